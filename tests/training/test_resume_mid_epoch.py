"""Fits that are broken off in mid-epoch, also by a kill."""

from __future__ import annotations

import copy
import inspect
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.support.compressing import compress
from tests.support.fitting import CUT_SHORT, QUIET, require_same_state
from tests.support.nets import TinyTask
from tests.support.optimizers import groups
from tests.support.resuming import IN_STEPS, Losses

pytestmark = [*QUIET, *CUT_SHORT]
slow = pytest.mark.slow


class Stateful:
    """A loader that shuffles by itself and knows where it is."""

    def __init__(self, loader) -> None:
        self.batches = list(loader)
        self.epoch, self.next = 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.next < len(self):
            self.next += 1
            yield self.batches[order[self.next - 1]]
        self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state) -> None:
        self.epoch, self.next = state["epoch"], state["next"]


MID = {
    "plain": {},
    "rounds": {"params": 0.5, "schedule": IN_STEPS},
    "distilled": {"distill": "layers", "schedule": {"warmup_steps": 4, "phases": [{"epochs": 1, "train": "factors"}]}},
}


@pytest.mark.parametrize("settings", MID.values(), ids=MID)
@pytest.mark.parametrize("step", [2, pytest.param(3, marks=slow)])
def test_resume_in_mid_epoch_with_a_stateful_loader_is_identical(make_trainer, loader, tmp_path, settings, step):
    task = TinyTask(groups)
    fresh = copy.deepcopy(task)
    losses = [Losses(), Losses()]
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(compress(**settings), losses[0], every, max_epochs=2).fit(task, Stateful(loader))
    path = tmp_path / f"step={step}.ckpt"
    trainer = make_trainer(compress(**settings), losses[1], max_epochs=2)
    trainer.fit(fresh, Stateful(loader), ckpt_path=path)
    assert losses[1].losses == losses[0].losses[step:]
    require_same_state(task, fresh)


@pytest.mark.skipif("weights_only" not in inspect.signature(L.Trainer.fit).parameters, reason="before Lightning 2.6")
def test_resume_without_pickled_code_across_a_round(make_trainer, loader, tmp_path):
    settings = {"params": 0.5, "schedule": IN_STEPS, "distill": "layers"}
    task = TinyTask(groups)
    fresh = copy.deepcopy(task)
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    make_trainer(compress(**settings), every, max_epochs=2).fit(task, loader)
    trainer = make_trainer(compress(**settings), max_epochs=2)
    trainer.fit(fresh, loader, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    require_same_state(task, fresh)


KILLED_AT = [1, 6, 7, 12, 18, 21, 24, 35, *(pytest.param(s, marks=pytest.mark.sweep) for s in (5, 11, 13, 23, 25, 30))]


def fit_in_a_process(folder, *more):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kill_resume", "--fit", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> str:
    return fit_in_a_process(tmp_path_factory.mktemp("whole")).stdout


@slow
@pytest.mark.parametrize("step", KILLED_AT)
def test_fit_with_rounds_killed_anywhere_resumes_to_the_same_weights(tmp_path, uninterrupted, step):
    done = fit_in_a_process(tmp_path, "--kill-at", str(step))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(uninterrupted.split()[-1]) == 64
    assert fit_in_a_process(tmp_path).stdout == uninterrupted

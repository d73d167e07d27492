"""Loggers that raise when they are told of a compression: module and optimizers are as they were before it."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import Plan
from lightning_compress.training.payload import CHECKPOINT_KEY
from tests.support.compressing import compress
from tests.support.fitting import CUT_SHORT, QUIET, factorised, held_by, planned, require_dense
from tests.support.loggers import MemoryLogger
from tests.support.nets import TinyTask
from tests.support.optimizers import Prebuilt, lbfgs, named_groups

pytestmark = [*QUIET, *CUT_SHORT]


class FullDisk(MemoryLogger):
    def __init__(self, name: str, time: int = 1, *, hyperparameters: bool = False) -> None:
        super().__init__()
        self.awaited, self.time, self.by_hyperparameters = name, time, hyperparameters

    def log_metrics(self, metrics, step=None) -> None:
        super().log_metrics(metrics, step)
        if not self.by_hyperparameters:
            self.count(metrics)

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        super().log_hyperparams(params)
        if self.by_hyperparameters:
            self.count(params)

    def count(self, given) -> None:
        self.time -= self.awaited in given
        if self.awaited in given and self.time == 0:
            msg = "No space left on device"
            raise OSError(msg)


def at_start() -> list[FullDisk]:
    return [FullDisk("compress/params"), FullDisk("compress", hyperparameters=True)]


@pytest.mark.parametrize("number", [0, 1], ids=["metrics", "hyperparameters"])
@pytest.mark.parametrize("settings", [{}, {"distill": {}, "schedule": {"warmup_steps": 3}}], ids=["plain", "more"])
@pytest.mark.parametrize("factorised_before", [False, True], ids=["new", "from a dense checkpoint"])
def test_a_logger_that_fails_when_a_fit_starts_leaves_all_dense(
    make_trainer, loader, tmp_path, unchanged, number, settings, factorised_before
):
    task, callback = Prebuilt(), compress(**settings)
    path = None
    if factorised_before:
        source = Prebuilt()
        make_trainer(max_epochs=1).fit(source, loader)
        path = tmp_path / "dense.ckpt"
        source._trainer.save_checkpoint(path)
        task.load_state_dict(source.state_dict())
    before, held = unchanged(task), held_by([task.optimizer])
    groups, names = copy.copy(task.optimizer.param_groups), list(task.optimizer.param_groups[0]["param_names"])
    with pytest.raises(OSError, match="No space left"):
        make_trainer(callback, logger=at_start()[number], max_epochs=2).fit(task, loader, ckpt_path=path)
    require_dense(task, before)
    assert held_by([task.optimizer]) == held == [id(p) for p in task.parameters()]
    assert task.optimizer.param_groups == groups
    assert task.optimizer.param_groups[0]["param_names"] == names
    assert callback.plan is None
    assert "training_step" not in task.__dict__
    make_trainer(callback, max_epochs=1).fit(task, loader)  # the same callback, a logger that works
    assert factorised(task)
    assert set(held_by([task.optimizer])) == {id(p) for p in task.parameters()}


ROUNDS = {"phases": [{"budget": {"params": 0.8}, "epochs": 1}, {"budget": {"params": 0.4}}]}


def states_of(trainer) -> list[tuple]:
    return [(state["state"], state["param_groups"]) for state in (o.state_dict() for o in trainer.optimizers)]


class Seen(Callback):
    """Keeps what there was before the epoch that fails."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.state = copy.deepcopy(pl_module.state_dict())
        self.modules = [(name, id(m)) for name, m in pl_module.named_modules()]
        self.optimizers = copy.deepcopy(states_of(trainer))
        self.held = held_by(trainer.optimizers)


FAILING_ROUNDS = {
    "phase": lambda: FullDisk("compress/phase"),
    "metrics": lambda: FullDisk("compress/params", 2),
    "hyperparameters": lambda: FullDisk("compress", 2, hyperparameters=True),
}


@pytest.mark.parametrize("make_logger", FAILING_ROUNDS.values(), ids=FAILING_ROUNDS)
@pytest.mark.parametrize("configure", [named_groups, lbfgs])
def test_a_logger_that_fails_when_a_round_starts_leaves_all_as_in_the_round_before(
    make_trainer, loader, tmp_path, make_logger, configure
):
    task, callback, seen = TinyTask(configure), compress(schedule=ROUNDS), Seen()
    trainer = make_trainer(callback, seen, logger=make_logger(), max_epochs=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(task, loader)
    assert [(name, id(m)) for name, m in task.named_modules()] == seen.modules
    assert all(torch.equal(value, seen.state[name]) for name, value in task.state_dict().items())
    assert held_by(trainer.optimizers) == seen.held
    assert [groups for _, groups in states_of(trainer)] == [groups for _, groups in seen.optimizers]
    states = [[state for state, _ in each] for each in (states_of(trainer), seen.optimizers)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert callback.plan.budget.params == 0.8
    assert callback._state.phases.state()["phase"] == 0


def test_a_fit_goes_on_from_what_was_saved_after_a_failed_round(make_trainer, loader, tmp_path):
    task = TinyTask(named_groups)
    fresh = copy.deepcopy(task)
    failing = make_trainer(
        compress(schedule=ROUNDS), ModelCheckpoint(tmp_path), logger=FullDisk("compress/params", 2), max_epochs=3
    )
    with pytest.raises(OSError, match="No space left"):
        failing.fit(task, loader)
    failing.save_checkpoint(tmp_path / "after.ckpt")
    held = torch.load(tmp_path / "after.ckpt", weights_only=True)[CHECKPOINT_KEY]
    assert held["schedule"]["phase"] == 0
    assert Plan.from_json(held["plan"]).budget.params == 0.8
    callback = compress(schedule=ROUNDS)
    make_trainer(callback, max_epochs=3).fit(fresh, loader, ckpt_path=tmp_path / "after.ckpt")
    assert callback.plan.budget.params == 0.4
    assert factorised(fresh) == planned(callback)

"""Checkpoints in every life, the first-batch check, and the ways to configure a trainer."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from lightning_compress import (
    CompressedCheckpointMixin,
    FactorisedLayer,
    apply_plan_,
    load_compressed_checkpoint,
)
from lightning_compress.core.errors import OrphanParameterError, ResumeError
from lightning_compress.training.checkpoint import CHECKPOINT_KEY
from lightning_compress.training.first_batch_check import FirstBatchCheck
from tests.support.compressing import compress
from tests.support.nets import TinyTask
from tests.support.resuming import (
    IN_STEPS,
    Losses,
    factorised,
    groups,
    lbfgs,
    momentum,
    require_same_optimizers,
    require_same_state,
    run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

# --- from a dense run ---------------------------------------------------------------------------------------


def dense_checkpoint(make_trainer, loader, tmp_path, task) -> Path:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    return tmp_path / "dense.ckpt"


class AtStart(Callback):
    # Optimizer states by parameter name before the first batch.
    def on_train_start(self, trainer, pl_module) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.states = [{names[id(p)]: copy.deepcopy(state) for p, state in o.state.items()} for o in trainer.optimizers]
        self.place = trainer.current_epoch, trainer.global_step
        self.weights = copy.deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("configure", [groups, momentum])
def test_fit_goes_on_from_a_dense_checkpoint(make_trainer, loader, tmp_path, configure):
    dense = TinyTask(configure)
    fresh = TinyTask(configure)
    path = dense_checkpoint(make_trainer, loader, tmp_path, dense)
    saved = dense._trainer.optimizers[0].state
    start, callback = AtStart(), compress()
    trainer = make_trainer(callback, start, max_epochs=3)
    trainer.fit(fresh, loader, ckpt_path=path)
    expected = copy.deepcopy(dense)
    apply_plan_(expected, callback.plan)
    assert all(torch.equal(v, start.weights[n]) for n, v in expected.state_dict().items())
    assert start.place == (1, 4)
    assert trainer.global_step == 12
    owners = {name for name, p in fresh.named_parameters()}
    by_name = {name: saved[p] for name, p in dense.named_parameters()}
    kept = {name.replace(".expand.bias", ".bias") for name in start.states[0]}
    assert kept <= set(by_name)
    assert {"net.norm.weight", "net.norm.bias", "net.fc1.bias"} <= kept
    assert set(start.states[0]) <= owners
    for name, state in start.states[0].items():
        torch.testing.assert_close(state, by_name[name.replace(".expand.bias", ".bias")], rtol=0, atol=0)


def test_dense_checkpoint_with_lbfgs_starts_its_history_anew(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(lbfgs))
    start = AtStart()
    make_trainer(compress(), start, max_epochs=2).fit(TinyTask(lbfgs), loader, ckpt_path=path)
    assert start.states == [{}]


@pytest.mark.filterwarnings("ignore:layer .* loses")  # of an untrained net one layer goes first
def test_dense_checkpoint_into_a_factorised_module_makes_it_dense_first(make_trainer, loader, tmp_path):
    dense = TinyTask(momentum)
    path = dense_checkpoint(make_trainer, loader, tmp_path, dense)
    task, fresh = TinyTask(momentum), TinyTask(momentum)
    make_trainer(compress(0.7)).fit(task, loader)
    for module in (task, fresh):
        make_trainer(compress(), max_epochs=2).fit(module, loader, ckpt_path=path)
    require_same_state(task, fresh)


def test_run_from_a_dense_checkpoint_resumes_identically(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(groups))
    settings = {"params": 0.5, "schedule": IN_STEPS}  # counted from where the compression began
    task, fresh = TinyTask(groups), TinyTask(groups)
    whole, losses = run(make_trainer, loader, task, compress(**settings), tmp_path / "a", ckpt_path=path, epochs=3)
    again, rest = run(
        make_trainer, loader, fresh, compress(**settings), tmp_path / "b", ckpt_path=tmp_path / "a" / "epoch=1.ckpt",
        epochs=3,
    )  # fmt: skip
    assert rest == losses[-4:]
    require_same_state(task, fresh)
    require_same_optimizers(whole, again)


def test_dense_checkpoint_of_other_optimizers_is_refused(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(groups))
    task = TinyTask(momentum)
    with pytest.raises(ResumeError, match=r"hold \[\[5, 6\]\] parameters by group.*\[\[11\]\]"):
        make_trainer(compress(), max_epochs=2).fit(task, loader, ckpt_path=path)
    assert not factorised(task)


# --- in mid-epoch -------------------------------------------------------------------------------------------


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
    "distilled": {"distill": "layers", "schedule": {"warmup_steps": 4, "freeze_epochs": 1}},
}


@pytest.mark.parametrize("settings", MID.values(), ids=MID)
@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.slow)])
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


# --- killed -------------------------------------------------------------------------------------------------


def killed(folder: Path, step: int) -> None:
    from benchmarks.kill_resume import fit

    assert folder.is_dir()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.kill_resume",
        "--fit",
        str(folder),
        "--kill-at",
        str(step),
    ]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    (folder / "whole").mkdir()
    assert fit(folder, None) == fit(folder / "whole", None)


@pytest.mark.slow
def test_killed_fit_with_rounds_resumes_to_the_same_weights(tmp_path):
    killed(tmp_path, 21)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [1, 6, 7, 12, 18, 24, 35, *(pytest.param(s, marks=pytest.mark.sweep) for s in (5, 11, 13, 23, 25, 30))]
)
def test_fit_killed_anywhere_resumes_to_the_same_weights(tmp_path, step):
    killed(tmp_path, step)


# --- loading without a trainer ------------------------------------------------------------------------------


class Sized(TinyTask):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net.fc1, self.net.fc2 = nn.Linear(16, width), nn.Linear(width, 4)


class Mixed(CompressedCheckpointMixin, Sized):
    pass


@pytest.fixture
def compressed(make_trainer, loader, tmp_path):
    def make(cls, *, weights_only=False):
        task = cls(24)
        trainer = make_trainer(compress())
        trainer.fit(task, loader)
        trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=weights_only)
        return task, tmp_path / "small.ckpt"

    return make


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_loads_by_the_mixin_and_by_the_helper(make_trainer, loader, tmp_path, compressed, weights_only):
    task, path = compressed(Mixed, weights_only=weights_only)
    for loaded in (Mixed.load_from_checkpoint(path), load_compressed_checkpoint(Mixed, path)):
        require_same_state(loaded, task)
        assert type(loaded) is Mixed
    plain, path = compressed(Sized, weights_only=weights_only)
    loaded = load_compressed_checkpoint(Sized, path, map_location="cpu")
    assert type(loaded) is Sized
    assert loaded.hparams.width == 24
    require_same_state(loaded, plain)


def test_loaded_modules_keep_their_plan_in_later_checkpoints(make_trainer, loader, tmp_path, compressed):
    _, path = compressed(Mixed)
    for number, loaded in enumerate((Mixed.load_from_checkpoint(path), load_compressed_checkpoint(Sized, path))):
        trainer = make_trainer()
        trainer.fit(loaded, loader)
        later = tmp_path / f"later{number}.ckpt"
        trainer.save_checkpoint(later)
        require_same_state(load_compressed_checkpoint(Sized, later), loaded)
        trainer.test(loaded, loader, ckpt_path=later, verbose=False)


def test_mixin_and_callback_go_together(make_trainer, loader, tmp_path, compressed):
    task, path = compressed(Mixed)
    fresh = Mixed(24)
    make_trainer(compress(), max_epochs=2).fit(fresh, loader, ckpt_path=path)
    make_trainer().test(Mixed(24), loader, ckpt_path=path, verbose=False)
    assert factorised(fresh) == factorised(task)


def test_dense_checkpoints_load_as_before(make_trainer, loader, tmp_path):
    task = Sized(24)
    path = dense_checkpoint(make_trainer, loader, tmp_path, task)
    for loaded in (Mixed.load_from_checkpoint(path), load_compressed_checkpoint(Sized, path)):
        require_same_state(loaded, task)


def test_plain_class_says_which_factors_it_does_not_know(compressed):
    _, path = compressed(Sized)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*net\.fc1\.reduce\.weight"):
        Sized.load_from_checkpoint(path)


def test_helper_refuses_checkpoints_of_other_versions(compressed):
    _, path = compressed(Sized)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CHECKPOINT_KEY]["version"] = 2
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match="has version 2, this library reads 1: update"):
        load_compressed_checkpoint(Sized, path)


# --- the first-batch check ---------------------------------------------------------------------------------------


class Unused(TinyTask):
    def __init__(self, configure=None) -> None:
        super().__init__(configure)
        self.spare = nn.Linear(32, 32)

    def forward(self, x):  # the training step does without the spare layer
        return self.net(x) + self.spare(torch.zeros(1, 32)).mean()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Cut(TinyTask):
    def forward(self, x):
        net = self.net
        with torch.no_grad():
            hidden = F.relu(net.conv2(F.relu(net.norm(net.conv1(x)))))
        return net.fc2(F.relu(net.fc1(F.relu(net.point(hidden)).mean(dim=(2, 3)))))


@pytest.mark.parametrize(("cls", "layer"), [(Unused, "spare"), (Cut, "net.conv2")], ids=["unused", "cut off"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_factors_without_a_gradient_are_named_after_the_first_batch(make_trainer, loader, cls, layer, accumulate):
    task, losses = cls(), Losses()
    task.example_input_array = None
    said = rf"no gradient reached .*'{re.escape(layer)}\.\w+\.weight'.*Exclude them, or"
    trainer = make_trainer(compress(0.9, include=layer), losses, accumulate_grad_batches=accumulate)
    with pytest.raises(OrphanParameterError, match=said):
        trainer.fit(task, loader)
    assert len(losses.losses) == 0
    assert not any(m._forward_pre_hooks for m in task.modules())


def test_factors_without_a_gradient_may_be_allowed_or_left_out(make_trainer, loader):
    make_trainer(compress(0.5, require_used=False)).fit(Unused(), loader)
    make_trainer(compress(0.7, exclude="spare")).fit(Unused(), loader)

    def without(task):
        return SGD(task.net.parameters(), lr=0.1)

    make_trainer(compress(0.5)).fit(Unused(without), loader)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_skipped_batches_do_not_count_as_the_first(make_trainer, loader):
    class Skips(TinyTask):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx > 1 else None

    make_trainer(compress()).fit(Skips(), loader)


def test_watch_takes_the_gradients_of_all_backward_passes_together():
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    watch = FirstBatchCheck([], {"a": first, "b": second})
    assert not watch.check()  # nothing had a gradient: not a batch at all
    first.grad = torch.ones(2)
    watch.look()
    first.grad, second.grad = None, torch.ones(2)
    assert watch.check()
    second.grad = None
    late = FirstBatchCheck([], {"a": first, "b": second})
    first.grad = torch.ones(2)
    with pytest.raises(OrphanParameterError, match="no gradient reached 'b' in the first batch"):
        late.check()


# --- LightningCLI and plain YAML ----------------------------------------------------------------------------

CLI_CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_compress.Compress
      init_args:
        budget: {params: 0.5}
        method: exact
        objective: weight
        heal: false
        exclude: [net.fc2]
        overrides: {net.fc1: {max_rank: 4}}
        distill: {kind: layers, weight: 0.3}
        schedule:
          phases:
            - {budget: {params: 0.8}, steps: 3, train: factors}
            - {budget: {params: 0.5}, warmup_steps: 2}
optimizer:
  class_path: torch.optim.Adam
  init_args: {lr: 0.01}
"""


class CliTask(TinyTask):
    """For LightningCLI, which gives it an optimizer."""

    def __init__(self) -> None:
        super().__init__()

    configure_optimizers = L.LightningModule.configure_optimizers


@pytest.mark.skipif(importlib.util.find_spec("jsonargparse") is None, reason="jsonargparse is not installed")
@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_with_an_optimizer_in_the_config(loader, tmp_path):
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(CLI_CONFIG)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader

    cli = LightningCLI(
        CliTask, Data, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None
    )
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "Compress"]
    assert callback.plan.budget.params == 0.5
    assert callback.plan.kept["params"] <= 0.5
    assert type(cli.trainer.optimizers[0]) is Adam
    own = {id(p) for p in cli.model.parameters()}
    assert {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]} == own
    assert not isinstance(cli.model.net.fc2, FactorisedLayer)
    assert callback.schedule.phases[0].train == "factors"
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert os.environ.get("PL_GLOBAL_SEED") == "0"

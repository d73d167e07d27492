"""Compress beside Lightning's other callbacks and features: averages, tuner, monitors, compilation, LightningCLI."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from packaging.version import Version
from torch.optim import SGD, Adam

from lightning_compress import FactorisedLayer, apply_plan_
from tests.support.compressing import WEIGHTS_ALONE, compress
from tests.support.fitting import QUIET, factorised, held_by, planned, require_same_state
from tests.support.nets import TinyTask
from tests.support.optimizers import momentum

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:  # before Lightning 2.6
    EMAWeightAveraging = None

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:layer 'net.conv2' loses 5:lightning_compress.core.errors.CompressionWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile looks
]


def ema():
    return EMAWeightAveraging(decay=0.5)


def swa():
    return StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)


AVERAGES = [
    pytest.param(ema, marks=pytest.mark.skipif(EMAWeightAveraging is None, reason="new in Lightning 2.6"), id="ema"),
    pytest.param(swa, id="swa"),
]


def ordered(make, first, callback=None):
    pair = [callback or compress(), make()]
    return pair if first else pair[::-1]


@pytest.mark.parametrize("make", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
def test_averages_are_those_of_a_fit_of_the_factorised_module(make_trainer, loader, make, first):
    task = TinyTask(momentum)
    plain, last = copy.deepcopy(task), copy.deepcopy(task)
    callback = compress()
    make_trainer(*ordered(make, first, callback), max_epochs=3).fit(task, loader, loader)
    apply_plan_(plain, callback.plan)
    apply_plan_(last, callback.plan)
    make_trainer(make(), max_epochs=3).fit(plain, loader, loader)
    require_same_state(task, plain)
    make_trainer(max_epochs=3).fit(last, loader, loader)
    assert not all(torch.equal(a, b) for a, b in zip(task.parameters(), last.parameters(), strict=True))


def rounds(epochs: int):
    return {"phases": [{"budget": {"params": params}, "epochs": epochs} for params in (0.7, 0.4)]}


@pytest.mark.parametrize("make", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="once"),
        pytest.param({"schedule": rounds(2)}, marks=pytest.mark.slow, id="rounds"),
        pytest.param({"schedule": rounds(2), "distill": {}}, marks=pytest.mark.slow, id="rounds-distilled"),
    ],
)
def test_a_fit_with_averages_resumes_identically(make_trainer, loader, tmp_path, make, first, settings):
    task = TinyTask(momentum)
    fresh, stopped = copy.deepcopy(task), copy.deepcopy(task)

    def fit(model, folder, **more):
        every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        make_trainer(*ordered(make, first, compress(**settings)), every, max_epochs=4).fit(
            model, loader, loader, **more
        )

    fit(task, tmp_path / "whole")
    fit(stopped, tmp_path / "first")
    # into the factorised module of the first run, and into a dense one, which a teacher needs
    for name in ("fresh",) if "distill" in settings else ("module", "fresh"):
        model = {"module": stopped, "fresh": fresh}[name]
        fit(model, tmp_path / name, ckpt_path=tmp_path / "first" / "epoch=2.ckpt")
        require_same_state(task, model)


@pytest.mark.parametrize("make", AVERAGES)
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside")
def test_a_checkpoint_with_averages_can_be_tested_in_a_fresh_trainer(make_trainer, loader, tmp_path, make):
    task = TinyTask(momentum)
    fresh = copy.deepcopy(task)
    trainer = make_trainer(*ordered(make, True), max_epochs=2)
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    path = tmp_path / "end.ckpt"
    expected = make_trainer().test(task, loader, verbose=False)
    assert make_trainer(*ordered(make, True)).test(fresh, loader, ckpt_path=path, verbose=False) == expected
    assert factorised(fresh) == factorised(task) != {}


# --- tuner, monitors, finetuning, summaries ------------------------------------------------------------


class Adjustable(TinyTask):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.01

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


def test_the_learning_rate_finder_leaves_the_module_dense_and_the_fit_compresses(make_trainer, loader):
    task, callback = Adjustable(), compress()
    dense = copy.deepcopy(task)
    trainer = make_trainer(callback, max_epochs=1)
    found = Tuner(trainer).lr_find(task, loader, num_training=8, early_stop_threshold=None)
    assert found is not None
    lr = task.lr
    require_same_state(dense, task)
    trainer.fit(task, loader)
    assert factorised(task) == planned(callback) != {}
    plain = copy.deepcopy(dense)
    plain.lr = lr
    apply_plan_(plain, callback.plan)
    make_trainer(max_epochs=1).fit(plain, loader)
    require_same_state(task, plain)


@pytest.mark.parametrize("settings", [{}, {"distill": {}}])
@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_as_a_callback(make_trainer, loader, first, settings):
    finder = functools.partial(LearningRateFinder, num_training_steps=8, early_stop_threshold=None)
    task, callback = Adjustable(), compress(**settings)
    plain = copy.deepcopy(task)
    trainer = make_trainer(*ordered(finder, first, callback), max_epochs=2)
    trainer.fit(task, loader)
    alone = make_trainer(finder(), max_epochs=2)
    alone.fit(copy.deepcopy(plain), loader)
    assert trainer.global_step == alone.global_step > 0  # Lightning 2.4 loses the steps of the first epoch
    assert factorised(task) == planned(callback) != {}
    assert callback.plan.layers == compress().plan_for(plain, torch.zeros(1, 3, 8, 8)).layers
    assert "configure_optimizers" not in task.__dict__


@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_monitor_sees_the_schedulers_rates(make_trainer, loader, tmp_path, first):
    def configure(task):
        optimizer = SGD(task.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    monitor, callback = LearningRateMonitor("epoch"), compress(schedule={"warmup_steps": 3})
    pair = ordered(lambda: monitor, first, callback)
    trainer = make_trainer(*pair, logger=CSVLogger(tmp_path), max_epochs=3, log_every_n_steps=1)
    trainer.fit(TinyTask(configure), loader)
    assert monitor.lrs == {"lr-SGD": [0.1, 0.05, 0.025]}


class UnfreezeLater(BaseFinetuning):
    def freeze_before_training(self, pl_module) -> None:
        self.freeze([pl_module.net.conv1, pl_module.net.conv2])

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group([pl_module.net.conv1, pl_module.net.conv2], optimizer, lr=0.01)


def trained_only(task):
    return SGD((p for p in task.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("first", [True, False])
def test_finetuning_callbacks_unfreeze_the_factors_and_resume(make_trainer, loader, tmp_path, first):
    task = TinyTask(trained_only)
    fresh, stopped = copy.deepcopy(task), copy.deepcopy(task)

    def fit(model, epochs, folder, **settings):
        every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(*ordered(UnfreezeLater, first), every, max_epochs=epochs)
        trainer.fit(model, loader, **settings)
        return trainer

    trainer = fit(task, 4, tmp_path / "whole")
    assert {n for n in factorised(task) if "conv" in n}
    assert set(held_by(trainer.optimizers)) == {id(p) for p in task.parameters()}
    start = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    first_epoch = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    frozen = [name for name, _ in task.named_parameters() if "conv2" in name]
    assert len(frozen) > 1
    for name in frozen:
        assert torch.equal(first_epoch[name], start[name])
        assert not torch.equal(task.get_parameter(name), start[name]), name
    fit(stopped, 2, tmp_path / "first")
    fit(fresh, 4, tmp_path / "again", ckpt_path=tmp_path / "first" / "epoch=1.ckpt")
    require_same_state(task, fresh)


def test_a_summary_after_the_fit_counts_the_factors_and_one_before_the_dense_layers(make_trainer, loader):
    task, callback = TinyTask(), compress()
    make_trainer(ModelSummary(max_depth=1), callback).fit(task, loader)
    assert L.pytorch.utilities.model_summary.summarize(task).total_parameters == callback.plan.compressed.params
    again, callback = TinyTask(), compress()
    seen = []

    class Seen(ModelSummary):
        def on_fit_start(self, trainer, pl_module) -> None:
            seen.append(self._summary(trainer, pl_module).total_parameters)

    make_trainer(callback, Seen()).fit(again, loader)
    assert seen == [callback.plan.compressed.params]


# --- compilation and precision -------------------------------------------------------------------------


LOGGED = pytest.mark.skipif(
    Version(L.__version__) < Version("2.5"), reason="self.log cannot be compiled, without Compress too"
)
COMPILED = [
    *((False, settings) for settings in ({}, {"distill": {"module": "net"}})),
    *(
        pytest.param(True, settings, marks=[pytest.mark.slow, LOGGED])
        for settings in ({}, {"distill": {"module": "net"}}, {"schedule": rounds(1)})
    ),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks on modules")
@pytest.mark.filterwarnings("ignore:torch._dynamo hit config.recompile_limit")
@pytest.mark.parametrize(("whole", "settings"), COMPILED)
def test_a_compiled_module_is_compressed_trained_and_resumed(make_trainer, loader, tmp_path, whole, settings):
    plain = TinyTask(momentum)
    task, fresh = copy.deepcopy(plain), copy.deepcopy(plain)

    def compiled(module):
        if whole:
            return torch.compile(module, backend="eager")
        module.net = torch.compile(module.net, backend="eager")
        return module

    callback, other = compress(**settings), compress(**settings)
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    make_trainer(callback, every, max_epochs=2).fit(compiled(task), loader)
    make_trainer(other, max_epochs=2).fit(plain, loader)
    prefix = "net." if whole else "net._orig_mod."
    assert [p.name for p in callback.plan.layers] == [p.name.replace("net.", prefix) for p in other.plan.layers]
    state = {name.replace("_orig_mod.", ""): value for name, value in task.state_dict().items()}
    torch.testing.assert_close(state, dict(plain.state_dict()))
    path = tmp_path / "epoch=0.ckpt"
    make_trainer(compress(**settings), max_epochs=2).fit(compiled(fresh), loader, ckpt_path=path)
    require_same_state(task, fresh)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", AVERAGES)
def test_averages_in_other_precisions(make_trainer, loader, make, precision):
    task, callback = TinyTask(momentum), compress(**WEIGHTS_ALONE)
    make_trainer(callback, make(), max_epochs=3, precision=precision).fit(task, loader)
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in task.parameters())


# --- LightningCLI -------------------------------------------------------------------------------------------

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
    assert set(held_by(cli.trainer.optimizers)) == {id(p) for p in cli.model.parameters()}
    assert not isinstance(cli.model.net.fc2, FactorisedLayer)
    assert callback.schedule.phases[0].train == "factors"
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert os.environ.get("PL_GLOBAL_SEED") == "0"

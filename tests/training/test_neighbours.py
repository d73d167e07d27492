"""Compress beside Lightning's other callbacks and features: averages, tuner, monitors, summaries, compilation."""

from __future__ import annotations

import copy
import io
import pickle

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
from torch import nn
from torch.optim import SGD

from lightning_compress import FactorisedLayer, apply_plan_
from tests.support.compressing import WEIGHTS_ALONE, compress
from tests.support.nets import TinyTask

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:  # before Lightning 2.6
    EMAWeightAveraging = None

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:layer 'net.conv2' loses 5:lightning_compress.core.errors.CompressionWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile looks
]


def momentum(task):
    return SGD(task.parameters(), lr=0.05, momentum=0.9)


def factorised(module) -> dict[str, tuple]:
    return {n: (m.kind, m.ranks) for n, m in module.named_modules() if isinstance(m, FactorisedLayer)}


def require_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


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
    require_same(task, plain)
    make_trainer(max_epochs=3).fit(last, loader, loader)
    assert not all(torch.equal(a, b) for a, b in zip(task.parameters(), last.parameters(), strict=True))


ROUNDS = {"phases": [{"budget": {"params": 0.7}, "epochs": 2}, {"budget": {"params": 0.4}, "epochs": 2}]}


@pytest.mark.parametrize("make", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="once"),
        pytest.param({"schedule": ROUNDS}, marks=pytest.mark.slow, id="rounds"),
        pytest.param({"schedule": ROUNDS, "distill": {}}, marks=pytest.mark.slow, id="rounds-distilled"),
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
        require_same(task, model)


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
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), task.state_dict().values(), strict=True))
    assert factorised(task) == {}
    trainer.fit(task, loader)
    assert factorised(task) == {p.name: (p.kind, p.ranks) for p in callback.plan.factorised} != {}
    plain = copy.deepcopy(dense)
    plain.lr = lr
    apply_plan_(plain, callback.plan)
    make_trainer(max_epochs=1).fit(plain, loader)
    require_same(task, plain)


@pytest.mark.parametrize("settings", [{}, {"distill": {}}])
@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_as_a_callback(make_trainer, loader, first, settings):
    finder, callback = LearningRateFinder(num_training_steps=8, early_stop_threshold=None), compress(**settings)
    task = Adjustable()
    plain = copy.deepcopy(task)
    trainer = make_trainer(*([callback, finder] if first else [finder, callback]), max_epochs=2)
    trainer.fit(task, loader)
    alone = make_trainer(LearningRateFinder(num_training_steps=8, early_stop_threshold=None), max_epochs=2)
    alone.fit(copy.deepcopy(plain), loader)
    assert trainer.global_step == alone.global_step > 0  # Lightning 2.4 loses the steps of the first epoch
    assert factorised(task) == {p.name: (p.kind, p.ranks) for p in callback.plan.factorised} != {}
    assert callback.plan.layers == compress().plan_for(plain, torch.zeros(1, 3, 8, 8)).layers
    assert "configure_optimizers" not in task.__dict__


@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_monitor_sees_the_schedulers_rates(make_trainer, loader, tmp_path, first):
    def configure(task):
        optimizer = SGD(task.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    monitor, callback = LearningRateMonitor("epoch"), compress(schedule={"warmup_steps": 3})
    pair = [callback, monitor] if first else [monitor, callback]
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
        pair = [compress(), UnfreezeLater()]
        every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(*(pair if first else pair[::-1]), every, max_epochs=epochs)
        trainer.fit(model, loader, **settings)
        return trainer

    trainer = fit(task, 4, tmp_path / "whole")
    assert {n for n in factorised(task) if "conv" in n}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in task.parameters()}
    start = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    first_epoch = torch.load(tmp_path / "whole" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    frozen = [name for name, _ in task.named_parameters() if "conv2" in name]
    assert len(frozen) > 1
    for name in frozen:
        assert torch.equal(first_epoch[name], start[name])
        assert not torch.equal(task.get_parameter(name), start[name]), name
    fit(stopped, 2, tmp_path / "first")
    fit(fresh, 4, tmp_path / "again", ckpt_path=tmp_path / "first" / "epoch=1.ckpt")
    require_same(task, fresh)


def test_a_summary_after_the_fit_counts_the_factors_and_one_before_the_dense_layers(make_trainer, loader):
    task, callback, summary = TinyTask(), compress(), ModelSummary(max_depth=1)
    trainer = make_trainer(summary, callback)
    trainer.fit(task, loader)
    assert L.pytorch.utilities.model_summary.summarize(task).total_parameters == callback.plan.compressed.params
    again, callback = TinyTask(), compress()
    seen = []

    class Seen(ModelSummary):
        def on_fit_start(self, trainer, pl_module) -> None:
            seen.append(self._summary(trainer, pl_module).total_parameters)

    make_trainer(callback, Seen()).fit(again, loader)
    assert seen == [callback.plan.compressed.params]


# --- the module afterwards ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_module_lives_on_its_own(make_trainer, loader, tmp_path, copied):
    task = TinyTask()
    trainer = make_trainer(compress(distill={}))
    trainer.fit(task, loader)
    other = copied(task)
    require_same(task, other)
    before = copy.deepcopy(task.state_dict())
    make_trainer(compress()).fit(other, loader)  # only fine-tunes
    assert factorised(other) == factorised(task)
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    trainer = make_trainer()
    trainer.strategy.connect(other)
    trainer.save_checkpoint(tmp_path / "copy.ckpt")  # the shadowed hooks are the copy's own
    saved = torch.load(tmp_path / "copy.ckpt", weights_only=True)
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in other.state_dict().items())
    assert "lightning_compress" in saved
    torch.save(other, buffer := io.BytesIO())
    buffer.seek(0)
    require_same(other, torch.load(buffer, weights_only=False))


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks on modules")
@pytest.mark.parametrize("settings", [{}, {"distill": {"module": "net"}}])
def test_a_compiled_submodule_is_compressed_trained_and_resumed(make_trainer, loader, tmp_path, settings):
    plain = TinyTask(momentum)
    task = copy.deepcopy(plain)
    task.net = torch.compile(task.net, backend="eager")
    fresh = copy.deepcopy(plain)
    fresh.net = torch.compile(fresh.net, backend="eager")
    callback, other = compress(**settings), compress(**settings)
    every = ModelCheckpoint(tmp_path / "a", filename="{epoch}", save_top_k=-1)
    make_trainer(callback, every, max_epochs=2).fit(task, loader)
    make_trainer(other, max_epochs=2).fit(plain, loader)
    assert [p.name for p in callback.plan.layers] == [
        p.name.replace("net.", "net._orig_mod.") for p in other.plan.layers
    ]
    compiled = {name.replace("_orig_mod.", ""): value for name, value in task.state_dict().items()}
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled[name], value)
    make_trainer(compress(**settings), max_epochs=2).fit(fresh, loader, ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    require_same(task, fresh)


@pytest.mark.slow
@pytest.mark.skipif(Version(L.__version__) < Version("2.5"), reason="self.log cannot be compiled, without Compress too")
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks on modules")
@pytest.mark.filterwarnings("ignore:torch._dynamo hit config.recompile_limit")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distill": {"module": "net"}},
        {"schedule": {"phases": [{"budget": {"params": 0.7}, "epochs": 1}, {"budget": {"params": 0.4}, "epochs": 1}]}},
    ],
    ids=["plain", "distillation", "rounds"],
)
def test_a_compiled_lightning_module_is_compressed_trained_and_resumed(make_trainer, loader, tmp_path, settings):
    plain = TinyTask(momentum)
    task, fresh = copy.deepcopy(plain), copy.deepcopy(plain)
    every = ModelCheckpoint(tmp_path / "a", filename="{epoch}", save_top_k=-1)
    make_trainer(compress(**settings), every, max_epochs=2).fit(torch.compile(task, backend="eager"), loader)
    make_trainer(compress(**settings), max_epochs=2).fit(plain, loader)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], value)
    again = torch.compile(fresh, backend="eager")
    make_trainer(compress(**settings), max_epochs=2).fit(again, loader, ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    require_same(task, fresh)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", AVERAGES)
def test_averages_in_other_precisions(make_trainer, loader, make, precision):
    task, callback = TinyTask(momentum), compress(**WEIGHTS_ALONE)
    make_trainer(callback, make(), max_epochs=3, precision=precision).fit(task, loader)
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in task.parameters())

"""Averages that callbacks of others keep: one that could not follow is refused before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel

from lightning_compress.core.errors import UnsupportedError
from tests.support.compressing import compress
from tests.support.fitting import CUT_SHORT, QUIET, factorised, require_dense
from tests.support.nets import TinyTask
from tests.support.resuming import first_epoch

pytestmark = [*QUIET, *CUT_SHORT]


class Ema(Callback):
    """As people write it: a copy, and its parameters paired with the module's by position."""

    def __init__(self, at: str) -> None:
        self.at = at

    def make(self, pl_module) -> None:
        self.copy = copy.deepcopy(pl_module)

    def setup(self, trainer, pl_module, stage) -> None:
        if self.at == "setup":
            self.make(pl_module)

    def on_fit_start(self, trainer, pl_module) -> None:
        if self.at == "on_fit_start":
            self.make(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.update(pl_module)

    @torch.no_grad()
    def update(self, pl_module) -> None:
        for mean, parameter in zip(self.copy.parameters(), pl_module.parameters(), strict=True):
            mean.lerp_(parameter, 0.5)


class ByName(Ema):
    """Keeps tensors by name."""

    def make(self, pl_module) -> None:
        self.tensors = {name: p.detach().clone() for name, p in pl_module.net.named_parameters()}

    @torch.no_grad()
    def update(self, pl_module) -> None:
        for name, parameter in pl_module.net.named_parameters():
            self.tensors[name].lerp_(parameter, 0.5)


class InAnObject(Ema):
    """Hands the work to an object, as timm's ModelEma is one."""

    def make(self, pl_module) -> None:
        self.model_ema = type("ModelEma", (), {})()
        self.model_ema.module = copy.deepcopy(pl_module)
        self.copy = None

    def update(self, pl_module) -> None:
        self.copy = self.model_ema.module
        super().update(pl_module)
        self.copy = None


class Smoothing(Ema):
    """By torch's own class, under no telling name."""

    def make(self, pl_module) -> None:
        self.held = AveragedModel(pl_module.net)

    def update(self, pl_module) -> None:
        self.held.update_parameters(pl_module.net)


KINDS = {Ema: "copy", ByName: "tensors", InAnObject: "model_ema", Smoothing: "held"}


def said(kind) -> str:
    return (
        rf"the callback {kind.__name__} keeps an average in its attribute '{KINDS[kind]}'.*List {kind.__name__} after "
        r"Compress, and let it make its copy in on_fit_start.*or use WeightAveraging"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["setup", "on_fit_start"])
def test_an_average_made_before_the_compression_is_refused(make_trainer, loader, unchanged, kind, at):
    task, callback = TinyTask(), compress()
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=said(kind)):
        make_trainer(kind(at), callback).fit(task, loader)
    require_dense(task, before)
    assert callback.plan is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_made_before_a_checkpoint_was_loaded_is_refused_too(make_trainer, loader, tmp_path, unchanged, kind):
    path = first_epoch(make_trainer, loader, tmp_path, TinyTask(), compress())
    task = TinyTask()
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=said(kind)):
        make_trainer(kind("setup"), compress(), max_epochs=2).fit(task, loader, ckpt_path=path)
    require_dense(task, before)


@pytest.mark.parametrize("kind", KINDS)
def test_one_made_afterwards_works(make_trainer, loader, tmp_path, kind):
    task = TinyTask()
    make_trainer(compress(), kind("on_fit_start")).fit(task, loader)
    path = first_epoch(make_trainer, loader, tmp_path, TinyTask(), compress())
    for callbacks in ([compress(), kind("on_fit_start")], [kind("on_fit_start"), compress()]):
        task = TinyTask()
        make_trainer(*callbacks, max_epochs=2).fit(task, loader, ckpt_path=path)
        assert factorised(task)


def test_one_that_cannot_follow_a_round_is_refused_before_it(make_trainer, loader):
    task = TinyTask()
    schedule = {"phases": [{"budget": {"params": 0.8}, "epochs": 1}, {"budget": {"params": 0.4}}]}
    callback = compress(schedule=schedule)
    with pytest.raises(UnsupportedError, match=said(Ema)):
        make_trainer(callback, Ema("on_fit_start"), max_epochs=2).fit(task, loader)
    assert callback.plan.budget.params == 0.8
    assert factorised(task)


class Teacher(Callback):
    """Keeps a copy for another purpose."""

    def setup(self, trainer, pl_module, stage) -> None:
        self.teacher = copy.deepcopy(pl_module)


def test_copies_for_other_purposes_are_none_of_our_business(make_trainer, loader):
    task = TinyTask()
    make_trainer(Teacher(), compress()).fit(task, loader)
    assert factorised(task)

"""Whether the layers that were replaced are those that the first batch runs and trains."""

from __future__ import annotations

import re

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.core.errors import ForwardMismatchError, OrphanParameterError
from lightning_compress.training.first_batch_check import FirstBatchCheck
from lightning_compress.training.running_fit import RunningFit
from tests.support.compressing import compress
from tests.support.fitting import QUIET, planned
from tests.support.nets import TinyTask
from tests.support.resuming import Losses

pytestmark = QUIET


class Listed(L.LightningModule):
    def __init__(self, container=list) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.layers = container([self.first, self.second])
        self.batches = 0

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OneListed(Listed):
    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.layers[0](x)))))


@pytest.fixture
def rows() -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(16, 24, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


@pytest.fixture
def no_example(monkeypatch) -> None:
    """No example input is found, on which the swap would be checked."""
    monkeypatch.setattr(RunningFit, "example_input", lambda *_, **__: None)


LISTED = pytest.mark.parametrize(("cls", "named"), [(Listed, "'first', 'second'"), (OneListed, "'first'")])
HEAD_DENSE = {"overrides": {"head": "dense"}}


@LISTED
def test_layers_held_in_a_plain_list_are_an_error_before_the_fit(make_trainer, rows, cls, named):
    task = cls()
    dense = task.first, task.second
    with pytest.raises(ForwardMismatchError, match=rf"still runs the dense module of {named}: something outside"):
        make_trainer(compress(0.5, **HEAD_DENSE)).fit(task, rows)
    assert task.batches == 0
    assert (task.first, task.second) == dense
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


@pytest.mark.usefixtures("no_example")
@pytest.mark.parametrize("settings", [{}, {"distill": {}, "schedule": {"warmup_steps": 3}}])
@LISTED
def test_layers_held_in_a_plain_list_are_an_error_after_the_first_batch(make_trainer, rows, cls, named, settings):
    task = cls()
    dense = task.first, task.second
    said = rf"still runs the dense module of {named}: something outside.*\(nn\.ModuleList\) or exclude it"
    with pytest.raises(OrphanParameterError, match=said):
        make_trainer(compress(0.5, **HEAD_DENSE, **settings)).fit(task, rows)
    assert task.batches == 1
    assert not any(layer._forward_pre_hooks for layer in dense)
    assert not task._forward_hooks
    assert "training_step" not in task.__dict__


def test_listed_layers_in_a_module_list_or_excluded_are_fine(make_trainer, rows):
    registered, callback = Listed(nn.ModuleList), compress(0.6)
    make_trainer(callback).fit(registered, rows)
    assert set(planned(callback)) >= {"first", "second"}
    assert registered.layers[0] is registered.first
    excluded, callback = Listed(), compress(0.95, include="head")
    make_trainer(callback).fit(excluded, rows)
    assert list(planned(callback)) == ["head"]
    assert excluded.batches == 4


def test_forward_hooks_of_replaced_layers_keep_working(make_trainer, loader):
    task = TinyTask()
    seen = []
    handle = task.net.fc1.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    callback = compress()
    make_trainer(callback).fit(task, loader)
    assert "net.fc1" in planned(callback)
    assert seen[-4:] == ["FactorisedLayer"] * 4
    handle.remove()
    calls = len(seen)
    task(torch.zeros(1, 3, 8, 8))
    assert len(seen) == calls


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

"""Networks inside a model that are not the model: metrics and frozen ones."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_compress import Budget, compress_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import PlanMismatchError
from lightning_compress.surgery.swap import apply_plan_
from lightning_compress.training.running_fit import RunningFit
from tests.support.compressing import WEIGHTS_ALONE, compress
from tests.support.fitting import QUIET, planned
from tests.support.nets import TinyNet, TinyTask

pytestmark = QUIET


class Quality(torchmetrics.Metric):
    """A metric by a network of its own, with one weight for two layers."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
        self.network[1].weight = self.network[0].weight
        self.add_state("total", torch.zeros(()))

    def update(self, x):
        self.total += self.network(x).sum()

    def compute(self):
        return self.total


class Measured(TinyNet):
    def __init__(self, metric):
        super().__init__()
        self.metrics = metric


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torchmetrics.MetricCollection({"quality": m})])
@pytest.mark.parametrize("example", [None, (1, 3, 8, 8)])
def test_networks_of_metrics_are_left_alone(wrap, example):
    model = Measured(wrap(Quality()))
    state = {name: value.clone() for name, value in model.metrics.named_parameters()}
    plan = compress_(model, Budget(params=0.7), example_input=example, method="exact", **WEIGHTS_ALONE)
    own = [p for p in plan.layers if p.name.startswith("metrics.")]
    assert own
    assert all(p.is_dense and "is part of the metric 'metrics" in p.reason and "(Quality)" in p.reason for p in own)
    assert all("counts in the budget" in p.reason for p in own)
    assert plan.dense.params == sum(p.numel() for p in TinyNet().parameters()) + 24 * 24 + 48
    assert all(torch.equal(value, state[name]) for name, value in model.metrics.named_parameters())


def test_a_plan_of_a_network_that_became_a_metrics_is_refused():
    class Other(TinyNet):
        def __init__(self):
            super().__init__()
            self.metrics = nn.Module()
            self.metrics.network = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

    plan = search_ranks(Other(), Budget(params=0.5), objective="weight", method="exact")
    with pytest.raises(PlanMismatchError, match=r"'metrics\.network\.0' cannot be factorised: it is part of the"):
        apply_plan_(Measured(Quality()), plan)


# --- frozen networks


def with_teacher():
    model = TinyNet()
    model.teacher = nn.Sequential(nn.Linear(24, 24), nn.Sequential(nn.Linear(24, 24))).requires_grad_(False)
    return model


def reasons(model, **settings):
    return {layer.name: layer.reason for layer in take_inventory(model, **settings)}


def test_frozen_networks_are_spared_where_asked_for_unless_included_by_name():
    model = with_teacher()
    assert set(reasons(model).values()) == {None, "no kind factorises BatchNorm2d"}
    spared = reasons(model, spare_frozen=True)
    assert all("no parameter of 'teacher' is trained" in spared[f"teacher.{name}"] for name in ("0", "1.0"))
    assert "counts in the budget" in spared["teacher.0"]
    assert spared["fc1"] is None
    named = reasons(model, spare_frozen=True, include=["fc1", "teacher.0"])
    assert named["teacher.0"] is None
    assert named["teacher.1.0"] == "not matched by include"


def test_a_model_that_is_frozen_as_a_whole_is_compressed():
    model = TinyNet().requires_grad_(False)
    assert reasons(model, spare_frozen=True) == reasons(model)


def test_one_frozen_layer_or_parameter_makes_no_frozen_network():
    model = TinyNet()
    model.fc1.weight.requires_grad_(False)
    model.conv2.requires_grad_(False)
    assert reasons(model, spare_frozen=True) == reasons(model)


class Distilled(TinyTask):
    def __init__(self):
        super().__init__(lambda task: torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1))
        self.teacher = TinyNet().requires_grad_(False)
        self.example_input_array = None


@pytest.fixture(params=[True, False], ids=["example", "no example"])
def example(request, monkeypatch) -> bool:
    """Whether an example input is found, on which the teacher is not called."""
    if not request.param:
        monkeypatch.setattr(RunningFit, "example_input", lambda *_, **__: None)
    return request.param


def test_a_fit_leaves_a_frozen_teacher_alone(make_trainer, loader, example):
    task, callback = Distilled(), compress(0.8)
    state = {name: value.clone() for name, value in task.teacher.named_parameters()}
    make_trainer(callback).fit(task, loader)
    assert planned(callback)
    assert not any(name.startswith("teacher") for name in planned(callback))
    assert all(torch.equal(value, state[name]) for name, value in task.teacher.named_parameters())
    (reason,) = {p.reason for p in callback.plan.layers if p.name == "teacher.fc1"}
    assert ("it is not called" if example else "no parameter of 'teacher' is trained") in reason
    assert not any(p.name.startswith("teacher") for p in callback.plan_for(Distilled()).factorised)


@pytest.mark.parametrize("example", [False], indirect=True)
@pytest.mark.usefixtures("example")
def test_a_fit_factorises_a_frozen_teacher_that_is_named(make_trainer, loader):
    callback = compress(0.8, include=["teacher.*"])
    make_trainer(callback).fit(Distilled(), loader)
    assert planned(callback)
    assert all(name.startswith("teacher.") for name in planned(callback))


class Backboned(TinyTask):
    def __init__(self):
        super().__init__(lambda task: torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1))
        self.backbone = self.net


def test_what_a_callback_unfreezes_later_is_no_frozen_network(make_trainer, loader):
    callback = compress(0.6)
    make_trainer(BackboneFinetuning(unfreeze_backbone_at_epoch=5), callback).fit(Backboned(), loader)
    assert planned(callback)

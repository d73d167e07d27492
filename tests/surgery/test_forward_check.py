"""The model is run once before and once after the swap: models whose code looks at its layers are not swapped."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, FactorisedLayer, apply_plan_, compress_, search_ranks
from lightning_compress.core.errors import CompressionWarning, ForwardMismatchError, InfeasibleBudgetError
from lightning_compress.surgery.forward_check import ForwardCheck
from lightning_compress.surgery.swap import apply_checked_
from tests.support.architectures import CASES
from tests.support.compressing import CLOSED_FORM, WEIGHTS_ALONE
from tests.support.nets import SHAPE, InMode, TinyNet

ROW = (1, 24)
QUICK = {**WEIGHTS_ALONE, "method": "exact", "kinds": CLOSED_FORM, "target": None}


class Chain(nn.Module):
    def __init__(self, layers=nn.ModuleList):
        super().__init__()
        self.layers = layers(nn.Linear(24, 24) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.run(x)

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ActsBehindLinear(Chain):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = torch.relu(x)
        return x


class ActsBehindTheLast(Chain):
    """Only what follows the last layer differs."""

    def run(self, x):
        x = super().run(x)
        return torch.relu(x) if isinstance(self.layers[-1], nn.Linear) else x


class SkipsOthers(Chain):
    def run(self, x):
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Linear) else x
        return x


class ReturnsOfLinear(Chain):
    def run(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            found += [x] if isinstance(layer, nn.Linear) else []
        return {"all": found, "last": x}


class AsksForAttributes(Chain):
    def run(self, x):
        x = super().run(x)
        return x + self.layers[0].weight_scale if type(self.layers[0]) is not nn.Linear else x


class InPrecisionOfLinear(Chain):
    def run(self, x):
        x = super().run(x)
        return x if isinstance(self.layers[2], nn.Linear) else x.double()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = F.relu(x) if isinstance(layer, nn.Conv2d) else x
        return x


LOOKING = {
    "acts behind nn.Linear": (
        ActsBehindLinear,
        ROW,
        r"outputs differ by .*behind 'layers.0'.*enters 'layers.1' differs",
    ),
    "acts behind the last": (ActsBehindTheLast, ROW, "behind 'layers.2', which was replaced, what follows the last"),
    "acts behind nn.Conv2d": (
        Convolutions,
        (1, 3, 8, 8),
        r"outputs differ by .*behind 'layers\.\d', which was replaced",
    ),
    "skips what is no nn.Linear": (SkipsOthers, ROW, "it calls no further layer in the place of 'layers.0'"),
    "returns what nn.Linear makes": (ReturnsOfLinear, ROW, r"returns torch.float32 \(1, 24\) where it returned torch"),
    "asks for an attribute": (
        AsksForAttributes,
        ROW,
        "after the swap the model fails on .*no attribute 'weight_scale'",
    ),
    "in another precision": (
        InPrecisionOfLinear,
        ROW,
        r"returns torch.float64 \(1, 24\) where it returned torch.float32",
    ),
}


def enter(model, example, entrance):
    if entrance == "compress_":
        return compress_(model, Budget(params=0.5), example_input=example, **QUICK)
    plan = search_ranks(model, Budget(params=0.5), method="exact", objective="weight")
    return apply_plan_(model, plan, example_input=example)


@pytest.mark.parametrize("which", LOOKING)
@pytest.mark.parametrize("entrance", ["compress_", "apply_plan_"])
def test_code_that_looks_at_its_layers_is_an_error_and_the_swap_undone(unchanged, which, entrance):
    make, example, said = LOOKING[which]
    model = make()
    before = unchanged(model)
    with pytest.raises(ForwardMismatchError, match=f"(?s){said}.*isinstance") as error:
        enter(model, example, entrance)
    assert "exclude" in str(error.value)
    before.check()


def test_without_an_example_input_nothing_is_run():
    model = ActsBehindLinear()
    compress_(model, Budget(params=0.5), **QUICK)
    assert model.calls == 0


class Pyramid(nn.Module):
    """Its layers are registered one by one and held in a list, as those of detectron2's."""

    def __init__(self):
        super().__init__()
        self.lateral = []
        for index in range(3):
            layer = nn.Conv2d(16, 16, 3, padding=1)
            self.add_module(f"lateral{index}", layer)
            self.lateral.append(layer)

    def forward(self, x):
        return sum(layer(x) for layer in self.lateral)


def test_layers_held_in_a_plain_list_are_named(unchanged):
    model = Pyramid()
    before = unchanged(model)
    said = "runs the dense module of 'lateral0', 'lateral1', 'lateral2': something outside the module tree"
    with pytest.raises(ForwardMismatchError, match=said):
        compress_(model, Budget(params=0.5), example_input=(1, 16, 8, 8), **QUICK)
    before.check()


class Nested(nn.Module):
    """Runs the parts of what is an nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.Sequential(nn.Linear(24, 24), nn.ReLU())])

    def forward(self, x):
        found = []
        for layer in self.layers:
            for part in layer if isinstance(layer, nn.Sequential) else [layer]:
                x = part(x)
                found.append(x)
        return found


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(24, 24, batch_first=True), nn.Linear(24, 24), nn.Linear(24, 24)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0] if isinstance(layer, nn.LSTM) else layer(x)
        return x


def test_parts_of_a_sequential_are_not_factors():
    model = Nested()
    compress_(model, Budget(params=0.5), example_input=ROW, **QUICK)
    assert len(model(torch.zeros(ROW))) == 3


@pytest.mark.parametrize("settings", [QUICK, {"method": "exact", "target": None}], ids=["weights alone", "with inputs"])
def test_recurrent_layers_stay_as_they_are_where_code_asks_for_their_class(settings):
    model = Recurrent()
    with pytest.warns(CompressionWarning, match=r"layers \('layers.0'\) stay as they are.*isinstance"):
        plan = compress_(model, Budget(params=0.9), example_input=(1, 5, 24), **settings)
    assert type(model.layers[0]) is nn.LSTM
    assert {p.name: p.reason for p in plan.layers}["layers.0"] == (
        "it cannot be unfused: the model's code asks for its class"
    )
    assert any(isinstance(m, FactorisedLayer) for m in model.modules())
    assert model(torch.zeros(1, 5, 24)).shape == (1, 5, 24)


@pytest.mark.parametrize("which", CASES)
def test_networks_in_the_style_of_what_people_bring_pass(which):
    case = CASES[which]
    model = case.make()
    plan = search_ranks(
        model, Budget(params=0.6), example_input=case.example, method="exact", target=None, objective="weight"
    )
    assert apply_plan_(model, plan, example_input=case.example)
    check = ForwardCheck.of(model, case.example)
    assert check.dense.macs == plan.compressed.macs


def test_two_passes_are_enough_and_leave_the_model_alone(unchanged):
    model = Chain()
    plan = search_ranks(model, Budget(params=0.5), method="exact", objective="weight")
    plain = Chain()
    plain.load_state_dict(model.state_dict())
    apply_plan_(plain, plan)
    calls, state = model.calls, torch.get_rng_state()
    apply_plan_(model, plan, example_input=ROW)
    assert model.calls == calls + 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_shells_are_checked_as_factors_are(unchanged):
    for make in (Chain, ActsBehindLinear):
        model = make()
        plan = search_ranks(model, Budget(params=0.5), method="exact", objective="weight")
        before = unchanged(model)
        if make is Chain:
            replacements, _ = apply_checked_(model, plan, example_input=ROW, decompose=False)
            assert not any(bool(f.any()) for r in replacements for f in r.factorised.factors().values())
        else:
            with pytest.raises(ForwardMismatchError):
                apply_checked_(model, plan, example_input=ROW, decompose=False)
            before.check()


def test_hooks_of_the_user_run_on_what_the_layers_hand_on():
    model = Chain()
    model.layers[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    compress_(model, Budget(params=0.5), example_input=ROW, **QUICK)
    x = torch.randn(ROW)
    doubled = model(x)
    model.layers[1]._forward_hooks.clear()
    assert not torch.allclose(doubled, model(x))


class Random(Chain):
    """Random in eval mode by torch's generator, or by another one that cannot be seeded for it."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def run(self, x):
        return super().run(x) * self.draw()


@pytest.mark.parametrize("draw", [lambda: 1 + torch.rand(()), lambda: 1 + random.random()], ids=["torch", "python"])
def test_models_that_are_random_in_eval_mode_pass(draw):
    model = Random(draw)
    compress_(model, Budget(params=0.5), example_input=ROW, **QUICK)
    assert any(isinstance(m, FactorisedLayer) for m in model.modules())


def test_outputs_that_are_not_finite_pass():
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), InMode(nn.Identity(), torch.no_grad))
    model[2].register_forward_hook(lambda _m, _args, output: output / 0)
    compress_(model, Budget(params=0.5), example_input=ROW, **QUICK)


# --- multiply-accumulates as they run -------------------------------------------------------------------------------


class ReadsTheWeight(Chain):
    """Of a factorised layer alone, and for nothing."""

    def run(self, x):
        if isinstance(self.layers[0], FactorisedLayer):
            F.linear(x, self.layers[0].weight)
        return super().run(x)


def plan_of(model, **budget):
    return search_ranks(model, Budget(**budget), example_input=ROW, method="exact", objective="weight", target=None)


def test_macs_are_those_that_really_run_and_the_layers_are_named():
    model = ReadsTheWeight()
    plan = plan_of(model, params=0.5)
    said = (
        r"the plan has 4\d\.\d %; the weights of 'layers\.0' are read outside their own layers\. The plan is corrected"
    )
    with pytest.warns(CompressionWarning, match=said):
        replacements, corrected = apply_checked_(model, plan, example_input=ROW)
    assert replacements[0].factorised is model.layers[0]
    assert corrected.compressed.macs == plan.compressed.macs + 24 * 24
    assert corrected.compressed.params == plan.compressed.params


def test_a_budget_of_macs_that_is_missed_is_an_error(unchanged):
    model = ReadsTheWeight()
    plan = plan_of(model, macs=0.6)
    before = unchanged(model)
    with pytest.raises(InfeasibleBudgetError, match=r"'layers\.0' are read .*That misses macs <= 60 %: exclude these"):
        apply_plan_(model, plan, example_input=ROW)
    before.check()
    with pytest.raises(InfeasibleBudgetError):
        compress_(model, Budget(macs=0.6), example_input=ROW, **QUICK)
    before.check()


def test_plans_of_other_inputs_are_not_corrected(net):
    plan = search_ranks(net, Budget(params=0.5), example_input=SHAPE, method="exact", objective="weight", target=None)
    other = TinyNet()
    apply_plan_(other, plan, example_input=(1, 3, 16, 16))

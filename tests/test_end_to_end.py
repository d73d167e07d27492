"""The search with the outputs in its loss, the metric of the outputs, quality targets and calibration."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_compress import Budget, Compress, FactorisedLayer, Plan, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import PROBES, Statistics, gather_statistics, output_moments
from lightning_compress.analysis.synthetic import WORK
from lightning_compress.core.errors import BudgetError, CompressionWarning, ConfigurationError, ExampleInputError
from lightning_compress.kinds.metric import OUTPUT_FLOOR, Metric
from lightning_compress.kinds.registry import (
    DECOMPOSITIONS,
    Operator,
    factorise_in,
    gated_weight,
    profile_in,
    weighted_energy,
)
from lightning_compress.search.api import BISECTIONS
from lightning_compress.search.candidates import tabulate
from lightning_compress.search.end_to_end import (
    GROUP,
    INPUTS,
    LEAST_INPUTS,
    LEAST_TEMPERATURE,
    STEPS,
    Outputs,
    _gates,
    _gradient_of_log_distance,
    affordable_inputs,
)
from lightning_compress.search.exact import solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.refine import refined
from tests.conftest import InMode, TinyTask, Unchanged
from tests.test_statistics import SHAPE, trained_like

VECTOR = (1, 6)
KIND_SHAPES = {
    "svd": (12, 7),
    "channel_svd": (8, 6, 3, 3),
    "spatial_svd": (8, 6, 3, 2),
    "tucker2": (8, 6, 3, 3),
    "split2_svd": (8, 6, 3, 3),
    "split4_svd": (8, 8, 3, 3),
    "tt": (8, 6, 3, 3),
    "cp": (8, 6, 3, 3),
    "cp3": (8, 6, 3, 3),
}
"""One shape for every kind but that of embeddings, which have no inputs to have moments."""

GATED = ("svd", "channel_svd", "spatial_svd", "tucker2", "split2_svd", "split4_svd", "tt")
"""Kinds whose factors of the largest ranks are exact and ordered; those of CP are neither nested nor unique."""

SUMMED = ("svd", "channel_svd", "spatial_svd", "tucker2", "split2_svd", "split4_svd")
"""Kinds whose gates are on the first factor and, with two ranks, on the last; the others: see their own tests."""

EXACT = ("svd", "channel_svd", "spatial_svd", "tucker2")
"""Kinds whose predicted error is that of the fitted factors; that of the others is an upper bound."""


def mlp(*, wrap=None) -> nn.Module:
    """Four linear layers of inputs (B, 6), outputs (B, 5); `wrap` goes between the second and the third."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
        wrap or nn.Tanh(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 5),
    ).eval()


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Statistics]:
    torch.set_num_threads(1)
    net = trained_like()
    return net, gather_statistics(net, SHAPE)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Statistics]:
    torch.set_num_threads(1)
    net = mlp()
    return net, gather_statistics(net, VECTOR)


def ranks_of(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    return [(layer.kind, layer.ranks) for layer in plan.layers]


def distance_after(model: nn.Module, plan: Plan, statistics: Statistics) -> float:
    """D of the model with the plan applied, in float64 over all inputs at once."""
    compressed = copy.deepcopy(model)
    apply_plan_(compressed, plan, statistics=statistics)
    lost = spread = 0.0
    with torch.no_grad():
        for args, kwargs in statistics.batches:
            target, output = model(*args, **kwargs).double(), compressed(*args, **kwargs).double()
            lost += float((target - output).square().sum())
            for part in target.split(4 * GROUP):
                spread += float((part - part.mean(dim=0)).square().sum())
    return lost / spread


def composite(plan: Plan) -> float:
    return math.log(plan.output_distance) + sum(-math.log1p(-layer.error) for layer in plan.layers)


# --- the search -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"params": 0.5}, {"macs": 0.4}, {"params": 0.6, "macs": 0.5}])
def test_budgets_hold_and_the_composite_loss_is_never_above_that_of_the_separable_optimum(known, limits):
    net, statistics = known
    settings = {"example_input": SHAPE, "statistics": statistics}
    plan = search_ranks(net, Budget(**limits), objective="end_to_end", **settings)
    exact = search_ranks(net, Budget(**limits), objective="moments", method="exact", **settings)
    assert plan.objective == "end_to_end"
    assert all(plan.kept[resource] <= limit for resource, limit in limits.items())
    assert all(layer.params_after <= layer.params_before for layer in plan.layers)
    assert all(layer.macs_after <= layer.macs_before for layer in plan.layers if layer.macs_before is not None)
    assert composite(plan) <= composite(exact) + 1e-6
    compressed = copy.deepcopy(net)
    apply_plan_(compressed, plan)
    assert sum(p.numel() for p in compressed.parameters()) == plan.compressed.params


@pytest.mark.parametrize(("objective", "method"), [("end_to_end", "continuous"), ("moments", "exact")])
def test_search_finds_a_layer_that_its_own_error_does_not_know_to_be_idle(objective, method):
    """The output of one branch is multiplied by nearly zero after a norm: only the outputs show it."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 12)
            self.first, self.second = (nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)) for _ in "ab")
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            return self.head(self.first(x) + 1e-3 * self.second(x))

    torch.manual_seed(0)
    model = Branches().eval()
    statistics = gather_statistics(model, VECTOR)
    settings = {"example_input": VECTOR, "statistics": statistics}
    plan = search_ranks(model, Budget(params=0.5), objective=objective, method=method, **settings)
    plain = search_ranks(model, Budget(params=0.5), objective="weight", **settings)

    def share(of: Plan) -> float:
        kept = {
            branch: sum(p.params_after for p in of.layers if p.name.startswith(branch)) for branch in ("fir", "sec")
        }
        return kept["fir"] / sum(kept.values())

    assert share(plan) > share(plain)
    assert plan.output_distance < 0.5 * distance_after(model, plain, replace(statistics, moments={}))


@pytest.mark.parametrize("objective", ["end_to_end", "moments"])
def test_errors_of_iterative_fits_in_the_plan_are_those_of_the_fitted_factors(known, objective):
    net, statistics = known
    layers = {layer.name: layer for layer in take_inventory(net)}
    plan = search_ranks(
        net, Budget(params=0.4), example_input=SHAPE, statistics=statistics, objective=objective, kinds=["cp3", "svd"]
    )
    chosen = [planned for planned in plan.factorised if planned.kind == "cp3"]
    assert chosen
    for planned in chosen:
        weight, metric = layers[planned.name].double_weight(), statistics.metric(planned.name)
        factors = factorise_in("cp3", weight, planned.ranks, metric)
        lost = weight - DECOMPOSITIONS["cp3"].dense_weight(factors, tuple(weight.shape))
        expected = weighted_energy(lost, metric) / weighted_energy(weight, metric)
        fitted = float(metric.unseen().at(np.array([expected]))[0])
        assert planned.error == pytest.approx(fitted, rel=1e-6 if objective == "moments" else 0.1)


def test_correction_scales_the_rough_kinds_alone_and_by_what_is_found(known):
    net, statistics = known
    layers = tuple(layer for layer in take_inventory(net) if layer.reason is None)
    tables = tuple(tabulate(own, budgeted=("params",), metric=statistics.metric(own.name)) for own in layers)
    limit = 0.4 * sum(table.costs[-1, 0] for table in tables)
    problem = Problem(tables, ("params",), np.array([limit]))
    outputs = Outputs(net, layers, statistics)
    corrected = refined(problem, outputs, lambda _: None)
    rough = {kind for kind, decomposition in DECOMPOSITIONS.items() if decomposition.fits_roughly}
    changed = set()
    for index, (before, after) in enumerate(zip(tables, corrected.layers, strict=True)):
        assert (before.kinds, before.ranks) == (after.kinds, after.ranks)
        for kind in dict.fromkeys(before.kinds):
            rows = before.rows_of(kind)
            if kind not in rough:
                np.testing.assert_array_equal(before.errors[rows], after.errors[rows])
                continue
            ratios = after.errors[rows] / before.errors[rows]
            changed.update({kind} if not np.allclose(ratios, 1) else ())
            fitted = [r for r in rows if (index, kind, before.ranks[r]) in outputs.fitted]
            measured = [outputs.lost_energy(index, kind, before.ranks[r]) / before.energy for r in fitted]
            assert fitted
            np.testing.assert_allclose(after.errors[fitted], measured, rtol=1e-6)
    assert "cp3" in changed
    for index, row in enumerate(solve(corrected).choice):  # the optimum has been fitted throughout
        kind, ranks = tables[index].kinds[row], tables[index].ranks[row]
        assert kind not in rough or (index, kind, ranks) in outputs.fitted


def test_search_is_deterministic_under_the_seed(unchanged):
    net = mlp()
    first, again, other = (search_ranks(net, Budget(params=0.6), example_input=VECTOR, seed=seed) for seed in (1, 1, 2))
    assert first.objective == "end_to_end"
    assert first.seed == 1
    assert (ranks_of(first), first.output_distance) == (ranks_of(again), again.output_distance)
    assert first.output_distance != other.output_distance


@pytest.mark.parametrize("training", [True, False])
def test_model_comes_back_as_it_was(training):
    net = trained_like().train(training)
    net.norm.eval()
    net.fc1.weight.requires_grad_(False)
    handle = net.conv2.register_forward_hook(lambda *_: None)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    grads = {name: p.grad for name, p in net.named_parameters()}
    before = Unchanged(net)
    plan = search_ranks(net, Budget(params=0.6), example_input=SHAPE, objective="end_to_end")
    assert plan.objective == "end_to_end"
    before.check()
    handle.remove()
    for name, parameter in net.named_parameters():
        assert parameter.grad is grads[name]
        assert bool((parameter.grad == 0.5).all())
        assert parameter.requires_grad is (name != "fc1.weight")


def test_result_does_not_depend_on_the_callers_gradient_mode(small):
    net, statistics = small
    expected = search_ranks(net, Budget(params=0.6), statistics=statistics, example_input=VECTOR)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plan = search_ranks(net, Budget(params=0.6), statistics=statistics, example_input=VECTOR)
        assert (plan.objective, ranks_of(plan)) == ("end_to_end", ranks_of(expected))


def test_plan_says_what_was_minimised_and_on_what(known):
    net, statistics = known
    plan = search_ranks(net, Budget(params=0.5), example_input=SHAPE, statistics=statistics)
    assert (plan.objective, plan.source, plan.data_free, plan.method) == (
        "end_to_end",
        "batch norm",
        True,
        "continuous",
    )
    assert {layer.name: layer.source for layer in plan.layers} == {
        "conv1": "batch norm",
        "norm": None,
        "conv2": "batch norm",
        "point": "batch norm",
        "fc1": "batch norm",
        "fc2": "batch norm",
    }
    assert set(plan.timings) == {"synthetic inputs", "moments", "search"}
    assert all(seconds > 0 for seconds in plan.timings.values())
    assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)
    assert Plan.from_json(plan.to_json()) == plan


def test_output_distance_of_other_objectives(small):
    net, statistics = small
    plan = search_ranks(net, Budget(params=0.6), statistics=statistics, objective="moments")
    assert plan.objective == "moments"
    assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)
    assert search_ranks(net, Budget(params=0.6), objective="weight").output_distance is None


def test_budget_that_allows_everything_keeps_the_outputs(small):
    net, statistics = small
    plan = search_ranks(net, Budget(params=1.0), statistics=statistics, objective="end_to_end")
    assert plan.output_distance < 1e-9
    assert plan.kept["params"] <= 1


def test_seconds_of_the_parts_fill_the_seconds_of_the_whole():
    plan = search_ranks(mlp(), Budget(params=0.6), example_input=VECTOR)
    assert 0.5 * plan.seconds < sum(plan.timings.values()) <= plan.seconds + 1e-3


def test_split_kinds_can_be_searched_by_the_outputs(known):
    net, statistics = known
    settings = {"statistics": statistics, "example_input": SHAPE, "kinds": ["split2_svd", "svd"]}
    plan = search_ranks(net, Budget(params=0.7), objective="end_to_end", **settings)
    exact = search_ranks(net, Budget(params=0.7), objective="moments", method="exact", **settings)
    assert plan.kept["params"] <= 0.7
    assert composite(plan) <= composite(exact) + 1e-6


# --- the table of objective "auto" ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "objective"),
    [
        ("continuous", "example_input", "end_to_end"),
        ("continuous", "statistics", "end_to_end"),
        ("continuous", "calibration", "end_to_end"),
        ("continuous", None, "weight"),
        ("exact", "example_input", "moments"),
        ("exact", "statistics", "moments"),
        ("exact", "calibration", "moments"),
        ("exact", None, "weight"),
        ("uniform", "example_input", "weight"),
        ("uniform", "statistics", "moments"),
        ("energy", "example_input", "weight"),
        ("alds", "example_input", "weight"),
        ("alds", "statistics", "weight"),
        ("paper", "example_input", "weight"),
        ("paper", "statistics", "weight"),
    ],
)
def test_automatic_objective_is_the_best_that_applies(small, method, given, objective):
    net, statistics = small
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    arguments = {
        "example_input": {"example_input": VECTOR},
        "statistics": {"statistics": statistics},
        "calibration": {"calibration": [inputs]},
        None: {},
    }[given]
    plan = search_ranks(net, Budget(params=0.8), method=method, **arguments)
    assert plan.objective == objective
    assert (plan.output_distance is None) == (objective == "weight")
    assert plan.data_free == (given != "calibration")


def test_models_so_large_that_it_would_take_long_are_searched_by_moments():
    net = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)).eval()
    statistics = gather_statistics(net, calibration=[torch.randn(8, 2, 512)])
    rows = 2 + WORK // (3 * STEPS * LEAST_INPUTS * 2 * 512 * 512)
    large = torch.zeros(1, rows, 512)
    settings = {"statistics": statistics, "kinds": "svd", "overrides": {"*": {"max_rank": 4}}}
    assert search_ranks(net, Budget(params=0.5), example_input=large, **settings).objective == "moments"
    assert search_ranks(net, Budget(params=0.5), example_input=large[:, :9], **settings).objective == "end_to_end"


@pytest.mark.parametrize(
    ("macs", "inputs"),
    [(0, INPUTS), (10**6, INPUTS), (WORK // (3 * STEPS * 16), 16), (WORK // (3 * STEPS), 1), (WORK, 0)],
)
def test_inputs_of_a_step_are_those_that_can_be_afforded(macs, inputs):
    assert affordable_inputs(macs) == inputs


@pytest.mark.parametrize("method", ["exact", "uniform", "energy", "alds", "paper"])
def test_other_methods_do_not_know_the_outputs(small, method):
    message = rf"objective='end_to_end' is nothing for method='{method}'.*the methods that take it: 'continuous'"
    with pytest.raises(ConfigurationError, match=message):
        search_ranks(small[0], Budget(params=0.6), example_input=VECTOR, objective="end_to_end", method=method)


def test_search_by_the_outputs_without_any_input_is_an_error(unchanged):
    net = mlp()
    before = unchanged(net)
    message = "objective='end_to_end' needs an example_input"
    with pytest.raises(ExampleInputError, match=message):
        search_ranks(net, Budget(params=0.6), objective="end_to_end")
    with pytest.raises(ExampleInputError, match=message):
        compress_(net, Budget(params=0.6), objective="end_to_end", heal=False)
    before.check()


@pytest.mark.parametrize("objective", ["outputs", "", None, 1])
def test_unknown_objective_is_an_error(small, objective):
    with pytest.raises(ConfigurationError, match=f"objective={objective!r} is unknown.*end_to_end"):
        search_ranks(small[0], Budget(params=0.6), objective=objective)


# --- models that cannot be differentiated -----------------------------------------------------------


class Detach(nn.Module):
    def forward(self, x):
        return x.detach().tanh()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_model_without_gradients_falls_back_to_the_moments(mode, unchanged):
    net = InMode(mlp(), mode)
    before = unchanged(net)
    with pytest.warns(CompressionWarning, match="falls back to objective='moments': the model cannot be differ"):
        plan = search_ranks(net, Budget(params=0.6), example_input=VECTOR)
    before.check()
    exact = search_ranks(net, Budget(params=0.6), example_input=VECTOR, method="exact")
    assert plan.objective == "moments"
    assert ranks_of(plan) == ranks_of(exact)
    assert plan.output_distance > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_model_without_gradients_that_holds_batch_norms_falls_back_too(mode, unchanged):
    net = InMode(trained_like(), mode)
    before = unchanged(net)
    with pytest.warns(CompressionWarning):
        plan = search_ranks(net, Budget(params=0.6), example_input=SHAPE)
    before.check()
    assert plan.objective in ("moments", "weight")


def test_layers_before_a_detach_keep_the_separable_objective_alone(unchanged):
    net = mlp(wrap=Detach())
    before = unchanged(net)
    plan = search_ranks(net, Budget(params=0.6), example_input=VECTOR)
    before.check()
    statistics = gather_statistics(net, VECTOR)
    assert plan.objective == "end_to_end"
    assert [statistics.moments[name].outputs is None for name in ("0", "2", "4", "6")] == [True, True, False, False]
    layers = tuple(layer for layer in take_inventory(net) if layer.reason is None)
    mixed = {i: 1.1 * layer.weight.detach() for i, layer in enumerate(layers)}
    gradients = _gradient_of_log_distance(Outputs(net, layers, statistics), mixed, 0)
    assert [bool(gradients[i].any()) for i in range(4)] == [False, False, True, True]


# --- gates and gradients ----------------------------------------------------------------------------


def test_gates_fall_over_the_components_and_rise_with_the_rank():
    for temperature in (0.2, 0.02):
        gates = torch.stack([_gates(rank, 12, temperature) for rank in torch.linspace(1, 12, 40).double()])
        assert gates.shape == (40, 12)
        assert bool((gates.diff(dim=1) <= 0).all())
        assert bool((gates.diff(dim=0) >= 0).all())
        assert bool(((gates > 0) & (gates <= 1)).all())
        middle = gates[:, 5]  # of component 6: a half at rank 5.5
        assert bool((middle.diff() > 0).all())
        assert float(_gates(torch.tensor(5.5), 12, temperature)[5]) == 0.5


def test_gates_are_those_of_the_formula_and_harden_down_to_a_quarter_of_a_rank():
    rank, index = torch.tensor(3.7, dtype=torch.float64), torch.arange(1, 9)
    warm = 1 / (1 + torch.exp(-(rank - index + 0.5) / (0.5 * 8)))
    torch.testing.assert_close(_gates(rank, 8, 0.5), warm)
    cold = 1 / (1 + torch.exp(-(rank - index + 0.5) / LEAST_TEMPERATURE))
    torch.testing.assert_close(_gates(rank, 8, 1e-9), cold)
    hard = _gates(torch.tensor(40.0), 100, 1e-9)
    assert bool((hard[:38] > 0.99).all())
    assert bool((hard[42:] < 0.01).all())
    assert hard.sum() == pytest.approx(40, abs=1e-3)


def test_gates_pass_a_gradient_to_the_rank():
    rank = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: _gates(r, 6, 0.1), rank)


def _gated(kind, factors, ranks, temperature, shape):
    return gated_weight(kind, factors, Operator(shape), lambda r, count: _gates(ranks[r], count, temperature))


@pytest.mark.parametrize("kind", GATED)
def test_open_gates_reproduce_the_dense_weight(kind):
    shape = KIND_SHAPES[kind]
    weight = torch.randn(shape, dtype=torch.float64)
    full = DECOMPOSITIONS[kind].max_ranks(shape)
    factors = DECOMPOSITIONS[kind].factorise(weight, full)
    ranks = torch.tensor(full, dtype=torch.float64)
    gated = _gated(kind, factors, ranks + 10 * LEAST_TEMPERATURE, 1e-9, shape)
    torch.testing.assert_close(gated, weight, rtol=0, atol=2e-3)
    lost = float((_gated(kind, factors, ranks, 1e-9, shape) - weight).norm() / weight.norm())
    assert lost < 0.13  # the last component alone is half open


@pytest.mark.parametrize("kind", SUMMED)
def test_gated_weight_is_the_sum_of_its_components_times_their_gates(kind):
    shape = KIND_SHAPES[kind]
    weight = torch.randn(shape, dtype=torch.float64)
    full = DECOMPOSITIONS[kind].max_ranks(shape)
    factors = DECOMPOSITIONS[kind].factorise(weight, full)
    ranks = torch.tensor([0.4 * r for r in (*full, 1)[:2]], dtype=torch.float64)
    gates = [
        1 / (1 + torch.exp(-(ranks[i] - torch.arange(1, r + 1) + 0.5) / max(LEAST_TEMPERATURE, 0.05 * r)))
        for i, r in enumerate(full)
    ]
    first, last = next(iter(factors)), list(factors)[-1]
    expected = torch.zeros(shape, dtype=torch.float64)
    for place in itertools.product(*(range(r) for r in full)):
        kept = dict(factors)
        inner = torch.zeros(len(factors[first]), dtype=torch.float64)
        inner[place[-1] :: full[-1]] = 1  # a split kind has its component once in every split
        kept[first] = (factors[first].flatten(1) * inner[:, None]).reshape(factors[first].shape)
        if len(full) > 1:
            kept[last] = torch.zeros_like(factors[last])
            kept[last][:, place[0]] = factors[last][:, place[0]]
        share = math.prod(float(g[i]) for g, i in zip(gates, place, strict=True))
        expected += share * DECOMPOSITIONS[kind].dense_weight(kept, shape)
    torch.testing.assert_close(_gated(kind, factors, ranks, 0.05, shape), expected, rtol=1e-8, atol=1e-10)


def test_layer_under_two_names_comes_back_as_it_was(unchanged):
    net = Twice().eval()
    before, weight = unchanged(net), net.first.weight
    for objective in ("moments", "end_to_end"):
        plan = search_ranks(net, Budget(params=0.9), example_input=(1, 5), objective=objective)
        assert net.first.weight is net.again.weight is weight
        assert isinstance(weight, nn.Parameter)
        before.check()
        statistics = gather_statistics(net, (1, 5))
        assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)


class Twice(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


def double_model(which: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if which == "twice":
        return Twice().double().eval(), (5,)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    return net.double().eval(), (2, 4, 4)


def log_distance(model, layers, weights, inputs) -> torch.Tensor:
    names = {f"{layers[i].name}.weight": w for i, w in weights.items()}
    with torch.no_grad():
        target = model(inputs)
    return (functional_call(model, names, (inputs,), tie_weights=False) - target).square().sum().log()


@pytest.mark.parametrize(("room", "runs"), [(2**24, 4), (0, 8), (16 * 2, 7)])
def test_outputs_of_the_dense_model_are_kept_while_there_is_room(monkeypatch, room, runs):
    monkeypatch.setattr("lightning_compress.search.end_to_end.CACHED", room)
    model = nn.Linear(3, 2)
    batches = tuple(((torch.randn(2 * GROUP, 3),), {}) for _ in range(2))
    outputs, calls = Outputs(model, (), Statistics(batches, "noise", {})), []
    with model.register_forward_hook(lambda *_: calls.append(0)):
        for step in range(4):
            for index, group in enumerate(outputs.groups(step)):
                (found,) = outputs.targets((step % 2, GROUP, index), group)
                with torch.no_grad():
                    assert torch.equal(found, F.linear(group[0][0], model.weight, model.bias))
    assert len(calls) == runs


@pytest.mark.parametrize("which", ["conv", "twice"])
def test_gradient_of_the_log_distance_is_that_of_finite_differences_and_of_all_inputs_at_once(which):
    model, shape = double_model(which)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(50, *shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    layers = tuple(layer for layer in take_inventory(model) if layer.reason is None)
    statistics = Statistics(tuple(((b,), {}) for b in batches), "noise", {})
    outputs = Outputs(model, layers, statistics, inputs=40)
    assert [len(args[0]) for args, _ in outputs.groups(0)] == [16, 16, 8]
    mixed = {
        i: layer.weight.detach() + 0.1 * torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        for i, layer in enumerate(layers)
    }
    before = Unchanged(model)
    found = _gradient_of_log_distance(outputs, mixed, 3)
    before.check()
    inputs = batches[1][:40]
    leaves = {i: w.clone().requires_grad_() for i, w in mixed.items()}
    whole = torch.autograd.grad(log_distance(model, layers, leaves, inputs), list(leaves.values()))
    for i, gradient in enumerate(whole):
        torch.testing.assert_close(found[i], gradient, rtol=1e-4, atol=1e-5)
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = [
            float(log_distance(model, layers, {**mixed, i: mixed[i] + sign * 1e-5 * direction}, inputs).detach())
            for sign in (1, -1)
        ]
        assert float((found[i] * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


# --- the metric of the outputs ----------------------------------------------------------------------


def definite(size: int, generator: torch.Generator, condition: float) -> torch.Tensor:
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (basis * torch.logspace(0, math.log10(condition), size, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("kind", KIND_SHAPES)
def test_predicted_error_in_both_metrics_is_the_measured_one(kind):
    shape, generator = KIND_SHAPES[kind], torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs, outputs = definite(weight[0].numel(), generator, 50), 7 * definite(shape[0], generator, 20)
    metric = Metric(inputs, outputs)
    floored = (1 - OUTPUT_FLOOR) * outputs / outputs.diagonal().mean() + OUTPUT_FLOOR * torch.eye(shape[0])

    def norm(w: torch.Tensor) -> float:  # ‖G^½ w S^½‖²
        flat = w.flatten(1)
        return float(torch.trace(flat.T @ floored.double() @ flat @ inputs))

    profile = profile_in(kind, weight, metric)
    step = max(3, len(profile.ranks) // 8)
    for row, predicted in zip(profile.ranks[::step], profile.errors[::step], strict=True):
        ranks = tuple(map(int, row))
        fitted = DECOMPOSITIONS[kind].dense_weight(factorise_in(kind, weight, ranks, metric), shape)
        measured = norm(fitted - weight) / norm(weight)
        if kind in EXACT:
            assert measured == pytest.approx(predicted, rel=1e-3, abs=2e-6)
        else:
            slack = 1e-4 if kind.startswith("split") else 0.05  # split: the blocks are refitted given each other
            assert measured <= predicted * (1 + slack) + 1e-6


@pytest.mark.parametrize("kind", ["svd", "channel_svd"])
def test_matrix_kinds_are_optimal_in_both_metrics(kind):
    shape, generator = KIND_SHAPES[kind], torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs, outputs = definite(weight[0].numel(), generator, 50), definite(shape[0], generator, 20)
    floored = (1 - OUTPUT_FLOOR) * outputs / outputs.diagonal().mean() + OUTPUT_FLOOR * torch.eye(shape[0]).double()
    left, right = torch.linalg.cholesky(floored), torch.linalg.cholesky(inputs)
    energies = torch.linalg.svdvals(left.T @ weight.flatten(1) @ right).square()
    expected = 1 - energies.cumsum(0) / energies.sum()
    errors = torch.from_numpy(profile_in(kind, weight, Metric(inputs, outputs)).errors)
    torch.testing.assert_close(errors, expected[: len(errors)], rtol=1e-8, atol=1e-10)


def test_scale_of_the_output_metric_does_not_matter_and_zero_is_the_identity():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 5, generator=generator, dtype=torch.float64), definite(5, generator, 10)
    outputs = definite(6, generator, 10)
    errors = [
        torch.from_numpy(profile_in("svd", weight, Metric(inputs, g)).errors)
        for g in (outputs, 1e6 * outputs, None, torch.zeros(6, 6, dtype=torch.float64))
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(errors[2], errors[3], rtol=0, atol=0)


def test_output_moments_of_linear_layers_are_those_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    batches = [torch.randn(7, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)]
    found = output_moments(net, [((b,), {}) for b in batches], ["0", "1"], seed=3)
    generator = torch.Generator().manual_seed(3)
    gradients = []
    for batch in batches:
        scale = net(batch).detach().std()
        gradients += [torch.randn(len(batch), 3, generator=generator).double() / scale for _ in range(PROBES)]
    rows = torch.cat(gradients)
    for name, own in (("1", rows), ("0", rows @ net[1].weight.detach())):
        shrunk = torch.from_numpy(ledoit_wolf(own.numpy(), assume_centered=True)[0])
        torch.testing.assert_close(found[name], shrunk, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unshrunk")
def test_output_moments_of_convolutions_sum_over_the_positions(net, images):
    net.eval()
    found = output_moments(net, [((images,), {})], ["conv2", "fc1"], seed=1)
    weights = torch.Generator().manual_seed(1)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for _ in range(PROBES):
        inner = net.conv2(F.relu(net.norm(net.conv1(images)))).detach().requires_grad_()
        output = net.fc2(F.relu(net.fc1(F.relu(net.point(F.relu(inner))).mean(dim=(2, 3)))))
        direction = torch.randn(output.shape, generator=weights)
        (gradient,) = torch.autograd.grad((output * direction / output.detach().std()).sum(), inner)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, 16).double()
        expected += rows.T @ rows
    scaled = found["conv2"] * (expected.trace() / found["conv2"].trace())  # its scale does not matter
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["moments", "end_to_end"])
def test_plan_does_not_change_when_a_batch_norm_takes_over_a_scale(objective):
    net = trained_like()
    net.norm.eps = 1e-12
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled.conv1.weight.mul_(10)
        scaled.conv1.bias.mul_(10)
        scaled.norm.running_mean.mul_(10)
        scaled.norm.running_var.mul_(100)
    plans = [search_ranks(m, Budget(params=0.5), example_input=SHAPE, objective=objective) for m in (net, scaled)]
    assert ranks_of(plans[0]) == ranks_of(plans[1])
    assert plans[0].output_distance == pytest.approx(plans[1].output_distance, rel=1e-2)


# --- quality targets --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), float("inf"), "0.1", True, [0.1]])
def test_quality_target_is_a_number_between_0_and_1(value):
    with pytest.raises(BudgetError) as caught:
        Budget(max_error=value)
    assert f"max_error={value!r}" in str(caught.value)
    assert "(0, 1)" in str(caught.value)


@pytest.mark.parametrize("bounds", [{"params": 0.5}, {"macs": 0.5}, {"bytes": 0.5}, {"ratio": "5x"}])
def test_quality_target_and_bounds_exclude_each_other(bounds):
    with pytest.raises(BudgetError, match=r"max_error=0\.05\): give bounds or a quality target, not both"):
        Budget(max_error=0.05, **bounds)


def test_quality_target_as_text_and_mapping():
    budget = Budget.from_value({"max_error": 0.05})
    assert budget == Budget(max_error=0.05)
    assert str(budget) == "output distance <= 0.05"
    assert budget.limits() == {}
    assert budget.budgeted == ("params",)


def test_quality_targets_hold_and_smaller_ones_never_give_smaller_models(small):
    net, statistics = small
    targets = [0.01, 0.05, 0.2, 0.6]
    settings = {"statistics": statistics, "example_input": VECTOR, "method": "exact"}
    plans = [search_ranks(net, Budget(max_error=e), **settings) for e in targets]
    for plan, target in zip(plans, targets, strict=True):
        assert (plan.objective, plan.budget, plan.data_free) == ("moments", Budget(max_error=target), True)
        assert plan.output_distance <= target
        assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)
        assert Plan.from_json(plan.to_json()) == plan
    sizes = [plan.compressed.params for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_quality_target_is_met_as_closely_as_the_bisection_can(small):
    """The plan within the next smaller budget that was tried exceeds the target."""
    net, statistics = small
    settings = {"statistics": statistics, "method": "exact", "objective": "moments"}
    target = 0.1
    plan = search_ranks(net, Budget(max_error=target), **settings)
    low, high, best = 1e-3, 1.0, None
    for _ in range(40):
        middle = (low * high) ** 0.5
        try:
            tried = search_ranks(net, Budget(params=middle), **settings)
        except BudgetError:
            low = middle
            continue
        if tried.output_distance <= target:
            best, high = tried, middle
        else:
            low = middle
        if high / low < 1.001:
            break
    resolution = (1 / 0.1) ** (2.0 ** (1 - BISECTIONS))  # of a floor above 0.1
    assert plan.compressed.params <= best.compressed.params * resolution * 1.002 + 1
    tighter = Budget(params=plan.compressed.params / resolution**2 / plan.dense.params - 1 / plan.dense.params)
    assert search_ranks(net, tighter, **settings).output_distance > target


@pytest.mark.slow
def test_quality_target_with_the_default_method(small):
    net, statistics = small
    plan = search_ranks(net, Budget(max_error=0.3), statistics=statistics, example_input=VECTOR)
    assert plan.output_distance <= 0.3
    assert plan.kept["params"] < 1
    assert "output distance <= 0.3" in str(plan)


@pytest.mark.parametrize("given", [{}, {"example_input": VECTOR, "objective": "weight"}])
def test_quality_target_needs_inputs(given, unchanged):
    net = mlp()
    before = unchanged(net)
    message = r"output distance <= 0\.1 is judged on synthetic inputs: pass an example_input"
    with pytest.raises(ExampleInputError, match=message):
        search_ranks(net, Budget(max_error=0.1), **given)
    before.check()


def test_quality_target_through_compress_in_place():
    net = mlp()
    plan = compress_(net, {"max_error": 0.3}, example_input=VECTOR, method="exact")
    assert plan.output_distance <= 0.3
    assert sum(p.numel() for p in net.parameters()) == plan.compressed.params < plan.dense.params


def test_quality_target_through_the_callback(make_trainer, loader):
    task = TinyTask()
    callback = Compress(Budget(max_error=0.5), method="exact", objective="moments", heal=False)
    make_trainer(callback).fit(task, loader, loader)
    assert callback.plan.output_distance <= 0.5
    assert any(isinstance(m, FactorisedLayer) for m in task.modules())
    make_trainer(callback).fit(task, loader, loader)  # a second fit only fine-tunes


# --- real inputs ------------------------------------------------------------------------------------


def test_calibration_takes_the_place_of_synthetic_inputs(small):
    net, _ = small
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    plan = search_ranks(net, Budget(params=0.6), calibration=[inputs[:24], {"input": inputs[24:]}])
    assert (plan.objective, plan.source, plan.data_free) == ("end_to_end", "real", False)
    assert {layer.source for layer in plan.layers} == {"real"}
    statistics = gather_statistics(net, calibration=[inputs[:24], (inputs[24:],)])
    assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)


def test_calibration_heals_too():
    net = mlp()
    plan = compress_(net, Budget(params=0.6), calibration=iter(torch.randn(4, 16, 6)))
    assert (plan.source, plan.data_free) == ("real", False)
    assert any(isinstance(m, FactorisedLayer) for m in net.modules())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(4, 6), r"calibration=Tensor: expected batches of inputs.*\[batch\]"),
        (7, "calibration=int: expected batches of inputs"),
        ([], "calibration holds no batch"),
        (iter(()), "calibration holds no batch"),
        ([torch.zeros(4, 7)], "the model fails on real inputs"),
        ([torch.full((4, 6), float("nan"))], "the inputs of layer '0' are not finite on real inputs"),
        ([[torch.zeros(4, 6), torch.zeros(4)]], "calibration"),
        ([(4, 6)], "calibration"),
    ],
)
def test_calibration_that_cannot_be_used_is_an_error(calibration, message, unchanged):
    net = mlp()
    before = unchanged(net)
    with pytest.raises(ExampleInputError, match=message):
        search_ranks(net, Budget(params=0.6), calibration=calibration)
    if not hasattr(calibration, "__next__"):
        with pytest.raises(ExampleInputError, match=message):
            compress_(net, Budget(params=0.6), calibration=calibration)
    before.check()

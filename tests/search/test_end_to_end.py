"""The search with the outputs in its loss."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_compress import Budget, Plan, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.core.effort import EFFORTS
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.kinds.registry import DECOMPOSITIONS, Operator, gated_weight
from lightning_compress.search.end_to_end import LEAST_TEMPERATURE, _gates, _gradient_of_log_distance
from lightning_compress.search.outputs import GROUP, OutputEvaluator, affordable_inputs
from lightning_compress.search.units import units_of
from tests.support.nets import SHAPE, Doubled, InMode, trained_like
from tests.support.searching import VECTOR, distance_after, mlp, ranks_of
from tests.support.unchanged import Unchanged
from tests.support.zoo import KIND_SHAPES

BALANCED = EFFORTS["balanced"]
WORK, INPUTS, STEPS = BALANCED.work, BALANCED.descent_inputs, BALANCED.descent_steps


def composite(plan: Plan) -> float:
    return math.log(plan.output_distance) + sum(-math.log1p(-layer.error) for layer in plan.layers)


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
        first, second = (sum(p.params_after for p in of.layers if p.name.startswith(b)) for b in ("first", "second"))
        return first / (first + second)

    assert share(plan) > share(plain)
    assert plan.output_distance < 0.5 * distance_after(model, plain, replace(statistics, moments={}))


def test_search_is_deterministic_under_the_seed(unchanged):
    net = mlp()
    settings = {"example_input": VECTOR, "objective": "end_to_end"}
    first, again, other = (search_ranks(net, Budget(params=0.6), seed=seed, **settings) for seed in (1, 1, 2))
    assert first.objective == "end_to_end"
    assert first.seed == 1
    assert (ranks_of(first), first.output_distance) == (ranks_of(again), again.output_distance)
    assert first.output_distance != other.output_distance


@pytest.mark.parametrize("training", [True, False])
def test_model_comes_back_as_it_was(training):
    net = trained_like().train(training)
    net.norm.eval()
    net.fc1.weight.requires_grad_(False)
    net.conv2.register_forward_hook(lambda *_: None)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = Unchanged(net)
    plan = search_ranks(net, Budget(params=0.6), example_input=SHAPE, objective="end_to_end")
    assert plan.objective == "end_to_end"
    before.check()


def test_budget_that_allows_everything_keeps_the_outputs(small):
    net, statistics = small
    plan = search_ranks(net, Budget(params=1.0), statistics=statistics, objective="end_to_end")
    assert plan.output_distance < 1e-9
    assert plan.kept["params"] <= 1


class Detach(nn.Module):
    def forward(self, x):
        return x.detach().tanh()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_model_without_gradients_falls_back_to_the_moments(mode, unchanged):
    net = InMode(mlp(), mode)
    before = unchanged(net)
    alike = pytest.warns(CompressionWarning, match="errors count alike")
    with alike, pytest.warns(CompressionWarning, match="falls back to objective='moments': the model cannot be differ"):
        plan = search_ranks(net, Budget(params=0.6), example_input=VECTOR, objective="end_to_end")
    before.check()
    with pytest.warns(CompressionWarning, match="errors count alike"):
        exact = search_ranks(net, Budget(params=0.6), example_input=VECTOR, method="exact")
    assert plan.objective == "moments"
    assert ranks_of(plan) == ranks_of(exact)
    assert plan.output_distance > 0


def test_layers_before_a_detach_keep_the_separable_objective_alone(unchanged):
    net = mlp(wrap=Detach())
    before = unchanged(net)
    plan = search_ranks(net, Budget(params=0.6), example_input=VECTOR, objective="end_to_end")
    before.check()
    statistics = gather_statistics(net, VECTOR)
    assert plan.objective == "end_to_end"
    assert [statistics.moments[name].outputs is None for name in ("0", "2", "4", "6")] == [True, True, False, False]
    layers = tuple(layer for layer in take_inventory(net) if layer.reason is None)
    mixed = {i: 1.1 * layer.weight.detach() for i, layer in enumerate(layers)}
    gradients = _gradient_of_log_distance(OutputEvaluator(net, units_of(layers), statistics), mixed, 0)
    assert [bool(gradients[i].any()) for i in range(4)] == [False, False, True, True]


def test_layer_under_two_names_comes_back_as_it_was(unchanged):
    net = Doubled(5, 3).eval()
    before, weight = unchanged(net), net.first.weight
    for objective in ("moments", "end_to_end"):
        plan = search_ranks(net, Budget(params=0.9), example_input=(1, 5), objective=objective)
        assert net.first.weight is net.again.weight is weight
        assert isinstance(weight, nn.Parameter)
        before.check()
        statistics = gather_statistics(net, (1, 5))
        assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)


def double_model(which: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if which == "twice":
        return Doubled(5, 3).double().eval(), (5,)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    return net.double().eval(), (2, 4, 4)


def log_distance(model, layers, weights, inputs) -> torch.Tensor:
    names = {f"{layers[i].name}.weight": w for i, w in weights.items()}
    with torch.no_grad():
        target = model(inputs)
    return (functional_call(model, names, (inputs,), tie_weights=False) - target).square().sum().log()


@pytest.mark.parametrize(("room", "runs"), [(2**24, 4), (0, 8), (16 * 2, 7)])
def test_outputs_of_the_dense_model_are_kept_while_there_is_room(monkeypatch, room, runs):
    monkeypatch.setattr("lightning_compress.search.outputs.CACHED", room)
    model = nn.Linear(3, 2)
    batches = tuple(((torch.randn(2 * GROUP, 3),), {}) for _ in range(2))
    outputs, calls = OutputEvaluator(model, (), Statistics(batches, "noise", {})), []
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
    outputs = OutputEvaluator(model, units_of(layers), statistics, inputs=40)
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


@pytest.mark.parametrize(
    ("macs", "inputs"),
    [(0, INPUTS), (10**6, INPUTS), (WORK // (3 * STEPS * 16), 16), (WORK // (3 * STEPS), 1), (WORK, 0)],
)
def test_inputs_of_a_step_are_those_that_can_be_afforded(macs, inputs):
    assert affordable_inputs(macs) == inputs


def gate(rank, component, width):
    return 1 / (1 + math.exp(-(rank - component + 0.5) / max(LEAST_TEMPERATURE, width)))


@pytest.mark.parametrize("rank", [1.0, 3.7, 5.5, 8.0])
@pytest.mark.parametrize("temperature", [0.5, 0.02, 1e-9])
def test_gates_are_those_of_the_formula_and_harden_down_to_a_quarter_of_a_rank(rank, temperature):
    expected = [gate(rank, component, temperature * 8) for component in range(1, 9)]
    found = _gates(torch.tensor(rank, dtype=torch.float64), 8, temperature)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_gates_pass_a_gradient_to_the_rank():
    rank = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: _gates(r, 6, 0.1), rank)


@pytest.mark.parametrize("kind", KIND_SHAPES)
def test_gated_weight_is_the_sum_of_its_components_times_their_gates(kind):
    shape, decomposition = KIND_SHAPES[kind], DECOMPOSITIONS[kind]
    full = decomposition.max_ranks(shape)
    factors = decomposition.factorise(torch.randn(shape, dtype=torch.float64), full)
    ranks = torch.tensor([0.4 * r for r in full], dtype=torch.float64)
    first, last = next(iter(factors)), list(factors)[-1]
    expected = torch.zeros(shape, dtype=torch.float64)
    for place in itertools.product(*(range(r) for r in full)):
        kept = {**factors, first: torch.zeros_like(factors[first])}
        kept[first][place[-1]] = factors[first][place[-1]]
        if len(full) > 1:
            kept[last] = torch.zeros_like(factors[last])
            kept[last][:, place[0]] = factors[last][:, place[0]]
        share = math.prod(gate(float(ranks[i]), place[i] + 1, 0.05 * r) for i, r in enumerate(full))
        expected += share * decomposition.dense_weight(kept, shape)
    found = gated_weight(kind, factors, Operator(shape), lambda r, count: _gates(ranks[r], count, 0.05))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)

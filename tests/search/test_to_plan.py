"""A plan is what it says, for every strategy and budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from torch import nn

from lightning_compress import Budget, FactorisedLayer, Plan, apply_plan_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.trace import trace
from tests.support.errors import require_planned_errors
from tests.support.nets import SHAPE, Doubled
from tests.support.searching import METHODS, VECTOR, distance_after, mlp

BUDGETS = [
    Budget(params=0.4),
    Budget(macs=0.5),
    Budget(bytes=0.45),
    Budget(ratio="2.5x"),
    Budget(params=0.5, macs=0.6),
    Budget(params=0.7, bytes=0.5),
    Budget(params=0.6, macs=0.4, bytes=0.7),
]


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_strategy_keeps_every_budget_in_the_real_model(net, unchanged, method, budget):
    dense_layers = trace(net, SHAPE)
    before = unchanged(net)
    numpy_state = np.random.get_state()[1].copy()
    plan = search_ranks(net, budget, example_input=SHAPE, method=method, objective="weight")
    before.check()
    assert (np.random.get_state()[1] == numpy_state).all()
    assert plan.dense == measure_costs(net, SHAPE)
    own = {name: sum(p.numel() for p in m.parameters(recurse=False)) for name, m in net.named_modules()}
    apply_plan_(net, plan)
    real = measure_costs(net, SHAPE)
    assert real == plan.compressed
    for resource, limit in budget.limits().items():
        assert getattr(real, resource) <= limit * getattr(plan.dense, resource) + 1e-6
        assert plan.kept[resource] == getattr(real, resource) / getattr(plan.dense, resource)
    calls = trace(net, SHAPE).calls
    for planned in plan.layers:
        module = net.get_submodule(planned.name)
        now = sum(p.numel() for p in module.parameters())
        assert (planned.params_before, planned.params_after) == (own[planned.name], now)
        assert isinstance(module, FactorisedLayer) != planned.is_dense
        if planned.type == "BatchNorm2d":
            continue
        (call,) = dense_layers.calls[planned.name]
        positions = math.prod(call.outputs)
        assert planned.macs_before == math.prod(planned.weight_shape) * positions
        if not planned.is_dense:
            assert now < own[planned.name]
        if planned.merged:  # its factors are multiplied out: no child is called
            assert planned.macs_after == planned.macs_before
        elif not planned.is_dense:
            after = sum(
                # an interpolation is no layer of torch's: it works on the positions that the child before it writes
                math.prod(f.weight.shape)
                * math.prod(calls.get(f"{planned.name}.{n}", calls.get(f"{planned.name}.reduce"))[0].outputs or (1,))
                for n, f in module.named_children()
            )
            assert planned.macs_after == after <= planned.macs_before
    assert (plan.method, plan.objective, plan.data_free, plan.budget) == (method, "weight", True, budget)


@pytest.mark.parametrize("method", METHODS)
def test_planned_error_is_that_of_the_factors(net, method):
    plan = search_ranks(net, Budget(params=0.45), method=method)
    require_planned_errors(net, plan)
    assert plan.signal_loss == pytest.approx(sum(-math.log(1 - layer.error) for layer in plan.layers), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_full_budget_keeps_everything_dense(net, method):
    plan = search_ranks(net, Budget(params=1.0), method=method)
    assert plan.factorised == ()
    assert plan.compressed == plan.dense
    assert plan.optimality_gap == 0
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["fc1"] == "the search keeps it dense: the budget is better spent here"
    assert reasons["norm"] == "no kind factorises BatchNorm2d"


@pytest.mark.parametrize("method", METHODS)
def test_full_budget_of_layers_too_small_to_shrink(method):
    plan = search_ranks(nn.Sequential(nn.Linear(2, 2)), Budget(params=1.0), method=method, kinds="svd")
    assert [layer.reason for layer in plan.layers] == ["every candidate is larger or slower than the dense layer"]
    assert plan.compressed == plan.dense


def test_macs_are_unknown_without_an_example_input(net):
    plan = search_ranks(net, Budget(params=0.5), method="exact")
    assert plan.dense.macs is plan.compressed.macs is plan.kept["macs"] is None
    assert {layer.macs_before for layer in plan.layers} == {layer.macs_after for layer in plan.layers} == {None}


@pytest.mark.parametrize("method", METHODS)
def test_shared_module_is_counted_once_in_parameters_and_twice_in_macs(method):
    model, budget = Doubled(16, 16), Budget(params=0.8, macs=0.7)
    plan = search_ranks(model, budget, example_input=(1, 16), method=method, objective="weight")
    apply_plan_(model, plan)
    assert model.first is model.again
    assert plan.dense.macs == 3 * 256
    assert measure_costs(model, (1, 16)) == plan.compressed
    assert plan.compressed.macs <= 0.7 * 3 * 256


def test_plan_says_what_was_minimised_and_on_what(known):
    net, statistics = known
    plan = search_ranks(net, Budget(params=0.5), example_input=SHAPE, statistics=statistics)
    found = (plan.objective, plan.source, plan.data_free, plan.method)
    assert found == ("moments", "batch norm", True, "continuous")
    sources = {layer.name: layer.source for layer in plan.layers}
    assert sources == {**dict.fromkeys(("conv1", "conv2", "point", "fc1", "fc2"), "batch norm"), "norm": None}
    assert set(plan.timings) == {"synthetic inputs", "moments", "search"}
    assert all(seconds > 0 for seconds in plan.timings.values())
    assert plan.output_distance == pytest.approx(distance_after(net, plan, statistics), rel=1e-4)
    assert Plan.from_json(plan.to_json()) == plan


def test_seconds_of_the_parts_fill_the_seconds_of_the_whole():
    plan = search_ranks(mlp(), Budget(params=0.6), example_input=VECTOR)
    assert 0.5 * plan.seconds < sum(plan.timings.values()) <= plan.seconds + 1e-3

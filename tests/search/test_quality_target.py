"""Budgets that bound the distance of the outputs."""

from __future__ import annotations

import pytest

from lightning_compress import Budget, Compress, FactorisedLayer, Plan, compress_, search_ranks
from lightning_compress.core.effort import EFFORTS
from lightning_compress.core.errors import BudgetError, ExampleInputError
from tests.support.nets import TinyTask
from tests.support.searching import VECTOR, distance_after, mlp

BALANCED = EFFORTS["balanced"]


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


@pytest.mark.slow
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
    resolution = (1 / 0.1) ** (2.0 ** (1 - BALANCED.bisections))  # of a floor above 0.1
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


@pytest.mark.slow
def test_quality_target_through_the_callback(make_trainer, loader):
    task = TinyTask()
    callback = Compress(Budget(max_error=0.5), method="exact", objective="moments", heal=False)
    make_trainer(callback).fit(task, loader, loader)
    assert callback.plan.output_distance <= 0.5
    assert any(isinstance(m, FactorisedLayer) for m in task.modules())
    make_trainer(callback).fit(task, loader, loader)  # a second fit only fine-tunes

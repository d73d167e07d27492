"""What is looked at once more before a plan is final, and what a layer's error does to the outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.analysis.trace import trace
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.plan import BETTER_ELSEWHERE, DENSE, LayerPlan
from lightning_compress.core.progress import silent
from lightning_compress.kinds.registry import DECOMPOSITIONS, fit_factors, weighted_energy
from lightning_compress.search.candidates import tabulate
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import OutputEvaluator, output_distance
from lightning_compress.search.problem import Problem, problem_of
from lightning_compress.search.refine import refined
from lightning_compress.search.safeguards import gives_up_most, spend_what_is_left
from lightning_compress.search.sensitivity import weighted
from lightning_compress.search.tables import tabulate_units
from lightning_compress.search.units import units_of
from tests.support.compressing import CLOSED_FORM
from tests.support.nets import IMAGE, SHAPE, TinyNet, pooled


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
        factors = fit_factors("cp3", weight, planned.ranks, metric)
        lost = weight - DECOMPOSITIONS["cp3"].dense_weight(factors, tuple(weight.shape))
        expected = weighted_energy(lost, metric) / weighted_energy(weight, metric)
        fitted = float(metric.unseen().at(np.array([expected]))[0])
        assert planned.error == pytest.approx(fitted, rel=1e-6 if objective == "moments" else 0.1)


def uncorrected(known):
    """The problem of keeping 40 % of the parameters with the profiles' errors, and the outputs; nothing is fitted."""
    net, statistics = known
    fresh = {name: replace(moments) for name, moments in statistics.moments.items()}
    statistics = replace(statistics, moments=fresh)
    layers = tuple(layer for layer in take_inventory(net) if layer.reason is None)
    tables = tuple(tabulate(own, compared=("params",), metric=statistics.metric(own.name)) for own in layers)
    limit = 0.4 * sum(table.costs[-1, 0] for table in tables)
    return Problem(tables, ("params",), np.array([limit])), OutputEvaluator(net, units_of(layers), statistics)


def test_fits_that_are_too_dear_are_not_made_and_expected_to_leave_what_is_typical(known, monkeypatch):
    problem, outputs = uncorrected(known)
    monkeypatch.setattr("lightning_compress.search.refine.WORK", 0.0)
    corrected = refined(problem, outputs, lambda _: None)
    assert not outputs.fitted
    ratios = np.concatenate(
        [a.errors[:-1] / b.errors[:-1] for a, b in zip(corrected.layers, problem.layers, strict=True)]
    )
    leaves = DECOMPOSITIONS["cp3"].leaves
    assert set(np.round(ratios, 6)) == {1.0, leaves}


def test_factors_nearby_stand_for_those_that_were_not_fitted(known):
    problem, outputs = uncorrected(known)
    index = next(i for i, table in enumerate(problem.layers) if "cp3" in table.kinds)
    unit = outputs.units[index]
    dense, drafted = (
        unit.canonical_weight(),
        unit.multiplied_out("cp3", outputs.factors(index, "cp3", (20,), draft=True)),
    )
    found = outputs.near_weight(index, "cp3", (20,))
    torch.testing.assert_close((found - dense).norm(), DECOMPOSITIONS["cp3"].leaves ** 0.5 * (drafted - dense).norm())
    assert not outputs.fitted
    fitted = outputs.dense_weight(index, "cp3", (21,))
    torch.testing.assert_close(outputs.near_weight(index, "cp3", (20,)), fitted)
    assert not torch.equal(outputs.near_weight(index, "cp3", (10,)), fitted)
    assert set(outputs.fitted) == {(index, "cp3", (21,))}


def test_correction_scales_the_rough_kinds_alone_and_by_what_is_found(known):
    problem, outputs = uncorrected(known)
    tables = problem.layers
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
            np.testing.assert_allclose(after.errors[fitted], measured, rtol=1e-6)
            assert fitted or np.array_equal(before.errors[rows], after.errors[rows])
    assert "cp3" in changed
    for index, row in enumerate(solve(corrected).choice):  # the optimum has been fitted throughout
        kind, ranks = tables[index].kinds[row], tables[index].ranks[row]
        assert kind not in rough or (index, kind, ranks) in outputs.fitted


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_the_whole_budget_is_used_where_errors_are_left(keep):
    net = pooled()
    plan = search_ranks(net, Budget(params=keep), example_input=IMAGE)
    step = max(sum(layer.weight_shape[:2]) for layer in plan.factorised)
    assert plan.compressed.params > keep * plan.dense.params - step


def test_what_is_left_goes_to_larger_ranks_of_the_same_kinds():
    net = TinyNet().eval()
    dense, budget = measure_costs(net), Budget(params=0.9)
    tables = tabulate_units(units_of(take_inventory(net, kinds=CLOSED_FORM)), ("params",), 1, None, silent)
    problem = problem_of(tables, dense, budget)
    small = solve(problem_of(problem.layers, dense, Budget(params=0.5))).choice
    spent = spend_what_is_left(problem, small)
    assert problem.fits(spent)
    assert problem.loss_of(spent) < problem.loss_of(small)
    for table, before, after in zip(problem.layers, small, spent, strict=True):
        assert table.kinds[before] in (DENSE, table.kinds[after])
        assert (table.costs[after] >= table.costs[before]).all()


def layer(name: str, error: float, params: int, *, dense: bool = False, reason: str | None = None) -> LayerPlan:
    kind = "dense" if dense else "svd"
    return LayerPlan(name, "Linear", kind, () if dense else (1,), (2, 2), error, params, params, reason=reason)


def test_layers_that_give_up_most_are_those_beside_which_the_rest_stays_dense():
    worst, fine = layer("a", 0.6, 100), layer("b", 0.1, 50)
    rest = layer("c", 0.0, 300, dense=True, reason=BETTER_ELSEWHERE)
    excluded = layer("d", 0.0, 900, dense=True, reason="excluded")
    assert [found.name for found in gives_up_most([worst, fine, rest])] == ["a"]
    assert gives_up_most([worst, fine, layer("c", 0.3, 300), excluded]) == []


def test_a_plan_that_gives_one_layer_up_warns_with_its_name():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 8), nn.Tanh(), nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 64))
    overrides = {"0": {"min_rank": 7}, "2": {"min_rank": 7}}
    with pytest.warns(CompressionWarning, match=r"layer '4' loses \d+ % of its energy \(svd, .* raise the budget"):
        search_ranks(
            nn.Sequential(*net, nn.Linear(64, 120)), Budget(params=0.9), kinds="svd", objective="weight",
            overrides={**overrides, "4": {"max_rank": 4}, "5": {"min_rank": 41}},
        )  # fmt: skip


def looked_at(net, example, keep=0.7, **selection):
    """A problem of the moments, and the outputs of the model."""
    statistics = gather_statistics(net, example)
    units, budget = units_of(take_inventory(net, **selection)), Budget(params=keep)
    problem = problem_of(tabulate_units(units, ("params",), 1, statistics, silent), measure_costs(net), budget)
    return problem, OutputEvaluator(net, units, statistics)


def test_layers_are_weighed_by_what_they_do_to_the_outputs():
    """Of two branches alike one is multiplied by nearly zero: its errors hardly count."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            return self.first(x) + 0.01 * self.second(x)

    torch.manual_seed(0)
    net = Branches()
    problem, outputs = looked_at(net, (1, 20), kinds="svd")
    found = weighted(problem, solve(problem).choice, outputs)
    assert found.weights[0] > 50 * found.weights[1]
    choices = [solve(each).choice for each in (problem, found)]
    assert output_distance(outputs, found, choices[1]) < output_distance(outputs, problem, choices[0])


@pytest.mark.slow
def test_layers_of_a_large_model_are_measured_on_few_inputs_or_not_at_all(try_only):
    net = pooled()
    problem, outputs = looked_at(net, IMAGE, kinds=["svd", "channel_svd"])
    layers = problem.layers
    choice, macs = solve(problem).choice, trace(net, IMAGE).macs
    seen: list[int] = []
    with net[8].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0]))):
        for inputs, most in ((10_000, 256), (70, 64), (10, 10)):
            try_only(work=inputs * macs * len(layers))
            seen.clear()
            assert weighted(problem, choice, outputs).weights is not None
            assert sum(len(args[0]) for args, _ in outputs.within(inputs).statistics.batches) == most
            assert sum(seen) <= 64 + (1 + len(layers)) * most  # the count of MACs, the dense outputs, each layer
        try_only(work=2 * macs * len(layers))
        assert weighted(problem, choice, outputs) is problem

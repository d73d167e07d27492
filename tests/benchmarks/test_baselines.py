"""The published strategy "alds", which comparisons alone need: of the benchmarks, through public extension points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from torch import nn

from benchmarks import zero_shot
from benchmarks.baselines import operator_norm_errors
from benchmarks.baselines.alds import least_largest
from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.settings import RESOURCES
from lightning_compress.search.candidates import Candidates, tabulate
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import STRATEGIES
from tests.support.nets import TinyNet, unfolding

SHAPE = (1, 3, 8, 8)


def errors_of(layer, kinds):
    """The table of a layer, and the errors of its rows."""
    (entry,) = take_inventory(nn.Sequential(layer), kinds=kinds)
    table = tabulate(entry, compared=("params",))
    return table, operator_norm_errors(entry, table)


@pytest.mark.parametrize(
    ("kind", "layer", "splits"),
    [
        ("svd", nn.Linear(9, 14), 1),
        ("channel_svd", nn.Conv2d(6, 20, 3), 1),
        ("spatial_svd", nn.Conv2d(6, 8, 3), 1),
        ("split2_svd", nn.Conv2d(8, 24, 3), 2),
        ("split4_svd", nn.Conv2d(8, 24, 3), 4),
    ],
)
def test_error_is_the_largest_singular_value_left_out_of_any_split(kind, layer, splits):
    weight = layer.weight.detach().double()
    if splits > 1:
        weight[:, :2] *= 3  # one split dominates
        layer.weight.data.copy_(weight)
    table, errors = errors_of(layer, kind)
    parts = [unfolding(part, kind) for part in weight.chunk(splits, dim=1)]
    values = [np.linalg.svd(part.numpy(), compute_uv=False) for part in parts]
    largest = np.linalg.norm(unfolding(weight, kind).numpy(), 2)
    expected = [max(s[rank] for s in values) / largest for (rank,) in table.ranks[:-1]]
    assert len(expected) >= 2
    assert errors == pytest.approx([*expected, 0.0], abs=1e-6)


@pytest.mark.parametrize("kind", ["channel_svd", "split2_svd"])
def test_values_of_several_groups_are_added_in_squares(kind):
    layer = nn.Conv2d(16, 40, 3, groups=2)
    table, errors = errors_of(layer, kind)
    splits = 2 if kind == "split2_svd" else 1
    parts = [part for block in layer.weight.detach().double().chunk(2) for part in block.chunk(splits, dim=1)]
    values = np.sum([np.linalg.svd(part.flatten(1).numpy(), compute_uv=False) ** 2 for part in parts], axis=0)
    expected = [np.sqrt(values[rank] / values[0]) for (rank,) in table.ranks[:-1]]
    assert errors == pytest.approx([*expected, 0.0], abs=1e-7)


def random_problem(seed, budgeted, *, layers=5, rows=6):
    """Candidates of no particular kind with costs of the budgets opposed, and errors unrelated to them."""
    rng = np.random.default_rng(seed)
    tables, errors = [], []
    for index in range(layers):
        costs = np.zeros((rows, len(RESOURCES)))
        for name in budgeted:
            costs[:, RESOURCES.index(name)] = [*rng.integers(1, 900, size=rows - 1), 1000]
        frobenius, own = (np.append(rng.random(rows - 1), 0.0) for _ in range(2))
        ranks, kinds = (*((r + 1,) for r in range(rows - 1)), ()), (*("svd",) * (rows - 1), "dense")
        tables.append(Candidates(str(index), kinds, ranks, frobenius, 1.0, costs))
        errors.append(own)
    limit = np.floor((0.45 + 0.05 * seed) * 1000 * layers)
    return Problem(tuple(tables), budgeted, np.full(len(budgeted), limit)), errors


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgeted", [("params",), RESOURCES])
def test_choice_is_the_brute_force_minimum_of_the_largest_error(seed, budgeted):
    problem, errors = random_problem(seed, budgeted)
    columns = [RESOURCES.index(name) for name in budgeted]
    choices = np.array(list(itertools.product(range(6), repeat=5)))
    cost = sum(t.costs[:, columns][choices[:, i]] for i, t in enumerate(problem.layers))
    largest = np.max([own[choices[:, i]] for i, own in enumerate(errors)], axis=0)
    fits = (cost <= problem.limits).all(axis=1)
    choice = least_largest(problem, errors)
    assert problem.fits(choice)
    assert max(own[row] for own, row in zip(errors, choice, strict=True)) == largest[fits].min()
    if len(budgeted) == 1:  # and of those choices it is the cheapest: what is left over stays unspent
        assert problem.cost_of(choice)[0] == cost[fits & (largest <= largest[fits].min())].min()


def test_alds_is_registered_with_its_own_kinds_and_judges_weights_alone():
    net = TinyNet().eval()
    kinds = STRATEGIES["alds"].kinds
    assert kinds == ("svd", "channel_svd", "split2_svd", "split4_svd")
    plan = search_ranks(net, Budget(params=0.5), method="alds", example_input=SHAPE)
    assert (plan.objective, plan.source, plan.output_distance) == ("weight", "weight", None)
    assert {p.kind for p in plan.factorised} <= set(kinds)
    with pytest.raises(ConfigurationError, match="objective='moments' is nothing for method='alds', which takes 'weig"):
        search_ranks(net, Budget(params=0.5), method="alds", example_input=SHAPE, objective="moments")
    assert {settings.get("method", "continuous") for settings in zero_shot.METHODS.values()} <= set(STRATEGIES)


def test_kind_without_spectrum_is_taken_only_where_nothing_else_keeps_the_budget():
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    for keep, kind in ((0.5, "channel_svd"), (0.05, "tucker2")):
        plan = search_ranks(net, Budget(params=keep), method="alds", kinds=["channel_svd", "tucker2"])
        assert {p.kind for p in plan.factorised} == {kind}
        assert plan.kept["params"] <= keep

"""The published strategy "alds", which comparisons alone need: of the benchmarks, through public extension points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import zero_shot
from benchmarks.baselines import operator_norm_errors
from benchmarks.baselines.alds import least_largest
from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.settings import RESOURCES
from lightning_compress.search.candidates import Candidates, tabulate
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import STRATEGIES
from tests.support.errors import planned_error
from tests.support.nets import TinyNet, random_net, unfolding

KINDS = STRATEGIES["alds"].kinds
SPLITS = {"split2_svd", "split4_svd"}
SHAPE = (1, 3, 8, 8)


def errors_of(layer, kinds):
    """The table of a layer, and the errors of its rows."""
    (entry,) = take_inventory(nn.Sequential(layer), kinds=kinds)
    table = tabulate(entry, budgeted=("params",))
    return table, operator_norm_errors(entry, table)


# --- the error of a candidate


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("svd", nn.Linear(9, 14)),
        ("svd", nn.Conv2d(12, 10, 1)),
        ("channel_svd", nn.Conv2d(6, 20, 3)),
        ("spatial_svd", nn.Conv2d(6, 8, 3)),
    ],
)
def test_error_is_the_first_singular_value_left_out(kind, layer):
    table, errors = errors_of(layer, kind)
    values = np.linalg.svd(unfolding(layer.weight.detach().double(), kind).numpy(), compute_uv=False)
    expected = [values[rank] / values[0] for (rank,) in table.ranks[:-1]]
    assert len(expected) > 3
    assert errors == pytest.approx([*expected, 0.0], abs=1e-7)


@pytest.mark.parametrize(("kind", "splits"), [("split2_svd", 2), ("split4_svd", 4)])
def test_error_of_the_split_kinds_is_the_maximum_over_the_splits(kind, splits):
    layer = nn.Conv2d(8, 24, 3)
    with torch.no_grad():
        layer.weight[:, :2] *= 3  # one split dominates
    table, errors = errors_of(layer, kind)
    weight = layer.weight.detach().double()
    values = [np.linalg.svd(part.flatten(1).numpy(), compute_uv=False) for part in weight.chunk(splits, dim=1)]
    largest = np.linalg.norm(weight.flatten(1).numpy(), 2)
    expected = [max(s[rank] for s in values) / largest for (rank,) in table.ranks[:-1]]
    assert len(expected) >= 2
    assert errors == pytest.approx([*expected, 0.0], abs=1e-7)


@pytest.mark.parametrize("kind", ["channel_svd", "split2_svd"])
def test_values_of_several_groups_are_added_in_squares(kind):
    layer = nn.Conv2d(16, 40, 3, groups=2)
    table, errors = errors_of(layer, kind)
    splits = 2 if kind == "split2_svd" else 1
    parts = [part for block in layer.weight.detach().double().chunk(2) for part in block.chunk(splits, dim=1)]
    values = np.sum([np.linalg.svd(part.flatten(1).numpy(), compute_uv=False) ** 2 for part in parts], axis=0)
    expected = [np.sqrt(values[rank] / values[0]) for (rank,) in table.ranks[:-1]]
    assert len(expected) > 3
    assert errors == pytest.approx([*expected, 0.0], abs=1e-7)


def test_kind_of_several_ranks_has_no_spectrum():
    table, errors = errors_of(nn.Conv2d(8, 10, 3), ["channel_svd", "tucker2"])
    tucker = table.rows_of("tucker2")
    assert len(tucker) > 3
    assert np.isinf(errors[tucker]).all()
    assert np.isfinite(np.delete(errors, tucker)).all()


@pytest.mark.parametrize("kinds", ["channel_svd", "split2_svd"])
def test_zero_weight_has_no_error(kinds):
    layer = nn.Conv2d(8, 24, 3)
    nn.init.zeros_(layer.weight)
    assert not errors_of(layer, kinds)[1].any()


# --- the search


def random_problem(seed, *, layers=5, rows=6, budgeted=("params",), keep=0.45):
    """Candidates of no particular kind with costs of the budgets opposed, and errors unrelated to them."""
    rng = np.random.default_rng(seed)
    tables, errors = [], []
    for index in range(layers):
        costs = np.zeros((rows, len(RESOURCES)))
        for name in budgeted:
            costs[:, RESOURCES.index(name)] = [*rng.integers(1, 900, size=rows - 1), 1000]
        frobenius, own = (np.append(rng.random(rows - 1), 0.0) for _ in range(2))
        ranks = (*((r + 1,) for r in range(rows - 1)), ())
        kinds = (*("svd",) * (rows - 1), "dense")
        tables.append(Candidates(str(index), kinds, ranks, frobenius, 1.0, costs, np.zeros(rows), 0.0))
        errors.append(own)
    return Problem(tuple(tables), budgeted, np.full(len(budgeted), np.floor(keep * 1000 * layers))), errors


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgeted", [("params",), ("params", "macs"), RESOURCES])
def test_choice_is_the_brute_force_minimum_of_the_largest_error(seed, budgeted):
    problem, errors = random_problem(seed, budgeted=budgeted, keep=0.45 + 0.05 * seed)
    columns = [RESOURCES.index(name) for name in budgeted]
    choices = np.array(list(itertools.product(range(6), repeat=5)))
    cost = sum(t.costs[:, columns][choices[:, i]] for i, t in enumerate(problem.layers))
    largest = np.max([own[choices[:, i]] for i, own in enumerate(errors)], axis=0)
    fits = (cost <= problem.limits).all(axis=1)
    assert fits.any()
    choice = least_largest(problem, errors)
    assert problem.fits(choice)
    assert max(own[row] for own, row in zip(errors, choice, strict=True)) == largest[fits].min()
    if len(budgeted) == 1:  # and of those choices it is the cheapest: what is left over stays unspent
        assert problem.cost_of(choice)[0] == cost[fits & (largest <= largest[fits].min())].min()


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_plan_of_a_model_is_the_published_rule(keep):
    net = random_net(1)
    plan = search_ranks(net, Budget(params=keep), method="alds")
    dense = sum(p.numel() for p in net.parameters())
    options = []  # per layer: (parameters, relative error, kind, rank), from numpy alone
    for layer in net:
        weight = layer.weight.detach().double().numpy()
        conv, out, flat = weight.ndim == 4, len(weight), weight.reshape(len(weight), -1)
        plain = "channel_svd" if conv and weight.shape[2:] != (1, 1) else "svd"
        own = [(weight.size, 0.0, "dense", ())]
        for k in (1, 2, 4) if conv else (1,):
            values = [np.linalg.svd(b, compute_uv=False) for b in np.split(flat, k, axis=1)]
            for rank in range(1, len(values[0]) + 1):
                size = rank * (flat.shape[1] + k * out)
                if size < weight.size:
                    left = max(s[rank] if rank < len(s) else 0.0 for s in values) / np.linalg.norm(flat, 2)
                    own.append((size, left, f"split{k}_svd" if k > 1 else plain, (rank,)))
        options.append(own)

    def at(threshold):
        return [min(option for option in own if option[1] <= threshold * (1 + 1e-9)) for own in options]

    rest = dense - sum(own[0][0] for own in options)
    every = sorted({left for own in options for _, left, *_ in own})
    least = next(t for t in every if sum(o[0] for o in at(t)) + rest <= keep * dense)
    assert [(p.kind, p.ranks) for p in plan.layers] == [option[2:] for option in at(least)]
    assert plan.compressed.params == sum(o[0] for o in at(least)) + rest


def test_alds_brings_its_own_kinds_and_judges_weights_alone():
    net = TinyNet().eval()
    assert KINDS == ("svd", "channel_svd", "split2_svd", "split4_svd")
    statistics = gather_statistics(net, SHAPE)
    plain = search_ranks(net, Budget(params=0.5), method="alds")
    assert {p.kind for p in plain.factorised} <= set(KINDS)
    assert {p.kind for p in plain.factorised} & SPLITS
    for known in ({"statistics": statistics, "kinds": ["auto"]}, {"example_input": SHAPE}):
        auto = search_ranks(net, Budget(params=0.5), method="alds", **known)
        assert (auto.objective, auto.source, auto.output_distance) == ("weight", "weight", None)
        assert [(p.kind, p.ranks) for p in auto.layers] == [(p.kind, p.ranks) for p in plain.layers]
    for objective in ("moments", "end_to_end"):
        message = f"objective='{objective}' is nothing for method='alds', which takes 'weight'"
        with pytest.raises(ConfigurationError, match=message):
            search_ranks(net, Budget(params=0.5), method="alds", statistics=statistics, objective=objective)
    named = search_ranks(net, Budget(params=0.5), method="alds", kinds=["svd", "spatial_svd"])
    assert {p.kind for p in named.factorised} == {"svd", "spatial_svd"}
    others = search_ranks(net, Budget(params=0.5), method="energy")
    assert {p.kind for p in others.factorised}.isdisjoint(SPLITS)


def test_kind_without_spectrum_is_taken_only_where_nothing_else_keeps_the_budget():
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    wide = search_ranks(net, Budget(params=0.5), method="alds", kinds=["channel_svd", "tucker2"])
    assert {p.kind for p in wide.factorised} == {"channel_svd"}
    narrow = search_ranks(net, Budget(params=0.05), method="alds", kinds=["channel_svd", "tucker2"])
    assert {p.kind for p in narrow.factorised} == {"tucker2"}
    assert narrow.kept["params"] <= 0.05


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_plan_does_not_depend_on_the_callers_gradient_mode(context, unchanged):
    net = TinyNet()
    before = unchanged(net)
    expected = search_ranks(net, Budget(params=0.5), method="alds")
    with context():
        assert search_ranks(net, Budget(params=0.5), method="alds").layers == expected.layers
    before.check()


@pytest.mark.slow
def test_several_budgets_are_kept_in_the_real_model():
    net = TinyNet().eval()
    budget = Budget(params=0.5, macs=0.6, bytes=0.55)
    plan = search_ranks(net, budget, example_input=SHAPE, method="alds")
    weights = {p.name: net.get_submodule(p.name).weight.detach().double().clone() for p in plan.factorised}
    apply_plan_(net, plan)
    assert all(plan.kept[name] <= limit for name, limit in budget.limits().items())
    for planned in plan.factorised:
        measured = planned_error(None, weights[planned.name], net.get_submodule(planned.name).weight)
        assert measured == pytest.approx(planned.error, abs=1e-5)


def test_benchmark_of_the_methods_knows_every_one_it_names():
    assert {settings.get("method", "continuous") for settings in zero_shot.METHODS.values()} <= set(STRATEGIES)
    assert zero_shot.METHODS["alds"] == {"method": "alds"}

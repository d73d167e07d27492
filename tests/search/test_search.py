from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, Override, apply_plan_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.trace import trace
from lightning_compress.core.effort import EFFORTS
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    ExampleInputError,
    InfeasibleBudgetError,
    NothingToFactoriseError,
    SelectionError,
    UnsupportedError,
)
from lightning_compress.core.plan import signal_loss
from lightning_compress.core.settings import RESOURCES
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.search.candidates import Candidates, tabulate
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import STRATEGIES, search_exact
from tests.support.nets import TinyNet

SHAPE = (1, 3, 8, 8)
METHODS = ["continuous", "energy", "exact", "paper", "uniform"]
BOUNDED = {"tucker2", "tt", "cp", "cp3"}
"""Kinds whose planned error is an upper bound of that of the fitted factors."""
BUDGETS = [
    Budget(params=0.4),
    Budget(macs=0.5),
    Budget(bytes=0.45),
    Budget(ratio="2.5x"),
    Budget(params=0.5, macs=0.6),
    Budget(params=0.7, bytes=0.5),
    Budget(params=0.6, macs=0.4, bytes=0.7),
]


def quiet(_what, _done):
    pass


def random_net(seed, width=12):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, (5, 3), stride=(2, 1)),
        nn.BatchNorm2d(2 * width),
        nn.Conv2d(2 * width, width, 1),
        nn.Flatten(),
        nn.Linear(width * 2 * 6, 24),
        nn.Linear(24, 10),
    )
    # Spectra of different decay, as trained layers have
    with torch.no_grad():
        for index, layer in enumerate(m for m in net if hasattr(m, "weight") and m.weight.ndim > 1):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            decay = torch.exp(-torch.arange(len(s)) * (0.05 + 0.1 * ((index + seed) % 4)))
            layer.weight.copy_((u * s * decay @ v).view_as(layer.weight))
    return net


def candidates(name, costs, errors, activations=None):
    """The last row is the dense layer."""
    costs = np.atleast_2d(np.asarray(costs, dtype=float).T).T
    columns = np.zeros((len(costs), len(RESOURCES)))
    columns[:, : costs.shape[1]] = costs
    rows = len(costs)
    kinds = ("svd",) * (rows - 1) + ("dense",)
    errors = np.asarray(errors, float)
    ranks = (*((r + 1,) for r in range(rows - 1)), ())
    activations = np.zeros(rows) if activations is None else activations
    return Candidates(name, kinds, ranks, errors, 1.0, columns, activations, 1.0)


def random_problem(seed, *, layers=5, rows=5, scale=1000, budgeted=("params",), keep=0.5, activation_weight=0.0):
    rng = np.random.default_rng(seed)
    tables = []
    for index in range(layers):
        costs = np.sort(rng.integers(1, scale, size=(rows, len(budgeted))), axis=0)
        errors = np.append(np.sort(rng.random(rows - 1))[::-1], 0.0)
        activations = np.append(np.random.default_rng((seed, index)).random(rows - 1), 0.0)
        tables.append(candidates(str(index), costs, errors, activations))
    limits = np.floor(keep * np.sum([t.costs[-1, : len(budgeted)] for t in tables], axis=0))
    return Problem(tuple(tables), budgeted, limits, activation_weight=activation_weight)


def brute_force(problem):
    """The least objective of all choices that keep every budget, by enumeration; inf if none does."""
    columns = [RESOURCES.index(name) for name in problem.budgeted]
    choices = np.array(list(itertools.product(*(range(len(table)) for table in problem.layers))))
    cost = sum(table.costs[:, columns][choices[:, i]] for i, table in enumerate(problem.layers))
    loss = sum(-np.log1p(-np.minimum(t.errors, 1 - 1e-9))[choices[:, i]] for i, t in enumerate(problem.layers))
    written = sum(table.activations[choices[:, i]] for i, table in enumerate(problem.layers))
    objective = loss + problem.activation_weight * written
    return float(np.where((cost <= problem.limits).all(axis=1), objective, np.inf).min())


# --- plans are what they say, for every strategy and budget


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
    weights = {layer.name: net.get_submodule(layer.name).weight.detach().clone() for layer in plan.factorised}
    assert weights
    apply_plan_(net, plan)
    for layer in plan.factorised:
        new = net.get_submodule(layer.name).weight.detach()
        measured = float((weights[layer.name] - new).square().sum() / weights[layer.name].square().sum())
        if layer.kind in BOUNDED:
            assert measured <= layer.error * 1.05 + 1e-5
        else:
            assert measured == pytest.approx(layer.error, abs=1e-5)
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


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_search_does_not_depend_on_the_callers_gradient_mode(net, context):
    expected = search_ranks(net, Budget(params=0.5))
    with context():
        plan = search_ranks(net, Budget(params=0.5))
    assert plan.layers == expected.layers


@pytest.mark.parametrize("method", METHODS)
def test_search_is_deterministic(net, method):
    first, second = (search_ranks(net, Budget(params=0.5), method=method, seed=seed) for seed in (0, 7))
    assert first.layers == second.layers
    assert (first.seed, second.seed) == (0, 7)
    assert first.seconds > 0


def test_budget_may_be_a_mapping_and_a_ratio_is_a_fraction(net):
    plans = [search_ranks(net, b, method="exact") for b in ({"params": 0.5}, Budget(params=0.5), {"ratio": "2x"})]
    assert plans[0].layers == plans[1].layers == plans[2].layers
    assert plans[0].budget == plans[2].budget == Budget(params=0.5)


def test_macs_are_unknown_without_an_example_input(net):
    plan = search_ranks(net, Budget(params=0.5), method="exact")
    assert plan.dense.macs is plan.compressed.macs is plan.kept["macs"] is None
    assert {layer.macs_before for layer in plan.layers} == {layer.macs_after for layer in plan.layers} == {None}


@pytest.mark.parametrize("method", METHODS)
def test_shared_module_is_counted_once_in_parameters_and_twice_in_macs(method):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a
            self.c = nn.Linear(16, 16)

        def forward(self, x):
            return self.c(self.b(F.relu(self.a(x))))

    model = Twice()
    budget = Budget(params=0.8, macs=0.7)
    plan = search_ranks(model, budget, example_input=(1, 16), method=method, objective="weight")
    apply_plan_(model, plan)
    assert model.a is model.b
    assert plan.dense.macs == 3 * 256
    assert measure_costs(model, (1, 16)) == plan.compressed
    assert plan.compressed.macs <= 0.7 * 3 * 256


@pytest.mark.parametrize("method", METHODS)
def test_progress_is_reported(net, method):
    seen = []
    search_ranks(net, Budget(params=0.5), method=method, progress=lambda what, done: seen.append((what, done)))
    for what in dict.fromkeys(what for what, _ in seen):
        done = [d for w, d in seen if w == what]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0.0, 1.0)
    assert seen[0][0] == "decomposing layers"
    assert len({what for what, _ in seen}) == 2


# --- what may be chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("multiple", [2, 4])
def test_ranks_are_multiples(method, multiple):
    net = random_net(0)
    plan = search_ranks(net, Budget(params=0.5), method=method, rank_multiple=multiple)
    assert plan.factorised
    for layer in plan.factorised:
        largest = layer.weight_shape[:2]
        # a mode smaller than the multiple may keep its full size
        assert all(
            rank % multiple == 0 or (layer.kind == "tucker2" and rank == size < multiple)
            for rank, size in zip(layer.ranks, largest if layer.kind == "tucker2" else layer.ranks, strict=True)
        )


def test_rank_multiple_above_every_rank_is_an_error():
    message = r"layer '0': no rank of \['svd'\] is a multiple of 16 between min_rank=1 and max_rank=None; .*svd \(8,\)"
    with pytest.raises(ConfigurationError, match=message):
        search_ranks(nn.Sequential(nn.Linear(8, 8)), Budget(params=0.9), rank_multiple=16, kinds="svd")


def test_bounds_that_leave_no_rank_are_an_error(net):
    message = (
        r"layer 'fc2': no rank of \['svd'\] .* between min_rank=9 and max_rank=None; its largest ranks are svd \(4,\)"
    )
    with pytest.raises(ConfigurationError, match=message):
        search_ranks(net, Budget(params=0.9), overrides={"fc2": {"min_rank": 9, "kinds": "svd"}})


@pytest.mark.parametrize("method", METHODS)
def test_kinds_overrides_include_and_exclude_are_kept(net, method):
    plan = search_ranks(
        net,
        Budget(params=0.75),
        method=method,
        kinds=["svd", "tucker2"],
        exclude=["fc2", "conv1"],
        overrides={"fc1": Override(min_rank=2, max_rank=3), "conv2": {"kinds": "spatial_svd"}, "point": "dense"},
    )
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["fc1"].ranks in {(2,), (3,), ()}
    assert layers["conv2"].kind in {"spatial_svd", "dense"}
    assert {n: layers[n].reason for n in ("fc2", "conv1", "point")} == {
        "fc2": "matched by exclude",
        "conv1": "matched by exclude",
        "point": "kept dense by overrides",
    }
    assert layers["conv2"].kind == "spatial_svd"  # nothing else can save a quarter


def test_weight_used_elsewhere_stays_dense_when_an_example_shows_it():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return F.linear(self.other(x), self.fc.weight)

    plan = search_ranks(Reads(), Budget(params=0.8), example_input=(1, 16), method="exact", objective="weight")
    assert [(p.name, p.kind) for p in plan.layers] == [("fc", "dense"), ("other", "interpolative")]
    assert plan.layers[0].reason == "its weight is used outside its own forward"


# --- candidates


def table_of(layer, *, budgeted=("params",), example=None, rank_multiple=1, **settings):
    model = nn.Sequential(layer)
    traced = trace(model, example) if example else None
    (entry,) = take_inventory(model, trace=traced, **settings)
    return tabulate(entry, budgeted=budgeted, rank_multiple=rank_multiple)


def test_candidates_of_a_linear_are_its_useful_ranks_and_dense():
    table = table_of(nn.Linear(6, 10), budgeted=("params", "macs"), example=(1, 4, 6), kinds="svd")
    assert table.kinds == ("svd",) * 3 + ("dense",)
    assert table.ranks == ((1,), (2,), (3,), ())
    assert table.costs.tolist() == [[16 * r, 64 * r, 64 * r] for r in (1, 2, 3)] + [[60, 240, 240]]
    assert table.errors[-1] == 0
    assert table.losses == pytest.approx(-np.log(1 - table.errors))


@pytest.mark.parametrize("budgeted", [("params",), ("macs",), ("params", "macs"), RESOURCES])
def test_candidates_hold_no_dominated_row_and_miss_no_other(budgeted):
    conv = nn.Conv2d(4, 6, (3, 5), stride=2)
    columns = [RESOURCES.index(name) for name in budgeted]
    table = table_of(conv, budgeted=budgeted, example=(1, 4, 11, 13), kinds="tucker2")
    (entry,) = take_inventory(nn.Sequential(conv), kinds="tucker2")
    from lightning_compress.kinds.registry import DECOMPOSITIONS, LayerCall

    tucker, shape = DECOMPOSITIONS["tucker2"], (6, 4, 3, 5)
    profile = tucker.profile(entry.weight.detach().double())
    params = tucker.parameters(shape, profile.ranks)
    macs = tucker.macs(shape, profile.ranks, LayerCall((11, 13), (5, 5), 1))
    costs = np.column_stack([params, macs, 4 * params])
    points = np.column_stack([costs[:, columns], profile.errors])
    expected = set()
    for row, ranks in enumerate(profile.ranks.tolist()):
        cheaper = params[row] < conv.weight.numel() and macs[row] <= conv.weight.numel() * 25
        usable = (params < conv.weight.numel()) & (macs <= conv.weight.numel() * 25)
        better = (points <= points[row]).all(axis=1) & (points < points[row]).any(axis=1) & usable
        if cheaper and not better.any():
            expected.add(tuple(ranks))
    assert set(table.ranks[:-1]) == expected
    assert len(table.ranks) == len(set(table.ranks))


def test_many_ranks_are_thinned_with_both_ends_kept():
    table = table_of(nn.Linear(1100, 1100, bias=False), kinds="svd")
    ranks = [r for (r,) in table.ranks[:-1]]
    assert 1 in ranks
    assert len(ranks) <= EFFORTS["balanced"].ranks
    assert ranks[:20] == list(range(1, 21))
    assert max(ranks) < 550
    tucker = table_of(nn.Conv2d(80, 70, 3, bias=False), kinds="tucker2")
    for mode in (0, 1):
        assert len({ranks[mode] for ranks in tucker.ranks[:-1]}) <= EFFORTS["balanced"].ranks_per_mode


def test_signal_loss_is_the_negative_logarithm_and_finite():
    assert signal_loss(np.array([0.0, 0.5, 0.9])) == pytest.approx([0, math.log(2), math.log(10)])
    assert signal_loss(np.array([1.0]))[0] == pytest.approx(9 * math.log(10), rel=1e-6)


# --- optimality


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budgeted", [("params",), ("params", "macs"), RESOURCES])
def test_exact_is_the_brute_force_optimum(seed, budgeted):
    problem = random_problem(seed, budgeted=budgeted, keep=0.35 + 0.05 * seed, activation_weight=0.2 * (seed % 3))
    best = brute_force(problem)
    choice = search_exact(problem, progress=quiet)
    assert best < np.inf
    assert problem.fits(choice)
    assert problem.loss_of(choice) == pytest.approx(best, rel=1.01e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["exact", "continuous"])
@pytest.mark.parametrize("seed", range(6))
def test_no_better_plan_is_missed_in_a_model_of_many_parameters(strategy, seed):
    # The limit is one parameter below what a near-optimal choice costs: less than the solver's own tolerance
    problem = random_problem(seed, layers=7, scale=10**8, keep=0.4)
    for _ in range(3):
        near = search_exact(problem, progress=quiet)
        problem = dataclasses.replace(problem, limits=problem.cost_of(near) - 1)
        choice = STRATEGIES[strategy].solve(problem, progress=quiet)
        assert problem.fits(choice)
        assert problem.loss_of(choice) <= 1.01 * brute_force(problem)


def test_strategies_of_the_package_are_those_tested_here():
    own = {name for name, found in STRATEGIES.items() if found.solve.__module__.startswith("lightning_compress.")}
    assert own == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_every_strategy_returns_a_choice_that_fits(method, seed):
    problem = random_problem(seed, budgeted=("params", "bytes"), keep=0.3 + 0.1 * seed)
    assert brute_force(problem) < np.inf
    choice = STRATEGIES[method].solve(problem, progress=quiet)
    assert (problem.cost_of(choice) <= problem.limits).all()
    assert len(choice) == len(problem.layers)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgeted", [("params",), ("params", "macs")])
def test_smallest_is_the_least_exceeded(seed, budgeted):
    problem = random_problem(seed, budgeted=budgeted)
    choices = itertools.product(*(range(len(table)) for table in problem.layers))
    worst = min((problem.cost_of(np.array(c)) / problem.limits).max() for c in choices)
    assert (problem.cost_of(smallest(problem)) / problem.limits).max() == pytest.approx(worst, rel=1e-9)


def separable(terms):
    """A convolution of which CP and spatial_svd of that rank lose nothing."""
    conv, rng = nn.Conv2d(32, 32, 3, padding=1, bias=False), np.random.default_rng(terms)
    factors = [rng.standard_normal((terms, size)) for size in conv.weight.shape]
    conv.weight.data = torch.from_numpy(np.einsum("ro,ri,rh,rw->oihw", *factors)).float()
    return nn.Sequential(conv)


def test_of_kinds_that_lose_the_same_the_one_that_writes_less_is_chosen():
    net, kinds = separable(4), ["cp3", "spatial_svd"]
    plan = search_ranks(net, Budget(params=0.2), kinds=kinds, example_input=(1, 32, 8, 8), objective="weight")
    assert plan.layers[0].kind == "spatial_svd"
    assert plan.layers[0].ranks == (4,)  # more ranks are no better and write more
    assert plan.signal_loss < 1e-6
    tight = search_ranks(net, Budget(params=0.04), kinds=kinds, example_input=(1, 32, 8, 8), objective="weight")
    assert tight.layers[0].kind == "cp3"


def test_numbers_written_are_those_of_the_layers():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(32, 10))
    traced = trace(net, (1, 4, 4, 4))
    conv, linear = (
        tabulate(layer, budgeted=("params",)) for layer in take_inventory(net, trace=traced) if not layer.reason
    )
    assert (conv.dense_activations, linear.dense_activations) == (8 * 2 * 2, 10)
    assert linear.activations.tolist() == [*(ranks[0] for ranks in linear.ranks[:-1]), 0]
    beyond = {
        "channel_svd": lambda r: r * 2 * 2,
        "spatial_svd": lambda r: r * 2 * 4,
        "cp3": lambda r: r * (4 * 4 + 2 * 2),
    }
    for kind, written in beyond.items():
        rows = conv.rows_of(kind)
        assert conv.activations[rows].tolist() == [written(conv.ranks[row][0]) for row in rows]


@pytest.mark.parametrize("seed", range(6))
def test_bound_is_below_the_optimum(seed):
    problem = random_problem(seed, keep=0.4)
    for rel_gap in (1e-4, 1e-1):
        solution = solve(problem, rel_gap=rel_gap)
        assert solution.bound <= brute_force(problem) * (1 + 1e-9)
        assert problem.loss_of(solution.choice) <= solution.bound * (1 + rel_gap) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "budget",
    [Budget(params=0.2), Budget(params=0.5), Budget(params=0.8), Budget(macs=0.4), Budget(params=0.3, macs=0.3)],
    ids=str,
)
def test_continuous_is_within_one_percent_of_exact(seed, budget):
    net = random_net(seed)
    exact, continuous = (
        search_ranks(net, budget, example_input=(1, 3, 8, 8), method=method, objective="weight")
        for method in ("exact", "continuous")
    )
    assert continuous.signal_loss <= 1.01 * exact.signal_loss
    assert exact.signal_loss <= continuous.signal_loss * (1 + 2e-4)


def weight_table(net, budgeted, kinds="auto"):
    return [tabulate(layer, budgeted=budgeted) for layer in take_inventory(net, kinds=kinds) if layer.reason is None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_optimality_gap_is_truthful(method, keep):
    net = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(3, 6, 3), nn.Linear(8, 10), nn.LayerNorm(5))
    kinds = ["svd", "channel_svd", "spatial_svd", "tucker2"]
    plan = search_ranks(net, Budget(params=keep), method=method, kinds=kinds)
    tables = weight_table(net, ("params",), kinds)
    total = sum(p.numel() for p in net.parameters())
    rest = total - sum(int(t.costs[-1, 0]) for t in tables)
    limit = np.array([math.floor(keep * total + 1e-6) - rest], dtype=float)
    best = brute_force(Problem(tuple(tables), ("params",), limit))
    true_gap = plan.signal_loss / best - 1
    assert true_gap - 1e-9 <= plan.optimality_gap <= true_gap + 2.1e-3 * (1 + true_gap)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_uniform_takes_the_same_share_of_every_layer(keep):
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(20, 60, bias=False), nn.Linear(64, 16, bias=False))
    plan = search_ranks(net, Budget(params=keep), method="uniform")
    sizes = [(layer.weight_shape, layer.params_after / layer.params_before) for layer in plan.layers]

    def at(share):  # the largest rank of each layer whose share of the dense parameters is at most this
        kept = []
        for (out, in_), _ in sizes:
            ranks = [r for r in range(1, min(out, in_) + 1) if r * (out + in_) < out * in_]
            shares = [r * (out + in_) / (out * in_) for r in ranks] + [1.0]
            kept.append(max([s for s in shares if s <= share], default=shares[0]))
        return kept

    every = sorted({s for share in np.linspace(0, 1, 2001) for s in at(share)})
    weights = [out * in_ for (out, in_), _ in sizes]
    fitting = [s for s in every if np.dot(at(s), weights) <= keep * sum(weights) + 1e-6]
    assert [share for _, share in sizes] == pytest.approx(at(max(fitting)))


def test_uniform_uses_the_first_kind_that_applies():
    net = random_net(1)
    plan = search_ranks(net, Budget(params=0.5), method="uniform")
    assert {layer.kind for layer in plan.factorised} <= {"svd", "channel_svd"}
    other = search_ranks(net, Budget(params=0.5), method="uniform", kinds=["tucker2", "svd"])
    assert {layer.kind for layer in other.factorised} == {"tucker2", "svd"}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_energy_takes_the_cheapest_candidate_within_one_threshold(keep):
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(20, 60), nn.Linear(64, 16))
    plan = search_ranks(net, Budget(params=keep), method="energy", kinds="svd")
    dense = sum(p.numel() for p in net.parameters())

    def at(threshold):
        after, ranks = 0, []
        for layer in net:
            out, in_ = layer.weight.shape
            energy = torch.linalg.svdvals(layer.weight.detach().double()).square()
            errors = [float(energy[r:].sum() / energy.sum()) for r in range(1, len(energy) + 1)]
            fitting = [r for r, e in enumerate(errors, 1) if e <= threshold and r * (out + in_) < out * in_]
            ranks.append((fitting[0],) if fitting else ())
            after += (fitting[0] * (out + in_) if fitting else out * in_) + out
        return after, ranks

    thresholds = sorted({layer.error for layer in plan.layers} | set(np.linspace(0, 1, 3001)))
    least = next(t for t in thresholds if at(t + 1e-9)[0] <= keep * dense)
    assert max(layer.error for layer in plan.layers) <= least + 1e-9
    assert [layer.ranks for layer in plan.layers] == at(max(layer.error for layer in plan.layers) + 1e-9)[1]


# --- budgets that cannot be kept


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resource", RESOURCES)
def test_stated_smallest_budget_can_be_kept(net, unchanged, method, resource):
    before, settings = unchanged(net), {"example_input": SHAPE, "method": method, "objective": "weight"}
    with pytest.raises(InfeasibleBudgetError, match=f"no plan keeps {resource} <= 1 %: the smallest reachable is") as e:
        search_ranks(net, Budget(**{resource: 0.01}), **settings)
    before.check()
    stated = float(re.search(rf"reachable is {resource}=(\d\.\d+)\.", str(e.value)).group(1))
    plan = search_ranks(net, Budget(**{resource: stated}), **settings)
    assert stated - 1.01e-4 < plan.kept[resource] <= stated
    with pytest.raises(InfeasibleBudgetError, match=f"{resource}={stated:.4f}"):
        search_ranks(net, Budget(**{resource: stated - 1.1e-4}), **settings)


def test_infeasible_pair_states_both(net):
    with pytest.raises(
        InfeasibleBudgetError, match=r"params <= 1 %, macs <= 90 %.* params=0\.\d{4}, macs=0\.\d{4} \(each"
    ):
        search_ranks(net, Budget(params=0.01, macs=0.9), example_input=SHAPE)


def test_fixed_part_of_the_model_counts():
    net = nn.Sequential(nn.Bilinear(10, 10, 10, bias=False), nn.Linear(10, 10))
    with pytest.raises(InfeasibleBudgetError, match=r"params <= 50 %: the smallest reachable is params=0\.9271"):
        search_ranks(net, Budget(params=0.5))  # (1000 + 10 + 19) / 1110 of them remain at rank 1


# --- arguments


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), True, "0.2", [0.2]])
def test_malformed_budget_is_an_error(resource, value):
    message = (
        rf"Budget\({resource}={re.escape(repr(value))}\): expected the fraction of the dense model to keep.*\(0, 1\]"
    )
    with pytest.raises(BudgetError, match=message):
        Budget(**{resource: value})
    with pytest.raises(BudgetError, match=message):
        search_ranks(TinyNet(), {resource: value}, example_input=SHAPE)


@pytest.mark.parametrize("ratio", [5, 0.2, "5", "0.5x", "x", "-2x", "0x", "nanx", "", "5xx", True])
def test_malformed_ratio_is_an_error(ratio):
    with pytest.raises(BudgetError, match=rf"Budget\(ratio={re.escape(repr(ratio))}\): .*'5x'.*params=0.2"):
        Budget(ratio=ratio)


@pytest.mark.parametrize(("ratio", "kept"), [("5x", 0.2), (" 2.5 X ", 0.4), ("1x", 1.0)])
def test_ratio_is_one_over_the_kept_fraction(ratio, kept):
    assert Budget(ratio=ratio) == Budget(params=kept)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.2, BudgetError, r"budget=0.2: expected a Budget or a mapping, as in Budget\(params=0.2\)"),
        (None, BudgetError, r"budget=None: expected a Budget"),
        ("5x", BudgetError, r"budget='5x': expected a Budget"),
        ({}, BudgetError, r"Budget\(\) bounds nothing: give at least one of params, macs, bytes, ratio='5x', or max_"),
        ({"params": None}, BudgetError, r"Budget\(\) bounds nothing"),
        ({"param": 0.2}, ConfigurationError, r"budget: unknown key 'param'. Did you mean 'params'"),
        ({"params": 0.2, "ratio": "5x"}, BudgetError, r"params=0.2, ratio='5x'.*give one of the two"),
        ({"latency": 0.5}, UnsupportedError, r"Budget\(latency=0.5\): .* does not bound it; use macs="),
    ],
)
def test_wrong_budget_argument_is_an_error(net, unchanged, value, error, message):
    before = unchanged(net)
    with pytest.raises(error, match=message):
        search_ranks(net, value)
    before.check()


BAD_SETTINGS = [
    ({"method": "exakt"}, ConfigurationError, r"search method 'exakt' is unknown. Did you mean 'exact'.*uniform"),
    ({"method": None}, ConfigurationError, r"search method None is unknown.*continuous, energy, exact, paper, uniform"),
    ({"method": ["exact"]}, ConfigurationError, r"search method \['exact'\] is unknown"),
    ({"objective": "weights"}, ConfigurationError, r"objective='weights' is unknown. Did you mean 'weight'"),
    ({"objective": 1}, ConfigurationError, r"objective=1 is unknown"),
    (
        {"objective": "end_to_end", "method": "exact"},
        ConfigurationError,
        r"objective='end_to_end' is nothing for method='exact', which takes 'weight', 'moments'",
    ),
    ({"rank_multiple": 0}, ConfigurationError, r"rank_multiple=0: expected a whole number of at least 1"),
    ({"rank_multiple": 2.0}, ConfigurationError, r"rank_multiple=2.0: expected a whole number"),
    ({"rank_multiple": True}, ConfigurationError, r"rank_multiple=True: expected a whole number"),
    ({"seed": -1}, ConfigurationError, r"seed=-1: expected a whole number of at least 0"),
    ({"seed": "0"}, ConfigurationError, r"seed='0': expected a whole number"),
    ({"kinds": "tuker2"}, ConfigurationError, r"kinds='tuker2': unknown kind 'tuker2'. Did you mean 'tucker2'"),
    ({"kinds": []}, ConfigurationError, r"kinds=\[\]: expected 'auto', a kind, or a list of kinds"),
    ({"include": "nope"}, SelectionError, r"include: 'nope' matches no layer"),
    ({"exclude": ["nope.*"]}, SelectionError, r"exclude: 'nope\.\*' matches no layer"),
    ({"overrides": {"nope": "dense"}}, SelectionError, r"overrides: 'nope' matches no layer"),
    ({"overrides": {"fc1": {"rank": 2}}}, ConfigurationError, r"overrides\['fc1'\]: unknown key 'rank'.*max_rank"),
]


@pytest.mark.parametrize(("setting", "error", "message"), BAD_SETTINGS, ids=[str(s) for s, *_ in BAD_SETTINGS])
def test_wrong_setting_is_an_error_before_the_model_is_run(net, unchanged, setting, error, message):
    calls = []
    net.fc1.register_forward_hook(lambda *_: calls.append(1))
    before = unchanged(net)
    with pytest.raises(error, match=message):
        search_ranks(net, Budget(params=0.5), example_input=SHAPE, **setting)
    before.check()
    assert calls == []


@pytest.mark.parametrize("model", [None, 5, "resnet", TinyNet, {"a": nn.Linear(2, 2)}])
def test_model_that_is_no_module_is_an_error(model):
    with pytest.raises(ConfigurationError, match=r"model=.*: expected a torch.nn.Module") as error:
        search_ranks(model, Budget(params=0.5))
    assert repr(model) in str(error.value)


def test_budget_in_macs_needs_an_example_input(net, unchanged):
    before = unchanged(net)
    with pytest.raises(
        ExampleInputError, match=r"a budget in MACs \(macs <= 50 %\) needs example_input: .*\(1, 3, 224"
    ):
        search_ranks(net, Budget(macs=0.5))
    before.check()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((1, 8), r"the model fails on example_input \(1, 8\): .*Shapes include the batch dimension"),
        ((1, 4, 8, 8), r"the model fails on example_input \(1, 4, 8, 8\): RuntimeError"),
        ({"y": torch.zeros(1, 3, 8, 8)}, r"the model fails on example_input \{'y': \(1, 3, 8, 8\)\}: TypeError.*'y'"),
        ("zeros", r"example_input='zeros': expected a tensor"),
    ],
)
def test_example_input_that_does_not_fit_is_an_error(net, unchanged, example, message):
    before = unchanged(net)
    with pytest.raises(ExampleInputError, match=message):
        search_ranks(net, Budget(params=0.5), example_input=example)
    before.check()


def test_nothing_to_factorise_is_an_error():
    with pytest.raises(NothingToFactoriseError, match=r"0 \(LayerNorm\): no kind factorises LayerNorm"):
        search_ranks(nn.Sequential(nn.LayerNorm(4)), Budget(params=0.5))

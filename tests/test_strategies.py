"""The published strategies "alds" and "paper", and the columns of the candidates they work with."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.settings import RESOURCES
from lightning_compress.kinds.metric import Metric
from lightning_compress.search.candidates import Candidates, tabulate
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import STRATEGIES
from lightning_compress.search.strategies.paper import (
    BETA,
    GAMMA,
    _first_step,
    _longest_chain,
    _loss,
    _most_probable,
    _Path,
    _search,
    _window,
)
from tests.conftest import TinyNet, planned_error

ALDS_KINDS = STRATEGIES["alds"].kinds
SHAPE = (1, 3, 8, 8)


def quiet(*_):
    pass


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table_of(layer, kinds, metric=None):
    (entry,) = take_inventory(nn.Sequential(layer), kinds=kinds)
    return tabulate(entry, budgeted=("params",), metric=metric)


def random_net(seed):
    """Spectra of different decay, as trained layers have."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(8, 12, 3), nn.Conv2d(12, 20, 3), nn.Conv2d(20, 16, 1), nn.Linear(30, 24), nn.Linear(64, 48)
    )
    with torch.no_grad():
        for index, layer in enumerate(net):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            decay = torch.exp(-torch.arange(len(s)) * (0.05 + 0.1 * ((index + seed) % 4)))
            layer.weight.copy_((u * s * decay @ v).view_as(layer.weight))
    return net


# --- columns of the candidates


def unfolding(weight, kind):
    if kind == "spatial_svd":
        out, in_, k_h, k_w = weight.shape
        return weight.permute(0, 3, 1, 2).reshape(out * k_w, in_ * k_h)
    return weight.flatten(1)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("svd", nn.Linear(9, 14)),
        ("svd", nn.Conv2d(12, 10, 1)),
        ("channel_svd", nn.Conv2d(6, 20, 3)),
        ("spatial_svd", nn.Conv2d(6, 8, 3)),
    ],
)
def test_spectral_column_is_the_first_singular_value_left_out(kind, layer):
    table = table_of(layer, kind)
    values = np.linalg.svd(unfolding(layer.weight.detach().double(), kind).numpy(), compute_uv=False)
    expected = [values[rank] / values[0] for (rank,) in table.ranks[:-1]]
    assert len(expected) > 3
    assert table.spectral == pytest.approx([*expected, 0.0], abs=1e-7)
    assert table.energy == pytest.approx(float(layer.weight.detach().double().square().sum()), rel=1e-12)


@pytest.mark.parametrize(("kind", "splits"), [("split2_svd", 2), ("split4_svd", 4)])
def test_spectral_column_of_the_split_kinds_is_the_maximum_over_the_splits(kind, splits):
    layer = nn.Conv2d(8, 10, 3)
    table, weight = table_of(layer, kind), layer.weight.detach().double()
    values = [np.linalg.svd(part.flatten(1).numpy(), compute_uv=False) for part in weight.chunk(splits, dim=1)]
    largest = np.linalg.norm(weight.flatten(1).numpy(), 2)
    expected = [max(s[rank] for s in values) / largest for (rank,) in table.ranks[:-1]]
    assert len(expected) >= 2
    assert table.spectral == pytest.approx([*expected, 0.0], abs=1e-7)


def test_kind_of_several_ranks_has_no_spectrum():
    table = table_of(nn.Conv2d(8, 10, 3), ["channel_svd", "tucker2"])
    tucker = table.rows_of("tucker2")
    assert len(tucker) > 3
    assert np.isinf(table.spectral[tucker]).all()
    assert np.isfinite(np.delete(table.spectral, tucker)).all()


@pytest.mark.parametrize(("kind", "layer"), [("svd", nn.Linear(9, 14)), ("channel_svd", nn.Conv2d(4, 20, 3))])
@pytest.mark.parametrize("two_sided", [False, True])
def test_columns_in_a_metric_are_those_of_the_weight_times_its_roots(kind, layer, two_sided):
    weight = layer.weight.detach().double().flatten(1)
    root = torch.linalg.cholesky(torch.cov(normal(weight.shape[1], 100, seed=2)))
    outputs = torch.cov(normal(len(weight), 100, seed=4))
    table = table_of(layer, kind, metric=Metric(root @ root.T, outputs if two_sided else None))
    floored = 0.95 * outputs / outputs.diagonal().mean() + 0.05 * torch.eye(len(weight), dtype=torch.float64)
    left = torch.linalg.cholesky(floored).T if two_sided else torch.eye(len(weight), dtype=torch.float64)
    values = torch.linalg.svdvals(left @ weight @ root).numpy()
    assert table.spectral == pytest.approx([*(values[r] / values[0] for (r,) in table.ranks[:-1]), 0.0], abs=1e-7)
    assert table.energy == pytest.approx(np.square(values).sum(), rel=1e-10)


def test_spectral_column_of_spatial_svd_in_a_metric_is_what_its_components_explain():
    layer, metric = nn.Conv2d(6, 8, 3), Metric(torch.cov(normal(54, 200, seed=3)))
    table = table_of(layer, "spatial_svd", metric=metric)
    shares = 1 - table.errors[0], *(-np.diff(table.errors[:-1]))
    assert table.ranks[: len(shares)] == tuple((r,) for r in range(1, len(shares) + 1))
    assert (np.diff(table.spectral) <= 0).all()
    assert (table.spectral <= 1).all()
    for row, share in enumerate(shares[1:]):  # at least what the next component explains
        assert table.spectral[row] >= np.sqrt(share / max(shares)) * (1 - 1e-9)


def test_restricted_problem_keeps_the_new_columns():
    tables = tuple(table_of(layer, "auto") for layer in (nn.Linear(9, 14), nn.Conv2d(8, 10, 3)))
    problem = Problem(tables, ("params",), np.array([500.0]))
    rows = [np.array([1, 0]), np.array([2, len(tables[1]) - 1])]
    for small, table, kept in zip(problem.restricted(rows).layers, tables, rows, strict=True):
        assert small.spectral.tolist() == table.spectral[kept].tolist()
        assert (small.energy, small.name, small.costs.tolist()) == (
            table.energy,
            table.name,
            table.costs[kept].tolist(),
        )


# --- alds


def random_problem(seed, *, layers=5, rows=6, budgeted=("params",), keep=0.45):
    """Candidates of no particular kind: errors and spectra unrelated, costs of the budgets opposed."""
    rng = np.random.default_rng(seed)
    tables = []
    for index in range(layers):
        costs = np.zeros((rows, len(RESOURCES)))
        for name in budgeted:
            costs[:, RESOURCES.index(name)] = [*rng.integers(1, 900, size=rows - 1), 1000]
        errors, spectral = (np.append(rng.random(rows - 1), 0.0) for _ in range(2))
        ranks = (*((r + 1,) for r in range(rows - 1)), ())
        kinds = (*("svd",) * (rows - 1), "dense")
        tables.append(Candidates(str(index), kinds, ranks, errors, spectral, 1.0, costs, np.zeros(rows), 0.0))
    return Problem(tuple(tables), budgeted, np.full(len(budgeted), np.floor(keep * 1000 * layers)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgeted", [("params",), ("params", "macs"), RESOURCES])
def test_alds_is_the_brute_force_minimum_of_the_largest_relative_error(seed, budgeted):
    problem = random_problem(seed, budgeted=budgeted, keep=0.45 + 0.05 * seed)
    columns = [RESOURCES.index(name) for name in budgeted]
    choices = np.array(list(itertools.product(range(6), repeat=5)))
    cost = sum(t.costs[:, columns][choices[:, i]] for i, t in enumerate(problem.layers))
    largest = np.max([t.spectral[choices[:, i]] for i, t in enumerate(problem.layers)], axis=0)
    fits = (cost <= problem.limits).all(axis=1)
    assert fits.any()
    choice = STRATEGIES["alds"].solve(problem, progress=quiet)
    assert problem.fits(choice)
    assert max(t.spectral[row] for t, row in zip(problem.layers, choice, strict=True)) == largest[fits].min()
    if len(budgeted) == 1:  # and of those choices it is the cheapest: what is left over stays unspent
        assert problem.cost_of(choice)[0] == cost[fits & (largest <= largest[fits].min())].min()


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_alds_plan_of_a_model_is_the_published_rule(keep):
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


def test_alds_brings_its_own_kinds_and_judges_weights():
    net = TinyNet().eval()
    assert ALDS_KINDS == ("svd", "channel_svd", "split2_svd", "split4_svd")
    statistics = gather_statistics(net, SHAPE)
    plain = search_ranks(net, Budget(params=0.5), method="alds")
    assert {p.kind for p in plain.factorised} <= set(ALDS_KINDS)
    assert {p.kind for p in plain.factorised} & {"split2_svd", "split4_svd"}
    auto = search_ranks(net, Budget(params=0.5), method="alds", statistics=statistics, kinds=["auto"])
    assert (auto.objective, auto.layers) == ("weight", plain.layers)
    moments = search_ranks(net, Budget(params=0.5), method="alds", statistics=statistics, objective="moments")
    assert moments.objective == "moments"
    assert moments.layers != plain.layers
    named = search_ranks(net, Budget(params=0.5), method="alds", kinds=["svd", "spatial_svd"])
    assert {p.kind for p in named.factorised} == {"svd", "spatial_svd"}
    others = search_ranks(net, Budget(params=0.5), method="energy")
    assert {p.kind for p in others.factorised}.isdisjoint({"split2_svd", "split4_svd"})


def test_alds_takes_a_kind_without_spectrum_only_where_nothing_else_keeps_the_budget():
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    wide = search_ranks(net, Budget(params=0.5), method="alds", kinds=["channel_svd", "tucker2"])
    assert {p.kind for p in wide.factorised} == {"channel_svd"}
    narrow = search_ranks(net, Budget(params=0.05), method="alds", kinds=["channel_svd", "tucker2"])
    assert {p.kind for p in narrow.factorised} == {"tucker2"}
    assert narrow.kept["params"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alds", "paper"])
@pytest.mark.parametrize("objective", ["weight", "moments"])
def test_published_methods_keep_several_budgets_in_the_real_model(method, objective):
    net = TinyNet().eval()
    statistics = gather_statistics(net, SHAPE) if objective == "moments" else None
    budget = Budget(params=0.5, macs=0.6, bytes=0.55)
    plan = search_ranks(net, budget, example_input=SHAPE, method=method, objective=objective, statistics=statistics)
    weights = {p.name: net.get_submodule(p.name).weight.detach().double().clone() for p in plan.factorised}
    apply_plan_(net, plan, statistics=statistics)
    assert all(plan.kept[name] <= limit for name, limit in budget.limits().items())
    for planned in plan.factorised:
        metric = statistics.metric(planned.name) if statistics else None
        measured = planned_error(metric, weights[planned.name], net.get_submodule(planned.name).weight)
        if objective == "weight" or not planned.kind.startswith("split"):
            assert measured == pytest.approx(planned.error, abs=1e-5)
        else:
            assert measured <= planned.error + 1e-5  # an upper bound


# --- paper: its loss


def truncations(kind, weight):
    """Every truncation of a weight along one path, by numpy, each of the shape of the unfolding."""
    if kind == "tucker2":
        u_out = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)[0]
        u_in = np.linalg.svd(weight.transpose(1, 0, 2, 3).reshape(weight.shape[1], -1), full_matrices=False)[0]

        def project(ranks):
            p_out, p_in = (u[:, :r] @ u[:, :r].T for u, r in zip((u_out, u_in), ranks, strict=True))
            return np.einsum("ab,bchw,cd->adhw", p_out, weight, p_in)

        return project
    blocks = np.split(weight.reshape(len(weight), -1), 2 if kind == "split2_svd" else 1, axis=1)
    if kind == "spatial_svd":
        blocks = [unfolding(torch.from_numpy(weight), kind).numpy()]
    factors = [np.linalg.svd(block, full_matrices=False) for block in blocks]
    return lambda ranks: np.concatenate([(u[:, : ranks[0]] * s[: ranks[0]]) @ v[: ranks[0]] for u, s, v in factors], 1)


@pytest.mark.parametrize("kind", ["svd", "channel_svd", "spatial_svd", "split2_svd", "tucker2"])
def test_mixed_error_is_that_of_the_mixed_matrices(kind):
    layer = (nn.Linear(20, 24) if kind == "svd" else nn.Conv2d(8, 12, 3)).double()
    table, weight = table_of(layer, kind), layer.weight.detach().numpy()
    path = _Path.of(0, table)
    ranks = [table.ranks[row] for row in path.rows]
    assert len(ranks) > 3
    logits = np.random.default_rng(0).normal(size=len(ranks))
    probability = np.exp(logits) / np.exp(logits).sum()
    whole = unfolding(torch.from_numpy(weight), kind).numpy() if kind == "spatial_svd" else weight
    truncated = truncations(kind, weight)
    mixed = sum(p * truncated(r) for p, r in zip(probability, ranks, strict=True))
    distance = np.square(whole.reshape(mixed.shape) - mixed).sum()
    largest = path.ranks / path.ranks[-1]
    expected = distance * GAMMA * (probability @ largest) ** BETA
    shares = -np.diff([1.0, *path.errors, 0.0]) * path.energy
    loss = _loss(*(torch.from_numpy(np.atleast_2d(x)) for x in (probability, shares, largest)))
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_loss_is_the_product_of_the_sums_over_the_layers():
    rng = np.random.default_rng(1)
    probability, shares, ranks = rng.dirichlet(np.ones(4), size=3), rng.random((3, 5)), rng.random((3, 4))
    distance = penalty = 0.0
    for p, share, r in zip(probability, shares, ranks, strict=True):
        distance += sum(share[j] * (1 - p[j:].sum()) ** 2 for j in range(5))
        penalty += GAMMA * sum(p * r) ** BETA
    assert (GAMMA, BETA) == (0.4, 0.8)
    assert float(_loss(*map(torch.from_numpy, (probability, shares, ranks)))) == pytest.approx(distance * penalty)


def test_truncated_svd_is_the_best_weight_step_whatever_the_coefficients():
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(6, 9)) * np.linspace(3, 0.5, 6)[:, None]
    u = np.linalg.svd(weight)[0]
    for _ in range(20):
        probability = rng.dirichlet(np.full(5, rng.choice([0.2, 1.0, 5.0])))

        def mixed_error(basis, p=probability):
            mix = sum(p[r] * basis[:, : r + 1] @ basis[:, : r + 1].T @ weight for r in range(5))
            return np.square(weight - mix).sum()

        best = mixed_error(u)
        for _ in range(20):
            near = np.linalg.qr(u + rng.choice([0.01, 0.3, 3.0]) * rng.normal(size=(6, 6)))[0]
            assert best <= mixed_error(near) * (1 + 1e-12)


def path_of(ranks, errors, energy=1.0, layer=0):
    ranks = np.asarray(ranks, dtype=float)
    return _Path(layer, np.arange(len(ranks)), ranks, np.asarray(errors, dtype=float), energy)


def test_descent_finds_the_knee_that_enumeration_finds():
    # Five strong components and a long flat tail: the product is lowest at the knee
    knee = np.append(0.1 + 0.9 * (1 - np.arange(1, 6) / 5), 0.1 - 0.001 * np.arange(1, 16))
    # The smallest rank wins where nothing is gained by more
    flat = 0.99 - 0.001 * np.arange(20)
    paths = [path_of(np.arange(1, 21), knee), path_of(np.arange(1, 21), flat, energy=1e-3, layer=1)]
    table = [
        [(knee[i] + 1e-3 * flat[j]) * (((i + 1) / 20) ** BETA + ((j + 1) / 20) ** BETA) for j in range(20)]
        for i in range(20)
    ]
    best = np.unravel_index(np.argmin(table), (20, 20))
    assert best == (4, 0)
    assert _most_probable(paths, [np.arange(20)] * 2) == [4, 0]


def test_search_does_not_depend_on_the_scale_of_the_weights():
    net, scaled = random_net(0), random_net(0)
    with torch.no_grad():
        for layer in scaled:
            layer.weight.mul_(2.0**10)
    plans = [search_ranks(n, Budget(params=0.4), method="paper") for n in (net, scaled)]
    assert [(p.kind, p.ranks) for p in plans[0].layers] == [(p.kind, p.ranks) for p in plans[1].layers]


# --- paper: windows, paths, the budget


@pytest.mark.parametrize(
    ("largest", "step"), [(1, 1), (79, 1), (80, 10), (100, 10), (799, 10), (800, 100), (850, 100), (8000, 1000)]
)
def test_first_step_is_the_papers_for_its_own_sets(largest, step):
    assert _first_step(largest) == step


def test_windows_shrink_as_in_the_papers_figure():
    path = path_of(np.arange(1, 901), np.linspace(1, 0, 900))
    second = _window(path, 200 - 1, 100)
    assert path.ranks[second].tolist() == list(range(150, 251, 10))
    third = _window(path, 240 - 1, 10)
    assert path.ranks[third].tolist() == list(range(235, 246))
    assert path.ranks[_window(path, 243 - 1, 1)].tolist() == [243]
    assert path.ranks[_window(path, 3 - 1, 10)].tolist() == list(range(1, 9))
    sparse = path_of(np.arange(16, 901, 16), np.linspace(1, 0, 56))
    assert sparse.ranks[_window(sparse, 9, 100)].tolist() == [112, 128, 144, 160, 176, 192, 208]


def test_search_refines_every_layer_to_single_ranks():
    # A knee at 37 between the ranks of the first set, 10, 20, …; beside it a layer that starts with step 1
    errors = np.concatenate([np.linspace(0.98, 0.04, 37), np.linspace(0.0399, 0.039, 93)])
    small = np.append(0.02 + 0.98 * (1 - np.arange(1, 4) / 3), np.full(9, 0.0199))
    paths = [path_of(np.arange(1, 131), errors), path_of(np.arange(1, 13), small, layer=1)]
    seen = []
    found = _search(paths, seen.append)
    assert found == [37.0, 3.0]
    assert seen == [0.5]


@pytest.mark.parametrize("seed", range(5))
def test_chain_is_the_longest_of_nested_candidates(seed):
    ranks = np.random.default_rng(seed).integers(1, 7, size=(9, 2)).astype(float)
    ranks = np.unique(ranks, axis=0)
    chain = ranks[_longest_chain(ranks)]
    assert (np.diff(chain, axis=0) >= 0).all()
    subsets = itertools.chain.from_iterable(itertools.combinations(range(len(ranks)), n) for n in range(1, 10))
    order = np.lexsort((*ranks.T, ranks.sum(axis=1)))
    longest = max(len(s) for s in subsets if (np.diff(ranks[order[list(s)]], axis=0) >= 0).all())
    assert len(chain) == longest


def test_paper_uses_one_kind_per_layer():
    net = TinyNet()
    plan = search_ranks(net, Budget(params=0.5), method="paper")
    kinds = {p.name: p.kind for p in plan.factorised}
    assert set(kinds) >= {"conv2", "point", "fc1"}
    assert all(kind == ("channel_svd" if name in ("conv1", "conv2") else "svd") for name, kind in kinds.items())
    named = search_ranks(net, Budget(params=0.5), method="paper", kinds=["tucker2", "svd", "channel_svd"])
    assert {p.kind for p in named.factorised} == {"tucker2", "svd"}


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("kinds", ["auto", ["tucker2", "svd"]])
def test_ranks_are_scaled_by_the_largest_common_factor_that_keeps_the_budget(keep, kinds, monkeypatch):
    import lightning_compress.search.strategies.paper as module

    searched = []

    def spy(paths, progress):
        searched.append((paths, _search(paths, progress)))
        return searched[0][1]

    monkeypatch.setattr(module, "_search", spy)
    net = random_net(2)
    plan = search_ranks(net, Budget(params=keep), method="paper", kinds=kinds)
    tables = [tabulate(layer, budgeted=("params",)) for layer in take_inventory(net, kinds=kinds)]
    ((paths, ranks),) = searched
    rest = plan.dense.params - sum(t.costs[-1, 0] for t in tables)

    def at(factor):
        after, chosen = rest, []
        for path, rank, table in zip(paths, ranks, tables, strict=True):
            scaled = Fraction(rank) * factor
            rows = [row for row, r in zip(path.rows, path.ranks, strict=True) if Fraction(r) <= scaled]
            row = rows[-1] if rows else path.rows[0]
            if scaled >= Fraction(path.ranks[-1]) + 1:  # beyond all its candidates
                row = len(table) - 1
            chosen.append((table.kinds[row], table.ranks[row]))
            after += table.costs[row, 0]
        return after, chosen

    halves = [Fraction(n, 2) for n in range(2, 200)]
    factors = {half / Fraction(rank) for half in halves for rank in ranks}
    fitting = [factor for factor in factors if at(factor)[0] <= keep * plan.dense.params]
    found = [(p.kind, p.ranks) for p in plan.layers]
    assert at(max(fitting))[1] == found
    assert plan.compressed.params == at(max(fitting))[0]


def test_paper_falls_back_to_other_kinds_only_where_no_factor_fits():
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    for kinds, fallbacks in (("auto", {"tucker2", "tt", "cp3"}), (["channel_svd", "tucker2"], {"tucker2"})):
        plan = search_ranks(net, Budget(params=0.05), method="paper", kinds=kinds)  # channel SVD of rank 1 keeps 7 %
        assert plan.factorised
        assert {p.kind for p in plan.factorised} <= fallbacks
        assert plan.kept["params"] <= 0.05


@pytest.mark.parametrize("method", ["alds", "paper"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_published_methods_do_not_depend_on_the_callers_gradient_mode(method, context):
    net = TinyNet()
    expected = search_ranks(net, Budget(params=0.5), method=method)
    with context():
        assert search_ranks(net, Budget(params=0.5), method=method).layers == expected.layers


def test_paper_judges_weights_unless_moments_are_asked_for():
    net = TinyNet().eval()
    statistics = gather_statistics(net, SHAPE)
    plain = search_ranks(net, Budget(params=0.5), method="paper")
    auto = search_ranks(net, Budget(params=0.5), method="paper", statistics=statistics)
    assert (auto.objective, auto.layers) == ("weight", plain.layers)
    moments = search_ranks(net, Budget(params=0.5), method="paper", statistics=statistics, objective="moments")
    assert moments.objective == "moments"

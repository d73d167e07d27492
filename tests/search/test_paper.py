"""The published strategy "paper": its loss, its windows, its budget."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.search.candidates import tabulate
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
from tests.support.nets import SHAPE, TinyNet, random_net, unfolding
from tests.support.searching import ranks_of, table_of


def truncations(kind, weight):
    """Every truncation of a weight along one path, by numpy, each of the shape of the unfolding."""
    if kind == "tucker2":
        u_out = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)[0]
        u_in = np.linalg.svd(weight.transpose(1, 0, 2, 3).reshape(weight.shape[1], -1), full_matrices=False)[0]

        def project(ranks):
            p_out, p_in = (u[:, :r] @ u[:, :r].T for u, r in zip((u_out, u_in), ranks, strict=True))
            return np.einsum("ab,bchw,cd->adhw", p_out, weight, p_in)

        return project
    u, s, v = np.linalg.svd(unfolding(torch.from_numpy(weight), kind).numpy(), full_matrices=False)
    return lambda ranks: (u[:, : ranks[0]] * s[: ranks[0]]) @ v[: ranks[0]]


@pytest.mark.parametrize("kind", ["svd", "channel_svd", "spatial_svd", "tucker2"])
def test_mixed_error_is_that_of_the_mixed_matrices(kind):
    layer = (nn.Linear(20, 24) if kind == "svd" else nn.Conv2d(8, 12, 3)).double()
    table, weight = table_of(layer, kinds=kind), layer.weight.detach().numpy()
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
    assert ranks_of(plans[0]) == ranks_of(plans[1])


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
    searched = []

    def spy(paths, progress):
        searched.append((paths, _search(paths, progress)))
        return searched[0][1]

    monkeypatch.setattr("lightning_compress.search.strategies.paper._search", spy)
    net = random_net(2)
    plan = search_ranks(net, Budget(params=keep), method="paper", kinds=kinds)
    tables = [tabulate(layer, compared=("params",)) for layer in take_inventory(net, kinds=kinds)]
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
    assert at(max(fitting))[1] == ranks_of(plan)
    assert plan.compressed.params == at(max(fitting))[0]


def test_paper_falls_back_to_other_kinds_only_where_no_factor_fits():
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    for kinds, fallbacks in (("auto", {"tucker2", "tt", "cp3"}), (["channel_svd", "tucker2"], {"tucker2"})):
        plan = search_ranks(net, Budget(params=0.05), method="paper", kinds=kinds)  # channel SVD of rank 1 keeps 7 %
        assert plan.factorised
        assert {p.kind for p in plan.factorised} <= fallbacks
        assert plan.kept["params"] <= 0.05


@pytest.mark.slow
def test_paper_judges_weights_alone():
    net = TinyNet().eval()
    statistics = gather_statistics(net, SHAPE)
    plain = search_ranks(net, Budget(params=0.5), method="paper")
    auto = search_ranks(net, Budget(params=0.5), method="paper", statistics=statistics)
    assert (auto.objective, auto.layers) == ("weight", plain.layers)
    with pytest.raises(
        ConfigurationError, match="objective='moments' is nothing for method='paper', which takes 'weight'"
    ):
        search_ranks(net, Budget(params=0.5), method="paper", statistics=statistics, objective="moments")

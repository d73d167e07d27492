"""The exact search, its bounds, and the gaps that plans state, against enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.progress import silent
from lightning_compress.core.settings import RESOURCES
from lightning_compress.search.candidates import tabulate
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import STRATEGIES, search_exact
from tests.support.searching import METHODS, brute_force, random_problem


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budgeted", [("params",), ("params", "macs"), RESOURCES])
def test_exact_is_the_brute_force_optimum(seed, budgeted):
    problem = random_problem(
        seed, budgeted=budgeted, keep=0.35 + 0.05 * seed, timing=SimpleNamespace(best=10.0 ** (1 - seed % 3))
    )
    best = brute_force(problem)
    choice = search_exact(problem, progress=silent)
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
        near = search_exact(problem, progress=silent)
        problem = dataclasses.replace(problem, limits=problem.cost_of(near) - 1)
        choice = STRATEGIES[strategy].solve(problem, progress=silent)
        assert problem.fits(choice)
        assert problem.loss_of(choice) <= 1.01 * brute_force(problem)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budgeted", [("params",), ("params", "macs")])
def test_smallest_is_the_least_exceeded(seed, budgeted):
    problem = random_problem(seed, budgeted=budgeted)
    choices = itertools.product(*(range(len(table)) for table in problem.layers))
    worst = min((problem.cost_of(np.array(c)) / problem.limits).max() for c in choices)
    assert (problem.cost_of(smallest(problem)) / problem.limits).max() == pytest.approx(worst, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_bound_is_below_the_optimum(seed):
    problem = random_problem(seed, keep=0.4)
    for rel_gap in (1e-4, 1e-1):
        solution = solve(problem, rel_gap=rel_gap)
        assert solution.bound <= brute_force(problem) * (1 + 1e-9)
        assert problem.loss_of(solution.choice) <= solution.bound * (1 + rel_gap) + 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_optimality_gap_is_truthful(method, keep):
    net = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(3, 6, 3), nn.Linear(8, 10), nn.LayerNorm(5))
    kinds = ["svd", "channel_svd", "spatial_svd", "tucker2"]
    plan = search_ranks(net, Budget(params=keep), method=method, kinds=kinds)
    inventory = take_inventory(net, kinds=kinds)
    tables = [tabulate(layer, compared=("params",)) for layer in inventory if layer.reason is None]
    total = sum(p.numel() for p in net.parameters())
    rest = total - sum(int(t.costs[-1, 0]) for t in tables)
    limit = np.array([math.floor(keep * total + 1e-6) - rest], dtype=float)
    best = brute_force(Problem(tuple(tables), ("params",), limit))
    true_gap = plan.signal_loss / best - 1
    assert true_gap - 1e-9 <= plan.optimality_gap <= true_gap + 2.1e-3 * (1 + true_gap)

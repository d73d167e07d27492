"""The exact optimum of the separable problem, by mixed-integer linear programming.

A multiple-choice knapsack: one binary variable per candidate, one candidate per layer, one
row per budget, solved by branch and cut (HiGHS through `scipy.optimize.milp`). Its dual bound
is the certificate by which every other strategy is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

from lightning_compress.core.effort import current_effort
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.problem import Problem

REL_GAP = 1e-4
"""Relative gap at which the exact strategy stops."""
MARGINS = (0.0, 2e-6, 1e-5)
"""Shares of the limits held back in turn, while the solver's tolerance of 1e-6 lets it exceed them."""


@dataclass(frozen=True)
class Solution:
    """A choice, None if none was found in time, and a lower bound on every choice's objective."""

    choice: Ints | None
    bound: float


def solve(problem: Problem, *, rel_gap: float = REL_GAP) -> Solution:
    """Returns the optimum, to a relative gap, and its lower bound."""
    losses = np.concatenate([problem.losses(layer) for layer in range(len(problem.layers))])
    options = {"mip_rel_gap": rel_gap, "time_limit": current_effort().solver_seconds}
    bound: float | None = None
    for margin in MARGINS:
        rows = [*_one_per_layer(problem), LinearConstraint(_relative_costs(problem), ub=1.0 - margin)]
        result = milp(losses, integrality=np.ones(len(losses)), bounds=Bounds(0, 1), constraints=rows, options=options)
        if bound is None:  # of the whole problem, not of one with less room
            bound = max(float(result.mip_dual_bound or 0.0), 0.0)
        choice = _to_choice(problem, result.x) if result.x is not None else None
        if choice is None or problem.fits(choice):
            return Solution(choice, bound)
    return Solution(None, bound or 0.0)


def smallest(problem: Problem) -> Ints:
    """Returns the choice whose worst budget is least exceeded: the smallest reachable model."""
    if len(problem.budgeted) == 1:
        return np.array([int(problem.costs(layer)[:, 0].argmin()) for layer in range(len(problem.layers))])
    costs = _relative_costs(problem)
    worst = np.zeros(costs.shape[1] + 1)
    worst[-1] = 1.0  # minimise t, subject to every relative cost ≤ t
    over = hstack([csr_array(costs), csr_array(-np.ones((costs.shape[0], 1)))])
    rows = [
        *_one_per_layer(problem, extra=1),
        LinearConstraint(over, ub=0.0),
    ]
    upper = np.ones(costs.shape[1] + 1)
    upper[-1] = np.inf
    integrality = np.ones(costs.shape[1] + 1)
    integrality[-1] = 0
    result = milp(worst, integrality=integrality, bounds=Bounds(0, upper), constraints=rows)
    return _to_choice(problem, result.x[:-1])


def first_that_fits(problem: Problem, values: Floats, choose: Callable[[float], Ints], otherwise: Ints) -> Ints:
    """Returns the choice of the first value whose choice keeps every budget, by bisection.

    Args:
        problem: The problem.
        values: In such an order that the choices grow cheaper.
        choose: Value to choice.
        otherwise: What is returned if none fits.
    """
    best, low, high = otherwise, 0, len(values)
    while low < high:
        middle = (low + high) // 2
        choice = choose(float(values[middle]))
        if problem.fits(choice):
            best, high = choice, middle
        else:
            low = middle + 1
    return best


def _one_per_layer(problem: Problem, extra: int = 0) -> list[LinearConstraint]:
    sizes = [len(layer) for layer in problem.layers]
    columns = np.arange(sum(sizes))
    owners = np.repeat(np.arange(len(sizes)), sizes)
    shape = (len(sizes), sum(sizes) + extra)
    matrix = csr_array((np.ones(len(columns)), (owners, columns)), shape=shape)
    return [LinearConstraint(matrix, lb=1.0, ub=1.0)]


def _relative_costs(problem: Problem) -> Floats:
    """Returns costs over their limits, shape (b, number of all candidates)."""
    costs = np.concatenate([problem.costs(layer) for layer in range(len(problem.layers))])
    return (costs / np.maximum(problem.limits, np.finfo(float).tiny)).T


def _to_choice(problem: Problem, x: Floats) -> Ints:
    sizes = [len(layer) for layer in problem.layers]
    return np.array([int(part.argmax()) for part in np.split(x, np.cumsum(sizes)[:-1])], dtype=np.int64)

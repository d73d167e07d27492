"""The exact optimum of the separable problem, by mixed-integer linear programming.

A multiple-choice knapsack: one binary variable per candidate, one candidate per layer, one
row per budget, solved by branch and cut (HiGHS through `scipy.optimize.milp`). Its dual bound
is the certificate by which every other strategy is judged.

Nearly all candidates are ruled out beforehand (reduced-cost fixing; Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem", section 4): with the multipliers λ of the linear relaxation, candidate c of layer l
cannot be part of an optimum if its ε_c + λ·C_c exceeds the smallest of its layer by more than what is between the
relaxation's value and that of any whole choice at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, hstack

from lightning_compress.core.effort import current_effort
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.problem import Problem

REL_GAP = 1e-4
"""Relative gap at which the exact strategy stops."""
MARGINS = (0.0, 2e-6, 1e-5)
"""Shares of the limits held back in turn, while the solver's tolerance of 1e-6 lets it exceed them."""


FEW = 6
"""Candidates of each layer among which a first whole choice is sought."""
TOLERANCE = 1e-9
"""Relative, of the relaxation's value."""


@dataclass(frozen=True)
class Solution:
    """A choice, None if none was found in time, and a lower bound on every choice's objective."""

    choice: Ints | None
    bound: float


def solve(problem: Problem, *, rel_gap: float = REL_GAP) -> Solution:
    """Returns the optimum, to a relative gap, and its lower bound."""
    bound: float | None = None
    for margin in MARGINS:
        found = _solved(problem, margin, rel_gap)
        if bound is None:  # of the whole problem, not of one with less room
            bound = max(found.bound, 0.0)
        if found.choice is None or problem.fits(found.choice):
            return Solution(found.choice, bound)
    return Solution(None, bound or 0.0)


def _solved(problem: Problem, margin: float, rel_gap: float) -> Solution:
    """Returns the optimum with a share of the limits held back, among the candidates that can be part of one."""
    every = [np.arange(len(table)) for table in problem.layers]
    reduced = _reduced_costs(problem, 1.0 - margin)
    if reduced is None:
        return _branch_and_cut(problem, every, margin, rel_gap)
    excess, relaxed = reduced
    nearest = [np.sort(np.argsort(own, kind="stable")[:FEW]) for own in excess]
    first = _branch_and_cut(problem, nearest, margin, rel_gap)
    if first.choice is None:
        return _branch_and_cut(problem, every, margin, rel_gap)
    value = problem.loss_of(first.choice)
    if value - relaxed <= rel_gap * abs(value):
        return Solution(first.choice, relaxed)
    room = value - relaxed + TOLERANCE * max(1.0, abs(relaxed))
    kept = [np.flatnonzero(own <= room) for own in excess]
    if all(np.isin(more, few).all() for more, few in zip(kept, nearest, strict=True)):
        return Solution(first.choice, max(first.bound, relaxed))
    found = _branch_and_cut(problem, kept, margin, rel_gap)
    return found if found.choice is not None else Solution(first.choice, relaxed)  # none was found in time


def _reduced_costs(problem: Problem, limit: float) -> tuple[list[Floats], float] | None:
    """Returns by how much each candidate exceeds the best of its layer at the multipliers, and the relaxation's value.

    None where that has no solution.
    """
    losses = [problem.losses(layer) for layer in range(len(problem.layers))]
    costs = _relative_costs(problem)
    equal = _one_per_layer(problem)[0]
    result = linprog(
        np.concatenate(losses), A_ub=costs, b_ub=np.full(len(costs), limit), A_eq=equal.A, b_eq=np.ones(len(losses))
    )
    if result.x is None:
        return None
    multipliers = np.maximum(-result.ineqlin.marginals, 0.0)
    sizes = np.cumsum([len(own) for own in losses])[:-1]
    values = np.split(np.concatenate(losses) + multipliers @ costs, sizes)
    best = [float(own.min()) for own in values]
    return [own - least for own, least in zip(values, best, strict=True)], sum(best) - limit * float(multipliers.sum())


def _branch_and_cut(problem: Problem, rows: Sequence[Ints], margin: float, rel_gap: float) -> Solution:
    """Returns the optimum among some rows of each layer."""
    small = problem.restricted(rows)
    losses = np.concatenate([small.losses(layer) for layer in range(len(small.layers))])
    options = {"mip_rel_gap": rel_gap, "time_limit": current_effort().solver_seconds}
    constraints = [*_one_per_layer(small), LinearConstraint(_relative_costs(small), ub=1.0 - margin)]
    result = milp(
        losses, integrality=np.ones(len(losses)), bounds=Bounds(0, 1), constraints=constraints, options=options
    )
    bound = float(result.mip_dual_bound or 0.0)
    if result.x is None:
        return Solution(None, bound)
    picked = _to_choice(small, result.x)
    return Solution(np.array([own[row] for own, row in zip(rows, picked, strict=True)], dtype=np.int64), bound)


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

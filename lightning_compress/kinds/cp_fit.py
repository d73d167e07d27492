"""The alternating least squares fits of the CP kinds.

Carroll and Chang 1970; Harshman 1970; with extrapolation between the sweeps (Mitchell, Ye and De Sterck 2020, "Nesterov
acceleration of alternating least squares for canonical tensor decomposition"; Ang, Cohen, Gillis and Hien 2021,
"Accelerating block coordinate descent for nonnegative tensor factorization": the step grows while the error falls and
shrinks when it does not). A sweep shares its two large products between the modes: some twenty times as fast as one of
tensorly's `parafac` on a kernel, against which the fit is checked in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.effort import current_effort
from lightning_compress.kinds.cp_problem import CG_STEPS, TINY, Components, Problem, unit_columns
from lightning_compress.kinds.slices import Slices

SCOUT_SWEEPS = 10
"""Sweeps after which the start from the slices and a random one are compared."""
SWEEPS_FOR_BOTH = 60
"""The random start is left out where fewer sweeps than these are affordable."""
SWEEPS, METRIC_SWEEPS, PROFILE_SWEEPS = (12, 90), (2, 15), (3, 12)
"""Fewest and most sweeps of a fit (of all its starts together), in the whole metric, and of one rank of a profile."""
WORK, PROFILE_WORK = 3e10, 2e9
"""Multiply-adds of a fit (about five seconds of one core) and of one rank of a profile, beyond the fewest sweeps."""
SOUND = 1.5
"""Root of the sum of the squared norms of all components, relative to the norm of the weight, that is not corrected."""
SLACK = 0.01
"""The correction of the norms may raise the squared error by this fraction of it, or of what is explained if less."""
CORRECTIONS, CORRECTION_SWEEPS = 4, (2, 6)
"""Bisections of the penalty, and fewest and most sweeps of each; between them all take half of those of the fit."""
REFIT_RIDGE = 1e-5
"""Penalty of the norms in a refit, so that components that nearly cancel do not grow."""
LARGEST = 10.0
"""Root of the sum of the squared norms of all components, at most, relative to the norm of the weight."""


def drafted(problem: Problem, rank: int, slices: Slices | None = None) -> Components:
    """Returns the components that a few sweeps lead to from the slices, which are worked out where not given."""
    slices = slices or Slices(problem.weight)
    sweeps = _sweeps(PROFILE_WORK, sweep_work(tuple(problem.weight.shape), rank), PROFILE_SWEEPS)
    found = _separable(problem).run(slices.filters(rank), sweeps)
    return found if problem.metric is None else problem.solve(found.filters)


def fitted(problem: Problem, rank: int) -> Components:
    """Returns the components of the better of two starts, with bounded norms."""
    dims = tuple(problem.weight.shape)
    separable = _separable(problem)
    total = _sweeps(WORK, sweep_work(dims, rank), SWEEPS)
    starts = [Slices(problem.weight).filters(rank)]
    if total >= SWEEPS_FOR_BOTH:
        starts.append(_random_filters(dims[1:], rank))
    scouted = min((separable.run(start, min(SCOUT_SWEEPS, total)) for start in starts), key=_error)
    best = separable.run(scouted.filters, max(total - SCOUT_SWEEPS * len(starts), 0))
    best, ridge = _corrected(separable, best, int(np.clip(total // (2 * CORRECTIONS), *CORRECTION_SWEEPS)))
    if problem.metric is None:
        return best
    sweeps = _sweeps(WORK, _metric_work(dims, rank), METRIC_SWEEPS)
    return _bounded(problem, problem.run(best.filters, sweeps, ridge), ridge)[0]


def refitted(problem: Problem, filters: Sequence[Tensor]) -> Components:
    """Returns the components that some sweeps lead to from those of a problem nearby, with bounded norms."""
    start = problem.whitened(filters)
    rank = start[0].shape[1]
    dims = tuple(problem.weight.shape)
    work = sweep_work(dims, rank) if problem.metric is None else _metric_work(dims, rank)
    found = problem.run(start, _sweeps(WORK, work, METRIC_SWEEPS), REFIT_RIDGE)
    return _bounded(problem, found, REFIT_RIDGE)[0]


def _error(found: Components) -> float:
    """Returns the error, infinite where it is none."""
    return found.error


def _separable(problem: Problem) -> Problem:
    """Returns the problem with the metric replaced by its separable approximation, here the identity."""
    return problem if problem.metric is None else Problem(problem.weight, None)


def _corrected(problem: Problem, found: Components, sweeps: int) -> tuple[Components, float]:
    """Returns components of smaller norms at hardly more error, and the penalty that led to them.

    Components that nearly cancel can lower the error while their norms grow without bound. Of all
    components within `SLACK` of the error those of the smallest Σ_r ‖component r‖² are sought (Phan et
    al. 2020, section 3.1, "error preserving correction"), here through the Lagrangian: alternating
    ridge regressions, the penalty as large as the bound on the error allows, found by bisection.
    """
    if found.size <= SOUND:
        return found, 0.0
    bound = found.error + SLACK * min(found.error, max(1 - found.error, 0.0)) + TINY
    best, ridge = found, 0.0
    low, high = -8.0, 0.0
    for _ in range(CORRECTIONS):
        middle = (low + high) / 2
        tried = problem.run(found.filters, sweeps, 10**middle)
        if tried.error <= bound:
            low = middle
            if tried.size <= best.size:
                best, ridge = tried, 10**middle
        else:
            high = middle
    return _bounded(problem, best, ridge)


def _bounded(problem: Problem, found: Components, ridge: float) -> tuple[Components, float]:
    """Returns components whose norms are at most `LARGEST`, whatever that costs in error.

    The objective at the exact output factor is at most that of no components at all, 1, so a penalty
    of 1 / LARGEST² is always enough.
    """
    while not found.size <= LARGEST and ridge < 1:
        ridge = max(10 * ridge, 1e-6)
        found = problem.run(found.filters, CORRECTION_SWEEPS[1], ridge)
    return found, ridge


def sweep_work(dims: Sequence[int], rank: int) -> float:
    """Returns the multiply-adds of a sweep: two products with the weight, a linear system for each mode."""
    return 2 * rank * math.prod(dims) + len(dims) * rank**3 / 3 + sum(dims) * rank**2


def fit_work(dims: Sequence[int], rank: int, *, in_metric: bool) -> float:
    """Returns about how many multiply-adds `fitted` takes."""
    each = sweep_work(dims, rank)
    work = 1.25 * _sweeps(WORK, each, SWEEPS) * each
    if in_metric:
        each = _metric_work(dims, rank)
        work += _sweeps(WORK, each, METRIC_SWEEPS) * each
    return work


def _metric_work(dims: Sequence[int], rank: int) -> float:
    """Returns the multiply-adds of a sweep in the whole metric."""
    return (2 + (len(dims) - 1) * CG_STEPS) * rank * math.prod(dims[1:]) ** 2


def _random_filters(dims: Sequence[int], rank: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [unit_columns(torch.randn(size, rank, generator=generator, dtype=torch.float64)) for size in dims]


def _sweeps(work: float, each: float, bounds: tuple[int, int]) -> int:
    """Returns how many sweeps are affordable where each takes so much work, by the current `Effort`."""
    (fewest, most), fits = bounds, current_effort().fits
    return int(np.clip(fits * work / each, fewest, max(fewest, fits * most)))

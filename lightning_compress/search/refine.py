"""Predicted errors of iterative fits, corrected by whole fits at the optimum.

The profile of such a kind (`Decomposition.fits_roughly`) is that of a few sweeps: on the reference
networks up to twice the error that its fitted factors have. The search would spend too much on its
layers and turn to kinds whose errors are exact. So every layer is fitted at the ranks that are the
optimum of the rough errors, or at those that cost the same, and all errors of that kind are scaled by
the ratio of the two. Where the optimum moves, the layers it chose such a kind for are fitted there too,
and the ratio is interpolated between the ranks that were fitted, until the optimum has been fitted
throughout: these fits are needed anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lightning_compress.core.effort import current_effort
from lightning_compress.core.parallel import in_threads
from lightning_compress.core.plan import DENSE
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.end_to_end import OutputEvaluator
from lightning_compress.search.exact import solve
from lightning_compress.search.problem import Problem

LEAST_ERROR = 1e-12
"""A smaller predicted error is not corrected."""


def refined(problem: Problem, outputs: OutputEvaluator, progress: Callable[[float], None]) -> Problem:
    """Returns the problem with the errors of iterative fits corrected around its optimum.

    Args:
        problem: The separable problem.
        outputs: Where the fitted factors are kept.
        progress: Called with the fraction done.
    """
    predicted = problem
    ratios: dict[tuple[int, str], dict[int, float]] = {
        (index, kind): {}
        for index, table in enumerate(problem.layers)
        for kind in dict.fromkeys(table.kinds)
        if kind != DENSE and DECOMPOSITIONS[kind].fits_roughly
    }
    passes = current_effort().corrections if ratios else 0
    for done in range(passes):
        choice = solve(problem).choice
        if choice is None:
            break
        if done:
            chosen = [(i, problem.layers[i].kinds[row], int(row)) for i, row in enumerate(choice)]
            rows = [(i, kind, row) for i, kind, row in chosen if (i, kind) in ratios and row not in ratios[i, kind]]
        else:
            rows = [(i, kind, _nearest(problem.layers[i], kind, int(choice[i]))) for i, kind in ratios]
        if not rows:
            break
        progress(done / passes)
        found = in_threads(lambda row: _ratio(predicted, outputs, row), rows)
        for (i, kind, row), ratio in zip(rows, found, strict=True):
            ratios[i, kind][row] = ratio
        problem = _scaled(predicted, ratios)
    if ratios:
        progress(1.0)
    return problem


def _ratio(problem: Problem, outputs: OutputEvaluator, item: tuple[int, str, int]) -> float:
    """Returns what the fit of a row loses, relative to what is predicted."""
    index, kind, row = item
    table = problem.layers[index]
    predicted = table.energy * max(float(table.errors[row]), LEAST_ERROR)
    return outputs.lost_energy(index, kind, table.ranks[row]) / max(predicted, np.finfo(float).tiny)


def _scaled(problem: Problem, ratios: Mapping[tuple[int, str], Mapping[int, float]]) -> Problem:
    """Returns the problem with errors times the ratios, which are interpolated over the logarithm of the parameters."""
    layers = list(problem.layers)
    for (index, kind), fitted in ratios.items():
        own, sizes = layers[index].rows_of(kind), np.log(layers[index].costs[:, 0])
        rows = sorted(fitted, key=lambda row: sizes[row])
        scale = np.interp(sizes[own], sizes[rows], [fitted[row] for row in rows])
        errors = layers[index].errors.copy()
        errors[own] = np.clip(errors[own] * scale, 0.0, 1.0)
        layers[index] = replace(layers[index], errors=errors)
    return replace(problem, layers=tuple(layers))


def _nearest(table: Candidates, kind: str, chosen: int) -> int:
    """Returns the row of a kind that costs about as many parameters as the chosen one."""
    rows, costs = table.rows_of(kind), np.log(table.costs[:, 0])
    return int(rows[np.abs(costs[rows] - costs[chosen]).argmin()])

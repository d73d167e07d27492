"""Predicted errors of iterative fits, corrected by whole fits at the optimum.

The profile of such a kind (`Decomposition.fits_roughly`) is that of a few sweeps: on the reference
networks up to twice the error that its fitted factors have. The search would spend too much on its
layers and turn to kinds whose errors are exact. So every layer is fitted at the ranks that are the
optimum of the rough errors, or at those that cost the same, and all errors of that kind are scaled by
the ratio of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_compress.candidates import DENSE, Candidates
from lightning_compress.decompositions import DECOMPOSITIONS
from lightning_compress.search.end_to_end import Outputs
from lightning_compress.search.exact import solve
from lightning_compress.search.problem import Problem
from lightning_compress.sharing import in_threads

LEAST_ERROR = 1e-12
"""A smaller predicted error is not corrected."""


def refined(problem: Problem, outputs: Outputs, progress: Callable[[float], None]) -> Problem:
    """Returns the problem with the errors of iterative fits corrected around its optimum.

    Args:
        problem: The separable problem.
        outputs: Where the fitted factors are kept.
        progress: Called with the fraction done.
    """
    rough = [
        (index, kind)
        for index, table in enumerate(problem.layers)
        for kind in dict.fromkeys(table.kinds)
        if kind != DENSE and DECOMPOSITIONS[kind].fits_roughly
    ]
    choice = solve(problem).choice if rough else None
    if choice is None:
        return problem
    progress(0.0)

    def ratio(item: tuple[int, str]) -> float:
        index, kind = item
        table = problem.layers[index]
        row = _nearest(table, kind, int(choice[index]))
        predicted = table.energy * max(float(table.errors[row]), LEAST_ERROR)
        return outputs.lost_energy(index, kind, table.ranks[row]) / max(predicted, np.finfo(float).tiny)

    layers = list(problem.layers)
    for (index, kind), value in zip(rough, in_threads(ratio, rough), strict=True):
        rows, errors = layers[index].rows_of(kind), layers[index].errors.copy()
        errors[rows] = np.clip(errors[rows] * value, 0.0, 1.0)
        layers[index] = replace(layers[index], errors=errors)
    progress(1.0)
    return replace(problem, layers=tuple(layers))


def _nearest(table: Candidates, kind: str, chosen: int) -> int:
    """Returns the row of a kind that costs about as many parameters as the chosen one."""
    rows, costs = table.rows_of(kind), np.log(table.costs[:, 0])
    return int(rows[np.abs(costs[rows] - costs[chosen]).argmin()])

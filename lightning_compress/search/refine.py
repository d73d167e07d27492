"""Predicted errors of iterative fits, corrected by whole fits around the optimum.

The profile of such a kind (`Decomposition.fits_roughly`) is that of a few sweeps: on the reference
networks up to twice the error that its fitted factors have. The search would spend too much on its
layers and turn to kinds whose errors are exact. Each round fits every layer at the ranks that are the
optimum so far, or at those that cost the same, and scales the errors of the kind by the ratio that was
found, interpolated in the logarithm of the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_compress.candidates import DENSE, Candidates
from lightning_compress.decompositions import DECOMPOSITIONS
from lightning_compress.decompositions.base import Floats
from lightning_compress.search.end_to_end import Outputs
from lightning_compress.search.exact import solve
from lightning_compress.search.problem import Problem
from lightning_compress.sharing import in_threads

ROUNDS = 1
LEAST_ERROR = 1e-12
"""A smaller predicted error is not corrected."""

Ratios = dict[int, float]
"""Row of a layer's candidates to the fitted error over the predicted one."""


def refined(problem: Problem, outputs: Outputs, progress: Callable[[float], None]) -> Problem:
    """Returns the problem with the errors of iterative fits corrected around its optimum.

    Args:
        problem: The separable problem.
        outputs: Where the fitted factors are kept.
        progress: Called with the fraction done.
    """
    found: dict[tuple[int, str], Ratios] = {
        (index, kind): {}
        for index, table in enumerate(problem.layers)
        for kind in dict.fromkeys(table.kinds)
        if kind != DENSE and DECOMPOSITIONS[kind].fits_roughly
    }
    current = problem
    for done in range(ROUNDS if found else 0):
        choice = solve(current).choice
        if choice is None:
            break
        progress(done / ROUNDS)
        wanted = {key: _nearest(problem.layers[key[0]], key[1], int(choice[key[0]])) for key in found}
        new = [(key, row) for key, row in wanted.items() if row not in found[key]]

        def ratio(item: tuple[tuple[int, str], int]) -> float:
            (layer, kind), row = item
            table = problem.layers[layer]
            return outputs.error(layer, kind, table.ranks[row]) / max(float(table.errors[row]), LEAST_ERROR)

        for (key, row), value in zip(new, in_threads(ratio, new), strict=True):
            found[key][row] = value
        layers = list(problem.layers)
        for (layer, kind), ratios in found.items():
            layers[layer] = _scaled(layers[layer], kind, ratios)
        current = replace(problem, layers=tuple(layers))
    return current


def _nearest(table: Candidates, kind: str, chosen: int) -> int:
    """Returns the row of a kind that costs about what the chosen one does."""
    rows = table.rows_of(kind)
    distances = np.abs(_log_cost(table)[rows] - _log_cost(table)[chosen])
    return int(rows[distances.argmin()])


def _scaled(table: Candidates, kind: str, ratios: Ratios) -> Candidates:
    rows, known = table.rows_of(kind), np.array(sorted(ratios, key=lambda row: _log_cost(table)[row]))
    costs = _log_cost(table)
    factor = np.interp(costs[rows], costs[known], [ratios[row] for row in known])
    errors = table.errors.copy()
    errors[rows] = np.clip(errors[rows] * factor, 0.0, 1.0)
    return replace(table, errors=errors)


def _log_cost(table: Candidates) -> Floats:
    costs: Floats = np.log(table.costs[:, 0])
    return costs

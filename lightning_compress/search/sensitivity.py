"""What a layer's error does to the model's outputs, measured.

The relative error of a layer says nothing of how much the layer matters: on a pretrained EfficientNet-Lite an error
of 0.2 moves the outputs by 2 % in a block with a shortcut, and by 25 % in one without. So every layer is
factorised alone, at the ranks of the separable optimum, and the distance of the outputs is measured on the
synthetic inputs. The weight of its term is the ratio of the two,

    w_l ∝ log(1 + D_l) / ε_l,

scaled so that the terms at the optimum sum up to what they did. Distances of single layers nearly add up to that
of all where little is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_compress.candidates import DENSE, Candidates
from lightning_compress.progress import Progress
from lightning_compress.search.end_to_end import Outputs, output_distance
from lightning_compress.search.exact import solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.refine import refined

LEAST_LOSS = 1e-6
"""Smaller losses and distances count as this much: a layer is never free."""
RANGE = 100.0
"""Weights lie within this factor of their median, either way."""


def nearer(problem: Problem, outputs: Outputs, progress: Progress) -> Problem:
    """Returns the problem with measured weights if its optimum leaves the outputs nearer, else as it is.

    Where most of a network is given up single layers say little of all together, and the plain sum can be better.

    Args:
        problem: The separable problem, without weights, corrected by `refined`.
        outputs: Of the model.
        progress: Called with what is being done and the fraction done.
    """
    measured = weighted(problem, outputs, lambda done: progress("measuring layers", done))
    measured = refined(measured, outputs, lambda done: progress("fitting layers", done))
    before, after = solve(problem).choice, solve(measured).choice
    if before is None or after is None:
        return problem
    closer = output_distance(outputs, measured, after) < output_distance(outputs, problem, before)
    return measured if closer else problem


def weighted(problem: Problem, outputs: Outputs, progress: Callable[[float], None]) -> Problem:
    """Returns the problem with each layer's term weighed by what it does to the outputs; as it is if nothing fits.

    Args:
        problem: The separable problem, without weights.
        outputs: Of the model.
        progress: Called with the fraction done.
    """
    choice = solve(problem).choice
    if choice is None:
        return problem
    dense = np.array([len(table) - 1 for table in problem.layers])
    losses, distances = (np.full(len(choice), np.nan) for _ in range(2))
    for index, table in enumerate(problem.layers):
        progress(index / len(choice))
        row = int(choice[index]) if table.kinds[choice[index]] != DENSE else _middle(table)
        if row is None:
            continue
        alone = dense.copy()
        alone[index] = row
        losses[index] = max(table.losses[row], LEAST_LOSS)
        distances[index] = max(np.log1p(output_distance(outputs, problem, alone)), LEAST_LOSS)
    known = np.isfinite(losses) & np.isfinite(distances)
    if not known.any():
        return problem
    weights = np.where(known, distances / np.where(known, losses, 1.0), 1.0)
    middle = float(np.median(weights[known]))
    weights = np.clip(weights, middle / RANGE, middle * RANGE)
    chosen = known & (choice != dense)
    chosen = chosen if chosen.any() else known
    weights = weights * losses[chosen].sum() / (weights[chosen] * losses[chosen]).sum()
    weights[~known] = 1.0
    progress(1.0)
    return replace(problem, weights=tuple(weights.tolist()))


def _middle(table: Candidates) -> int | None:
    """Returns the row of the first kind that costs about half of the dense layer's parameters, None without any."""
    if len(table) == 1:
        return None
    rows = table.rows_of(table.kinds[0])
    return int(rows[np.abs(table.costs[rows, 0] - table.costs[-1, 0] / 2).argmin()])

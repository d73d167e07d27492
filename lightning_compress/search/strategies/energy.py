"""One energy threshold for all layers: each takes its cheapest candidate that keeps the energy."""

from __future__ import annotations

import numpy as np

from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.exact import first_that_fits, smallest
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies.registry import register_strategy


@register_strategy("energy")
def search_energy(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the choice of the smallest error threshold that keeps every budget.

    A threshold τ keeps the fraction 1 − τ of every weight's squared norm; the threshold is
    found by bisection over the errors that occur.
    """
    progress("energy threshold", 0.0)
    thresholds = np.unique(np.concatenate([layer.errors for layer in problem.layers]))
    best = first_that_fits(problem, thresholds, lambda t: _cheapest_within(problem, t), smallest(problem))
    progress("energy threshold", 1.0)
    return best


def _cheapest_within(problem: Problem, threshold: float) -> Ints:
    choice = []
    for index, layer in enumerate(problem.layers):
        relative = (problem.costs(index) / np.maximum(problem.limits, 1)).max(axis=1)
        choice.append(int(np.where(layer.errors <= threshold, relative, np.inf).argmin()))
    return np.array(choice)

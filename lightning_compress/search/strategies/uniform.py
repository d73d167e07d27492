"""Uniform ranks: every layer keeps the same fraction of its cost, the usual hand-made choice."""

from __future__ import annotations

import numpy as np

from lightning_compress.core.plan import DENSE
from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.exact import smallest
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies.registry import register_strategy


@register_strategy("uniform")
def search_uniform(problem: Problem, *, progress: Progress) -> Ints:
    """Returns, for the largest fraction that keeps every budget, the largest candidates under it.

    Each layer uses one kind: the first of its kinds that has candidates, in the order of the
    registry (svd for matrices, channel_svd for convolutions, unless the user chose otherwise).
    """
    progress("uniform ranks", 0.0)
    paths = [_path(problem, layer) for layer in range(len(problem.layers))]
    shares = [problem.costs(i).mean(axis=1) / problem.costs(i)[-1].mean() for i in range(len(paths))]
    best = smallest(problem)
    for fraction in np.unique(np.concatenate([share[path] for share, path in zip(shares, paths, strict=True)])):
        choice = np.array([_largest_under(share, path, fraction) for share, path in zip(shares, paths, strict=True)])
        if problem.fits(choice):
            best = choice
    progress("uniform ranks", 1.0)
    return best


def _path(problem: Problem, layer: int) -> Ints:
    """Returns the rows of the layer's one kind and the dense row, cheapest first."""
    candidates = problem.layers[layer]
    kind = candidates.kinds[0]
    rows = candidates.rows_of(kind)
    if kind == DENSE:
        return rows
    order = np.argsort(problem.costs(layer)[rows].sum(axis=1), kind="stable")
    return np.append(rows[order], len(candidates) - 1)


def _largest_under(share: np.ndarray[tuple[int], np.dtype[np.float64]], path: Ints, fraction: float) -> int:
    under = path[share[path] <= fraction]
    return int(under[-1]) if len(under) else int(path[0])

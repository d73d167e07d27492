"""BALF: whitened SVD on real inputs, ranks by a Lagrangian relaxation of the budget.

Every layer becomes the SVD of its out x (in·k_h·k_w) unfolding in the metric of what enters it (channel_svd for
convolutions), and the sum of the relative errors of the layers' outputs,

    min Σ_l e_l(r_l) + λ Σ_l C_l(r_l),

falls apart into layers under a multiplier λ of the budget: the smallest at which it is kept is found by bisection.

Source: González-Martínez 2025, "BALF: Budgeted Activation-Aware Low-Rank Factorization for Fine-Tuning-Free Model
Compression" (arXiv 2509.25136). The dense weight is a candidate here as there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_compress.analysis.statistics import Statistics
from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.exact import first_that_fits, smallest
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import register_strategy

MULTIPLIERS = np.geomspace(1e-9, 1e6, 20_001)
"""λ, for costs as shares of their limits."""


@register_strategy("balf", objectives=("weight", "moments"), kinds=("svd", "channel_svd"))
def search_balf(problem: Problem, *, progress: Progress) -> Ints:
    """Returns what is best of every layer on its own at the smallest multiplier that keeps every budget."""
    progress("multipliers", 0.0)
    shares = [(problem.costs(layer) / problem.limits).mean(axis=1) for layer in range(len(problem.layers))]

    def at(multiplier: float) -> Ints:
        pairs = zip(problem.layers, shares, strict=True)
        return np.array([int((table.errors + multiplier * share).argmin()) for table, share in pairs])

    found = first_that_fits(problem, MULTIPLIERS, at, smallest(problem))
    progress("multipliers", 1.0)
    return found


def inputs_alone(statistics: Statistics) -> Statistics:
    """Returns statistics with the second moments of the inputs alone, as the method has them."""
    moments = {name: replace(own, outputs=None, folds=None) for name, own in statistics.moments.items()}
    return replace(statistics, moments=moments)

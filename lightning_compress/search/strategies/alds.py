"""ALDS: the largest relative error in the operator norm over all layers is made as small as possible.

With σ the singular values of a layer's out x (in·k_h·k_w) unfolding, cut along the input channels
into k splits of rank j each, the relative error of a candidate is

    max_i σ_{i,j+1} / σ_1,

σ_{i,j+1} the largest value that split i leaves out and σ_1 the largest of the whole unfolding
(k = 1: σ_{r+1} / σ_1 of the plain SVD). The search minimises its maximum over the layers under the
budgets. The operator norm of what all k splits leave out together can be √k times larger; as in the
authors' public implementation (torchprune, `ALDSErrorAllocator`) that factor is left out.

There k is any divisor of the input channels, found by alternating from random seeds; here it is 1, 2
or 4, and the optimum is found by bisection.

Source: Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal
Layer-wise Decomposition", NeurIPS.
"""

from __future__ import annotations

import numpy as np

from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.exact import first_that_fits, smallest
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies.registry import register_strategy


@register_strategy("alds", objectives=("weight",), kinds=("svd", "channel_svd", "split2_svd", "split4_svd"))
def search_alds(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the cheapest choice within the smallest relative error that keeps every budget.

    Found by bisection over the errors that occur. Within an error every layer takes its cheapest
    candidate over its kinds; with several budgets, those that exceed the worst of them least (to the
    tolerance of `smallest`). Budget that is left over stays unspent: a better candidate of any one layer
    leaves the maximum as it is. Kinds without one spectrum (tucker2) count as infinitely wrong:
    they are taken only where nothing else keeps the budgets.
    """
    progress("operator-norm threshold", 0.0)
    thresholds = np.unique(np.concatenate([layer.spectral for layer in problem.layers]))
    best = first_that_fits(problem, thresholds, lambda t: _smallest_within(problem, t), smallest(problem))
    progress("operator-norm threshold", 1.0)
    return best


def _smallest_within(problem: Problem, threshold: float) -> Ints:
    rows = [np.flatnonzero(layer.spectral <= threshold) for layer in problem.layers]
    local = smallest(problem.restricted(rows))
    return np.array([kept[row] for kept, row in zip(rows, local, strict=True)])

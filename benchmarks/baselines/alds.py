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

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from benchmarks.baselines.split_svd import SplitSvd
from lightning_compress.core.plan import DENSE
from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Floats, Ints, singular_energies, threads_for
from lightning_compress.kinds.registry import DECOMPOSITIONS, rank_errors
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.exact import first_that_fits, smallest
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies import register_strategy
from lightning_compress.search.units import Unit


@register_strategy("alds", objectives=("weight",), kinds=("svd", "channel_svd", "split2_svd", "split4_svd"))
def search_alds(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the cheapest choice within the smallest relative error that keeps every budget."""
    progress("operator-norm threshold", 0.0)
    units = zip(problem.units, problem.layers, strict=True)
    best = least_largest(problem, [operator_norm_errors(unit, table) for unit, table in units])
    progress("operator-norm threshold", 1.0)
    return best


def least_largest(problem: Problem, errors: Sequence[Floats]) -> Ints:
    """Returns the cheapest choice within the smallest error that keeps every budget.

    Found by bisection over the errors that occur. Within an error every layer takes its cheapest
    candidate over its kinds; with several budgets, those that exceed the worst of them least (to the
    tolerance of `smallest`). Budget that is left over stays unspent: a better candidate of any one layer
    leaves the maximum as it is.

    Args:
        problem: The candidates with their costs, and the budgets.
        errors: Of each layer's candidates, shape (n,).
    """

    def within(threshold: float) -> Ints:
        rows = [np.flatnonzero(own <= threshold) for own in errors]
        local = smallest(problem.restricted(rows))
        return np.array([kept[row] for kept, row in zip(rows, local, strict=True)])

    return first_that_fits(problem, np.unique(np.concatenate(errors)), within, smallest(problem))


def operator_norm_errors(unit: Unit, table: Candidates) -> Floats:
    """Returns the relative error in the operator norm of each candidate of a layer, shape (n,).

    0 for dense. Kinds of several ranks (tucker2) have no one spectrum and count as infinitely wrong: they are taken
    only where nothing else keeps the budgets.

    Args:
        unit: The layer.
        table: Its candidates.
    """
    weight, groups = unit.double_weight(), unit.operator.groups
    errors = np.zeros(len(table))
    for kind in dict.fromkeys(table.kinds):
        if kind == DENSE:
            continue
        rows = table.rows_of(kind)
        if len(table.ranks[rows[0]]) > 1:
            errors[rows] = np.inf
            continue
        with threads_for(weight):
            by_rank = _errors_by_rank(kind, weight, groups)
        errors[rows] = [by_rank[table.ranks[row][0]] for row in rows]
    return errors


def _errors_by_rank(kind: str, weight: Tensor, groups: int) -> dict[int, float]:
    """Returns σ_{r+1} / σ_1 of a kind of one rank by the rank r.

    Where the kind is not split, or the layer has groups, σ_r² is by how much component r lowers the squared error.
    """
    decomposition = DECOMPOSITIONS[kind]
    if isinstance(decomposition, SplitSvd) and groups == 1:
        energies = np.array([singular_energies(block) for block in decomposition.blocks(weight)]).max(axis=0)
        (limit,) = decomposition.max_ranks(tuple(weight.shape))
        ranks, energies, largest = range(1, limit + 1), energies[:limit], singular_energies(weight.flatten(1))[0]
    else:
        profile = rank_errors(kind, weight, groups=groups)
        shares = -np.diff(profile.errors, prepend=1.0)
        ranks, energies = profile.ranks[:, 0].tolist(), np.maximum.accumulate(shares[::-1])[::-1]
        largest = energies[0]
    left_out = np.sqrt(np.append(energies[1:], 0.0) / largest) if largest > 0 else np.zeros(len(energies))
    return dict(zip(ranks, left_out.tolist(), strict=True))

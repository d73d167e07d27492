"""The rank search of arXiv 2409.03555 on the weights alone, to compare with.

Every layer has a set R of candidate ranks with coefficients p = softmax(α); the mixed weight is
W_mix = Σ_r p_r Ŵ_r, and weights and α are updated in turn to lower

    L = [Σ_l ‖W − W_mix‖²_F] · γ Σ_l (Σ_r p_r r / max R)^β,    γ = 0.4, β = 0.8.

The most probable rank r̄ of each layer is then the middle of a smaller set: the ranks in r̄ ± s/2
in steps of ⌊s/f⌋, until the step s is 1.

*Weight step.* The truncations Ŵ_1, Ŵ_2, … along the path of one kind are nested orthogonal projections
of W, so that with their errors e_1 … e_n and e_0 = 1

    ‖W − W_mix‖² / ‖W‖² = Σ_j (e_{j−1} − e_j) (1 − P(candidate ≥ j))² + e_n.

Whatever p is, (1 − P)² rises along the path, so of all nested projections those that take the largest
components first are the best (Ky Fan's maximum principle): the optimal weight step is the truncated
SVD itself and does not depend on α. What is left to descend are the α. (Were the factors of a candidate
free instead of projections, the mixture could always equal the largest candidate, its j-th components
scaled by 1 / P(candidate ≥ j): the first bracket would no longer see the ranks, and the smallest would
win everywhere.) The formula is exact for the SVD kinds and for truncated HOSVD (tucker2) without a metric;
in a metric it is exact for svd, channel_svd and spatial_svd, and an approximation for the others.

*The α step.* The public re-implementation multiplies the second bracket by the loss on validation
data; here it is, as in its data-free variant, the same L. On the reference networks its minimum puts
most of p on the largest candidate of nearly every layer, whatever the optimizer: the first bracket can
fall towards zero, the second only rise to a bound. The plan is then that of `uniform` or close to it.

*What the paper leaves to the user.* R is set by hand there ({10, 20, …, 100}, s = 10, f = 10 for CIFAR);
here s is, for each layer, the largest power of f that gives at least eight candidates, from s up. One
kind per layer: the first of its kinds that has candidates, as in `uniform` (svd for matrices,
channel_svd for convolutions, unless the user named others). The ranks of tucker2 are those of the
longest chain of nested candidates, and r is their mean.

*The budget.* The method has none. The ranks it ends with are all multiplied by one factor, up or down:
the largest with which every budget holds. A layer takes its largest candidate up to the scaled
rank, and is dense only where that is beyond all its candidates: there dense is the smaller one.

Source: Aghababaei-Harandi and Amini 2024, "Unified Framework for Neural Network Compression via
Decomposition and Optimal Rank Selection", and its public re-implementation RENE for the windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.plan import DENSE
from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.exact import first_that_fits, smallest
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies.registry import register_strategy

GAMMA, BETA = 0.4, 0.8
FACTOR = 10
"""f, by which the step between candidate ranks shrinks."""
FEWEST = 8
"""Candidates a layer starts with at least, if it has that many ranks."""
STEPS = 200
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class _Path:
    """The nested candidates of one layer, smallest first.

    Attributes:
        layer: The layer's index.
        rows: Their rows among the layer's candidates.
        ranks: Their ranks (the mean of several), shape (n,).
        errors: Their relative errors, shape (n,).
        energy: ‖W‖²_F.
    """

    layer: int
    rows: Ints
    ranks: Floats
    errors: Floats
    energy: float

    @classmethod
    def of(cls, index: int, layer: Candidates) -> _Path:
        rows = layer.rows_of(layer.kinds[0])
        ranks = np.array([layer.ranks[row] for row in rows], dtype=np.float64)
        chain = _longest_chain(ranks)
        rows = rows[chain]
        return cls(index, rows, ranks[chain].mean(axis=1), layer.errors[rows], layer.energy)

    def nearest(self, ranks: Floats | Ints) -> Ints:
        """Returns the positions on the path nearest to some ranks, each once."""
        return np.unique(np.abs(self.ranks[:, None] - ranks).argmin(axis=0))


@register_strategy("paper", objectives=("weight",))
def search_paper(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the ranks of the published search, scaled by the largest factor that keeps every budget.

    Where no factor does, the smallest choice over all kinds.
    """
    what = "rank search of the paper"
    progress(what, 0.0)
    paths = [_Path.of(index, layer) for index, layer in enumerate(problem.layers) if layer.kinds[0] != DENSE]
    choice = smallest(problem)
    if paths:
        with torch.inference_mode(mode=False), torch.enable_grad():  # whatever the caller is in
            ranks = _search(paths, lambda done: progress(what, done))
        choice = _scaled(problem, paths, ranks, choice)
    progress(what, 1.0)
    return choice


def _longest_chain(ranks: Floats) -> Ints:
    """Returns the rows of the longest chain in which no rank falls, shape (at most n,).

    Args:
        ranks: Shape (n, number of ranks of the kind).
    """
    order = np.lexsort((*ranks.T, ranks.sum(axis=1)))
    ordered = ranks[order]
    lengths, previous = np.ones(len(order), dtype=np.int64), np.full(len(order), -1)
    for row in range(1, len(order)):
        before = np.where((ordered[:row] <= ordered[row]).all(axis=1), lengths[:row], 0)
        if before.any():
            previous[row] = before.argmax()
            lengths[row] = before.max() + 1
    chain: list[int] = []
    row = int(lengths.argmax()) if len(order) else -1
    while row >= 0:
        chain.append(row)
        row = int(previous[row])
    kept: Ints = order[chain[::-1]]
    return kept


def _search(paths: list[_Path], progress: Callable[[float], None]) -> list[float]:
    """Returns the rank of each layer: the most probable of ever smaller windows around the last."""
    steps = [_first_step(float(path.ranks[-1])) for path in paths]
    sets = [path.nearest(np.arange(step, path.ranks[-1] + step, step)) for path, step in zip(paths, steps, strict=True)]
    for done in count(1):
        best = [int(own[position]) for own, position in zip(sets, _most_probable(paths, sets), strict=True)]
        if max(steps) == 1:
            break
        progress(1 - 2.0**-done)
        sets = [_window(path, row, step) for path, row, step in zip(paths, best, steps, strict=True)]
        steps = [max(1, step // FACTOR) for step in steps]
    return [float(path.ranks[row]) for path, row in zip(paths, best, strict=True)]


def _first_step(largest: float) -> int:
    """Returns the largest power of f that gives `FEWEST` candidates up to the largest rank, at least 1."""
    step = 1
    while step * FACTOR * FEWEST <= largest:
        step *= FACTOR
    return step


def _window(path: _Path, row: int, step: int) -> Ints:
    """Returns the positions with ranks in r̄ ± s/2, in steps of ⌊s/f⌋; r̄ alone once s is 1."""
    if step == 1:
        return np.array([row])
    low, high = max(1, math.floor(path.ranks[row] - step / 2)), math.ceil(path.ranks[row] + step / 2)
    return path.nearest(np.arange(low, high + 1, step // FACTOR))


def _most_probable(paths: list[_Path], sets: list[Ints]) -> list[int]:
    """Returns the position in each layer's set whose coefficient ends largest."""
    width = max(len(own) for own in sets)
    total = sum(path.energy for path in paths) or 1.0  # a unit, so that no step size depends on the weights' scale
    energy = torch.tensor([path.energy / total for path in paths], dtype=torch.float64)
    shares = torch.zeros(len(sets), width + 1, dtype=torch.float64)  # (layers, J + 1), what each candidate adds
    ranks = torch.zeros(len(sets), width, dtype=torch.float64)
    allowed = torch.zeros(len(sets), width, dtype=torch.bool)
    for index, (path, own) in enumerate(zip(paths, sets, strict=True)):
        errors = np.concatenate([[1.0], path.errors[own], [0.0]])
        shares[index, : len(own) + 1] = torch.from_numpy(-np.diff(errors)) * energy[index]
        ranks[index, : len(own)] = torch.from_numpy(path.ranks[own] / path.ranks[own].max())
        allowed[index, : len(own)] = True
    return _descend(shares, ranks, allowed)


def _descend(shares: Tensor, ranks: Tensor, allowed: Tensor) -> list[int]:
    logits = torch.zeros_like(ranks).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    for _ in range(STEPS):
        loss = _loss(logits.masked_fill(~allowed, -torch.inf).softmax(dim=1), shares, ranks)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    positions: list[int] = logits.detach().masked_fill(~allowed, -torch.inf).argmax(dim=1).tolist()
    return positions


def _loss(probability: Tensor, shares: Tensor, ranks: Tensor) -> Tensor:
    """Returns L.

    Args:
        probability: p, (layers, J), 0 beyond a layer's own candidates.
        shares: ‖W‖² (e_{j−1} − e_j) of each candidate and, after a layer's last, ‖W‖² e_n, (layers, J + 1).
        ranks: r / max R, (layers, J).
    """
    at_least = probability.flip(1).cumsum(1).flip(1)  # P(candidate ≥ j)
    missing = torch.cat([1 - at_least, torch.ones_like(at_least[:, :1])], dim=1)
    distance = (shares * missing.square()).sum()
    return distance * GAMMA * (probability * ranks).sum(dim=1).pow(BETA).sum()


def _scaled(problem: Problem, paths: list[_Path], ranks: list[float], fallback: Ints) -> Ints:
    """Returns the choice of the largest common factor that keeps every budget, by bisection."""
    factors = [np.append(p.ranks, p.ranks[-1] + 1) / rank for p, rank in zip(paths, ranks, strict=True)]

    def scaled(factor: float) -> Ints:
        choice = np.array([len(layer) - 1 for layer in problem.layers])
        for path, own in zip(paths, factors, strict=True):
            reached = max(int(np.searchsorted(own, factor, side="right")) - 1, 0)
            choice[path.layer] = np.append(path.rows, choice[path.layer])[reached]
        return choice

    return first_that_fits(problem, np.unique(np.concatenate(factors))[::-1], scaled, fallback)

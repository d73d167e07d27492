"""The continuous space that is searched: kinds and ranks of every layer as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.problem import Problem


@dataclass(frozen=True)
class Space:
    """All (layer, kind) paths as padded tensors; P paths of at most J points, b budgets.

    A path lists a kind's candidates by rising size, each with a smaller loss than the last.
    Its coordinate, the size, is the cost relative to the budgets: for the SVD kinds the rank
    up to a constant, for kinds with several ranks the position on their best path.

    Attributes:
        sizes: Shape (P, J), padded by repeating the last point.
        losses: What each point adds to the objective, shape (P, J).
        costs: Relative to the budget, shape (P, J, b).
        ranks: Shape (P, J, R), R the largest number of ranks of a kind; padded by ones.
        kinds: Kind of each path.
        layer_of: Shape (P,).
        rows: Row of each point among its layer's candidates, one array per path.
        row_sizes: Size of each of those rows.
        layers: Number of layers.
    """

    sizes: Tensor
    losses: Tensor
    costs: Tensor
    ranks: Tensor
    kinds: tuple[str, ...]
    layer_of: Tensor
    rows: tuple[Ints, ...]
    row_sizes: tuple[Floats, ...]
    layers: int

    @classmethod
    def of(cls, problem: Problem) -> Space:
        """Returns the space of a problem."""
        paths = []
        most = max(1, *(len(ranks) for candidates in problem.layers for ranks in candidates.ranks))
        ones = (1,) * most
        for index, candidates in enumerate(problem.layers):
            relative, losses = problem.costs(index) / np.maximum(problem.limits, 1.0), problem.losses(index)
            for kind in dict.fromkeys(candidates.kinds):
                rows = _best_path(candidates.rows_of(kind), losses, relative.mean(axis=1))
                sizes = relative[rows].mean(axis=1)
                hull = rows[_convex_hull(sizes, losses[rows])]
                ranks = np.array([(*candidates.ranks[row], *ones)[:most] for row in hull], dtype=np.float64)
                paths.append((index, kind, rows, sizes, losses[hull], ranks, relative[hull]))
        longest = max(2, *(len(path[4]) for path in paths))

        def padded(values: Floats) -> Floats:
            return np.concatenate([values, np.repeat(values[-1:], longest - len(values), axis=0)])

        costs = np.stack([padded(c) for *_, c in paths])
        return cls(
            sizes=torch.from_numpy(costs.mean(axis=2)),
            losses=torch.from_numpy(np.stack([padded(path[4]) for path in paths])),
            costs=torch.from_numpy(costs),
            ranks=torch.from_numpy(np.stack([padded(path[5]) for path in paths])),
            kinds=tuple(path[1] for path in paths),
            layer_of=torch.tensor([path[0] for path in paths]),
            rows=tuple(path[2] for path in paths),
            row_sizes=tuple(path[3] for path in paths),
            layers=len(problem.layers),
        )

    def at(self, log_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss (P,), cost (P, b) and ranks (P, R) of every path at its size, linear in between."""
        size = log_sizes.exp()[:, None]  # (P, 1)
        left = (torch.searchsorted(self.sizes, size.detach(), right=True) - 1).clamp(0, self.sizes.shape[1] - 2)
        low, high = self.sizes.gather(1, left), self.sizes.gather(1, left + 1)
        step = high - low
        weight = torch.where(step > 0, (size - low) / step.clamp_min(1e-300), torch.zeros(())).clamp(0, 1)

        def between(values: Tensor) -> Tensor:
            at = left[:, :, None].expand(-1, -1, values.shape[2])
            return torch.lerp(values.gather(1, at), values.gather(1, at + 1), weight[:, :, None])[:, 0]

        return between(self.losses[:, :, None])[:, 0], between(self.costs), between(self.ranks)

    def softmax(self, logits: Tensor) -> Tensor:
        """Returns the probability of each path among those of its layer, (P,)."""
        weights = logits.exp()
        totals = torch.zeros(self.layers, dtype=weights.dtype).index_add(0, self.layer_of, weights)
        return weights / totals[self.layer_of]


def _best_path(rows: Ints, losses: Floats, sizes: Floats) -> Ints:
    """Returns the rows by rising size that each lower the loss of all smaller ones."""
    order = rows[np.lexsort((losses[rows], sizes[rows]))]
    best = np.minimum.accumulate(losses[order])
    improves = np.append(True, (best[1:] < best[:-1]) & (np.diff(sizes[order]) > 0))
    path: Ints = order[improves]
    return path


def _convex_hull(sizes: Floats, losses: Floats) -> Ints:
    """Returns the points of the lower convex hull: on it, no rank is a local optimum only."""
    hull: list[int] = []
    for point in range(len(sizes)):
        while len(hull) > 1 and _is_above(sizes, losses, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _is_above(sizes: Floats, losses: Floats, left: int, middle: int, right: int) -> bool:
    slope = (losses[right] - losses[left]) / (sizes[right] - sizes[left])
    return bool(losses[middle] >= losses[left] + slope * (sizes[middle] - sizes[left]))


def around(space: Space, log_sizes: Tensor, window: int) -> list[Ints]:
    """Returns, per layer, the candidates within `window` of the continuous ranks of each kind."""
    rows: list[list[int]] = [[] for _ in range(space.layers)]
    for path, own in enumerate(space.rows):
        here = int(np.searchsorted(space.row_sizes[path], float(log_sizes[path].exp())))
        rows[int(space.layer_of[path])] += own[max(0, here - window) : here + window + 1].tolist()
    return [np.array(sorted(kept)) for kept in rows]

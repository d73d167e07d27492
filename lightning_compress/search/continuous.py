"""The default: a differentiable search over kinds and ranks in a continuous space.

Every layer carries one log-rank per kind and logits over its kinds (the dense layer among
them). Between two neighbouring ranks loss and cost are interpolated, so that the composite
compression loss

    L(ρ, z) = D(ρ, z) + Σ_l ε_l(ρ_l, z_l) + Σ_b [ λ_b v_b + (μ/2) max(0, v_b)² ],
    v_b = C_b(ρ, z) / B_b − 1,

with ε = −log(1 − e), is differentiable in all of them. The kinds' softmax is annealed to a hard choice, and the
multipliers λ_b are raised by dual ascent until the budgets are met (augmented Lagrangian;
Nocedal and Wright, "Numerical Optimization", chapter 17). The result is projected onto whole
ranks: the best combination of candidates around the continuous solution that keeps every
budget. D, the distance of the model's outputs, is for objectives beyond the weights: the
separable one has D = 0.

Extends the continuous rank search of arXiv 2409.03555 (its loss is a product without a budget)
by strict budgets and several kinds per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.decompositions.base import Floats, Ints
from lightning_compress.progress import Progress
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem

STEPS = 300
LEARNING_RATE = 0.1
TEMPERATURES = (0.5, 0.01)
"""First and last temperature of the softmax over kinds; annealed geometrically."""
PENALTIES = (5.0, 100.0)
"""First and last μ, likewise."""
LEAST_SHARE = 0.05
LARGEST_LOGIT = 4.0
DUAL_RATE = 0.05
WINDOWS = (4, 16, 64)
"""Candidates on either side of the continuous ranks that the projection may use."""
SETTLED = 1e-3
"""The projection stops when a larger window lowers the objective by less than this fraction."""


def search_continuous(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the projection of the continuous optimum of the composite loss."""
    with torch.inference_mode(mode=False), torch.enable_grad():  # whatever the caller is in
        space = _Space.of(problem)
        log_sizes = _descend(space, progress)
    return _project(problem, space, log_sizes)


def _project(problem: Problem, space: _Space, log_sizes: Tensor) -> Ints:
    """Returns the best whole ranks around the continuous ones that keep every budget.

    The neighbourhood grows until a larger one no longer helps, or none is left.
    """
    best, loss = smallest(problem), np.inf
    for window in WINDOWS:
        rows = _around(space, log_sizes, window)
        local = solve(problem.restricted(rows), rel_gap=SETTLED).choice
        if local is None:
            continue
        choice = np.array([kept[row] for kept, row in zip(rows, local, strict=True)])
        settled = problem.loss_of(choice) > loss * (1 - SETTLED)
        if problem.loss_of(choice) < loss:
            best, loss = choice, problem.loss_of(choice)
        if settled:
            break
    return best


@dataclass(frozen=True)
class _Space:
    """All (layer, kind) paths as padded tensors; P paths of at most J points, b budgets.

    A path lists a kind's candidates by rising size, each with a smaller loss than the last.
    Its coordinate, the size, is the cost relative to the budgets: for the SVD kinds the rank
    up to a constant, for kinds with several ranks the position on their best path.

    Attributes:
        sizes: Shape (P, J), padded by repeating the last point.
        losses: −log(1 − e), shape (P, J).
        costs: Relative to the budget, shape (P, J, b).
        layer_of: Shape (P,).
        rows: Row of each point among its layer's candidates, one array per path.
        row_sizes: Size of each of those rows.
        layers: Number of layers.
    """

    sizes: Tensor
    losses: Tensor
    costs: Tensor
    layer_of: Tensor
    rows: tuple[Ints, ...]
    row_sizes: tuple[Floats, ...]
    layers: int

    @classmethod
    def of(cls, problem: Problem) -> _Space:
        paths = []
        for index, candidates in enumerate(problem.layers):
            relative = problem.costs(index) / np.maximum(problem.limits, 1.0)
            for kind in dict.fromkeys(candidates.kinds):
                rows = _best_path(candidates.rows_of(kind), candidates.losses, relative.mean(axis=1))
                hull = rows[_convex_hull(relative[rows].mean(axis=1), candidates.losses[rows])]
                paths.append((index, rows, relative[rows].mean(axis=1), candidates.losses[hull], relative[hull]))
        longest = max(2, *(len(losses) for *_, losses, _ in paths))

        def padded(values: Floats) -> Floats:
            return np.concatenate([values, np.repeat(values[-1:], longest - len(values), axis=0)])

        costs = np.stack([padded(c) for *_, c in paths])
        return cls(
            sizes=torch.from_numpy(costs.mean(axis=2)),
            losses=torch.from_numpy(np.stack([padded(e) for *_, e, _ in paths])),
            costs=torch.from_numpy(costs),
            layer_of=torch.tensor([index for index, *_ in paths]),
            rows=tuple(rows for _, rows, *_ in paths),
            row_sizes=tuple(sizes for _, _, sizes, *_ in paths),
            layers=len(problem.layers),
        )

    def at(self, log_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loss (P,) and cost (P, b) of every path at its size, linear in between."""
        size = log_sizes.exp()[:, None]  # (P, 1)
        left = (torch.searchsorted(self.sizes, size.detach(), right=True) - 1).clamp(0, self.sizes.shape[1] - 2)
        low, high = self.sizes.gather(1, left), self.sizes.gather(1, left + 1)
        step = high - low
        weight = torch.where(step > 0, (size - low) / step.clamp_min(1e-300), torch.zeros(())).clamp(0, 1)
        loss = torch.lerp(self.losses.gather(1, left), self.losses.gather(1, left + 1), weight)[:, 0]
        wide = left[:, :, None].expand(-1, -1, self.costs.shape[2])
        cost = torch.lerp(self.costs.gather(1, wide), self.costs.gather(1, wide + 1), weight[:, :, None])[:, 0]
        return loss, cost

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


def _descend(space: _Space, progress: Progress) -> Tensor:
    """Returns the log-sizes (P,) that minimise the composite loss."""
    low, high = space.sizes[:, 0].log(), space.sizes[:, -1].log()
    log_sizes = ((low + high) / 2).requires_grad_()
    logits = torch.zeros_like(low).requires_grad_()
    multipliers = torch.zeros(space.costs.shape[2], dtype=low.dtype)
    optimizer = torch.optim.Adam([log_sizes, logits], lr=LEARNING_RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        done = step / STEPS
        temperature, penalty = (_anneal(*ends, done) for ends in (TEMPERATURES, PENALTIES))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done) ** 0.5
        loss, cost = space.at(log_sizes)
        probability = space.softmax(logits)
        violation = (probability[:, None] * cost).sum(dim=0) - 1  # (b,)
        price = (multipliers + penalty * violation.clamp_min(0)).detach()
        value = loss + cost @ price  # (P,), the Lagrangian of each path
        entropy = -(probability * probability.clamp_min(1e-12).log()).sum()
        total = (probability * value.detach()).sum() - temperature * entropy
        total = total + (probability.detach().clamp_min(LEAST_SHARE) * value).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            multipliers = (multipliers + DUAL_RATE * penalty * violation.detach()).clamp_min(0)
            log_sizes.clamp_(low, high)
            logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
        if step % 20 == 0:
            progress("continuous rank search", done)
    progress("continuous rank search", 1.0)
    return log_sizes.detach()


def _anneal(first: float, last: float, done: float) -> float:
    return float(first * (last / first) ** done)


def _around(space: _Space, log_sizes: Tensor, window: int) -> list[Ints]:
    """Returns, per layer, the candidates within `window` of the continuous ranks of each kind."""
    rows: list[list[int]] = [[] for _ in range(space.layers)]
    for path, own in enumerate(space.rows):
        here = int(np.searchsorted(space.row_sizes[path], float(log_sizes[path].exp())))
        rows[int(space.layer_of[path])] += own[max(0, here - window) : here + window + 1].tolist()
    return [np.array(sorted(kept)) for kept in rows]

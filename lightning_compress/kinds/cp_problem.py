"""The problem that a CP fit solves, and its sweeps; see `cp_fit`."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_compress.kinds.metric import regularised

SETTLED = 1e-3
"""A fit stops once ten sweeps lower its objective by less than this fraction."""
CG_STEPS = 2
"""Conjugate gradient steps for a mode in a metric; where the metric is separable one is exact."""
FIRST_STEP, GROWTH, LEAST_STEP, LARGEST_STEP = 0.5, 1.2, 0.1, 8.0
"""Extrapolation: by this multiple of the last change of the filters."""
TINY = 1e-14
"""Relative squared error that is none in float64."""
LARGE, COARSE = 2e7, 1e-4
"""Products of so many multiply-adds are made in float32, as long as the relative squared error is above the second."""


@dataclass(frozen=True)
class Components:
    """R components of a fit.

    Attributes:
        expand: (out, R), with the norms of the components.
        filters: Columns of norm 1, (size of the mode, R) for each mode but the first.
        error: ‖(W − Ŵ) S^½‖² / ‖W S^½‖².
        objective: The error and the penalty of the norms.
    """

    expand: Tensor
    filters: list[Tensor]
    error: float
    objective: float

    @property
    def size(self) -> float:
        """Root of the sum of the squared norms."""
        return float(self.expand.norm())


class Problem:
    """A weight of energy 1 to be written as a sum of R components, in a metric or the identity.

    Args:
        weight: (out, in, first filter, …).
        metric: S, (D, D); None for the identity.
    """

    def __init__(self, weight: Tensor, metric: Tensor | None) -> None:
        self.weight, self.metric = weight, metric
        self._flat = weight.flatten(1)
        self._cross = self._flat if metric is None else self._flat @ metric  # W S, (out, D)
        total = float((self._cross * self._flat).sum())
        self.scale, self._roots = 1.0, [torch.eye(0)]
        if total > 0:
            self.scale = total**0.5
            self.weight, self._flat, self._cross = (t / self.scale for t in (self.weight, self._flat, self._cross))

    @classmethod
    def of(cls, weight: Tensor, metric: Tensor | None) -> Problem:
        """Returns the problem in coordinates in which the metric is near the identity.

        With S ≈ K_in ⊗ K_1 ⊗ … of the partial traces and K = L Lᵀ, the weight becomes W ×_m Lᵀ_m and
        the metric (⊗L)⁻¹ S (⊗L)⁻ᵀ.
        """
        largest = weight.abs().max()
        if metric is None:
            problem = cls(weight / largest, None)
            problem.scale *= float(largest)
            return problem
        dims = tuple(weight.shape[1:])
        weight, metric = weight / largest, regularised(metric)
        metric = metric / metric.diagonal().mean()
        roots = [torch.linalg.cholesky(regularised(_partial_trace(metric, dims, m))) for m in range(len(dims))]
        for mode, root in enumerate(roots):
            weight = torch.tensordot(weight, root, dims=([mode + 1], [0])).movedim(-1, mode + 1)
            for _ in range(2):  # both sides of a symmetric matrix
                blocks = metric.reshape(*dims, -1).movedim(mode, 0)
                solved = torch.linalg.solve_triangular(root, blocks.flatten(1), upper=False).reshape(blocks.shape)
                metric = solved.movedim(0, mode).reshape(len(metric), -1).T
        problem = cls(weight.contiguous(), (metric + metric.T) / 2)
        problem.scale *= float(largest)
        problem._roots = roots
        return problem

    def unwhitened(self, found: Components) -> tuple[Tensor, list[Tensor]]:
        """Returns the factors for the weight as it came, largest component first."""
        order = found.expand.norm(dim=0).argsort(descending=True, stable=True)
        expand, filters = found.expand[:, order] * self.scale, [f[:, order] for f in found.filters]
        if self.metric is None:
            return expand, filters
        pairs = zip(self._roots, filters, strict=True)
        return expand, [torch.linalg.solve_triangular(root.T, f, upper=True) for root, f in pairs]

    def whitened(self, filters: Sequence[Tensor]) -> list[Tensor]:
        """Returns filters for the weight as it came in the coordinates of the problem, columns of norm 1."""
        if self.metric is None:
            return [unit_columns(f) for f in filters]
        return [unit_columns(root.T @ f) for root, f in zip(self._roots, filters, strict=True)]

    def solve(self, filters: list[Tensor], ridge: float = 0.0) -> Components:
        """Returns the components with the exact output factor of given filters."""
        return self._solve(filters, ridge)[0]

    @functools.cached_property
    def single(self) -> Problem:
        """The same in float32, in which large products take half the time."""
        twin = copy.copy(self)
        twin.weight, twin._flat, twin._cross = self.weight.float(), self._flat.float(), self._cross.float()
        twin.metric = None if self.metric is None else self.metric.float()
        return twin

    def run(self, filters: list[Tensor], sweeps: int, ridge: float = 0.0) -> Components:
        """Returns the best components of some sweeps from given filters.

        Args:
            filters: Where to start.
            sweeps: At most.
            ridge: μ of the objective ‖(W − Ŵ) S^½‖² + μ Σ_r ‖component r‖².
        """
        product = self.weight.numel() if self.metric is None else self.metric.numel()
        if sweeps and product * filters[0].shape[1] >= LARGE:
            coarse = self.single._run([f.float() for f in filters], sweeps, ridge)
            filters = [unit_columns(f.double()) for f in coarse.filters]
            if coarse.error >= COARSE:
                return self.solve(filters, ridge)
        return self._run(filters, sweeps, ridge)

    def _run(self, filters: list[Tensor], sweeps: int, ridge: float) -> Components:
        """See `run`."""
        current, before, step = filters, None, FIRST_STEP
        best: Components | None = None
        seen = [math.inf]
        for _ in range(sweeps):
            tried = current if before is None else _extrapolated(current, before, step)
            found, half = self._solve(tried, ridge)
            if before is not None:
                if found.objective <= seen[-1]:
                    step = min(step * GROWTH, LARGEST_STEP)
                else:
                    step = max(step / 2, LEAST_STEP)
                    found, half = self._solve(current, ridge)
            seen.append(found.objective)
            best = found if best is None or found.objective < best.objective else best
            settled = len(seen) > 10 and seen[-11] - seen[-1] < SETTLED * seen[-1]  # noqa: PLR2004
            if not math.isfinite(found.objective) or found.objective < TINY or settled:
                break
            before, current = current, self._swept(found, half, ridge)
        last = self.solve(current, ridge)
        return last if best is None or last.objective < best.objective else best

    def _solve(self, filters: list[Tensor], ridge: float) -> tuple[Components, Tensor | None]:
        """Returns the components and S Φ, (D, R); None for the identity."""
        features = _khatri_rao(filters)
        half = None if self.metric is None else self.metric @ features
        gram = _grams(filters) if half is None else features.T @ half
        cross = self._cross @ features
        expand = _divided(cross, gram, ridge)
        explained = ((expand.T @ expand) * gram).double()
        error = float(1 - 2 * (expand * cross).sum(dtype=torch.float64) + explained.sum())
        rounding = torch.finfo(gram.dtype).eps * float(explained.abs().sum())  # large where components cancel
        error = max(error, rounding) if math.isfinite(error) else math.inf
        return Components(expand, filters, error, error + ridge * float(expand.square().sum())), half

    def _swept(self, found: Components, half: Tensor | None, ridge: float) -> list[Tensor]:
        """Returns the filters after one round over their modes.

        All other columns have norm 1 when a mode is solved for, so that the penalty of the norms is its ridge.
        """
        norms = torch.linalg.vector_norm(found.expand, dim=0)
        expand, filters = unit_columns(found.expand), list(found.filters)
        correlated = (self._cross.T @ expand).reshape(*(len(f) for f in filters), -1)  # Wᵀ A
        outer = expand.T @ expand
        if half is not None:
            half = half * norms  # S Φ of filters that carry the norms
        for mode in range(len(filters)):
            target = _contracted(correlated, filters, mode)
            if half is None:
                others = [f for m, f in enumerate(filters) if m != mode]
                solved = _divided(target, outer * _grams(others), ridge)
            else:
                solved, half = self._stepped(
                    filters, mode, solved=filters[mode] * norms, target=target, half=half, outer=outer, ridge=ridge
                )
            norms = torch.linalg.vector_norm(solved, dim=0)
            filters[mode] = solved / norms.clamp_min(torch.finfo(solved.dtype).tiny)
        return filters

    def _stepped(
        self,
        filters: list[Tensor],
        mode: int,
        *,
        solved: Tensor,
        target: Tensor,
        half: Tensor,
        outer: Tensor,
        ridge: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns a mode's columns after some preconditioned conjugate gradient steps, and the new S Φ."""
        metric = cast(Tensor, self.metric)
        gram = outer * _grams([f for m, f in enumerate(filters) if m != mode])

        def normal(image: Tensor, columns: Tensor) -> Tensor:
            blocks = (image @ outer).reshape(*(len(f) for f in filters), -1)
            return _contracted(blocks, filters, mode) + ridge * columns

        residual = target - normal(half, solved)
        direction = conditioned = _divided(residual, gram, ridge)
        product = (residual * conditioned).sum()
        for _ in range(CG_STEPS):
            image = metric @ _khatri_rao([direction if m == mode else f for m, f in enumerate(filters)])
            mapped = normal(image, direction)
            curvature = (direction * mapped).sum()
            if not curvature > 0:
                break
            length = product / curvature
            solved, half, residual = solved + length * direction, half + length * image, residual - length * mapped
            conditioned = _divided(residual, gram, ridge)
            before, product = product, (residual * conditioned).sum()
            direction = conditioned + product / before * direction
        return solved, half


def _partial_trace(metric: Tensor, dims: tuple[int, ...], mode: int) -> Tensor:
    """Returns S averaged over the diagonal of all modes but one, (size, size)."""
    before, size, after = math.prod(dims[:mode]), dims[mode], math.prod(dims[mode + 1 :])
    blocks = metric.reshape(before, size, after, before, size, after)
    return torch.einsum("aibajb->ij", blocks) / (before * after)


def _khatri_rao(filters: Sequence[Tensor]) -> Tensor:
    """Returns the products of the columns, (product of the sizes, R)."""
    product = filters[0]
    for factor in filters[1:]:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def _grams(filters: Sequence[Tensor]) -> Tensor:
    """Returns the Gram matrix of `_khatri_rao`, (R, R)."""
    product = filters[0].T @ filters[0]
    for factor in filters[1:]:
        product = product * (factor.T @ factor)
    return product


def _contracted(blocks: Tensor, filters: Sequence[Tensor], mode: int) -> Tensor:
    """Returns (…, R) summed against the columns of all modes but one, (size of the mode, R)."""
    for other in reversed(range(len(filters))):
        if other != mode:
            sizes = [1] * blocks.ndim
            sizes[other], sizes[-1] = filters[other].shape
            blocks = (blocks * filters[other].reshape(sizes)).sum(dim=other, keepdim=True)
    return blocks.reshape(len(filters[mode]), -1)


def _divided(targets: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """Returns T (G + ridge)⁻¹, (n, R), with as little more on the diagonal as makes G definite."""
    scale = float(gram.trace()) / len(gram)
    if not math.isfinite(scale):
        return torch.full_like(targets, torch.nan)
    for more in (1e-12, 1e-9, 1e-6):
        definite = gram.double() if gram.dtype != torch.float64 else gram.clone()
        definite.diagonal().add_(ridge + more * scale)
        root, info = torch.linalg.cholesky_ex(definite)
        if int(info) == 0:
            break
    solved: Tensor = torch.cholesky_solve(targets.T.double(), root).T
    return solved.to(targets)


def unit_columns(columns: Tensor) -> Tensor:
    """Returns columns of norm 1, those of zero as they are."""
    norms: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return columns / norms.clamp_min(torch.finfo(columns.dtype).tiny)


def _extrapolated(current: Sequence[Tensor], before: Sequence[Tensor], step: float) -> list[Tensor]:
    return [unit_columns(now + step * (now - then)) for now, then in zip(current, before, strict=True)]

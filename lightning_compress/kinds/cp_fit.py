"""The alternating least squares fits of the CP kinds.

Carroll and Chang 1970; Harshman 1970; with extrapolation between the sweeps (Mitchell, Ye and De Sterck 2020, "Nesterov
acceleration of alternating least squares for canonical tensor decomposition"; Ang, Cohen, Gillis and Hien 2021,
"Accelerating block coordinate descent for nonnegative tensor factorization": the step grows while the error falls and
shrinks when it does not). A sweep shares its two large products between the modes: some twenty times as fast as one of
tensorly's `parafac` on a kernel, against which the fit is checked in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.effort import current_effort
from lightning_compress.kinds.metric import regularised
from lightning_compress.kinds.slices import Slices

SCOUT_SWEEPS = 10
"""Sweeps after which the start from the slices and a random one are compared."""
SWEEPS_FOR_BOTH = 60
"""The random start is left out where fewer sweeps than these are affordable."""
SWEEPS, METRIC_SWEEPS, PROFILE_SWEEPS = (12, 90), (2, 15), (3, 12)
"""Fewest and most sweeps of a fit (of all its starts together), in the whole metric, and of one rank of a profile."""
WORK, PROFILE_WORK = 3e10, 2e9
"""Multiply-adds of a fit (about five seconds of one core) and of one rank of a profile, beyond the fewest sweeps."""
SETTLED = 1e-3
"""A fit stops once ten sweeps lower its objective by less than this fraction."""
SLACK = 0.01
"""The correction of the norms may raise the squared error by this fraction of it, or of what is explained if less."""
CORRECTIONS, CORRECTION_SWEEPS = 4, (2, 6)
"""Bisections of the penalty, and fewest and most sweeps of each; between them all take half of those of the fit."""
REFIT_RIDGE = 1e-5
"""Penalty of the norms in a refit, so that components that nearly cancel do not grow."""
LARGEST = 10.0
"""Root of the sum of the squared norms of all components, at most, relative to the norm of the weight."""
CG_STEPS = 2
"""Conjugate gradient steps for a mode in a metric; where the metric is separable one is exact."""
FIRST_STEP, GROWTH, LEAST_STEP, LARGEST_STEP = 0.5, 1.2, 0.1, 8.0
"""Extrapolation: by this multiple of the last change of the filters."""
TINY = 1e-14
"""Relative squared error that is none in float64."""


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
            return [_unit(f) for f in filters]
        return [_unit(root.T @ f) for root, f in zip(self._roots, filters, strict=True)]

    def solve(self, filters: list[Tensor], ridge: float = 0.0) -> Components:
        """Returns the components with the exact output factor of given filters."""
        return self._solve(filters, ridge)[0]

    def run(self, filters: list[Tensor], sweeps: int, ridge: float = 0.0) -> Components:
        """Returns the best components of some sweeps from given filters.

        Args:
            filters: Where to start.
            sweeps: At most.
            ridge: μ of the objective ‖(W − Ŵ) S^½‖² + μ Σ_r ‖component r‖².
        """
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
        explained = (expand.T @ expand) * gram
        error = float(1 - 2 * torch.vdot(expand.flatten(), cross.flatten()) + explained.sum())
        rounding = torch.finfo(gram.dtype).eps * float(explained.abs().sum())  # large where components cancel
        error = max(error, rounding) if math.isfinite(error) else math.inf
        return Components(expand, filters, error, error + ridge * float(expand.square().sum())), half

    def _swept(self, found: Components, half: Tensor | None, ridge: float) -> list[Tensor]:
        """Returns the filters after one round over their modes.

        All other columns have norm 1 when a mode is solved for, so that the penalty of the norms is its ridge.
        """
        norms = torch.linalg.vector_norm(found.expand, dim=0)
        expand, filters = _unit(found.expand), list(found.filters)
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


def drafted(problem: Problem, rank: int, slices: Slices | None = None) -> Components:
    """Returns the components that a few sweeps lead to from the slices, which are worked out where not given."""
    slices = slices or Slices(problem.weight)
    sweeps = _sweeps(PROFILE_WORK, sweep_work(tuple(problem.weight.shape), rank), PROFILE_SWEEPS)
    found = _separable(problem).run(slices.filters(rank), sweeps)
    return found if problem.metric is None else problem.solve(found.filters)


def fitted(problem: Problem, rank: int) -> Components:
    """Returns the components of the better of two starts, with bounded norms."""
    dims = tuple(problem.weight.shape)
    separable = _separable(problem)
    total = _sweeps(WORK, sweep_work(dims, rank), SWEEPS)
    starts = [Slices(problem.weight).filters(rank)]
    if total >= SWEEPS_FOR_BOTH:
        starts.append(_random_filters(dims[1:], rank))
    scouted = min((separable.run(start, min(SCOUT_SWEEPS, total)) for start in starts), key=_error)
    best = separable.run(scouted.filters, max(total - SCOUT_SWEEPS * len(starts), 0))
    best, ridge = _corrected(separable, best, int(np.clip(total // (2 * CORRECTIONS), *CORRECTION_SWEEPS)))
    if problem.metric is None:
        return best
    work = (2 + (len(dims) - 1) * CG_STEPS) * rank * problem.metric.numel()
    sweeps = _sweeps(WORK, work, METRIC_SWEEPS)
    return _bounded(problem, problem.run(best.filters, sweeps, ridge), ridge)[0]


def refitted(problem: Problem, filters: Sequence[Tensor]) -> Components:
    """Returns the components that some sweeps lead to from those of a problem nearby, with bounded norms."""
    start = problem.whitened(filters)
    rank = start[0].shape[1]
    work = sweep_work(tuple(problem.weight.shape), rank)
    if problem.metric is not None:
        work = (2 + (problem.weight.ndim - 1) * CG_STEPS) * rank * problem.metric.numel()
    found = problem.run(start, _sweeps(WORK, work, METRIC_SWEEPS), REFIT_RIDGE)
    return _bounded(problem, found, REFIT_RIDGE)[0]


def _error(found: Components) -> float:
    """Returns the error, infinite where it is none."""
    return found.error


def _separable(problem: Problem) -> Problem:
    """Returns the problem with the metric replaced by its separable approximation, here the identity."""
    return problem if problem.metric is None else Problem(problem.weight, None)


def _corrected(problem: Problem, found: Components, sweeps: int) -> tuple[Components, float]:
    """Returns components of smaller norms at hardly more error, and the penalty that led to them.

    Components that nearly cancel can lower the error while their norms grow without bound. Of all
    components within `SLACK` of the error those of the smallest Σ_r ‖component r‖² are sought (Phan et
    al. 2020, section 3.1, "error preserving correction"), here through the Lagrangian: alternating
    ridge regressions, the penalty as large as the bound on the error allows, found by bisection.
    """
    bound = found.error + SLACK * min(found.error, max(1 - found.error, 0.0)) + TINY
    best, ridge = found, 0.0
    low, high = -8.0, 0.0
    for _ in range(CORRECTIONS):
        middle = (low + high) / 2
        tried = problem.run(found.filters, sweeps, 10**middle)
        if tried.error <= bound:
            low = middle
            if tried.size <= best.size:
                best, ridge = tried, 10**middle
        else:
            high = middle
    return _bounded(problem, best, ridge)


def _bounded(problem: Problem, found: Components, ridge: float) -> tuple[Components, float]:
    """Returns components whose norms are at most `LARGEST`, whatever that costs in error.

    The objective at the exact output factor is at most that of no components at all, 1, so a penalty
    of 1 / LARGEST² is always enough.
    """
    while not found.size <= LARGEST and ridge < 1:
        ridge = max(10 * ridge, 1e-6)
        found = problem.run(found.filters, CORRECTION_SWEEPS[1], ridge)
    return found, ridge


def sweep_work(dims: Sequence[int], rank: int) -> float:
    """Returns the multiply-adds of a sweep: two products with the weight, a linear system for each mode."""
    return 2 * rank * math.prod(dims) + len(dims) * rank**3 / 3 + sum(dims) * rank**2


def _random_filters(dims: Sequence[int], rank: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [_unit(torch.randn(size, rank, generator=generator, dtype=torch.float64)) for size in dims]


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
        definite = gram.clone()
        definite.diagonal().add_(ridge + more * scale)
        root, info = torch.linalg.cholesky_ex(definite)
        if int(info) == 0:
            break
    solved: Tensor = torch.cholesky_solve(targets.T, root).T
    return solved


def _unit(columns: Tensor) -> Tensor:
    """Returns columns of norm 1, those of zero as they are."""
    norms: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return columns / norms.clamp_min(torch.finfo(columns.dtype).tiny)


def _extrapolated(current: Sequence[Tensor], before: Sequence[Tensor], step: float) -> list[Tensor]:
    return [_unit(now + step * (now - then)) for now, then in zip(current, before, strict=True)]


def _sweeps(work: float, each: float, bounds: tuple[int, int]) -> int:
    """Returns how many sweeps are affordable where each takes so much work, by the current `Effort`."""
    (fewest, most), fits = bounds, current_effort().fits
    return int(np.clip(fits * work / each, fewest, max(fewest, fits * most)))

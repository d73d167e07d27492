"""Canonical polyadic (CP) kinds: a convolution as a sum of R separable filters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_compress.kinds.base import (
    Decomposition,
    Floats,
    Ints,
    Operator,
    RankProfile,
    Stage,
    equalise_norms,
    pointwise,
)
from lightning_compress.kinds.cp_fit import drafted, fit_work, fitted, refitted, sweep_work
from lightning_compress.kinds.cp_problem import TINY, Components, Problem
from lightning_compress.kinds.slices import Slices
from lightning_compress.kinds.svd import axes_of, needs_spatial_kernel

PROFILE_LIMIT = 1e10
"""A profile does not fit ranks at which a sweep takes more: they keep the fraction of the next smaller one."""
PROFILE_SHARES = (1 / 32, 1 / 8, 1 / 2)
"""Ranks that a profile fits, of the largest that saves parameters."""
FEW_RANKS = 64
"""Up to so many every second one is fitted."""
AFFORDABLE = 3e10
"""Multiply-adds of a sweep from which on "auto" leaves the CP kinds out."""
SAVING = 0.9
"""Parameters of a component of `cp` relative to one of `cp3` up to which "auto" tries both."""


class _Canonical(Decomposition):
    """W ≈ Σ_r a_r ∘ b_r ∘ c_r ∘ …: 1x1 into R channels, filters on each of them alone, 1x1 out."""

    fits_roughly = True
    leaves = 0.65

    @override
    def automatic(self, operator: Operator) -> bool:
        """Returns whether fits are affordable: a sweep at the ranks of a fifth of the parameters takes that much."""
        dims = self._dims(operator.shape)
        return sweep_work(dims, max(1, math.prod(dims) // (5 * sum(dims)))) < AFFORDABLE

    @abstractmethod
    def _parts(self, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Returns the spatial axes of each filter."""

    def _names(self, kernel: tuple[int, ...]) -> list[str]:
        return [f"axis{index}" for index in range(len(self._parts(kernel)))]

    def _dims(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the modes, (out, in, first filter, …)."""
        kernel = shape[2:]
        return (*shape[:2], *(math.prod(kernel[axis] for axis in part) for part in self._parts(kernel)))

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the rank of the exact sum over the SVDs of all kernel positions."""
        return (min(shape[:2]) * math.prod(shape[2:]),)

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        rank, kernel = ranks[:, 0], shape[2:]
        filters = (
            Stage(name, rank, rank, part, groups=rank)
            for name, part in zip(self._names(kernel), self._parts(kernel), strict=True)
        )
        return Stage("reduce", rank, shape[1]), *filters, Stage("expand", shape[0], rank)

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        """Returns the errors of all ranks that make the layer smaller.

        They are those of the slices' SVDs, nested and exact, times the fraction that a few sweeps leave
        of them at some ranks, interpolated.
        """
        shape = tuple(weight.shape)
        dims = self._dims(shape)
        limit = min(self.max_ranks(shape)[0], max(1, (math.prod(dims) - 1) // sum(dims)))
        ranks = np.arange(1, limit + 1)
        if not bool(weight.any()):
            return RankProfile(ranks[:, None], np.zeros(limit))
        problem = Problem.of(weight.reshape(dims), metric)
        slices = Slices(problem.weight)
        start = np.maximum(slices.errors[:limit], TINY)
        shares = PROFILE_SHARES if limit > FEW_RANKS else 0.5 ** np.arange(math.log2(limit) + 1)
        grid = np.unique([1, *(max(1, round(share * limit)) for share in shares)])
        grid = np.array([rank for rank in grid.tolist() if rank == 1 or sweep_work(dims, rank) < PROFILE_LIMIT])
        kept = [drafted(problem, rank, slices).error / start[rank - 1] for rank in grid.tolist()]
        predicted = start * np.interp(ranks, grid, kept)
        errors: Floats = np.minimum.accumulate(np.clip(predicted, 0.0, 1.0))
        return RankProfile(ranks[:, None], errors)

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the factors; components of the largest norm (in the metric) come first.

        The norm of a component is shared out evenly over its factors.
        """
        return self._factors(weight, ranks[0], metric, fitted)

    @override
    def fit_work(self, shape: tuple[int, ...], ranks: tuple[int, ...], *, in_metric: bool) -> float:
        return fit_work(self._dims(shape), ranks[0], in_metric=in_metric)

    @override
    def draft(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        return self._factors(weight, ranks[0], metric, drafted)

    @override
    def refit(
        self, weight: Tensor, factors: Mapping[str, Tensor], ranks: tuple[int, ...], metric: Tensor | None = None
    ) -> dict[str, Tensor]:
        rank, names = ranks[0], self._names(tuple(weight.shape[2:]))
        start = [factors["reduce"].reshape(rank, -1).T, *(factors[name].reshape(rank, -1).T for name in names)]
        return self._factors(weight, rank, metric, lambda problem, _: refitted(problem, start))

    def _factors(
        self, weight: Tensor, rank: int, metric: Tensor | None, fit: Callable[[Problem, int], Components]
    ) -> dict[str, Tensor]:
        shape = tuple(weight.shape)
        dims = self._dims(shape)
        if bool(weight.any()):
            problem = Problem.of(weight.reshape(dims), metric)
            expand, filters = problem.unwhitened(fit(problem, rank))
        else:  # some directions for the zero components to train in
            expand, filters = (
                torch.zeros(dims[0], rank, dtype=weight.dtype),
                [weight.new_zeros(n, rank) for n in dims[1:]],
            )
        columns = equalise_norms(expand, *filters)
        kernel = shape[2:]
        names = self._names(kernel)
        factors = {"reduce": pointwise(columns[1].T, len(kernel))}
        for name, part, column in zip(names, self._parts(kernel), columns[2:], strict=True):
            sizes = (kernel[axis] if axis in part else 1 for axis in range(len(kernel)))
            factors[name] = column.T.reshape(rank, 1, *sizes)
        return {**factors, "expand": pointwise(columns[0], len(kernel))}

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        reduce, expand = factors["reduce"].flatten(1), factors["expand"].flatten(1)
        filters = factors[self._names(shape[2:])[0]]  # (r, 1, *kernel), 1 along the axes of the others
        for name in self._names(shape[2:])[1:]:
            filters = filters * factors[name]
        return torch.einsum("or,ri,rk->oik", expand, reduce, filters.flatten(1)).reshape(shape)


class Cp(_Canonical):
    """1x1 into R channels, k_h x 1 and 1 x k_w on each channel alone, 1x1 out; any number of axes.

    An axis along which the kernel is 1 goes with its neighbour: it is not worth a layer.

    Source: Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition", section 3; Phan et al. 2020, "Stable Low-rank Tensor Decomposition for
    Compression of Convolutional Neural Network" for the bounded norms, see `cp_fit`.
    """

    kind = "cp"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        refusal = needs_spatial_kernel(operator, self.kind)
        if refusal is None and len(self._parts(operator.kernel)) < 2:  # noqa: PLR2004
            return f"{self.kind} of a kernel along one axis is cp3"
        return refusal

    @override
    def automatic(self, operator: Operator) -> bool:
        """Returns whether a component is clearly smaller than one of `cp3`, which fits better, and fits affordable."""
        if not super().automatic(operator):
            return False
        whole = sum(operator.shape[:2]) + math.prod(operator.kernel)
        return sum(self._dims(operator.shape)) <= SAVING * whole

    @override
    def _parts(self, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        parts: list[tuple[int, ...]] = []
        waiting: tuple[int, ...] = ()
        for axis, size in enumerate(kernel):
            if size > 1:
                parts.append((*waiting, axis))
                waiting = ()
            elif parts:
                parts[-1] = (*parts[-1], axis)
            else:
                waiting = (*waiting, axis)
        return tuple(parts)


class Cp3(_Canonical):
    """1x1 into R channels, a filter of the whole kernel on each channel alone, 1x1 out.

    CP of the tensor (out, in, kernel positions).

    Source: as `Cp`; the three-way form is that of Denton et al. 2014, "Exploiting Linear Structure
    Within Convolutional Networks for Efficient Evaluation", section 3.2.2, with a single cluster.
    """

    kind = "cp3"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        return needs_spatial_kernel(operator, self.kind)

    @override
    def _parts(self, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return (axes_of((1, 1, *kernel)),)

    @override
    def _names(self, kernel: tuple[int, ...]) -> list[str]:
        return ["kernel"]

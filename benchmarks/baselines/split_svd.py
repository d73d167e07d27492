"""Channel SVD with k splits: the input channels in equal groups, each with low-rank factors of its own."""

from __future__ import annotations

import itertools
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
    along,
    equalise_norms,
    pointwise,
    singular_energies,
    tail_errors,
)
from lightning_compress.kinds.metric import energy, output_basis, regularised
from lightning_compress.kinds.registry import register_kind
from lightning_compress.kinds.svd import axes_of

SWEEPS = 4
"""Rounds of the regression over the splits."""
SETTLED = 1e-3
"""A round that lowers the error by less than this fraction is the last."""


class SplitSvd(Decomposition):
    """A k_h x k_w convolution in k groups into k·j channels, then 1x1: SVDs of k blocks of the unfolding.

    The out x (in·k_h·k_w) unfolding is cut along the input channels into k blocks of equal width;
    each gets the same rank j. A kernel of 1x1 is a convolution like any other.

    Source: Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal
    Layer-wise Decomposition", NeurIPS, section 2.

    Args:
        splits: Number of groups k.
    """

    refines = True

    def __init__(self, splits: int) -> None:
        self.splits = splits
        self.kind = f"split{splits}_svd"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if not operator.kernel:
            return f"{self.kind} factorises convolutions only, nn.Linear has no groups"
        if operator.shape[1] % self.splits:
            return f"{self.kind} needs in_channels divisible by {self.splits}, not {operator.shape[1]}"
        return None

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (min(shape[0], int(np.prod(shape[1:])) // self.splits),)

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        """Returns the error of every rank.

        In a metric the errors are those of the start of the fit, which its regression can only
        lower; they may rise with the rank, as what the blocks lose need not be uncorrelated.
        """
        (limit,) = self.max_ranks(tuple(weight.shape))
        if metric is None:
            energies = np.array([singular_energies(block)[:limit] for block in self.blocks(weight)])  # (k, j)
            errors = tail_errors(energies.sum(axis=0))
        else:
            errors = _SplitFit(self.blocks(weight), metric).errors()[:limit]
        return RankProfile(ranks=np.arange(1, limit + 1)[:, None], errors=errors)

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        between = self.splits * ranks[:, 0]
        return (
            Stage("reduce", between, shape[1], axes_of(shape), groups=self.splits),
            Stage("expand", shape[0], between),
        )

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        (rank,) = ranks
        blocks = self.blocks(weight)  # (k, out, in / k * k_h * k_w)
        if metric is None:
            u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
            expand, reduce = u[:, :, :rank], s[:, :rank, None] * vh[:, :rank]
        else:
            expand, reduce = _SplitFit(blocks, metric).fit(rank)
        expand, columns = equalise_norms(expand.transpose(0, 1).flatten(1), reduce.flatten(0, 1).T)
        return {
            "reduce": columns.T.reshape(expand.shape[1], -1, *weight.shape[2:]),
            "expand": pointwise(expand, weight.ndim - 2),
        }

    @override
    def gated(self, factors: Mapping[str, Tensor], gates: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """Gates every split alike: the components of one come after those of another."""
        reduce = factors["reduce"]
        own = gates(0, len(reduce) // self.splits)
        return {**factors, "reduce": along(reduce, own.repeat(self.splits))}

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        expand = factors["expand"].reshape(shape[0], self.splits, -1)  # (out, k, j)
        reduce = factors["reduce"].reshape(self.splits, expand.shape[2], -1)  # (k, j, in / k * k_h * k_w)
        return torch.einsum("okj,kjm->okm", expand, reduce).reshape(shape)

    def blocks(self, weight: Tensor) -> Tensor:
        """Returns the blocks of the unfolding, (k, out, in / k · k_h · k_w)."""
        return weight.reshape(len(weight), self.splits, -1).transpose(0, 1)


class _SplitFit:
    """Split SVD in the metric: a reduced-rank regression for each block, given the others.

    It starts from the best factors of each block in its own metric S_ii, nested in the rank, and
    then refits block by block what the others leave: with D_l the loss of block l, the best
    rank-j factors in S_ii of the target W_i + (Σ_{l≠i} D_l S_li) S_ii⁻¹. Each such step is the exact
    minimum over one block (but for the ridge of the inverse); of all rounds the best is kept.

    Args:
        blocks: Blocks of the weight, (k, out, m).
        metric: S, (k·m, k·m).
    """

    def __init__(self, blocks: Tensor, metric: Tensor) -> None:
        splits, _, width = blocks.shape
        self._blocks = blocks
        self._whole_metric = metric
        self._metric = metric.reshape(splits, width, splits, width)
        self._bases = torch.stack([output_basis(block, self._own(i))[1] for i, block in enumerate(blocks)])
        self._total = energy(_joined(blocks), metric)

    def _own(self, block: int) -> Tensor:
        return self._metric[block, :, block]

    def errors(self) -> Floats:
        """Returns the error of the start at the ranks 1, 2, … out.

        Of block i the start loses Σ_{a>j} u_a u_aᵀ W_i. With R_i = U_iᵀ W_i the error is the sum over
        a, b > j of Σ_il (R_i S_il R_lᵀ)_ab (U_iᵀ U_l)_ab, for all j at once.
        """
        rotated = self._bases.transpose(1, 2) @ self._blocks  # (k, out, m)
        products = torch.zeros_like(self._bases[0])
        for i, other in itertools.product(range(len(self._blocks)), repeat=2):
            crossed = rotated[i] @ self._metric[i, :, other] @ rotated[other].T
            products += crossed * (self._bases[i].T @ self._bases[other])
        if self._total <= 0:
            return np.zeros(len(products))
        lost = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).numpy()
        errors: Floats = np.clip(np.append(lost[1:], 0.0) / self._total, 0.0, 1.0)
        return errors

    def fit(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns the factors of each block, (k, out, j) and (k, j, m)."""
        expand = self._bases[:, :, :rank]
        reduce = expand.transpose(1, 2) @ self._blocks
        best, least = (expand, reduce), self._lost(expand, reduce)
        if least > self._total:  # the blocks cancel each other in W but not in what they lose: start from nothing
            best, least = (expand, torch.zeros_like(reduce)), self._total
        if not least > 0:
            return best
        factors, inverses = best, self._inverses()
        for _ in range(SWEEPS):
            factors = self._sweep(*factors, inverses)
            lost, before = self._lost(*factors), least
            if lost < least:
                best, least = factors, lost
            if lost > before * (1 - SETTLED):
                break
        return best

    def _inverses(self) -> Tensor:
        """Returns S_ii⁻¹ of each block, with a ridge relative to the whole of S, (k, m, m)."""
        splits, _, width = self._blocks.shape
        ridged = regularised(self._whole_metric).reshape(splits, width, splits, width)
        own = ridged.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return torch.cholesky_inverse(torch.linalg.cholesky(own))

    def _lost(self, expand: Tensor, reduce: Tensor) -> float:
        return energy(_joined(self._blocks - expand @ reduce), self._whole_metric)

    def _sweep(self, expand: Tensor, reduce: Tensor, inverses: Tensor) -> tuple[Tensor, Tensor]:
        expand, reduce = expand.clone(), reduce.clone()
        lost = self._blocks - expand @ reduce
        for i, block in enumerate(self._blocks):
            lost[i] = 0
            crossed = torch.einsum("lom,lmn->on", lost, self._metric[:, :, i])
            target = block + crossed @ inverses[i]
            expand[i] = output_basis(target, self._own(i))[1][:, : expand.shape[2]]
            reduce[i] = expand[i].T @ target
            lost[i] = block - expand[i] @ reduce[i]
        return expand, reduce


def _joined(blocks: Tensor) -> Tensor:
    """Returns the unfolding of the blocks, (out, k·m)."""
    return blocks.transpose(0, 1).flatten(1)


register_kind(SplitSvd(2))
register_kind(SplitSvd(4))

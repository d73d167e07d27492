"""The SVD family: one matrix unfolding each, the best rank-r factors by Eckart-Young-Mirsky."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_compress.kinds.base import (
    Decomposition,
    Ints,
    Operator,
    RankProfile,
    Stage,
    equalise_norms,
    pointwise,
    singular_energies,
    tail_errors,
)
from lightning_compress.kinds.metric import energy, output_basis, regularised, solvable, whitened_targets


class _MatrixDecomposition(Decomposition):
    """A kind whose two factors are those of one matrix unfolding of the weight."""

    @abstractmethod
    def _matrix(self, weight: Tensor) -> Tensor:
        """Returns the unfolding, (outputs, inputs) of the rank-r bottleneck."""

    @abstractmethod
    def _matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns the shape of the unfolding."""

    @abstractmethod
    def _fold(self, expand: Tensor, reduce: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns the child weights from the factors, (outputs, r) and (r, inputs)."""

    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (min(self._matrix_shape(shape)),)

    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        matrix = self._matrix(weight)
        energies = singular_energies(matrix) if metric is None else output_basis(matrix, metric)[0]
        energies = energies[: min(matrix.shape)]
        return RankProfile(ranks=np.arange(1, len(energies) + 1)[:, None], errors=tail_errors(energies))

    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        (rank,) = ranks
        matrix = self._matrix(weight)
        if metric is None and matrix.shape[0] > matrix.shape[1]:
            reduce = _leading(matrix.T @ matrix, rank).T
            expand = matrix @ reduce.T
        elif metric is None:
            expand = _leading(matrix @ matrix.T, rank)
            reduce = expand.T @ matrix
        else:  # reduced-rank regression: project on the leading directions of the outputs
            expand = output_basis(matrix, metric)[1][:, :rank]
            reduce = expand.T @ matrix
        expand, columns = equalise_norms(expand, reduce.T)
        return self._fold(expand, columns.T, tuple(weight.shape))


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Returns the eigenvectors of the largest eigenvalues, (n, rank): up to 8 times as fast as an SVD of the matrix.

    To project on them is exact at full rank, whatever the scale of the small singular values.
    """
    vectors: Tensor = torch.linalg.eigh(gram)[1].flip(1)
    return vectors[:, :rank]


class _ChannelMatrix(_MatrixDecomposition):
    """A kind whose unfolding is out x everything else: r filters of the layer's own kernel, then r to out."""

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)  # (out, in) or (out, in * k_h * k_w)

    def _matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], int(np.prod(shape[1:]))

    def _fold(self, expand: Tensor, reduce: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"reduce": reduce.reshape(-1, *shape[1:]), "expand": pointwise(expand, len(shape) - 2)}

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        rank = ranks[:, 0]
        return Stage("reduce", rank, shape[1], axes_of(shape)), Stage("expand", shape[0], rank)

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return (factors["expand"].flatten(1) @ factors["reduce"].flatten(1)).reshape(shape)


class Svd(_ChannelMatrix):
    """W ≈ U V for nn.Linear and 1x1 convolutions: out x r times r x in.

    Source: Eckart and Young 1936; for layers, Denton et al. 2014, "Exploiting Linear Structure
    Within Convolutional Networks".
    """

    kind = "svd"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if operator.is_spatial:
            return "svd factorises nn.Linear, embeddings and 1x1 convolutions only"
        return None


class ChannelSvd(_ChannelMatrix):
    """A k_h x k_w convolution into r channels, then 1x1: SVD of the out x (in·k_h·k_w) unfolding.

    Source: Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks for Classification
    and Detection", section 3.1 (without its data-driven response reconstruction).
    """

    kind = "channel_svd"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        return needs_spatial_kernel(operator, self.kind)


class SpatialSvd(_MatrixDecomposition):
    """A k_h x 1 convolution into r channels, then 1 x k_w: SVD of the (out·k_w) x (in·k_h) unfolding.

    In three dimensions k_h is the first axis and k_w stands for the other two.

    Source: Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank
    Expansions", scheme 2.
    """

    kind = "spatial_svd"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if len(operator.kernel) < 2:  # noqa: PLR2004
            return f"{self.kind} factorises convolutions over two axes or more only"
        return needs_spatial_kernel(operator, self.kind)

    def _matrix(self, weight: Tensor) -> Tensor:
        weight = weight.flatten(3)
        return weight.permute(0, 3, 1, 2).reshape(self._matrix_shape(tuple(weight.shape)))  # (out * k_w, in * k_h)

    def _matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        out, in_, k_h, *k_w = shape
        return out * int(np.prod(k_w)), in_ * k_h

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        rank, (first, *others) = ranks[:, 0], axes_of(shape)
        return Stage("reduce", rank, shape[1], (first,)), Stage("expand", shape[0], rank, tuple(others))

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        if metric is None or not bool(metric.any()) or not bool(weight.any()):
            return super().profile(weight)
        spatial = _SpatialFit(weight.flatten(3), metric)
        targets = spatial.whitened()  # (r * k_w, out), rank by rank
        explained = targets.square().sum(dim=1).reshape(-1, weight.shape[3:].numel()).sum(dim=1).cumsum(0)
        errors = (1 - explained / spatial.total).clamp(0, 1).numpy()
        return RankProfile(ranks=np.arange(1, len(errors) + 1)[:, None], errors=errors)

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        if metric is None or not bool(metric.any()) or not bool(weight.any()):
            return super().factorise(weight, ranks)
        (rank,) = ranks
        reduce, expand = _SpatialFit(weight.flatten(3), metric).fit(rank)  # (r, in * k_h), (out * k_w, r)
        expand, columns = equalise_norms(expand, reduce.T)
        return self._fold(expand, columns.T, tuple(weight.shape))

    def _fold(self, expand: Tensor, reduce: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        out, in_, k_h, *k_w = shape
        return {
            "reduce": reduce.reshape(-1, in_, k_h, *(1 for _ in k_w)),
            "expand": expand.reshape(out, *k_w, -1).movedim(-1, 1).unsqueeze(2),
        }

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        reduce, expand = factors["reduce"].flatten(2), factors["expand"].flatten(2)
        return torch.einsum("rih,orw->oihw", reduce, expand).reshape(shape)


def needs_spatial_kernel(operator: Operator, kind: str) -> str | None:
    """Returns why a kind for convolutions with a kernel does not apply, or None if it does."""
    if not operator.kernel:
        return f"{kind} factorises convolutions only"
    if not operator.is_spatial:
        return f"{kind} of a 1x1 convolution is svd"
    return None


def axes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns all spatial axes of a weight of this shape."""
    return tuple(range(len(shape) - 2))


class _SpatialFit:
    """Spatial SVD in the metric: vertical filters from the averaged moments, horizontal by least squares.

    The vertical filters are the leading right factors of the (out·k_w) x (in·k_h) unfolding in the
    metric of one kernel column, averaged over the columns; given them the horizontal ones are the
    exact minimum of ‖(W − Ŵ) S^½‖_F, nested in the rank.
    """

    def __init__(self, weight: Tensor, metric: Tensor) -> None:
        out, in_, k_h, k_w = weight.shape
        self._rows = in_ * k_h
        self._k_w = k_w
        self._weight = weight.permute(0, 3, 1, 2).reshape(out, k_w * self._rows)  # (out, k_w * in * k_h)
        order = torch.arange(metric.shape[0]).reshape(self._rows, k_w).T.reshape(-1)
        self._metric = regularised(metric)[order][:, order].reshape(k_w, self._rows, k_w, self._rows)
        column = torch.einsum("widj,wd->ij", self._metric, torch.eye(k_w, dtype=weight.dtype)) / k_w
        matrix = self._weight.reshape(out * k_w, self._rows)
        root = torch.linalg.cholesky(column)
        _, s, vh = torch.linalg.svd(matrix @ root, full_matrices=False)
        self._filters = s[:, None] * torch.linalg.solve_triangular(root, vh, upper=False, left=False)  # (r, in * k_h)
        self.total = energy(self._weight, self._metric.reshape(k_w * self._rows, -1))

    def _normal(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Φ S Φᵀ and Φ S Wᵀ of the features (filter, column), (r·k_w, r·k_w) and (r·k_w, out)."""
        half = torch.einsum("ri,widj->rwdj", filters, self._metric)  # (r, k_w, k_w, in * k_h)
        features = torch.einsum("rwdj,qj->rwqd", half, filters)
        n = len(filters) * self._k_w
        weight = self._weight.reshape(-1, self._k_w, self._rows)
        return features.reshape(n, n), torch.einsum("rwdj,odj->rwo", half, weight).reshape(n, -1)

    def whitened(self) -> Tensor:
        features, cross = self._normal(self._usable(self._filters))
        return whitened_targets(solvable(features), cross)

    def fit(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns vertical (r, in·k_h) and horizontal (out·k_w, r) factors."""
        filters = self._usable(self._filters)[:rank]
        features, cross = self._normal(filters)
        solution = torch.linalg.solve(solvable(features), cross)  # (r * k_w, out)
        expand = solution.reshape(len(filters), self._k_w, -1).permute(2, 1, 0).reshape(-1, len(filters))
        return filters, expand

    @staticmethod
    def _usable(filters: Tensor) -> Tensor:
        norms = filters.norm(dim=1, keepdim=True)
        return torch.where(norms > 0, filters / norms.clamp_min(1e-300), filters)

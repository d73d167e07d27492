"""The tensor train of a convolution: 1x1, one axis of the kernel after another, 1x1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

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
    along,
    pointwise,
    singular_energies,
)
from lightning_compress.kinds.metric import regularised, solvable, whitened_targets
from lightning_compress.kinds.multilinear import mode_basis
from lightning_compress.kinds.svd import needs_spatial_kernel

MOST = 1500
"""Rank tuples tabulated at most."""
WIDE = 256
"""Of more channels than that ranks up to three quarters are tabulated: the largest take most of the time."""
SWEEPS = 3
"""Rounds of the orthogonal iteration."""
SETTLED = 1e-3
"""A round that lowers the error by less than this fraction is the last."""


class TensorTrain(Decomposition):
    """1x1 into r_1, k_h x 1 into r_2, 1 x k_w into r_3, 1x1 out; ranks are (r_1, r_2, r_3).

    Conv3d has one axis and one rank more; an axis on which the kernel is 1 belongs to its
    neighbour. The profile's errors are those of the TT-SVD from the inputs on, exactly; its tuples
    form a grid in which no rank is larger than its neighbours allow. The fit starts there and only
    ever improves, so that the predicted error is an upper bound.

    Source: Oseledets 2011, "Tensor-Train Decomposition", algorithm 1; Zhou et al. 2022, "Optimal
    High-order Tensor SVD via Tensor-Train Orthogonal Iteration", for the rounds after it; Gabor and
    Zdunek 2023, "Compressing convolutional neural networks with hierarchical Tucker-2
    decomposition", for networks of such chains of one-dimensional convolutions.
    """

    kind = "tt"
    fits_roughly = True

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if operator.is_spatial and len(_spans(operator.kernel)) < 2:  # noqa: PLR2004
            return f"{self.kind} of a kernel that spans one axis is tucker2"
        return needs_spatial_kernel(operator, self.kind)

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = (*_modes(shape), shape[0])
        return tuple(int(min(np.prod(sizes[:bond]), np.prod(sizes[bond:]))) for bond in range(1, len(sizes)))

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        columns = list(ranks.T)
        return (
            Stage("reduce", columns[0], shape[1]),
            *(
                Stage(f"axis{index}", after, before, axes)
                for index, (axes, (before, after)) in enumerate(
                    zip(_spans(shape[2:]), itertools.pairwise(columns), strict=True)
                )
            ),
            Stage("expand", shape[0], columns[-1]),
        )

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        """Returns the errors of a grid of rank tuples that depends on the shape alone."""
        shape = tuple(weight.shape)
        errors = _TrainFit(weight, metric).errors(self._grid(shape))
        errors[self.max_ranks(shape)] = 0.0
        return RankProfile(ranks=np.array(list(errors)), errors=np.array(list(errors.values())))

    def _grid(self, shape: tuple[int, ...]) -> Ints:
        """Returns the finest of the grids that is small enough and smaller than dense, (n, R)."""
        channels = max(shape[:2])
        cap = channels if channels <= WIDE else channels * 3 // 4
        for steps in (4, 2, 1):
            ranks = np.array(list(_chains(_modes(shape)[1:], self.max_ranks(shape), steps, cap)))
            ranks = ranks[self.parameters(shape, ranks) < np.prod(shape)]
            if len(ranks) <= MOST:
                break
        return ranks

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        kernel = weight.shape[2:]
        first, *cores, last = _TrainFit(weight, metric).fit(ranks)
        sizes = [[n if axis in axes else 1 for axis, n in enumerate(kernel)] for axes in _spans(kernel)]
        named = {f"axis{i}": c.reshape(len(c), -1, *size) for i, (c, size) in enumerate(zip(cores, sizes, strict=True))}
        return {"reduce": pointwise(first, len(kernel)), **named, "expand": pointwise(last, len(kernel))}

    @override
    def gated(self, factors: Mapping[str, Tensor], gates: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """Gates the outputs of each factor but the last with the rank of that bond."""
        *bonds, _ = factors
        own = {name: along(factors[name], gates(bond, len(factors[name]))) for bond, name in enumerate(bonds)}
        return {**factors, **own}

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        first, *others = (factor.flatten(2) for factor in factors.values())
        product = first  # (r, in, positions so far)
        for factor in others:
            product = torch.einsum("sra,rip->sipa", factor, product).flatten(2)
        return product.reshape(shape)


def _spans(kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the axes in groups in which one axis spans more than one position (or none does)."""
    groups: list[tuple[int, ...]] = []
    for axis in range(len(kernel)):
        if groups and (kernel[axis] == 1 or all(kernel[other] == 1 for other in groups[-1])):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return tuple(groups)


def _modes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes of the train's modes before the outputs, (in, k_h, k_w)."""
    return shape[1], *(int(np.prod([shape[2 + axis] for axis in axes])) for axes in _spans(shape[2:]))


def _chains(kernel: tuple[int, ...], limits: tuple[int, ...], steps: int, cap: int) -> Iterator[tuple[int, ...]]:
    """Yields tuples of ranks on a geometric grid, each at most the kernel's size times its neighbours."""
    grids = [geometric(min(limit, cap), steps) for limit in limits]
    chains: list[tuple[int, ...]] = [(first,) for first in grids[0]]
    for size, grid in zip(kernel, grids[1:], strict=True):
        chains = [(*chain, r) for chain in chains for r in grid if r <= size * chain[-1] and chain[-1] <= size * r]
    yield from chains


def geometric(limit: int, steps: int) -> list[int]:
    """Returns 1, 2, … limit with so many steps per doubling: large ones are multiples of 8, as hardware prefers."""
    values = {2**octave * (steps + step) // steps for octave in range(limit.bit_length()) for step in range(steps)}
    return sorted({value for value in values if value < limit} | {limit})


@dataclass(frozen=True)
class _Features:
    """What the cores so far make of a layer's inputs: p features at q positions that are not yet summed over.

    Attributes:
        weight: Of the features, in the order of `moments`, (n, p, positions): what the next core is chosen for.
        cross: W S Φᵀ of the features Φ x, (out, p, q).
        moments: Φ S Φᵀ, (p, q, p, q); None for the identity.
    """

    weight: Tensor
    cross: Tensor
    moments: Tensor | None

    def narrowed(self, most: int) -> tuple[Tensor, _Features]:
        """Returns the core of the leading directions, (r, p), and the features in it, nested in r."""
        matrix = self.weight.permute(1, 2, 0).flatten(1)  # (p, positions * n)
        root = None
        if self.moments is not None:
            p, q, *_ = self.moments.shape
            mean = torch.einsum("pqrs,qs->pr", self.moments, torch.eye(q, dtype=matrix.dtype)) / q
            root = torch.linalg.cholesky(solvable(mean))
            matrix = root.T @ matrix
        core = mode_basis(matrix, 0)[:, : min(most, *matrix.shape)].T
        weight = (core @ matrix).reshape(len(core), -1, len(self.weight)).permute(2, 0, 1)
        if root is None or self.moments is None:
            return core, _Features(weight, core @ self.cross, None)
        core = torch.linalg.solve_triangular(root, core, upper=False, left=False)
        half = (core @ self.moments.flatten(1)).reshape(-1, p, q).transpose(1, 2).reshape(-1, p)  # one product each
        moments = (half @ core.T).reshape(len(core), q, q, len(core)).transpose(2, 3).contiguous()
        return core, _Features(weight, core @ self.cross, moments)

    def merged(self, rank: int, size: int) -> _Features:
        """Returns the first features, with the next axis of the kernel among them."""
        rank = min(rank, self.cross.shape[1])
        n = rank * size
        weight, cross = (t[:, :rank].reshape(len(t), n, -1) for t in (self.weight, self.cross))
        if self.moments is None:
            return _Features(weight, cross, None)
        moments = self.moments[:rank, :, :rank].reshape(n, -1, n, self.moments.shape[1] // size)
        return _Features(weight, cross, moments)


class _TrainFit:
    """A tensor train in the metric: left cores by whitened TT-SVD, the last two by reduced-rank regression.

    Each left core keeps the leading directions of its mode's unfolding, whitened by the second
    moment of the features averaged over the positions not yet summed over; they are nested in the
    rank. Given them, the last axis and the outputs are the exact minimum of ‖(W − Ŵ) S^½‖_F. With
    S = I this is the TT-SVD.

    Args:
        weight: (out, in, *kernel).
        metric: S, None for the identity.
    """

    def __init__(self, weight: Tensor, metric: Tensor | None) -> None:
        out, in_, *_ = weight.shape
        self._kernel = _modes(tuple(weight.shape))[1:]
        self._weight = weight.reshape(out, in_, -1)
        positions = self._weight.shape[2]
        cross, moments = self._weight, None
        if metric is not None and bool(metric.any()):
            metric = regularised(metric)
            cross = (weight.flatten(1) @ metric).reshape(out, in_, positions)
            moments = metric.reshape(in_, positions, in_, positions)
        self._inputs = _Features(self._weight, cross, moments)
        self._total = float((cross * self._weight).sum())

    def errors(self, ranks: Ints) -> dict[tuple[int, ...], float]:
        """Returns the error of each tuple of ranks."""
        if not self._total > 0:
            return {tuple(row): 0.0 for row in ranks.tolist()}
        return {
            chain: min(max(1 - explained / self._total, 0.0), 1.0)
            for chain, explained in self._explained(self._inputs, 0, ranks)
        }

    def _explained(self, features: _Features, bond: int, ranks: Ints) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yields tuples of ranks that agree before a bond with the energies they explain."""
        _, narrowed = features.narrowed(int(ranks[:, bond].max()))
        here = sorted(set(ranks[:, bond].tolist()))
        if bond + 1 < len(self._kernel):
            for rank in here:
                merged = narrowed.merged(rank, self._kernel[bond])
                yield from self._explained(merged, bond + 1, ranks[ranks[:, bond] == rank])
            return
        size = self._kernel[bond]
        last = narrowed.merged(here[-1], size)
        targets = last.cross[:, :, 0].T  # (r * size, out), nested in r
        if last.moments is not None:
            targets = whitened_targets(solvable(last.moments[:, 0, :, 0]), targets)
        for rank in here:
            energies = singular_energies(targets[: rank * size]).cumsum()
            for row in ranks[ranks[:, bond] == rank].tolist():
                yield tuple(row), float(energies[min(row[-1], len(energies)) - 1])

    def fit(self, ranks: tuple[int, ...]) -> list[Tensor]:
        """Returns the cores in the order of the train, (r, r before · size)."""
        best, least = self._cores(self._weight, ranks)
        cores, lost = best, least
        for _ in range(SWEEPS):
            if not lost > 0:
                break
            before = lost
            cores, lost = self._cores(self._seen_through(*cores[-2:]), ranks)
            if lost < least:
                best, least = cores, lost
            if lost > before * (1 - SETTLED):
                break
        return even(_padded(best, ranks))

    def _seen_through(self, core: Tensor, expand: Tensor) -> Tensor:
        """Returns what of the weight the last two cores can express, (out, in, positions)."""
        size = self._kernel[-1]
        right = (expand @ core).reshape(len(expand), -1, size).transpose(1, 2).flatten(0, 1)  # (out * size, r)
        basis, _ = torch.linalg.qr(right)
        out, in_, positions = self._weight.shape
        unfolded = self._weight.reshape(out, in_, -1, size).permute(0, 3, 1, 2).reshape(out * size, -1)
        seen = (basis @ (basis.T @ unfolded)).reshape(out, size, in_, -1)
        whole: Tensor = seen.permute(0, 2, 3, 1).reshape(out, in_, positions)
        return whole

    def _cores(self, weight: Tensor, ranks: tuple[int, ...]) -> tuple[list[Tensor], float]:
        """Returns the cores, their left ones chosen for another weight, and the energy they lose."""
        features, cores = replace(self._inputs, weight=weight), []
        for rank, size in zip(ranks[:-1], self._kernel, strict=True):
            core, features = features.narrowed(rank)
            features = features.merged(rank, size)
            cores.append(core)
        mapping = cross = features.cross[:, :, 0]  # (out, r * size)
        if features.moments is not None:
            mapping = torch.linalg.solve(solvable(features.moments[:, 0, :, 0]), cross.T).T
        energies, vectors = torch.linalg.eigh(mapping @ cross.T)
        expand = vectors.flip(1)[:, : ranks[-1]]
        lost = self._total - float(energies.flip(0)[: ranks[-1]].sum())
        return [*cores, expand.T @ mapping, expand], max(lost, 0.0)


def _padded(cores: list[Tensor], ranks: tuple[int, ...]) -> list[Tensor]:
    """Returns the cores at ranks larger than their neighbours allow: more outputs, which the next core ignores."""
    cores = list(cores)
    for bond, rank in enumerate(ranks):
        core, after = cores[bond], cores[bond + 1]
        have = len(core)
        cores[bond] = core[torch.arange(rank) % have]
        wider = after.new_zeros(len(after), rank, after.shape[1] // have)
        wider[:, :have] = after.reshape(len(after), have, -1)
        cores[bond + 1] = wider.flatten(1)
    return cores


def even(cores: list[Tensor]) -> list[Tensor]:
    """Returns the cores at one scale, so that they train alike; as they are where one is zero."""
    norms = torch.stack([core.norm() / core.numel() ** 0.5 for core in cores])
    if not bool((norms > 0).all()):
        return cores
    mean = norms.log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]

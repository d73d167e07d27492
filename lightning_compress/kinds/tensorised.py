"""A very large nn.Embedding as a tensor of four modes: a tensor-train matrix of two cores.

The table (out, rows) becomes (out_1, out_2, in_1, in_2), out_2 <= out_1 the two most balanced factors of the row's
size; the number of rows, which seldom has such factors, is rounded up to in_1 · in_2. The output channels are then
shared between two factors, so the metric G of the outputs is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_compress.kinds.base import (
    Decomposition,
    Ints,
    LayerCall,
    Operator,
    RankProfile,
    Stage,
    balanced,
    singular_energies,
    tail_errors,
)

SMALLEST = 2**16
"""Weights with fewer entries are left to `svd`: there is little to gain."""
UNBALANCED = 16
"""Largest ratio of the two factors of a row's size."""
AUTOMATIC_SIZE = 2**23
"""Entries from which on "auto" tries the kind."""
LARGE, FEW, LANCZOS_TOLERANCE = 1024, 16, 1e-4
"""Singular vectors of a matrix of this size, at most one of so many, are found by Lanczos iteration."""


def balanced_factors(size: int) -> tuple[int, int]:
    """Returns the factors p <= q of a size that are nearest to each other."""
    small = next(p for p in range(math.isqrt(size), 0, -1) if size % p == 0)
    return small, size // small


def modes_of(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Returns (out_1, out_2, in_1, in_2) of a table (out, rows), with in_1 · in_2 >= rows."""
    out_2, out_1 = balanced_factors(shape[0])
    in_2 = math.isqrt(shape[1] - 1) + 1
    return out_1, out_2, -(-shape[1] // in_2), in_2


class TtEmbedding(Decomposition):
    """An embedding's rows v = (i, j) as Σ_r a_ir ⊗ b_rj: a tensor-train matrix of two cores that is looked up.

    The best of every rank is the SVD of the rearranged table, (out_1·in_1) x (out_2·in_2), with rows of
    zeros up to in_1 · in_2. The order of the rows matters: those of a vocabulary by frequency do best.

    Source: Hrinchuk et al. 2020, "Tensorized Embedding Layers", section 3, with two cores; Novikov et al. 2015,
    "Tensorizing Neural Networks", section 3; Van Loan and Pitsianis 1993, "Approximation with Kronecker Products".
    """

    kind = "tt_embedding"
    splits_outputs = True

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if not operator.lookup:
            return f"{self.kind} factorises nn.Embedding only"
        if not operator.rowwise:
            return f"{self.kind} looks up row by row, without sparse or scaled gradients; this layer takes svd"
        if math.prod(operator.shape) < SMALLEST:
            return f"{self.kind} is for weights of {SMALLEST} entries or more, not {math.prod(operator.shape)}"
        small, large = balanced_factors(operator.shape[0])
        if large > UNBALANCED * small:
            size = operator.shape[0]
            return f"{self.kind} needs sizes with two balanced factors; {size} is {small} x {large} at best"
        return None

    @override
    def automatic(self, operator: Operator) -> bool:
        return math.prod(operator.shape) >= AUTOMATIC_SIZE

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        out_1, out_2, in_1, in_2 = modes_of(shape)
        return (min(out_1 * in_1, out_2 * in_2),)

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        """Returns none: the children are modules of their own."""
        return ()

    @override
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        out_1, out_2, in_1, in_2 = modes_of(shape)
        costs: Ints = ranks[:, 0] * (out_1 * in_1 + out_2 * in_2)
        return costs

    @override
    def macs(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        costs: Ints = ranks[:, 0] * shape[0] * call.rows
        return costs

    @override
    def activations(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        out_1, out_2, *_ = modes_of(shape)
        written: Ints = (ranks[:, 0] * (out_1 + out_2) + shape[0]) * call.rows
        return written

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        errors = tail_errors(singular_energies(_rearranged(weight)))
        return RankProfile(ranks=np.arange(1, len(errors) + 1)[:, None], errors=errors)

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        out_1, out_2, in_1, in_2 = modes_of(tuple(weight.shape))
        matrix = _rearranged(weight)
        inner = _leading(matrix.T, *ranks).T
        outer, inner = balanced(matrix @ inner.T, inner)
        return {"inner": inner.reshape(-1, out_2, in_2), "outer": outer.reshape(out_1, in_1, -1)}

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        product = torch.einsum("air,rbj->abij", factors["outer"], factors["inner"])
        return product.flatten(2).flatten(0, 1)[:, : shape[1]]


def _rearranged(weight: Tensor) -> Tensor:
    """Returns a table (out, rows) as (out_1 · in_1, out_2 · in_2), filled up with zeros."""
    modes = modes_of(tuple(weight.shape))
    filled = F.pad(weight, (0, modes[2] * modes[3] - weight.shape[1]))
    return filled.reshape(modes).transpose(1, 2).flatten(2).flatten(0, 1)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Returns the leading left singular vectors, (rows, r); a few of a large matrix by Lanczos iteration."""
    if min(matrix.shape) < LARGE or rank * FEW > min(matrix.shape) or not bool(matrix.any()):
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
        return vectors.flip(1)[:, :rank]
    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    u, values, _ = svds(matrix.numpy(), rank, tol=LANCZOS_TOLERANCE, v0=start, return_singular_vectors="u")
    return torch.from_numpy(u[:, np.argsort(-values)].copy())

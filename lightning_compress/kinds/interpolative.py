"""The interpolative decomposition: some outputs are worked out from the inputs, the others from those.

Of an SVD's factors U V of rank r, r² numbers are redundant: U A and A⁻¹ V are the same weight for every A. With A
the inverse of r rows of U, those rows become the identity and need not be stored, so a rank costs r · (out + in − r)
in the place of r · (out + in): always less than the dense layer, and a quarter less where half of a square weight's
rank is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from typing_extensions import override

from lightning_compress.kinds.base import Ints, LayerCall, Operator
from lightning_compress.kinds.svd import Svd


class Interpolative(Svd):
    """W ≈ P [I; T] R for nn.Linear and 1x1 convolutions: r outputs R x, the others T R x.

    The factors are those of `Svd`, so errors are the smallest of the rank; the rows that become the identity are
    chosen by QR with column pivoting, which keeps T small.

    Source: Cheng, Gimbutas, Martinsson and Rokhlin 2005, "On the Compression of Low Rank Matrices".
    """

    kind = "interpolative"

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if operator.is_spatial or operator.lookup or operator.transposed or operator.groups > 1:
            return f"{self.kind} factorises nn.Linear and 1x1 convolutions of one group only"
        return None

    @override
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        rank = ranks[:, 0]
        costs: Ints = rank * (shape[0] + shape[1] - rank)
        return costs

    @override
    def macs(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        positions = int(np.prod(call.outputs, dtype=np.int64)) * call.rows  # the first child has the strides
        costs: Ints = self.parameters(shape, ranks) * positions
        return costs

    @override
    def buffer_bytes(self, shape: tuple[int, ...]) -> int:
        return shape[0] * torch.int32.itemsize

    @override
    def finished(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        reduce, expand = factors["reduce"], factors["expand"]
        matrix, inner = expand.flatten(1), reduce.flatten(1)
        sized = matrix * inner.norm(dim=1)
        rank = matrix.shape[1]
        pivots = torch.from_numpy(scipy.linalg.qr(sized.T.numpy(), mode="r", pivoting=True)[1][:rank].astype(np.int64))
        chosen = matrix[pivots]
        rows = torch.linalg.lstsq(chosen.T, matrix.T, driver="gelsd").solution.T  # (out, r) with rows · chosen = matrix
        rows[pivots] = torch.eye(rank, dtype=rows.dtype)
        return {"reduce": (chosen @ inner).reshape(reduce.shape), "expand": rows.reshape(expand.shape)}

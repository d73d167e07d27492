"""The interpolative decomposition: some outputs are worked out from the inputs, the others from those.

Of an SVD's factors U V of rank r, r² numbers are redundant: U A and A⁻¹ V are the same weight for every A. With A
the inverse of r rows of U, those rows become the identity and need not be stored, so a rank costs r · (out + in − r)
in the place of r · (out + in): always less than the dense layer, and a quarter less where half of a square weight's
rank is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_compress.decompositions.base import Ints, LayerCall, Operator
from lightning_compress.decompositions.svd import Svd

_CODE = 4
"""Places are stored as 4 k + 2: a callback that averages copies of a model may round whole numbers down by one."""


class Interpolation(nn.Module):
    """h ↦ y: r of the outputs are h itself, the others W h.

    Its weight is (out − r, r) for nn.Linear, (out − r, r, 1, …) for convolutions.

    Args:
        outputs: Number of outputs.
        rank: r.
        dims: Spatial dimensions of the layer, 0 for nn.Linear.
    """

    order: Tensor

    def __init__(self, outputs: int, rank: int, dims: int) -> None:
        super().__init__()
        shape = (outputs - rank, rank, *(1 for _ in range(dims)))
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        self.register_buffer("order", _coded(torch.arange(outputs)))
        self.dims = dims

    def places(self) -> Tensor:
        """Returns where each output is among h and W h, (out,)."""
        return self.order.div(_CODE, rounding_mode="floor")

    def arrange(self, expand: Tensor) -> Tensor:
        """Takes over which rows of a factor (out, r, …) are those of the identity; returns the others."""
        matrix = expand.flatten(1)
        units = ((matrix == 1).sum(dim=1) == 1) & ((matrix != 0).sum(dim=1) == 1)
        rank = matrix.shape[1]
        places = torch.empty(len(matrix), dtype=torch.int64, device=matrix.device)
        taken = torch.zeros(rank, dtype=torch.bool, device=matrix.device)
        for row in torch.nonzero(units)[:, 0].tolist():
            component = int(matrix[row].argmax())
            units[row] = not bool(taken[component])  # of two equal rows the first one
            taken[component] = True
            places[row] = component
        others = torch.nonzero(~units)[:, 0]
        places[others] = rank + torch.arange(len(others), device=matrix.device)
        self.order.copy_(_coded(places))
        return expand[others]

    def expanded(self, weight: Tensor) -> Tensor:
        """Returns the factor (out, r, …) that a weight of this layer stands for, differentiable."""
        rank = weight.shape[1]
        identity = torch.eye(rank, dtype=weight.dtype, device=weight.device).reshape(rank, *weight.shape[1:])
        return torch.cat([identity, weight]).index_select(0, self.places().to(weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """Returns (…, out) for (…, r), or (B, out, …) for (B, r, …)."""
        axis = -1 - self.dims
        joined = torch.cat([input, _pointwise(input, self.weight, self.dims)], dim=axis)
        if _channels_last(joined):  # to select along the last axis keeps that format
            output = joined.movedim(1, -1).index_select(-1, self.places()).movedim(-1, 1)
        else:
            output = joined.index_select(axis, self.places())
        if self.bias is None:
            return output
        return output + self.bias.reshape(-1, *(1 for _ in range(self.dims))).to(output)


def _pointwise(values: Tensor, weight: Tensor, dims: int) -> Tensor:
    if not len(weight):  # full rank: nothing is left to work out
        return values.narrow(-1 - dims, 0, 0)
    if not dims:
        return F.linear(values, weight)
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    found: Tensor = convolve(values, weight)
    return found


def _channels_last(values: Tensor) -> bool:
    known = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.ndim)
    return known is not None and not values.is_contiguous() and values.is_contiguous(memory_format=known)


def _coded(places: Tensor) -> Tensor:
    return (_CODE * places + _CODE // 2).to(torch.int32)


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

"""The module of the interpolative decomposition: some outputs are its inputs, the others are worked out from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

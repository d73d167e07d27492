"""The module of the interpolative decomposition: some outputs are its inputs, the others are worked out from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.layers.scripted import scriptable

_CODE = 4
"""Places are stored as 4 k + 2: a callback that averages copies of a model may round whole numbers down by one."""


@scriptable
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
        self.dims, self.is_square = dims, outputs == rank

    @scriptable
    def places(self) -> Tensor:
        """Returns where each output is among h and W h, (out,)."""
        return self.order.div(4, rounding_mode="floor")  # _CODE: TorchScript takes no global one

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

    @scriptable
    def forward(self, input: Tensor) -> Tensor:
        """Returns (…, out) for (…, r), or (B, out, …) for (B, r, …)."""
        axis = -1 - self.dims
        joined = input
        if not self.is_square:  # else nothing is left to work out
            joined = torch.cat([input, _pointwise(input, self.weight, self.dims)], dim=axis)
        if _channels_last(joined):  # to select along the last axis keeps that format
            output = joined.movedim(1, -1).index_select(-1, self.places()).movedim(-1, 1)
        else:
            output = joined.index_select(axis, self.places())
        bias = self.bias
        if bias is None:
            return output
        return output + bias.reshape([-1] + [1] * self.dims).to(output)  # of TorchScript


@scriptable
def _pointwise(values: Tensor, weight: Tensor, dims: int) -> Tensor:
    if dims == 0:
        return F.linear(values, weight)
    if dims == 1:
        return F.conv1d(values, weight)
    return F.conv2d(values, weight) if dims == 2 else F.conv3d(values, weight)  # noqa: PLR2004


@scriptable
def _channels_last(values: Tensor) -> bool:
    if values.is_contiguous():
        return False
    if values.ndim == 4:  # noqa: PLR2004
        return values.is_contiguous(memory_format=torch.channels_last)
    return values.ndim == 5 and values.is_contiguous(memory_format=torch.channels_last_3d)  # noqa: PLR2004


def _coded(places: Tensor) -> Tensor:
    return (_CODE * places + _CODE // 2).to(torch.int32)

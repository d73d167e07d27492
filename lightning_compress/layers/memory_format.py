"""The channels-last memory format of a module's weights.

Torch runs a convolution in the format that the strides of its input or its weight suggest. Of a kernel of 1x1, or of
one input channel, both formats hold the numbers in the same order, and only strides written on purpose tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

CHANNELS_LAST = "channels_last"
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last_format(tensor: Tensor) -> torch.memory_format | None:
    """Returns the channels-last format that the strides of a tensor are those of, and not of the ordinary one."""
    known = _FORMATS.get(tensor.ndim)
    if known is None:
        return None
    like = torch.empty(tensor.shape, device="meta")
    last = torch.empty(tensor.shape, device="meta", memory_format=known)
    return known if tensor.stride() == last.stride() != like.stride() else None


def in_channels_last(tensor: Tensor) -> Tensor:
    """Returns a tensor with the strides of the channels-last format, one of other dimensions as it is."""
    known = _FORMATS.get(tensor.ndim)
    if known is None or channels_last_format(tensor) is not None:
        return tensor
    return torch.empty_like(tensor, memory_format=known).copy_(tensor)


def is_channels_last(module: nn.Module) -> bool:
    """Returns whether a module has a weight in such a format."""
    return any(channels_last_format(parameter) is not None for parameter in module.parameters())


def can_be_channels_last(module: nn.Module) -> bool:
    """Returns whether a module has convolutions, all in the ordinary format."""
    return any(p.ndim in _FORMATS for p in module.parameters()) and not is_channels_last(module)


def outside_channels_last(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Returns the convolutions' weights that are not in channels-last format."""
    return [p for p in parameters if p.ndim in _FORMATS and channels_last_format(p) is None]


def put_in_channels_last_(parameters: Iterable[nn.Parameter]) -> None:
    """Puts convolutions' weights in channels-last format, in place."""
    for parameter in outside_channels_last(parameters):
        parameter.data = in_channels_last(parameter.data)


def put_back_(parameters: Iterable[nn.Parameter]) -> None:
    """Puts weights that `put_in_channels_last_` has changed in the ordinary format again."""
    for parameter in parameters:
        plain = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        parameter.data = plain.copy_(parameter.data)

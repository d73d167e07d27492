"""What the kernel of a convolution is applied to."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd


def stuffed_between(conv: _ConvTransposeNd, inputs: Tensor) -> Tensor:
    """Returns the inputs with zeros between them and padding around: the transposed convolution then has stride 1."""
    stride, kernel, dilation = conv.stride, conv.kernel_size, conv.dilation
    padding, more = cast("tuple[int, ...]", conv.padding), conv.output_padding
    sizes = [(n - 1) * s + 1 for n, s in zip(inputs.shape[2:], stride, strict=True)]
    stuffed = inputs.new_zeros((*inputs.shape[:2], *sizes))
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = inputs
    pads: list[int] = []
    for axis in reversed(range(len(sizes))):
        around = dilation[axis] * (kernel[axis] - 1) - padding[axis]
        pads += [around, around + more[axis]]
    return F.pad(stuffed, pads)


def all_patches(inputs: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Returns a view of all patches of (B, C, *inputs), (B, *outputs, C, *kernel)."""
    dims = len(kernel)
    for axis in range(dims):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        inputs = inputs.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
    return inputs.movedim(1, dims + 1)


def some_patches(patches: Tensor, dims: int, most: int) -> Tensor:
    """Returns the patches (B, *outputs, C, *kernel) of evenly spread positions, about so many in all, (B, n, C, …)."""
    sizes = patches.shape[1 : dims + 1]
    every = len(patches) * sizes.numel() // most
    if every < 2:  # noqa: PLR2004
        return patches
    flat = torch.arange(0, sizes.numel(), every, device=patches.device)
    index: Any = (slice(None), *torch.unravel_index(flat, sizes))
    return patches[index]

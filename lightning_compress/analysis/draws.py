"""Arguments of a model drawn at random, before anything is optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_compress.analysis.drawing import leaves, noise, textured
from lightning_compress.analysis.trace import Arguments
from lightning_compress.core.compat import tree_flatten, tree_map, tree_unflatten
from lightning_compress.core.effort import current_effort

LEAST_SIDE = 96
"""Images whose sides would get shorter than this are not halved to afford more of them."""


def judging_inputs(example: Arguments, tables: Mapping[int, int], generator: torch.Generator) -> Arguments:
    """Returns a batch of inputs of another kind than those drawn first."""

    def other(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim):
            return leaf
        if is_image(leaf.shape):
            half = (len(leaf) // 2, *leaf.shape[1:])
            return torch.cat([leaves(half, generator), noise(half, generator)]).to(leaf)
        scales = torch.logspace(-0.5, 0.5, len(leaf)).reshape(-1, *(1 for _ in leaf.shape[1:]))
        return leaf * scales.to(leaf)

    drawn = draw_inputs(example, tables, current_effort().judging, generator)
    return cast(Arguments, tree_map(other, drawn))


def draw_inputs(example: Arguments, tables: Mapping[int, int], size: int, generator: torch.Generator) -> Arguments:
    """Returns arguments like the example's with `size` samples; what is looked up is drawn from its table."""
    leaves, spec = tree_flatten(example)
    drawn = []
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            drawn.append(leaf)
        elif leaf.is_floating_point():
            drawn.append(_values((size, *leaf.shape[1:]), generator).to(leaf.device, leaf.dtype))
        elif place in tables:
            drawn.append(torch.randint(tables[place], (size, *leaf.shape[1:]), generator=generator).to(leaf))
        else:
            drawn.append(leaf.expand(size, *leaf.shape[1:]))
    return cast(Arguments, tree_unflatten(drawn, spec))


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns values of mean 0 and deviation 1; images (B, C, H, W) are drawn."""
    if not is_image(shape):
        return torch.randn(shape, generator=generator)
    if min(shape[2:]) >= LEAST_SIDE:
        return textured(shape, generator)
    half = shape[0] // 2
    images = [noise((shape[0] - half, *shape[1:]), generator)]
    if half:
        images.append(leaves((half, *shape[1:]), generator))
    return torch.cat(images)[torch.randperm(shape[0], generator=generator)]


def shows_textures(example: Arguments) -> bool:
    """Returns whether some images of the arguments are large enough to be drawn with textures."""
    shapes = [leaf.shape for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(is_image(shape) and min(shape[2:]) >= LEAST_SIDE for shape in shapes)


def is_image(shape: Sequence[int]) -> bool:
    """Returns whether values of a shape are taken for images, (B, C, H, W)."""
    return len(shape) == 4 and min(shape[2:]) >= 4  # noqa: PLR2004

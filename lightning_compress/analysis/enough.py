"""How much is enough: inputs that say what there is to know of a layer, and moments that are worth their memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_compress.kinds.base import LayerCall, Operator
from lightning_compress.layers.families import operator_of

POSITIONS = 2**14
"""Rows of an unfolded input that are taken at most per layer and batch, evenly spread."""
LEAST_POSITIONS, NUMBERS = 2**10, 2**22
"""Fewer, down to the first, where they are so long that all together would hold more than the second."""
LARGEST, LARGEST_OF_KERNEL = 6144, 2048
"""Rows of the largest second moment that is kept (300 MB), and of the largest over the places of a kernel.

Of convolutions with longer inputs that of the channels is kept. The reference VGG at a tenth of its parameters has
0.925 on 5,000 training images with whole moments, and 0.919 with those of channels from 500 rows on; ResNet-20 0.907
and 0.906.
"""
ROWS = 32
"""Rows per row of its second moment that a layer needs where inputs are drawn anew, each position of each of them."""


def positions_of(size: int) -> int:
    """Returns how many rows of so many numbers are taken at most per batch."""
    return min(POSITIONS, max(LEAST_POSITIONS, NUMBERS // size))


def is_small(operator: Operator) -> bool:
    """Returns whether the whole second moment of what enters a layer is kept."""
    size = math.prod(operator.shape[1:])
    return size <= (LARGEST_OF_KERNEL if size > operator.shape[1] else LARGEST)


def moment_size(operator: Operator) -> int:
    """Returns the rows of the second moment that is kept of what enters a layer."""
    return math.prod(operator.shape[1:]) if is_small(operator) else operator.shape[1]


def enough_inputs(model: nn.Module, calls: Mapping[str, Sequence[LayerCall]]) -> int:
    """Returns how many inputs that are drawn at random say what there is to know of every layer.

    Args:
        model: Attention and recurrent layers unfused.
        calls: Of each layer in one forward pass of one input.
    """
    needed = 1
    for name, own in calls.items():
        operator = operator_of(model.get_submodule(name))
        positions = sum(call.positions for call in own)
        if positions and not operator.lookup:
            needed = max(needed, math.ceil(ROWS * moment_size(operator) / positions))
    return needed

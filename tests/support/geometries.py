"""Every geometry of a convolution."""

from __future__ import annotations

import itertools

from torch import nn

from tests.support.zoo import normal, randomised

SIZES = (9, 8, 7)


def convolutions(dims):
    """Every geometry of a convolution, an even kernel among them."""
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    paddings, modes = [0, (1, 0, 2)[:dims], "same", "valid"], ["zeros", "reflect", "replicate", "circular"]
    kernels, strides, dilations = [(3, 2, 1)[:dims], (1, 3, 2)[:dims]], [1, (2, 1, 3)[:dims]], [1, (1, 2, 1)[:dims]]
    every = itertools.product(kernels, strides, paddings, dilations, (1, 2, 4), modes, (True, False))
    for index, (kernel, stride, padding, dilation, groups, mode, bias) in enumerate(every):
        if padding != "same" or stride == 1:  # torch refuses it
            layer = cls(8, 12, kernel, stride, padding, dilation, groups, bias, mode)
            yield randomised(layer, seed=index)


def transposed_convolutions(dims):
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    kernels, strides = [(3, 2, 1)[:dims], (1, 4, 2)[:dims]], [1, (3, 2, 1)[:dims], 2]
    paddings, dilations, groups = [0, (1, 0, 1)[:dims]], [1, (1, 2, 1)[:dims]], (1, 2, 4)
    every = itertools.product(kernels, strides, paddings, (0, 1), dilations, groups, (True, False))
    for index, (kernel, stride, padding, more, dilation, group, bias) in enumerate(every):
        both = [v if isinstance(v, tuple) else (v,) * dims for v in (stride, dilation)]
        steps = [max(step) for step in zip(*both, strict=True)]
        output_padding = tuple(min(more, step - 1) for step in steps)  # torch refuses more
        yield randomised(cls(8, 12, kernel, stride, padding, output_padding, group, bias, dilation), seed=index)


def geometries(dims, every):
    """All of them, or a sample: the step shares no factor with the number of any setting."""
    return itertools.islice(itertools.chain(convolutions(dims), transposed_convolutions(dims)), 0, None, every)


def images(dims, channels=8, batch=2):
    return normal(batch, channels, *SIZES[:dims], seed=99)

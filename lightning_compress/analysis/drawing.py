"""Images drawn without any data: what synthetic inputs start from.

Three families: normal noise on several scales; overlapping random shapes ("dead leaves": Lee, Mumford and
Huang 2001, "Occlusion Models for Natural Images"); and shapes with soft edges filled with textures, noise of a
random power law and direction (natural images have spectra near 1/f: Ruderman and Bialek 1994, "Statistics of
Natural Images"; as training images: Baradad et al. 2021, "Learning to See by Looking at Noise").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = 12
"""Most shapes in one image of `leaves`."""
TEXTURED_SHAPES = 30
"""Most shapes in one image of `textured`."""
TEXTURES = 4
"""Textures that the shapes of one batch of images are filled with, each shifted at random."""


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns normal noise summed over scales, (B, C, H, W), of mean 0 and deviation 1."""
    summed = torch.randn(shape, generator=generator)
    side = 1
    while side < max(shape[2:]):
        coarse = torch.randn((*shape[:2], min(side, shape[2]), min(side, shape[3])), generator=generator)
        summed = summed + F.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=False)
        side *= 2
    return summed / summed.std()


def leaves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns overlapping ellipses and rectangles of random place, size, turn and colour, (B, C, H, W)."""
    count, channels, _, _ = shape
    uniform = _uniform(count, generator)
    images = torch.randn((count, channels, 1, 1), generator=generator).expand(shape)
    shapes = torch.randint(2, SHAPES + 1, (count, 1, 1), generator=generator)
    for index in range(SHAPES):
        turn, right, down = uniform(0, math.pi), uniform(-0.9, 0.9), uniform(-0.9, 0.9)
        long, short = 0.9 * uniform(0, 1) ** 1.5 + 0.08, 0.9 * uniform(0, 1) ** 1.5 + 0.08
        power = torch.where(uniform(-1, 1) < 0, 2.0, 8.0)  # an ellipse, or nearly a rectangle
        along, across = _turned(shape, turn, right, down)
        inside = ((along / long).abs() ** power + (across / short).abs() ** power < 1) & (index < shapes)
        colour = torch.randn((count, channels, 1, 1), generator=generator)
        images = torch.where(inside[:, None], colour, images)
    return _standardised(images + 0.1 * torch.randn(shape, generator=generator))


def textured(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns textured shapes with soft edges and shading before a textured ground, (B, C, H, W)."""
    count, channels, height, width = shape
    uniform = _uniform(count, generator)

    def colours(own: float, common: float) -> Tensor:
        """Returns one colour an image: channels vary together more than apart, as in photographs."""
        apart = own * torch.randn((count, channels, 1, 1), generator=generator)
        return apart + common * torch.randn((count, 1, 1, 1), generator=generator)

    def shift(size: int) -> int:
        return int(torch.randint(size, (1,), generator=generator))

    images = colours(0.7, 0.7) + 0.6 * uniform(0, 1)[:, None] * _texture(shape, generator)
    textures = [_texture(shape, generator) for _ in range(TEXTURES)]
    shapes = torch.randint(3, TEXTURED_SHAPES + 1, (count, 1, 1), generator=generator)
    for index in range(TEXTURED_SHAPES):
        turn, right, down = uniform(0, math.pi), uniform(-1, 1), uniform(-1, 1)
        long, short = 0.7 * uniform(0, 1) ** 2.5 + 0.03, 0.7 * uniform(0, 1) ** 2.5 + 0.03
        power = torch.where(uniform(-1, 1) < 0, 2.0, 8.0)
        along, across = _turned(shape, turn, right, down)
        distance = (along / long).abs() ** power + (across / short).abs() ** power
        edge = 2 * uniform(0, 1) ** 3 + 0.02  # nearly sharp for most, blurred for some
        cover = (torch.sigmoid(2 * (1 - distance) / edge) * (index < shapes))[:, None]
        texture = textures[index % TEXTURES].roll((shift(height), shift(width)), (2, 3))
        shading = (along * uniform(-1, 1))[:, None]
        fill = colours(0.5, 0.8) + 0.8 * uniform(0, 1)[:, None] ** 2 * texture + shading
        images = images * (1 - cover) + fill * cover
    return _standardised(images.clamp(-2.2, 2.2))


def _texture(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns noise whose spectrum falls by a power of the frequency, stronger in some direction, (B, C, H, W)."""
    count, _, height, width = shape
    uniform = _uniform(count, generator)
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    squared = down.square() + right.square()
    squared[0, 0] = squared[0, 1]
    power, turn, strength = uniform(0.5, 2.5), uniform(0, math.pi), 3 * uniform(0, 1) ** 2
    directed = torch.cos(2 * (torch.atan2(down, right) - turn)) - 1
    amplitude = (squared ** (-power / 2) * torch.exp(strength * directed))[:, None]  # (B, 1, H, W // 2 + 1)

    def filtered(channels: int) -> Tensor:
        white = torch.fft.rfft2(torch.randn((count, channels, height, width), generator=generator))
        values = torch.fft.irfft2(white * amplitude, s=(height, width))
        deviation = values.flatten(1).std(dim=1).clamp_min(1e-6)
        scaled: Tensor = values / deviation[:, None, None, None]
        return scaled

    share = 0.4 + 0.6 * torch.rand((count, shape[1], 1, 1), generator=generator)
    return filtered(1) * share + 0.3 * filtered(shape[1])


def _turned(shape: tuple[int, ...], turn: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the coordinates of all pixels in a frame that is turned and moved, (B, H, W) each."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, shape[2]), torch.linspace(-1, 1, shape[3]), indexing="ij")
    x, y = x - right, y - down
    return x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()


def _uniform(count: int, generator: torch.Generator) -> Callable[[float, float], Tensor]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((count, 1, 1), generator=generator)

    return uniform


def _standardised(images: Tensor) -> Tensor:
    return (images - images.mean()) / images.std()

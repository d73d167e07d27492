"""Four small classifiers, written for 8x8 to 32x32 images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_norm_relu(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class SmallCNN(nn.Module):
    """Three 3x3 convolutions and a linear head.

    Args:
        in_channels: Channels of the images.
        num_classes: Outputs.
        width: Channels of the first convolution; the others have 2 and 4 times as many.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_norm_relu(in_channels, width),
            _conv_norm_relu(width, 2 * width, stride=2),
            _conv_norm_relu(2 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, num_classes)."""
        return cast(Tensor, self.head(self.features(images).mean(dim=(2, 3))))


class MLP(nn.Module):
    """Flattens the image and applies linear layers with ReLU between them.

    Args:
        in_features: Pixels times channels.
        num_classes: Outputs.
        hidden: Widths of the hidden layers.
    """

    def __init__(self, in_features: int = 64, num_classes: int = 10, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, num_classes)."""
        return cast(Tensor, self.layers(images))


class VGG(nn.Module):
    """Pairs of 3x3 convolutions with pooling between them, and two linear layers.

    Args:
        in_channels: Channels of the images.
        num_classes: Outputs.
        widths: Channels of each pair.
        hidden: Width of the hidden linear layer.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (32, 64, 128), hidden: int = 256
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for index, width in enumerate(widths):
            stages += [nn.MaxPool2d(2)] if index else []
            stages += [_conv_norm_relu(in_channels, width), _conv_norm_relu(width, width)]
            in_channels = width
        self.features = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(4 * in_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, num_classes)."""
        return cast(Tensor, self.classifier(self.pool(self.features(images)).flatten(1)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a residual connection (He et al. 2016, figure 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, (B, out_channels, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The CIFAR ResNet with 3 stages of n basic blocks (He et al. 2016, section 4.2).

    Args:
        in_channels: Channels of the images.
        num_classes: Outputs.
        width: Channels of the first stage.
        blocks: n; 3 gives the 20 layers.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, num_classes)."""
        x = self.blocks(F.relu(self.norm(self.conv(images))))
        return cast(Tensor, self.head(torch.mean(x, dim=(2, 3))))

"""Layers that compute their weight or do something around their operation, and nets of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_compress import LayerPlan, Plan, search_ranks
from lightning_compress.analysis.inventory import list_layers
from lightning_compress.core.costs import Costs
from lightning_compress.core.settings import Budget

SIZE = (1, 3, 17, 23)
"""Of an image whose sizes a stride of two does not divide."""


class OwnConv2d(nn.Conv2d):
    """Pads on two sides only, divides its weight by its norm, and doubles what comes out."""

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.reach = self.kernel_size[0] - 1
        self.size = nn.Parameter(torch.tensor(3.0))

    def forward(self, input):
        padded = F.pad(input, (self.reach, 0, self.reach, 0))
        weight = self.size * self.weight / self.weight.norm()
        return 2 * F.conv2d(padded, weight, self.bias, self.stride, 0, self.dilation, self.groups)


def own_weight(layer):
    return layer.size * layer.weight / layer.weight.norm()


def own_padding(layer, input):
    return F.pad(input, (layer.reach, 0, layer.reach, 0))


def doubled(_layer, output):
    return 2 * output


class Patches(nn.Module):
    """Of no class of torch: a convolution that holds its weight as a matrix."""

    in_channels, out_channels, kernel_size, stride, padding, dilation, groups = (
        32,
        64,
        (3, 3),
        (1, 1),
        (0, 0),
        (1, 1),
        1,
    )
    transposed, output_padding, padding_mode, _reversed_padding_repeated_twice = False, (0, 0), "zeros", [0] * 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 288) / 17)
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, input):
        return F.conv2d(input, self.weight.view(64, 32, 3, 3), self.bias)


def as_kernel(layer):
    return layer.weight.view(64, 32, 3, 3)


def in_timm(name):
    layers = pytest.importorskip("timm.layers")
    return getattr(layers, name)


def from_efficientnet(name):
    utils = pytest.importorskip("efficientnet_lite_pytorch.utils")

    def make(*args, **settings):
        size = {"image_size": (17, 23)} if name == "Conv2dStaticSamePadding" and args[0] == 3 else {}
        size = size or ({"image_size": (9, 12)} if name == "Conv2dStaticSamePadding" else {})
        return getattr(utils, name)(*args, **size, **settings)

    return make


def with_norm(norm, **settings):
    return lambda: lambda *args, **kwargs: norm(nn.Conv2d(*args, **kwargs), **settings)


COMPUTED = {
    "weight_norm": with_norm(parametrizations.weight_norm),
    "spectral_norm": with_norm(parametrizations.spectral_norm),
    "weight_norm of old": with_norm(torch.nn.utils.weight_norm),
    "spectral_norm of old": with_norm(torch.nn.utils.spectral_norm),
    "StdConv2d": lambda: in_timm("StdConv2d"),
    "StdConv2dSame": lambda: in_timm("StdConv2dSame"),
    "ScaledStdConv2d": lambda: in_timm("ScaledStdConv2d"),
    "ScaledStdConv2dSame": lambda: in_timm("ScaledStdConv2dSame"),
}
"""Makers of convolutions with a computed weight, by name."""
PADDED = {
    "Conv2dSame": lambda: in_timm("Conv2dSame"),
    "Conv2dDynamicSamePadding": lambda: from_efficientnet("Conv2dDynamicSamePadding"),
    "Conv2dStaticSamePadding": lambda: from_efficientnet("Conv2dStaticSamePadding"),
}
"""Those of convolutions that pad by their own rule."""


def net_of(convolution):
    """Returns a net of two convolutions, of which the second holds most of the parameters."""
    return nn.Sequential(
        convolution(3, 32, 3, stride=2, bias=True),
        nn.ReLU(),
        convolution(32, 64, 3, stride=2, bias=True),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


def image(count=1):
    return torch.randn(count, *SIZE[1:], generator=torch.Generator().manual_seed(3))


ALL = COMPUTED | PADDED
ALONE = {"method": "exact", "objective": "weight", "target": None}


def made(name):
    torch.manual_seed(0)
    net = net_of(ALL[name]())
    with torch.no_grad():
        net(image())  # the old norms set their weight in forward
    return net


def searched(net, share=0.5, **settings):
    return search_ranks(net, Budget(params=share), example_input=SIZE, **{**ALONE, **settings})


def at_full_rank(net, name="2", kind="channel_svd", rank=64):
    """A plan by which a layer loses nothing."""
    layer = listed(net)[name]
    planned = LayerPlan(name, layer.type, kind, (rank,), layer.weight_shape, 0.0, layer.parameters, layer.parameters)
    costs = Costs(layer.parameters, None, 4)
    return Plan((planned,), costs, costs)


def listed(net):
    return {layer.name: layer for layer in list_layers(net)}


def outputs(net, dtype=torch.float32):
    with torch.no_grad():
        return net(image(3).to(dtype))


def near(one, other, tolerance=1e-4):
    return float((one - other).norm() / other.norm()) < tolerance

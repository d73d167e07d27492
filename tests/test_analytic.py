"""Input moments from the norm layers alone, against integrals, Monte Carlo and formulas written out."""

from __future__ import annotations

import copy
import threading

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.analytic import ChannelMoments, analytic_moments
from lightning_compress.moments import gather_statistics
from tests.conftest import TinyNet, TinyTask, Unchanged

BETA = torch.tensor([-2.0, -0.3, 0.0, 0.8, 3.0, 0.5])
GAMMA = torch.tensor([0.7, 1.5, 1.0, -2.0, 0.2, 0.0])
CHANNELS = len(BETA)


def randomise(net: nn.Module) -> nn.Module:
    """Affine parameters and running statistics as training leaves them; in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 1 and not isinstance(module, nn.PReLU):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if name != "bias" else -0.5))
    return net


def norm(cls=nn.BatchNorm2d) -> nn.Module:
    """A norm layer of 6 channels with β and γ as above, and statistics under which they hold exactly."""
    layer = cls(CHANNELS, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(GAMMA)
        layer.bias.copy_(BETA)
    return layer


def expectations(function, mean=BETA, deviation=GAMMA) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a function of independent Gaussians, by the trapezoidal rule on a fine grid."""
    nodes = torch.linspace(-14, 14, 400_001, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2)
    weights /= weights.sum()
    values = function(mean.double() + deviation.double() * nodes[:, None])
    first = weights @ values
    return first, weights @ (values - first).square()


def assert_moments(found: ChannelMoments, mean, variance, rtol=1e-6, atol=1e-7) -> None:
    for tensor, expected in ((found.mean, mean), (found.variance, variance)):
        assert (tensor.dtype, tensor.device.type, tensor.requires_grad) == (torch.float64, "cpu", False)
        torch.testing.assert_close(tensor, expected.detach().double(), rtol=rtol, atol=atol)


def of_batch_norm(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    variance = layer.running_var.double()
    return layer.bias.double(), layer.weight.double().square() * variance / (variance + layer.eps)


def of_relu(mean, variance) -> tuple[torch.Tensor, torch.Tensor]:
    return expectations(torch.relu, mean, variance.sqrt())


def of_conv(layer: nn.Module, mean, variance) -> tuple[torch.Tensor, torch.Tensor]:
    """Without groups."""
    weight = layer.weight.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    return weight.sum(dim=(2, 3)) @ mean + bias, weight.square().sum(dim=(2, 3)) @ variance


class Head(nn.Module):
    """A norm layer, a function of its output, and a layer whose input is of interest."""

    def __init__(self, function, layer=None, norm_layer=None) -> None:
        super().__init__()
        self.norm = norm() if norm_layer is None else norm_layer
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 2.0]))
        self.register_buffer("scales", self.scale.detach()[:, None, None].clone())
        self.function = function
        self.layer = nn.Conv2d(CHANNELS, 2, 1) if layer is None else layer

    def forward(self, x):
        return self.layer(self.function(self, self.norm(x)))


# Elementwise functions


SMOOTH = [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Softplus(), nn.LogSigmoid()]
KINKED = [
    nn.ReLU6(),
    nn.Hardswish(inplace=True),
    nn.Hardsigmoid(),
    nn.LeakyReLU(0.2),
    nn.ELU(0.7),
    nn.SELU(),
    nn.CELU(),
    nn.Hardtanh(-0.5, 1.5),
    nn.Softsign(),
    nn.Softshrink(),
    nn.Tanhshrink(),
]


@pytest.mark.parametrize("activation", [*SMOOTH, *KINKED], ids=repr)
def test_activations_are_integrated(activation):
    found = analytic_moments(nn.Sequential(norm(), activation, nn.Conv2d(CHANNELS, 2, 3)))["2"]
    tolerance = 2e-4 if activation in SMOOTH else 0.02
    assert_moments(found, *expectations(lambda z: activation(z.clone())), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)], ids=repr)
def test_relu_is_exact(relu):
    found = analytic_moments(nn.Sequential(norm(), relu, nn.Conv2d(CHANNELS, 2, 3)))["2"]
    assert_moments(found, *expectations(torch.relu), rtol=1e-7, atol=1e-9)
    assert found.mean[-1] == 0.5  # γ = 0: a constant
    assert found.variance[-1] == 0


def test_relu_far_in_its_tails():
    layer = norm(nn.BatchNorm1d)
    layer.bias.data.copy_(torch.tensor([-80.0, -30.0, -6.0, 6.0, 30.0, 1e4]))
    layer.weight.data.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-3, 1e-3]))
    found = analytic_moments(nn.Sequential(layer, nn.ReLU(), nn.Linear(CHANNELS, 1)))["2"]
    mean, variance = expectations(torch.relu, layer.bias.detach(), layer.weight.detach())
    assert_moments(found, mean, variance, rtol=1e-3, atol=1e-9)
    assert (found.variance >= 0).all()


FUNCTIONS = [
    (lambda m, x: F.relu(x), torch.relu),
    (lambda m, x: x.relu_(), torch.relu),
    (lambda m, x: torch.relu(F.dropout(x, training=m.training)), torch.relu),
    (lambda m, x: F.relu(F.relu(x, inplace=True)), torch.relu),
    (lambda m, x: F.gelu(x, approximate="tanh"), lambda z: F.gelu(z, approximate="tanh")),
    (lambda m, x: F.silu(x), F.silu),
    (lambda m, x: torch.sigmoid(x), torch.sigmoid),
    (lambda m, x: x.sigmoid(), torch.sigmoid),
    (lambda m, x: x.tanh_(), torch.tanh),
    (lambda m, x: F.softplus(x, beta=2), lambda z: F.softplus(z, beta=2)),
    (lambda m, x: x * torch.sigmoid(x), F.silu),  # one function of one Gaussian, no product of independent factors
    (lambda m, x: x * F.softplus(x).tanh(), F.mish),
    (lambda m, x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), F.gelu),
    (lambda m, x: x + x, lambda z: 2 * z),
    (lambda m, x: x - x, lambda z: 0 * z),
    (lambda m, x: 1 - 2 * x, lambda z: 1 - 2 * z),
    (lambda m, x: torch.add(x, x.tanh(), alpha=2), lambda z: z + 2 * z.tanh()),
    (lambda m, x: x.mul_(3).add_(1), lambda z: 3 * z + 1),
    (lambda m, x: (x / 4) ** 2 - 3, lambda z: (z / 4).square() - 3),
    (lambda m, x: -x.abs().neg(), torch.abs),
    (lambda m, x: x * m.scales, lambda z: z * torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 2.0])),
    (lambda m, x: x.clamp(min=-1, max=2), lambda z: z.clamp(-1, 2)),
    (lambda m, x: F.prelu(x, m.scale), lambda z: F.prelu(z, torch.tensor([1, -2, 0.5, 3, 1, 2]).double())),
]


@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_functions_and_methods_are_known_in_every_spelling(index):
    ours, plain = FUNCTIONS[index]
    found = analytic_moments(Head(ours))["layer"]
    assert_moments(found, *expectations(plain), rtol=0.03, atol=0.02)


def test_prelu_of_tokens_has_its_channels_elsewhere():
    known = nn.Sequential(norm(), nn.PReLU(CHANNELS), nn.Conv2d(CHANNELS, 1, 1))
    with torch.no_grad():
        known[1].weight.copy_(torch.arange(6) / 5)
    expected = expectations(lambda z: torch.where(z > 0, z, z * torch.arange(6) / 5))
    assert_moments(analytic_moments(known)["2"], *expected, rtol=0.02, atol=0.02)
    tokens = nn.Sequential(nn.LayerNorm(6), nn.PReLU(6), nn.Linear(6, 1))  # of (B, 6, 6) its second dimension
    assert analytic_moments(tokens) == {}
    shared = nn.Sequential(nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 1))
    assert set(analytic_moments(shared)) == {"2"}


# Norm layers


@pytest.mark.parametrize(
    ("layer", "after"),
    [
        (nn.BatchNorm2d(6), nn.Conv2d(6, 1, 1)),
        (nn.BatchNorm1d(6), nn.Linear(6, 1)),
        (nn.SyncBatchNorm(6), nn.Conv2d(6, 1, 1)),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.Conv2d(6, 1, 1)),
    ],
    ids=repr,
)
def test_norms_with_running_statistics_state_their_output(layer, after):
    net = randomise(nn.Sequential(layer, after))
    assert_moments(analytic_moments(net)["1"], *of_batch_norm(layer), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("layer", "after"),
    [
        (nn.LayerNorm(6), nn.Linear(6, 1)),
        (nn.RMSNorm(6), nn.Linear(6, 1)),
        (nn.GroupNorm(3, 6), nn.Conv2d(6, 1, 1)),
        (nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 1, 1)),
    ],
    ids=repr,
)
def test_norms_over_a_sample_state_their_output(layer, after):
    net = randomise(nn.Sequential(layer, after))
    bias = getattr(layer, "bias", None)
    expected = torch.zeros(6) if bias is None else bias
    assert_moments(analytic_moments(net)["1"], expected, layer.weight.detach().double().square(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("layer", "after"),
    [
        (nn.BatchNorm2d(6, affine=False, eps=0), nn.Conv2d(6, 1, 1)),
        (nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 1)),
        (nn.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 1)),
        (nn.GroupNorm(3, 6, affine=False), nn.Conv2d(6, 1, 1)),
        (nn.InstanceNorm2d(6), nn.Conv2d(6, 1, 1)),
    ],
    ids=repr,
)
def test_norms_without_parameters_are_standard(layer, after):
    assert_moments(analytic_moments(nn.Sequential(layer, after))["1"], torch.zeros(6), torch.ones(6))


def test_functional_norms():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            self.weight = nn.Parameter(GAMMA.clone())
            self.bias = nn.Parameter(BETA.clone())
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(6, 6, 1) for _ in range(3))
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            n = self.norm
            y = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.1, n.eps)
            self.conv1(y)
            self.conv2(F.group_norm(x, 2, self.weight, self.bias))
            self.conv3(F.batch_norm(x, None, None, n.weight, n.bias, True))
            self.fc1(F.layer_norm(x, (6,), self.weight, bias=self.bias, eps=1e-6))
            return self.fc2(F.rms_norm(x, (6,), self.weight))

    net = randomise(Net()).train()
    found = analytic_moments(net)
    assert set(found) == {"conv1", "conv2", "fc1", "fc2"}
    assert_moments(found["conv1"], *of_batch_norm(net.norm))
    assert_moments(found["conv2"], net.bias, net.weight.square())
    assert_moments(found["fc1"], net.bias, net.weight.square())
    assert_moments(found["fc2"], torch.zeros(6), net.weight.square())


def test_running_variance_of_zero_is_a_constant_channel():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    net[0].running_var.copy_(torch.tensor([1.0, 0.0, 1e-5]))
    net[0].bias.data.fill_(2.0)
    found = analytic_moments(net)["1"]
    assert found.mean.tolist() == [2.0, 2.0, 2.0]
    torch.testing.assert_close(found.variance, torch.tensor([1.0, 0.0, 0.5]).double(), rtol=1e-4, atol=0)
    images = torch.randn(50_000, 3, 1, 1) * net[0].running_var.sqrt()[:, None, None]  # what such statistics saw
    torch.testing.assert_close(net.eval()[0](images).var(dim=(0, 2, 3)).double(), found.variance, rtol=0.05, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "value"), [("running_var", float("nan")), ("running_var", -1.0), ("running_mean", float("inf"))]
)
def test_statistics_that_are_no_statistics_are_unknown(name, value):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    getattr(net[0], name)[1] = value
    assert set(analytic_moments(net)) == {"3"}


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d(3, eps=0.0), nn.BatchNorm2d(3)])
def test_results_that_are_not_finite_are_unknown(norm_layer):
    net = nn.Sequential(norm_layer, nn.ReLU(), nn.Conv2d(3, 4, 1))
    if norm_layer.eps:
        norm_layer.weight.data[0] = float("inf")
    else:
        norm_layer.running_var[0] = 0
    assert analytic_moments(net) == {}


def test_batch_norm_without_running_statistics_is_unknown():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Conv2d(3, 4, 1))
    assert analytic_moments(net) == {}


def test_layer_norm_over_several_dimensions_is_unknown():
    assert analytic_moments(nn.Sequential(nn.LayerNorm((4, 6)), nn.Linear(6, 1))) == {}


def test_a_norm_needs_no_known_input_and_ignores_one():
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    net = randomise(nn.Sequential(first, nn.Conv2d(4, 4, 3), nn.Hardshrink(), second, nn.Conv2d(4, 4, 3)))
    assert_moments(analytic_moments(net)["4"], *of_batch_norm(second))


# Linear layers and convolutions


def empirical(net: nn.Module, name: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of what enters a layer, over samples and positions."""
    seen = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        net.eval()(*inputs)
    handle.remove()
    x = seen[0].movedim(1, -1) if isinstance(net.get_submodule(name), nn.Conv2d) else seen[0]
    variance, mean = torch.var_mean(x.flatten(0, -2), dim=0)
    return mean, variance


def test_conv_norm_relu_conv_against_monte_carlo():
    """Noise through a convolution is Gaussian; with its true statistics in the norm the formula is exact."""
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    offset = torch.tensor([0.5, -1.0, 2.0])
    weight = net[0].weight.detach()
    net[1].running_mean.copy_(weight.sum(dim=(2, 3)) @ offset + net[0].bias.detach())
    net[1].running_var.copy_(weight.square().sum(dim=(1, 2, 3)))
    images = offset[:, None, None] + torch.randn(1500, 3, 12, 12)
    mean, variance = empirical(net, "3", images)
    assert_moments(analytic_moments(net)["3"], mean, variance, rtol=0.03, atol=0.01)


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_and_linear_of_independent_inputs_against_monte_carlo(groups):
    net = nn.Sequential(
        nn.BatchNorm2d(6, eps=0),
        nn.ReLU(),
        nn.Conv2d(6, 9, 3, groups=groups),
        nn.Conv2d(9, 5, 1, bias=False),
        nn.Flatten(),
        nn.Linear(5, 4),
        nn.Linear(4, 2),
    )
    found = analytic_moments(randomise(net))
    scale = net[0].running_var.sqrt()[:, None, None]
    images = net[0].running_mean[:, None, None] + scale * torch.randn(40_000, 6, 3, 3)
    assert set(found) == {"2", "3", "5", "6"}
    for name in ("2", "3"):
        assert_moments(found[name], *empirical(net, name, images), rtol=0.03, atol=0.01)
    for name in ("5", "6"):  # their inputs depend on each other: the means are exact, the variances not
        torch.testing.assert_close(found[name].mean, empirical(net, name, images)[0], rtol=0.03, atol=0.01)
        before = net[int(name) - 1 - (name == "5")].weight.detach().double().flatten(1)
        previous = found["3" if name == "5" else "5"]
        torch.testing.assert_close(found[name].variance, before.square() @ previous.variance)


def test_a_large_linear_layer_is_read_in_parts():
    net = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 1000), nn.Linear(1000, 2))
    randomise(net)
    found = analytic_moments(net)["2"]
    weight, bias = net[1].weight.detach().double(), net[1].bias.detach().double()
    mean, variance = net[0].bias.double(), net[0].weight.double().square()
    assert_moments(found, weight @ mean + bias, weight.square() @ variance, rtol=1e-12)


def test_a_chain_is_known_only_if_its_start_is():
    def chain(first: nn.Module) -> nn.Module:
        return nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    assert analytic_moments(chain(nn.Identity())) == {}
    assert set(analytic_moments(chain(nn.BatchNorm2d(3)))) == {"1", "3", "5"}


# Sums, products, shapes


def test_sums_and_products_of_independent_tensors_against_monte_carlo():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = norm(), norm()
            self.b.weight.data, self.b.bias.data = GAMMA.flip(0), BETA.flip(0)
            self.plus, self.minus, self.times = (nn.Conv2d(6, 1, 1) for _ in range(3))
            self.ratio = nn.Conv2d(6, 1, 1)

        def forward(self, x, y):
            a, b = F.relu(self.a(x)), self.b(y)
            self.minus(a - b)
            self.times(a * b)
            self.ratio(a / b)
            a += b
            return self.plus(a)

    net = Net()
    found = analytic_moments(net)
    assert set(found) == {"plus", "minus", "times"}
    images = torch.randn(2, 200_000, 6, 1, 1)
    for name in found:
        assert_moments(found[name], *empirical(net, name, *images), rtol=0.03, atol=0.02)


class BasicBlock(nn.Module):
    """Two convolutions around a shortcut, as torchvision writes it."""

    def __init__(self, channels: int, *, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if project else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def test_residual_blocks():
    first, second = BasicBlock(4, project=True), BasicBlock(4, project=False)
    net = randomise(nn.Sequential(first, second, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(4, 2)))
    found = analytic_moments(net)
    assert set(found) == {"0.conv2", "1.conv1", "1.conv2", "4"}
    shortcut, body = of_batch_norm(first.downsample[1]), of_batch_norm(first.bn2)
    x = of_relu(shortcut[0] + body[0], shortcut[1] + body[1])
    body = of_batch_norm(second.bn2)
    assert_moments(found["0.conv2"], *of_relu(*of_batch_norm(first.bn1)))
    assert_moments(found["1.conv1"], *x)
    assert_moments(found["4"], *of_relu(x[0] + body[0], x[1] + body[1]))


class PreActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.conv(self.relu(self.norm(x)))


def test_pre_activation_blocks():
    net = randomise(nn.Sequential(nn.BatchNorm2d(4), PreActivation(4), PreActivation(4), nn.Conv2d(4, 2, 1)))
    found = analytic_moments(net)
    assert set(found) == {"1.conv", "2.conv", "3"}
    mean, variance = of_batch_norm(net[0])
    for block, name in ((net[1], "1.conv"), (net[2], "2.conv")):
        inner = of_relu(*of_batch_norm(block.norm))
        assert_moments(found[name], *inner)
        more = of_conv(block.conv, *inner)
        mean, variance = mean + more[0], variance + more[1]
    assert_moments(found["3"], mean, variance)


def test_an_in_place_function_changes_what_is_read_later():
    class Net(nn.Module):
        def __init__(self, *, inplace: bool) -> None:
            super().__init__()
            self.norm, self.relu, self.conv = norm(), nn.ReLU(inplace=inplace), nn.Conv2d(6, 1, 1)

        def forward(self, x):
            x = self.norm(x)
            self.relu(x)
            return self.conv(x)

    assert_moments(analytic_moments(Net(inplace=True))["conv"], *expectations(torch.relu))
    assert_moments(analytic_moments(Net(inplace=False))["conv"], BETA, GAMMA.square())


def unknown_in_place(m, x):
    x.cumsum_(1)
    return x


KEEP = {
    "pooling": lambda m, x: F.avg_pool2d(F.max_pool2d(x, 2), 2),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, 1),
    "resize": lambda m, x: F.interpolate(x, scale_factor=2),
    "identity": lambda m, x: x.contiguous().clone().to(torch.float64).float(),
    "there and back": lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transposed": lambda m, x: x.transpose(1, 3).transpose(-1, 1),
    "spatial dimensions swapped": lambda m, x: x.transpose(2, 3),
    "cropped": lambda m, x: x[:, :, 1:, :-1],
    "half the batch": lambda m, x: x[:3],
    "through one dimension": lambda m, x: x.flatten(2).unsqueeze(-1),
    "viewed": lambda m, x: x.view(x.size(0), x.shape[1], -1, 4),
    "mean": lambda m, x: x.mean((2, 3), keepdim=True),
    "squeezed": lambda m, x: x.mean(3, keepdim=True).squeeze(3)[:, :, None],
    "out and in": lambda m, x: x.mean((2, 3)).view(x.shape[0], -1, 1, 1),
    "indexed": lambda m, x: x[:, :, 0, 0][:, :, None, None],
}


@pytest.mark.parametrize("name", KEEP)
def test_what_keeps_the_channels(name):
    assert_moments(analytic_moments(Head(KEEP[name]))["layer"], BETA, GAMMA.square())


LOSE = {
    "channels last": lambda m, x: x.permute(0, 2, 3, 1),
    "one channel": lambda m, x: x[:, :1],
    "other channels": lambda m, x: x[:, [5, 4, 3, 2, 1, 0]],
    "ellipsis": lambda m, x: x[..., 0],
    "mean over channels": lambda m, x: x.mean(1, keepdim=True),
    "shuffled": lambda m, x: x.view(x.size(0), 2, 3, 4, 4).transpose(1, 2).reshape(x.size(0), 6, 4, 4),
    "scale per position": lambda m, x: x * m.scale,
    "softmax": lambda m, x: x.softmax(1),
    "dropout that stays on": lambda m, x: F.dropout(x),
    "indices": lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "in place": unknown_in_place,
    "sum with the unknown": lambda m, x: x + x.softmax(1),
    "other axis": lambda m, x: torch.cat([x[:, :3], x[:, 3:]], 1),
}


@pytest.mark.parametrize("name", LOSE)
def test_what_loses_the_channels(name):
    assert analytic_moments(Head(LOSE[name])) == {}


TO_LINEAR = {
    "flatten": (lambda m, x: x.flatten(1), 4),
    "torch.flatten": (lambda m, x: torch.flatten(x, 1), 1),
    "view": (lambda m, x: x.view(x.size(0), -1), 4),
    "view of shape": (lambda m, x: x.view(x.shape[0], -1), 4),
    "reshape": (lambda m, x: x.reshape(-1, 24), 4),
    "functions behind": (lambda m, x: F.dropout(torch.flatten(x, 1), training=False), 9),
    "mean": (lambda m, x: x.mean((-2, -1)), 1),
    "channels last": (lambda m, x: x.permute(0, 2, 3, 1), 1),
    "tokens": (lambda m, x: x.flatten(2).transpose(1, 2), 1),
    "squeezed": (lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(), 1),
    "squeezed twice": (lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), 1),
}


@pytest.mark.parametrize("name", TO_LINEAR)
def test_features_of_a_linear_layer_behind_a_feature_map(name):
    function, repeats = TO_LINEAR[name]
    found = analytic_moments(Head(function, nn.Linear(CHANNELS * repeats, 2)))["layer"]
    assert_moments(found, BETA.repeat_interleave(repeats), GAMMA.square().repeat_interleave(repeats))


def test_flattening_repeats_in_the_order_of_torch():
    net = Head(lambda m, x: torch.flatten(x, 1), nn.Linear(CHANNELS * 4, 2))
    mean, variance = empirical(net, "layer", torch.randn(50_000, CHANNELS, 2, 2))
    assert_moments(analytic_moments(net)["layer"], mean, variance, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("function", [lambda m, x: x, lambda m, x: x.flatten(1)])
def test_linear_layer_that_does_not_fit_is_unknown(function):
    assert analytic_moments(Head(function, nn.Linear(7, 2))) == {}


def test_concatenation_needs_every_part():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = norm(), norm()
            self.known, self.unknown, self.other = nn.Conv2d(12, 1, 1), nn.Conv2d(9, 1, 1), nn.Conv2d(6, 1, 1)

        def forward(self, x):
            a, b = F.relu(self.a(x)), self.b(x)
            self.known(torch.cat([a, b], dim=1))
            self.unknown(torch.cat([a, x], 1))
            return self.other(torch.cat([a, b], dim=2))

    found = analytic_moments(Net())
    assert set(found) == {"known"}
    relu = expectations(torch.relu)
    assert_moments(found["known"], torch.cat([relu[0], BETA]), torch.cat([relu[1], GAMMA.square()]))


def test_squeeze_and_excitation():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc1, self.fc2, self.conv = norm(), nn.Linear(6, 2), nn.Linear(2, 6), nn.Conv2d(6, 1, 1)

        def forward(self, x):
            x = self.norm(x)
            b, c, _, _ = x.size()
            y = F.adaptive_avg_pool2d(x, 1).view(b, c)
            y = torch.sigmoid(self.fc2(F.relu(self.fc1(y)))).view(b, c, 1, 1)
            return self.conv(x * y.expand_as(x))

    net = Net()
    found = analytic_moments(net)
    assert set(found) == {"fc1", "fc2", "conv"}
    inner = found["fc2"]
    weight = net.fc2.weight.detach().double()
    before = weight @ inner.mean + net.fc2.bias.detach(), weight.square() @ inner.variance
    mean, variance = expectations(torch.sigmoid, before[0], before[1].sqrt())
    second = variance + mean.square()
    expected = second * (GAMMA.square() + BETA.square()) - (mean * BETA).square()
    assert_moments(found["conv"], mean * BETA, expected, rtol=1e-5, atol=1e-6)


def test_stochastic_depth_of_torchvision():
    ops = pytest.importorskip("torchvision.ops")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.conv = norm(), ops.StochasticDepth(0.5, "row"), nn.Conv2d(6, 1, 1)

        def forward(self, x):
            return self.conv(self.drop(self.norm(x)))

    assert_moments(analytic_moments(Net())["conv"], BETA, GAMMA.square())


# Token models


class TransformerMLP(nn.Module):
    """The second half of a pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm(x))))))


def test_transformer_mlp():
    net = randomise(nn.Sequential(TransformerMLP(6), TransformerMLP(6), nn.LayerNorm(6), nn.Linear(6, 2)))
    found = analytic_moments(net)
    assert set(found) == {"0.fc1", "0.fc2", "1.fc1", "1.fc2", "3"}
    mlp = net[1]
    assert_moments(found["1.fc1"], mlp.norm.bias, mlp.norm.weight.square())
    weight = mlp.fc1.weight.detach().double()
    mean = weight @ mlp.norm.bias.detach().double() + mlp.fc1.bias.detach().double()
    deviation = (weight.square() @ mlp.norm.weight.detach().double().square()).sqrt()
    assert_moments(found["1.fc2"], *expectations(F.gelu, mean, deviation))


def test_class_token_and_mean_over_tokens_keep_the_features():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.c = nn.LayerNorm(6), nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 1)

        def forward(self, x):
            x = self.norm(x)
            self.c(x.mean(-1))
            return self.a(x[:, 0]) + self.b(x.mean(dim=1))

    assert set(analytic_moments(Net())) == {"a", "b"}


@pytest.mark.parametrize(
    ("reshape", "known"),
    [
        (lambda x: x.reshape(-1, 6), True),
        (lambda x: x.view(x.size(0), 3, 5, 6), True),
        (lambda x: torch.flatten(x, 0, -2), True),
        (lambda x: x.flatten(0, 1), False),
        (lambda x: x.flatten(1), False),
        (lambda x: x.transpose(1, 2), False),
        (lambda x: x.reshape(-1, 6, 1).squeeze(-1), False),
    ],
)
def test_tokens_in_other_shapes(reshape, known):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 1)

        def forward(self, x):
            return self.fc(reshape(self.norm(x)))

    assert set(analytic_moments(Net())) == ({"fc"} if known else set())


def test_residual_multilayer_perceptron_with_batch_norms():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.gain = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            return x + self.gain * F.group_norm(self.norm(self.fc(x)), 2).flatten(1)

    net = randomise(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), Block(), nn.Linear(6, 2)))
    net[2].gain.data.fill_(0.5)
    found = analytic_moments(net)
    assert set(found) == {"1", "2.fc", "3"}
    assert_moments(found["3"], found["2.fc"].mean, found["2.fc"].variance + 0.25)


def test_convnext_block_moves_its_channels_back_and_forth():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(6, 6, 7, padding=3, groups=6), nn.LayerNorm(6)
            self.fc1, self.fc2, self.scale = nn.Linear(6, 24), nn.Linear(24, 6), nn.Parameter(torch.rand(6))

        def forward(self, x):
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.scale * self.fc2(F.gelu(self.fc1(y)))
            return x + y.permute(0, 3, 1, 2)

    net = randomise(nn.Sequential(nn.BatchNorm2d(6), Block(), Block(), nn.Conv2d(6, 2, 2, stride=2)))
    found = analytic_moments(net)
    assert set(found) == {"1.depthwise", "1.fc1", "1.fc2", "2.depthwise", "2.fc1", "2.fc2", "3"}
    mean, variance = of_batch_norm(net[0])
    weight, scale = net[1].fc2.weight.detach().double(), net[1].scale.detach().double()
    inner = found["1.fc2"]
    mean = mean + scale * (weight @ inner.mean + net[1].fc2.bias.detach())
    variance = variance + scale.square() * (weight.square() @ inner.variance)
    assert_moments(found["2.depthwise"], mean, variance)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_of_torch_is_known_where_possible(norm_first):
    layer = nn.TransformerEncoderLayer(6, 2, 12, norm_first=norm_first, batch_first=True)
    net = randomise(nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 2)))
    found = analytic_moments(net)
    layers = {f"0.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert set(found) == layers
    first = net[0].layers[1]
    before = first.norm2 if norm_first else first.norm1
    assert_moments(found["0.layers.1.linear1"], before.bias, before.weight.square())


def test_other_parts_of_torch_are_harmless():
    net = nn.ModuleDict(
        {
            "transformer": nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
            "lstm": nn.LSTM(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "lazy": nn.LazyLinear(3),
            "after": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)),
        }
    )
    found = set(analytic_moments(net))
    assert "after.1" in found
    assert found - {"after.1"} == {
        f"transformer.{part}.layers.0.linear{j}" for part in ("encoder", "decoder") for j in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_modules_are_harmless():
    def mlp() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

    assert analytic_moments(nn.Sequential(torch.jit.script(mlp()), mlp())).keys() == {"1.1"}
    assert analytic_moments(nn.Sequential(torch.compile(mlp()), mlp())).keys() == {"0._orig_mod.1", "1.1"}


# Shared layers, containers, names


def test_calls_of_a_shared_layer_are_averaged():
    class Net(nn.Module):
        def __init__(self, *, third: bool) -> None:
            super().__init__()
            self.a, self.b, self.conv, self.third = norm(), nn.BatchNorm2d(6, eps=0), nn.Conv2d(6, 6, 1), third

        def forward(self, x):
            y = self.conv(self.a(x)) + self.conv(self.b(x))
            return self.conv(x) if self.third else y

    assert_moments(
        analytic_moments(Net(third=False))["conv"],
        BETA / 2,
        (GAMMA.square() + BETA.square() + 1) / 2 - (BETA / 2).square(),
    )
    assert analytic_moments(Net(third=True)) == {}


def test_a_layer_used_by_its_weight_alone_counts():
    class Net(nn.Module):
        def __init__(self, *, known: bool) -> None:
            super().__init__()
            self.norm, self.fc, self.known = nn.LayerNorm(6), nn.Linear(6, 6), known

        def forward(self, x):
            y = self.norm(x)
            return self.fc.forward(y) + F.linear(y if self.known else x, self.fc.weight)

    assert set(analytic_moments(Net(known=True))) == {"fc"}
    assert analytic_moments(Net(known=False)) == {}


def test_a_subclass_with_a_forward_of_its_own_is_read_by_what_it_does():
    class Padded(nn.Conv2d):
        def forward(self, x):
            x = F.relu(x)
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    net = randomise(nn.Sequential(nn.BatchNorm2d(6), Padded(6, 9, 3, groups=3), nn.Conv2d(9, 1, 1)))
    plain = nn.Sequential(net[0], nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), net[2])
    plain[2].load_state_dict(net[1].state_dict())
    found, expected = analytic_moments(net), analytic_moments(plain)
    assert set(found) == {"1", "2"}
    for ours, theirs in (("1", "2"), ("2", "3")):
        assert_moments(found[ours], expected[theirs].mean, expected[theirs].variance, rtol=1e-12, atol=0)


def test_names_are_the_first_ones():
    shared = nn.Linear(6, 6)
    net = nn.ModuleDict({"x": shared, "net": nn.Sequential(nn.LayerNorm(6), shared)})
    found = analytic_moments(net)
    assert found == {}  # not callable as a whole, so "x" may be called with anything
    net = nn.Sequential(nn.LayerNorm(6), shared, nn.LayerNorm(6), shared)
    assert set(analytic_moments(net)) == {"1"}


def test_lightning_module_and_containers(make_trainer, loader):
    bare = set(analytic_moments(randomise(TinyNet())))
    assert bare == {"conv2", "point", "fc1", "fc2"}
    task = TinyTask()
    make_trainer(max_epochs=1).fit(task, loader, loader)
    assert task.trainer is not None
    assert set(analytic_moments(task)) == {f"net.{name}" for name in bare}
    assert set(analytic_moments(nn.ModuleList([TinyNet()]))) == {f"0.{name}" for name in bare}

    class NoForward(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = TinyNet(), nn.Linear(4, 2)

        def training_step(self, batch):
            return self.head(self.encoder(batch)).sum()

    assert set(analytic_moments(NoForward())) == {f"encoder.{name}" for name in bare}


# What cannot be traced


class Branches(nn.Module):
    """Looks at its data."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2 = (
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 1),
        )
        self.inner = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU())

    def forward(self, x):
        x = self.conv1(self.norm(x))
        if x.mean() > 0:
            x = self.conv2(x)
        return self.inner(x)


def test_a_branch_on_data_costs_only_the_module_that_holds_it():
    assert set(analytic_moments(Branches())) == {"inner.2"}
    net = randomise(
        nn.Sequential(nn.BatchNorm2d(6), Branches(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 1, 1))
    )
    assert set(analytic_moments(net)) == {"1.inner.2", "4"}


def test_calls_before_the_failure_do_not_count():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            y = self.conv(self.norm(x))
            return self.conv(x) if bool(y.sum() > 0) else y

    assert analytic_moments(Net()) == {}
    assert analytic_moments(nn.Sequential(nn.BatchNorm2d(6), Net())) == {}


def test_arguments_with_a_default_keep_it():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x, /, y, mask=None, *, scale, targets=None, **more):
            x = self.fc(self.norm(x + y * scale))
            if mask is not None and mask.any():
                x = x[mask]
            return x if targets is None else F.cross_entropy(x, targets)

    class AllDefaults(Net):
        def forward(self, inputs=None, labels=None):
            if inputs is None:
                raise ValueError
            return self.fc(self.norm(inputs)) if labels is None else int(labels)

    assert set(analytic_moments(Net())) == {"fc"}
    assert set(analytic_moments(AllDefaults())) == {"fc"}


class Foreign(nn.Module):
    """Does what a tracer does not expect; `trick` gets the module and x."""

    def __init__(self, trick) -> None:
        super().__init__()
        self.trick = trick
        self.hidden = [nn.Linear(6, 6), nn.ReLU()]
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.norm(self.trick(self, x)))


def add_a_layer(m, x):
    m.late = nn.Linear(6, 6)
    return m.late(x) + F.linear(x, m.late.weight)


@pytest.mark.parametrize(
    "trick",
    [
        lambda m, x: m.hidden[1](m.hidden[0](x)),
        add_a_layer,
        lambda m, x: x + torch.randn(6),
        lambda m, x: torch.einsum("bi->bi", x),
        lambda m, x: x.to(m.fc.weight.dtype),
        lambda m, x: torch.stack([x, x]).sum(0),
    ],
)
def test_foreign_code_that_can_be_traced(trick):
    assert set(analytic_moments(Foreign(trick))) == {"fc"}


@pytest.mark.parametrize(
    "trick",
    [
        lambda m, x: torch.from_numpy(np.sin(x.numpy())),
        lambda m, x: sum(x for _ in range(x.shape[0])),
        lambda m, x: x if float(x.max()) else -x,
        lambda m, x: {}["missing"],
        lambda m, x: m.fc(object()),
    ],
)
def test_foreign_code_that_cannot_be_traced(trick):
    assert analytic_moments(Foreign(trick)) == {}


def test_a_model_that_cannot_be_copied_is_read_by_its_parts():
    net = nn.Sequential(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), nn.Linear(6, 6))
    net.lock = threading.Lock()
    assert set(analytic_moments(net)) == {"0.1"}


def test_models_without_layers():
    assert analytic_moments(nn.Identity()) == {}
    assert analytic_moments(nn.Linear(3, 3)) == {}
    assert analytic_moments(nn.Module()) == {}


# The model comes back as it was


@pytest.mark.parametrize("mode", [True, False])
def test_model_is_untouched(mode, capfd):
    fired = []

    class Net(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.seen, self.last, self.extra = [], None, nn.Dropout(0.1)

        def forward(self, x):
            print("called", x.shape)
            self.steps += 1
            self.seen.append(x)
            self.last = super().forward(x + torch.randn(1)) if not self.training else None
            return self.last

    net = Net().train(mode)
    net.extra.train(not mode)
    net.norm.register_forward_hook(lambda *_: fired.append(1))
    net.register_forward_pre_hook(lambda *_: fired.append(1))
    before = Unchanged(net)
    found = analytic_moments(net)
    before.check()
    assert set(found) == {"conv2", "point", "fc1", "fc2"}
    assert (net.seen, net.last, fired) == ([], None, [])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert capfd.readouterr() == ("", "")
    net(torch.zeros(2, 3, 8, 8))
    assert len(fired) == 1 if mode else 2


def test_mode_does_not_matter():
    net = randomise(TinyNet())
    train, evaluation = analytic_moments(net.train()), analytic_moments(net.eval())
    assert set(train) == set(evaluation)
    for name, moments in train.items():
        assert_moments(moments, evaluation[name].mean, evaluation[name].variance, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    net = randomise(TinyNet()).to(dtype)
    same = copy.deepcopy(net).double()
    found, expected = analytic_moments(net), analytic_moments(same)
    assert set(found) == {"conv2", "point", "fc1", "fc2"}
    for name, moments in found.items():
        assert_moments(moments, expected[name].mean, expected[name].variance, rtol=1e-12, atol=0)


def test_model_without_memory_is_unknown():
    assert analytic_moments(TinyNet().to("meta")) == {}


def test_weight_norm_and_parametrizations():
    net = randomise(TinyNet())
    net.conv2 = nn.utils.parametrizations.weight_norm(net.conv2)
    assert analytic_moments(net) == {}  # conv2 is a class of its own now, and nothing behind it has a norm
    with pytest.warns(FutureWarning):
        net.conv2 = nn.utils.weight_norm(TinyNet().conv2)  # a hook, and a weight that cannot be deep-copied
    assert set(analytic_moments(net)) == {"conv2", "point", "fc1", "fc2"}


# The reference networks


def reference(name: str) -> nn.Module:
    return pytest.importorskip("benchmarks.common", reason="the source distribution leaves them out").reference(name)


@pytest.mark.parametrize("name", ["resnet20", "vgg"])
def test_every_layer_but_the_first_of_the_reference_networks_is_known(name):
    net = reference(name)
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert list(analytic_moments(net)) == layers[1:]


@pytest.mark.slow
def test_moments_agree_with_those_of_synthetic_images():
    """Over the channels of all convolutions; within one layer less is left of it (0.5), for want of Gaussians."""
    net = reference("resnet20")
    statistics = gather_statistics(net, (1, 1, 28, 28))
    pairs = []
    for layer, moments in analytic_moments(net).items():
        second = statistics.metric(layer).inputs.diagonal().view(len(moments.mean), -1).mean(dim=1)
        pairs.append(torch.stack([moments.mean.square() + moments.variance, second]).sqrt())
    assert len(pairs) == 21
    assert np.corrcoef(torch.cat(pairs, dim=1))[0, 1] > 0.8

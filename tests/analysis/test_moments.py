"""Second moments of what enters the layers, and of what their outputs do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis import enough, moments
from lightning_compress.analysis.draws import LEAST_SIDE
from lightning_compress.analysis.moments import OTHER_KIND, PROBES, batch_statistics, input_moments, output_moments
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.analysis.synthetic import synthesise
from lightning_compress.core.effort import Effort, trying
from lightning_compress.kinds import shrinkage
from lightning_compress.layers.families import family_of
from tests.support.nets import IMAGE, pooled
from tests.support.unchanged import Unchanged


class Steps(nn.Module):
    """A linear layer over a sequence, step by step or at once."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.at_once = nn.Linear(5, 4), at_once

    def forward(self, x):
        if self.at_once:
            return self.linear(x).tanh()
        return torch.stack([self.linear(x[:, step]) for step in range(x.shape[1])], dim=1).tanh()


@pytest.mark.parametrize("room", [2**22, 90])
def test_calls_of_one_batch_are_positions_of_the_same_samples(room, monkeypatch):
    monkeypatch.setattr(moments, "WAITING", room)
    batches = [((torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(seed)),), {}) for seed in range(2)]
    stepwise, whole = (Steps(at_once=own) for own in (False, True))
    found, expected = (input_moments(model, batches, ["linear"])["linear"] for model in (stepwise, whole))
    torch.testing.assert_close(found.mean, expected.mean)
    assert found.samples == expected.samples == 12
    if room > 90:  # else they are added in parts
        torch.testing.assert_close(found.second, expected.second)
        assert found.shrinkage == pytest.approx(expected.shrinkage)
    gradients = [output_moments(model, batches, ["linear"])["linear"] for model in (stepwise, whole)]
    torch.testing.assert_close(*gradients)


def test_moments_are_those_of_the_rows_that_enter_the_layer(net, images):
    found = input_moments(net.train(), [((images[:2],), {}), ((images[2:],), {})], ["conv2", "fc1"])
    net.eval()
    with torch.no_grad():
        x = F.relu(net.norm(net.conv1(images)))
        rows = family_of(net.conv2).rows(net.conv2, x)[0].double()
        pooled = F.relu(net.point(F.relu(net.conv2(x)))).mean(dim=(2, 3)).double()
    for name, expected in (("conv2", rows), ("fc1", pooled)):
        mean, alpha = expected.mean(dim=0), found[name].shrinkage
        covariance = (expected - mean).T @ (expected - mean) / len(expected)
        shrunk = (1 - alpha) * covariance + alpha * covariance.trace() / len(mean) * torch.eye(len(mean))
        torch.testing.assert_close(found[name].second, shrunk + mean[:, None] * mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].mean, mean, rtol=1e-5, atol=1e-6)
        assert 0 < alpha <= 1
        assert found[name].samples == len(images)


def test_output_moments_of_linear_layers_are_those_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    batches = [torch.randn(7, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)]
    found = output_moments(net, [((b,), {}) for b in batches], ["0", "1"], seed=3)
    generator = torch.Generator().manual_seed(3)
    gradients = []
    for batch in batches:
        scale = net(batch).detach().std()
        gradients += [torch.randn(len(batch), 3, generator=generator).double() / scale for _ in range(PROBES)]
    rows = torch.cat(gradients)
    for name, own in (("1", rows), ("0", rows @ net[1].weight.detach())):
        shrunk = torch.from_numpy(ledoit_wolf(own.numpy(), assume_centered=True)[0])
        torch.testing.assert_close(found[name], shrunk, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unshrunk")
def test_output_moments_of_convolutions_sum_over_the_positions(net, images):
    net.eval()
    found = output_moments(net, [((images,), {})], ["conv2", "fc1"], seed=1)
    weights = torch.Generator().manual_seed(1)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for _ in range(PROBES):
        inner = net.conv2(F.relu(net.norm(net.conv1(images)))).detach().requires_grad_()
        output = net.fc2(F.relu(net.fc1(F.relu(net.point(F.relu(inner))).mean(dim=(2, 3)))))
        direction = torch.randn(output.shape, generator=weights)
        (gradient,) = torch.autograd.grad((output * direction / output.detach().std()).sum(), inner)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, 16).double()
        expected += rows.T @ rows
    scaled = found["conv2"] * (expected.trace() / found["conv2"].trace())  # its scale does not matter
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert all(p.grad is None for p in net.parameters())


def test_norms_take_the_statistics_of_the_batch_for_a_while():
    net, images = pooled(), 3 + 2 * torch.randn(16, *IMAGE[1:])
    before = Unchanged(net)
    with torch.no_grad(), batch_statistics(net):
        normed = net[1](net[0](images))
    torch.testing.assert_close(normed.mean(dim=(0, 2, 3)), net[1].bias.detach(), rtol=1e-3, atol=1e-3)
    before.check()


@pytest.mark.slow
def test_moments_of_drawn_inputs_are_the_mean_of_two_kinds_shrunk(scarce):
    net, statistics = scarce
    assert statistics.scarce
    drawn = synthesise(net, (1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE)).drawn
    plain = input_moments(net, drawn, ["3", "8"])
    with batch_statistics(net):
        normed = input_moments(net, drawn, ["3", "8"])
    for name in ("3", "8"):
        found, first, second = statistics.moments[name], normed[name], plain[name]
        torch.testing.assert_close(found.mean, (first.mean + second.mean) / 2)
        own = (first.second + second.second) / 2 - torch.outer(found.mean, found.mean)
        covariance = found.second - torch.outer(found.mean, found.mean)
        torch.testing.assert_close(covariance.trace(), own.trace())
        off = ~torch.eye(len(own), dtype=torch.bool)
        torch.testing.assert_close(covariance[off], (1 - OTHER_KIND) * own[off])
        assert found.shrinkage >= OTHER_KIND


@pytest.mark.slow
def test_of_a_layer_with_very_many_inputs_the_moment_of_its_channels_is_kept(monkeypatch, net, images):
    whole = input_moments(net.eval(), [((images,), {})], ["conv1", "conv2"])
    size = net.conv2.weight[0].numel()
    monkeypatch.setattr(enough, "LARGEST_OF_KERNEL", size - 1)
    found = input_moments(net, [((images,), {})], ["conv1", "conv2"])
    assert torch.equal(found["conv1"].second, whole["conv1"].second)
    assert found["conv2"].second is None
    channels = net.conv2.in_channels
    assert found["conv2"].channels.shape == (channels, channels)
    with torch.no_grad():
        entering = F.relu(net.norm(net.conv1(images))).double().movedim(1, -1).reshape(-1, channels)
    mean, alpha = entering.mean(dim=0), found["conv2"].shrinkage
    covariance = (entering - mean).T @ (entering - mean) / len(entering)
    shrunk = (1 - alpha) * covariance + alpha * covariance.trace() / channels * torch.eye(channels)
    torch.testing.assert_close(found["conv2"].channels, shrunk + mean[:, None] * mean, rtol=1e-5, atol=1e-6)
    plan = search_ranks(net, Budget(params=0.5), example_input=IMAGE, objective="moments")
    apply_plan_(net, plan, statistics=gather_statistics(net, IMAGE))
    assert "conv2" in {layer.name for layer in plan.factorised}


def test_linear_layers_with_very_many_inputs_have_the_metric_of_their_outputs_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    monkeypatch.setattr(enough, "LARGEST", 35)
    found = gather_statistics(model, (1, 40))
    assert found.metric("0").inputs is None
    assert found.metric("0").outputs.shape == (30, 30)
    assert found.metric("2").inputs.shape == (30, 30)


@pytest.mark.parametrize("dims", [1, 2])
def test_rows_of_some_positions_are_those_of_all_at_even_steps(dims):
    layer = (nn.Conv1d, nn.Conv2d)[dims - 1](3, 4, 3, padding=1)
    inputs = torch.randn(2, 3, *([8] * dims))
    whole = family_of(layer).rows(layer, inputs)[0].reshape(2, 8**dims, -1)
    some = family_of(layer).rows(layer, inputs, 2 * 8**dims // 4)[0].reshape(2, -1, whole.shape[2])
    assert torch.equal(some, whole[:, ::4])


def test_folds_of_many_outputs_are_of_random_combinations_and_say_the_same(monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(24, 96, bias=False)
    samples = torch.randn(60, 24) * torch.linspace(0.1, 2, 24)
    unseen = {}
    for most in (1024, 48):
        monkeypatch.setattr(shrinkage, "MOST_OUTPUTS", most)
        found = input_moments(nn.Sequential(layer), [((samples,), {})], ["0"])["0"]
        assert found.folds.products.shape[-1] == min(96, most)
        unseen[most] = found.metric.unseen().at(np.array([0.02, 0.1, 0.3]))
    assert unseen[48] == pytest.approx(unseen[1024], rel=0.15)


def test_inputs_that_are_not_matched_to_norms_are_as_many_as_their_moments_can_afford():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    macs = 64 * 64 + 64 * 8
    with trying(Effort(work=6 * macs * 40)):
        assert len(synthesise(model, (1, 64)).batches[0][0][0]) == 40
    with trying(Effort(work=1)):
        assert len(synthesise(model, (1, 64)).batches[0][0][0]) == 8

"""Synthetic inputs and the moments of what enters each layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.moments import input_moments
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.analysis.synthetic import LEAST_COUNT, LEAST_STEPS, affordable, synthesise
from lightning_compress.core.effort import EFFORTS
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.layers.families import family_of
from tests.support.errors import planned_error
from tests.support.nets import SHAPE, TinyNet, trained_like
from tests.support.unchanged import Unchanged

BOUNDED = {"tucker2", "tt", "cp", "cp3"}
"""Kinds whose planned error is an upper bound of that of the fitted factors."""

WORK = EFFORTS["balanced"].work


def mismatch(net: TinyNet, images: torch.Tensor) -> float:
    with torch.no_grad():
        inputs = net.conv1(images)
    variance, mean = torch.var_mean(inputs, (0, 2, 3), unbiased=False)
    running = net.norm.running_var + net.norm.eps
    spread = ((variance + net.norm.eps).sqrt() / running.sqrt() - 1).square()
    return float(((mean - net.norm.running_mean).square() / running + spread).mean())


def test_synthetic_images_match_the_running_statistics():
    net = trained_like()
    made = synthesise(net, SHAPE, count=64, steps=60)
    ((images,), kwargs) = made.batches[0]
    assert made.source == "batch norm"
    assert kwargs == {}
    assert images.shape == (64, 3, 8, 8)
    assert made.mismatch == pytest.approx(mismatch(net, images), rel=1e-4)
    assert made.mismatch < 0.02 * mismatch(net, torch.randn(64, 3, 8, 8))


def test_synthetic_images_are_deterministic_under_the_seed():
    net = trained_like()
    first, again, other = (synthesise(net, SHAPE, count=8, steps=3, seed=s).batches[0][0][0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_model_comes_back_as_it_was():
    net = trained_like().train()
    before = Unchanged(net)
    gather_statistics(net, SHAPE)
    before.check()
    assert all(p.grad is None for p in net.parameters())


class Fails(TinyNet):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 3:
            raise KeyboardInterrupt
        return super().forward(x)


def test_model_comes_back_as_it_was_after_an_interruption():
    net = Fails().train()
    before = Unchanged(net)
    with pytest.raises(KeyboardInterrupt):
        synthesise(net, SHAPE, count=8, steps=10)
    before.check()


def test_without_batch_norm_the_inputs_are_noise():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    made = synthesise(net, SHAPE, count=70)
    assert (made.source, made.mismatch) == ("noise", None)
    assert [args[0].shape[0] for args, _ in made.batches] == [64, 6]
    assert torch.cat([args[0] for args, _ in made.batches]).std() == pytest.approx(1, abs=0.1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens, scale):
        return self.head(self.embedding(tokens)) * scale[:, None, None]


def test_tokens_are_drawn_from_the_vocabulary():
    example = {"tokens": torch.zeros(1, 5, dtype=torch.long), "scale": torch.ones(1)}
    made = synthesise(Tokens(), example, count=32)
    (args, kwargs) = made.batches[0]
    assert made.source == "tokens"
    assert args == ()
    assert kwargs["tokens"].shape == (32, 5)
    assert set(kwargs["tokens"].unique().tolist()) == set(range(11))
    metric = gather_statistics(Tokens(), example).metric("head")
    assert (metric.inputs.shape, metric.outputs.shape) == ((6, 6), (3, 3))


@pytest.mark.parametrize(
    ("macs", "expected"),
    [(10**6, (256, 40)), (WORK // (3 * 100 * 40), (100, 40)), (WORK // (3 * 16 * 20), (16, 20)), (WORK, (16, 10))],
)
def test_work_of_the_synthesis_is_bounded(macs, expected):
    assert affordable(macs, 256, 40) == expected
    assert affordable(macs, 8, 5) == (8, 5)
    assert (LEAST_COUNT, LEAST_STEPS) == (16, 10)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
        {"kernel_size": 1, "padding": 1},
    ],
)
def test_unfolded_inputs_times_the_weight_are_the_outputs(settings):
    layer = nn.Conv2d(3, 5, bias=False, **settings).double()
    images = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    rows = family_of(layer).rows(layer, images)[0]
    expected = layer(images).permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.usefixtures("unshrunk")
def test_calibration_takes_real_batches_and_says_so(net, images):
    statistics = gather_statistics(net, SHAPE, calibration=[images[:3], images[3:]])
    assert (statistics.source, statistics.data_free) == ("real", False)
    expected = input_moments(net, [((images,), {})], ["fc2"])["fc2"].second
    torch.testing.assert_close(statistics.metric("fc2").inputs, expected, rtol=1e-5, atol=1e-7)
    plan = search_ranks(net, Budget(params=0.5), statistics=statistics)
    assert (plan.objective, plan.source, plan.data_free) == ("end_to_end", "real", False)
    assert {layer.source for layer in plan.factorised} == {"real"}
    again = search_ranks(net, Budget(params=0.5), calibration=[images[:3], images[3:]])
    assert (again.layers, again.data_free) == (plan.layers, False)


@pytest.mark.parametrize("kind", ["svd", "channel_svd", "spatial_svd", "tucker2"])
def test_fewer_rows_of_inputs_than_there_are_inputs_are_no_obstacle(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1 if kind == "svd" else 3, padding=1))
    batches = [torch.randn(2, 4, 4, 4)]  # 32 positions, 64 or 576 inputs of the last layer
    plan = search_ranks(
        net, Budget(params=0.5), calibration=batches, objective="moments", overrides={"2": {"kinds": kind}}
    )
    statistics = gather_statistics(net, calibration=batches)
    dense = net[2].weight.detach().clone()
    apply_plan_(net, plan, statistics=statistics)
    error = planned_error(statistics.metric("2"), dense, net[2].weight)
    assert error == pytest.approx(plan.layers[1].error, rel=1e-2, abs=1e-4)


def test_empty_calibration_is_an_error(net):
    with pytest.raises(ExampleInputError, match="calibration holds no batch"):
        gather_statistics(net, SHAPE, calibration=[])


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].weight.data.fill_(3e38)
    with pytest.raises(ExampleInputError, match=r"the inputs of layer '1' are not finite.*objective='weight'"):
        gather_statistics(net, (1, 3))


def test_errors_of_a_plan_are_those_of_the_outputs():
    net = trained_like()
    statistics = gather_statistics(net, SHAPE)
    plan = search_ranks(net, Budget(params=0.4), statistics=statistics, example_input=SHAPE)
    dense = {layer.name: net.get_submodule(layer.name).weight.detach().clone() for layer in plan.factorised}
    apply_plan_(net, plan, statistics=statistics)
    assert (plan.objective, plan.source) == ("end_to_end", "batch norm")
    for layer in plan.factorised:
        error = planned_error(statistics.metric(layer.name), dense[layer.name], net.get_submodule(layer.name).weight)
        if layer.kind in BOUNDED:
            assert error <= layer.error * 1.05 + 1e-5
        else:
            assert error == pytest.approx(layer.error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("objective", ["moments", "end_to_end"])
def test_objectives_of_moments_without_any_input_are_an_error(net, unchanged, objective):
    before = unchanged(net)
    with pytest.raises(ExampleInputError, match=rf"objective='{objective}' needs an example_input.*or calibration"):
        search_ranks(net, Budget(params=0.5), objective=objective)
    with pytest.raises(ExampleInputError, match=r"no moments without inputs: pass an example_input.*or calibration"):
        gather_statistics(net)
    before.check()

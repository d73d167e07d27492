"""The distance of outputs: one definition, however the inputs come."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_compress.analysis.distance import OutputDistance, output_distance, relative_error, squared_error


def outputs(samples: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of different means and variances, and outputs that are not far from them."""
    targets = 100 + torch.tensor([0.0, 50.0, -20.0]) + torch.tensor([1.0, 3.0, 0.1]) * torch.randn(samples, 3)
    return targets + 0.5 * torch.randn(samples, 3), targets


def by_definition(output: torch.Tensor, target: torch.Tensor) -> float:
    output, target = output.double(), target.double()
    return float((target - output).square().sum() / (target - target.mean(dim=0)).square().sum())


@pytest.mark.parametrize("parts", [[40], [20, 20], [16, 16, 8], [39, 1], [1] * 40])
def test_mean_is_over_all_samples_however_they_are_parted(parts):
    output, target = outputs()
    distance = OutputDistance()
    for o, t in zip(output.split(parts), target.split(parts), strict=True):
        distance.add([o], [t])
    assert distance.value == pytest.approx(by_definition(output, target), rel=1e-4)


def test_best_outputs_that_do_not_depend_on_the_input_have_distance_one():
    _, target = outputs()
    distance = OutputDistance()
    distance.add([target.mean(dim=0).expand_as(target)], [target])
    assert distance.value == pytest.approx(1)


def test_several_outputs_are_pooled_and_those_of_other_sizes_have_means_of_their_own():
    pairs = [outputs(8) for _ in range(3)]
    longer = [torch.cat([tensor, tensor], dim=1) for tensor in pairs[2]]
    distance = OutputDistance()
    distance.add([pairs[0][0], pairs[1][0]], [pairs[0][1], pairs[1][1]])
    distance.add([longer[0], pairs[1][0]], [longer[1], pairs[1][1]])
    lost = sum(float((o - t).square().sum()) for o, t in (pairs[0], longer, pairs[1], pairs[1]))
    varies = sum(float((t - t.mean(dim=0)).square().sum()) for _, t in (pairs[0], longer, pairs[1], pairs[1]))
    assert distance.value == pytest.approx(lost / varies, rel=1e-4)


def test_outputs_that_do_not_vary_are_judged_by_the_plain_error():
    distance = OutputDistance()
    assert distance.value == 0
    distance.add([torch.full((4, 2), 3.0)], [torch.full((4, 2), 1.0)])
    assert distance.value == 32


def test_distance_of_outputs_that_are_not_finite_is_infinite():
    distance = OutputDistance()
    distance.add([torch.full((4, 2), math.nan)], [torch.randn(4, 2)])
    assert distance.value == math.inf


def test_distance_of_models_is_that_of_their_outputs_and_leaves_their_modes():
    dense, model = (nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train() for _ in range(2))
    batches = [((torch.randn(n, 5),), {}) for n in (7, 4)]
    inputs = torch.cat([args[0] for args, _ in batches])
    with torch.no_grad():
        expected = by_definition(model[0](inputs), dense[0](inputs))
    assert output_distance(dense, model, batches) == pytest.approx(expected, rel=1e-4)
    assert output_distance(dense, copy.deepcopy(dense), batches) == 0
    assert dense.training
    assert model[1].training


def test_squared_error_and_relative_error_have_gradients_and_agree():
    output, target = outputs()
    output.requires_grad_()
    error, relative = squared_error([output], [target]), relative_error(output, target)
    assert relative.item() == pytest.approx(by_definition(output.detach(), target), rel=1e-4)
    gradients = [torch.autograd.grad(value, output)[0] for value in (error, relative)]
    torch.testing.assert_close(gradients[0] / error.item(), gradients[1] / relative.item(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("target", [torch.randn(1, 6), torch.randn(6).expand(32, 6)], ids=["one", "all the same"])
def test_samples_that_do_not_differ_are_compared_by_the_variance_over_all_values(target):
    output = target + 0.1
    expected = 0.01 / float((target - target.mean()).square().mean())
    assert relative_error(output, target).item() == pytest.approx(expected, rel=1e-3)

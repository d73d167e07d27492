"""Weights that look untrained."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from benchmarks.common import reference
from lightning_compress import Budget, compress_
from lightning_compress.analysis.untrained import EDGE, LEAST_SIDE, edge_ratio, looks_untrained
from lightning_compress.core.errors import CompressionWarning
from tests.support.compressing import WEIGHTS_ALONE


def wide(layers=4, width=96):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def trained(net):
    """Adds a direction to every weight, as a few steps of training do."""
    with torch.no_grad():
        for layer in net:
            left, right = torch.randn(layer.out_features), torch.randn(layer.in_features)
            layer.weight += 0.5 * layer.weight.norm() * torch.outer(left / left.norm(), right / right.norm())
    return net


@pytest.mark.parametrize("shape", [(64, 64), (96, 400), (1000, 64)])
@pytest.mark.parametrize("init", [nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_])
def test_random_matrices_end_at_the_edge(shape, init):
    weight = init(torch.empty(shape))
    weight = weight - weight.mean()
    largest = torch.linalg.svdvals(weight)[0]
    edge = weight.std() * (shape[0] ** 0.5 + shape[1] ** 0.5)
    assert edge_ratio(weight) == pytest.approx(float(largest / edge), rel=0.05)
    assert edge_ratio(weight) <= EDGE


def test_a_direction_stands_out():
    assert edge_ratio(trained(wide(1))[0].weight) > EDGE


def test_all_large_layers_have_to_look_random():
    assert looks_untrained(wide())
    assert not looks_untrained(trained(wide()))
    mixed = wide()
    mixed[2] = trained(wide(1))[0]
    assert not looks_untrained(mixed)


@pytest.mark.parametrize("name", ["resnet20", "vgg"])
def test_trained_reference_networks_do_not_look_untrained(name):
    assert not looks_untrained(reference(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vit_b_32"])
def test_networks_as_torchvision_makes_them_look_untrained(name):
    models = pytest.importorskip("torchvision.models")
    assert looks_untrained(getattr(models, name)())


def test_projections_of_recurrent_and_attention_layers_count():
    fused = nn.ModuleList([nn.LSTM(96, 96, 2), nn.MultiheadAttention(96, 4)])
    assert looks_untrained(fused)
    with torch.no_grad():
        fused[0].weight_hh_l0 += 1.0
    assert not looks_untrained(fused)


@pytest.mark.parametrize("net", [lambda: wide(2), lambda: wide(width=LEAST_SIDE - 1)], ids=["few", "small"])
def test_few_or_small_layers_say_nothing(net):
    assert not looks_untrained(net())


def test_weights_of_zeros_do_not_matter():
    net = wide()
    nn.init.zeros_(net[1].weight)
    assert looks_untrained(net)


def test_the_default_objective_warns_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compress_(wide(), Budget(params=0.5), heal=False)
    assert [w.category for w in seen] == [CompressionWarning]
    assert "the weights look untrained" in str(seen[0].message)
    compress_(wide(), Budget(params=0.5), **WEIGHTS_ALONE)  # who asks for the weights alone knows what he does

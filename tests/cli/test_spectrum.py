"""Singular values beside the ranks of a plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.cli import spectrum
from lightning_compress.cli.spectrum import spectra_of
from lightning_compress.core.costs import Costs
from lightning_compress.core.plan import LayerPlan, Plan


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 8, (3, 2))
        self.up = nn.ConvTranspose2d(8, 4, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.head = nn.Linear(20, 10)
        self.norm = nn.BatchNorm2d(8)


def layer(net, name, kind, ranks, **changes):
    weight = net.get_submodule(name).weight
    size = weight.numel()
    reason = {"reason": "small"} if kind == "dense" else {}
    error = 0.0 if kind == "dense" else 0.1
    after = size if kind == "dense" else size // 2
    module = type(net.get_submodule(name)).__name__
    return LayerPlan(name, module, kind, ranks, tuple(weight.shape), error, size, after, **reason, **changes)


def plan_of(*layers):
    return Plan(layers, Costs(5_000, None, 20_000), Costs(2_500, None, 10_000))


def singular(matrix):
    values = torch.linalg.svdvals(matrix.detach().double())
    return pytest.approx((values / values[0]).numpy(), abs=1e-6)


def found(net, *layers):
    shown, left = spectra_of(plan_of(*layers), net)
    assert left == 0
    return {each.layer.name: each.spectra for each in shown}


def test_matrices_are_those_that_the_ranks_are_ranks_of():
    net = Net()
    weight = net.conv.weight
    outputs, inputs = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    columns = weight.permute(0, 3, 1, 2).reshape(8 * 2, 6 * 3)
    expected = {
        ("channel_svd", (3,)): [(outputs, 3)],
        ("spatial_svd", (4,)): [(columns, 4)],
        ("tucker2", (3, 5)): [(outputs, 3), (inputs, 5)],
        ("tt", (2, 4, 6)): [(outputs, 6), (inputs, 2)],
        ("cp", (7,)): [(outputs, None)],
        ("dense", ()): [(outputs, None)],
    }
    for (kind, ranks), wanted in expected.items():
        spectra = found(net, layer(net, "conv", kind, ranks))["conv"]
        assert [s.rank for s in spectra] == [rank for _, rank in wanted]
        for one, (matrix, _) in zip(spectra, wanted, strict=True):
            assert one.values == singular(matrix)


def test_energy_is_what_a_truncated_svd_keeps():
    net = Net()
    (one,) = found(net, layer(net, "head", "svd", (4,)))["head"]
    u, s, vh = torch.linalg.svd(net.head.weight.detach().double(), full_matrices=False)
    kept = (u[:, :4] * s[:4]) @ vh[:4]
    assert one.energy == pytest.approx(float(kept.square().sum() / net.head.weight.detach().double().square().sum()))
    (dense,) = found(net, layer(net, "head", "dense", ()))["head"]
    assert dense.energy is None


def test_transposed_and_grouped_layers_are_looked_at_as_they_compute():
    net = Net()
    (up,) = found(net, layer(net, "up", "channel_svd", (2,)))["up"]
    assert up.values == singular(net.up.weight.transpose(0, 1).flatten(1))
    (grouped,) = found(net, layer(net, "grouped", "channel_svd", (2,)))["grouped"]
    assert grouped.values == singular(net.grouped.weight[:6].flatten(1))  # of the first group


def test_largest_come_first_and_the_others_are_counted(monkeypatch):
    net = Net()
    layers = [layer(net, name, "dense", ()) for name in ("head", "grouped", "conv", "up")]
    norm = LayerPlan("norm", "BatchNorm2d", "dense", (), (), 0.0, 16, 16, reason="a norm layer")
    shown, left = spectra_of(plan_of(*layers, norm), net, most=2)
    assert ([each.layer.name for each in shown], left) == (["grouped", "conv"], 2)
    monkeypatch.setattr(spectrum, "MOST_SIDE", 7)  # conv has 8 outputs
    shown, left = spectra_of(plan_of(*layers), net)
    assert ([each.layer.name for each in shown], left) == (["grouped", "up"], 2)


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["zeros", "nan"])
def test_weights_without_a_spectrum(value):
    net = Net()
    nn.init.constant_(net.head.weight, value)
    shown, left = spectra_of(plan_of(layer(net, "head", "svd", (4,))), net)
    if value == 0:
        assert np.array_equal(shown[0].spectra[0].values, np.zeros(10))
        assert shown[0].spectra[0].energy == 1.0
    else:
        assert (shown, left) == ((), 1)


def test_layers_that_the_model_does_not_have_are_left_out():
    net = Net()
    other = dataclasses.replace(layer(net, "head", "svd", (4,)), name="elsewhere")
    assert spectra_of(plan_of(other), net) == ((), 1)
    reshaped = dataclasses.replace(layer(net, "head", "svd", (4,)), weight_shape=(5, 40))
    assert spectra_of(plan_of(reshaped), net) == ((), 1)

"""Decompositions in the metric of the inputs, ‖(W − Ŵ) S^½‖, and of the outputs too, ‖G^½ (W − Ŵ) S^½‖."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, factorise_in
from tests.support.errors import error_in

CASES = [
    ("svd", (12, 7)),
    ("svd", (5, 9, 1, 1)),
    ("channel_svd", (8, 6, 3, 3)),
    ("channel_svd", (12, 2, 1, 3)),
    ("spatial_svd", (8, 6, 3, 3)),
    ("spatial_svd", (5, 4, 3, 2)),
    ("tucker2", (8, 6, 3, 3)),
    ("tucker2", (12, 3, 3, 1)),
]


def weight_and_metric(shape, condition=1e3):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    size = weight[0].numel()
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return weight, (basis * scales) @ basis.T


def error(weight, factors, metric, decomposition):
    lost = (decomposition.dense_weight(factors, tuple(weight.shape)) - weight).flatten(1)
    flat = weight.flatten(1)
    return float(((lost @ metric) * lost).sum() / ((flat @ metric) * flat).sum())


@pytest.mark.parametrize(("kind", "shape"), [c for c in CASES if c[0] in ("svd", "channel_svd")])
def test_matrix_kinds_are_optimal_in_the_metric(kind, shape):
    decomposition, (weight, metric) = DECOMPOSITIONS[kind], weight_and_metric(shape)
    root = torch.linalg.cholesky(metric)
    energies = torch.linalg.svdvals(weight.flatten(1) @ root).square()
    profile = decomposition.profile(weight, metric)
    expected = 1 - energies.cumsum(0) / energies.sum()
    torch.testing.assert_close(torch.from_numpy(profile.errors), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_fit_in_the_metric_beats_the_plain_fit_where_it_counts(kind, shape):
    decomposition, (weight, metric) = DECOMPOSITIONS[kind], weight_and_metric(shape)
    ranks = tuple(max(1, r // 2) for r in decomposition.max_ranks(shape))
    plain, fitted = decomposition.factorise(weight, ranks), decomposition.factorise(weight, ranks, metric)
    assert error(weight, fitted, metric, decomposition) < error(weight, plain, metric, decomposition)


def weight_and_two_sided_metric(shape):
    weight, inputs = weight_and_metric(shape)
    scales = torch.logspace(0, 3, len(weight), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(weight), len(weight), dtype=torch.float64))
    return weight, Metric(inputs, 7.0 * (basis * scales) @ basis.T)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_fit_in_both_metrics_beats_the_fit_in_one_where_it_counts(kind, shape):
    weight, metric = weight_and_two_sided_metric(shape)
    ranks = tuple(max(1, r // 2) for r in DECOMPOSITIONS[kind].max_ranks(shape))
    fits = [factorise_in(kind, weight, ranks, m) for m in (None, Metric(metric.inputs), metric)]
    plain, one, both = (error_in(metric, weight, DECOMPOSITIONS[kind].dense_weight(f, shape)) for f in fits)
    assert both < one < plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel_svd", "spatial_svd", "tucker2"])
def test_plan_does_not_change_when_a_batch_norm_takes_over_the_scale_of_a_convolution(kind):
    from lightning_compress import Budget, search_ranks

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    first = search_ranks(net, Budget(params=0.5), objective="moments", example_input=(1, 4, 8, 8), kinds=["svd", kind])
    conv, norm = net[0][0], net[0][1]
    with torch.no_grad():
        conv.weight.mul_(16)  # a power of two, so that not a bit of the activations changes
        norm.running_mean.mul_(16)
        norm.running_var.mul_(256)
        norm.eps *= 256
    again = search_ranks(net, Budget(params=0.5), objective="moments", example_input=(1, 4, 8, 8), kinds=["svd", kind])
    assert [(p.kind, p.ranks) for p in again.layers] == [(p.kind, p.ranks) for p in first.layers]

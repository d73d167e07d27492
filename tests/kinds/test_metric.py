"""Decompositions in the metric of the inputs, ‖(W − Ŵ) S^½‖, and of the outputs too, ‖G^½ (W − Ŵ) S^½‖."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, fit_factors, rank_errors
from tests.support.errors import error_in
from tests.support.zoo import normal, random_metric


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("svd", (12, 7)), ("svd", (5, 9, 1, 1)), ("channel_svd", (8, 6, 3, 3)), ("channel_svd", (12, 2, 1, 3))),
        *(("spatial_svd", (8, 6, 3, 3)), ("spatial_svd", (5, 4, 3, 2)), ("tucker2", (8, 6, 3, 3))),
        *(("tucker2", (12, 3, 3, 1)), ("tt", (9, 8, 3, 3))),
    ],
)
def test_fit_in_each_metric_beats_the_fit_in_fewer_where_it_counts(kind, shape):
    decomposition, weight = DECOMPOSITIONS[kind], normal(*shape)
    inputs = random_metric(weight[0].numel(), seed=1)
    ranks = tuple(max(1, r // 2) for r in decomposition.max_ranks(shape))
    metrics = [None, Metric(inputs), Metric(inputs, 7.0 * random_metric(len(weight), seed=2))]
    fits = [decomposition.dense_weight(fit_factors(kind, weight, ranks, metric), shape) for metric in metrics]
    assert error_in(metrics[1], weight, fits[1]) < error_in(metrics[1], weight, fits[0])
    plain, one, both = (error_in(metrics[2], weight, fit) for fit in fits)
    assert both < one < plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel_svd", "spatial_svd", "tucker2"])
def test_plan_does_not_change_when_a_batch_norm_takes_over_the_scale_of_a_convolution(kind):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    settings = {"objective": "moments", "example_input": (1, 4, 8, 8), "kinds": ["svd", kind]}
    first = search_ranks(net, Budget(params=0.5), **settings)
    conv, norm = net[0][0], net[0][1]
    with torch.no_grad():
        conv.weight.mul_(16)  # a power of two, so that not a bit of the activations changes
        norm.running_mean.mul_(16)
        norm.running_var.mul_(256)
        norm.eps *= 256
    again = search_ranks(net, Budget(params=0.5), **settings)
    assert [(p.kind, p.ranks) for p in again.layers] == [(p.kind, p.ranks) for p in first.layers]


KINDS_OF_CONVOLUTIONS = ["channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "svd", "interpolative"]


@pytest.mark.parametrize("kind", KINDS_OF_CONVOLUTIONS)
def test_metric_of_the_channels_alone_is_that_of_its_kronecker_product(kind):
    shape = (6, 5, 1, 1) if kind in {"svd", "interpolative"} else (6, 5, 3, 3)
    decomposition, weight, channels = DECOMPOSITIONS[kind], normal(*shape), random_metric(5, seed=1)
    outputs = random_metric(6, seed=2)
    ranks = tuple(max(1, r // 2) for r in decomposition.max_ranks(shape))
    whole = Metric(torch.kron(channels, torch.eye(weight[0, 0].numel(), dtype=channels.dtype)), outputs)
    small = Metric(None, outputs, channels=channels)
    errors = [rank_errors(kind, weight, metric).errors for metric in (small, whole)]
    tolerance = 0.05 if decomposition.fits_roughly or decomposition.refines else 1e-4
    assert errors[0] == pytest.approx(errors[1], rel=tolerance, abs=1e-6)
    fits = [decomposition.dense_weight(fit_factors(kind, weight, ranks, each), shape) for each in (small, whole)]
    lost = [error_in(whole, weight, fit) for fit in fits]
    assert lost[0] == pytest.approx(lost[1], rel=tolerance, abs=1e-6)


def test_iterative_fits_are_kept_in_the_metric_for_the_same_weight(monkeypatch):
    weight, metric, fits = normal(6, 5, 3, 3), Metric(random_metric(45, seed=1)), []
    fit = type(DECOMPOSITIONS["cp3"]).factorise
    monkeypatch.setattr(
        type(DECOMPOSITIONS["cp3"]), "factorise", lambda self, *args: fits.append(args) or fit(self, *args)
    )
    first = fit_factors("cp3", weight, (4,), metric)
    again = fit_factors("cp3", weight.clone(), (4,), metric)
    assert len(fits) == 1
    assert all(torch.equal(first[name], again[name]) and first[name] is not again[name] for name in first)
    fit_factors("cp3", weight + 1, (4,), metric)
    fit_factors("cp3", weight, (3,), metric)
    fit_factors("cp3", weight, (4,), Metric(metric.inputs))
    assert len(fits) == 4


@pytest.mark.parametrize("kind", ["cp3", "cp"])
def test_refit_from_factors_nearby_is_as_good_as_a_fit_from_nothing(kind):
    weight, metric = normal(12, 10, 3, 3), Metric(random_metric(90, seed=1), random_metric(12, seed=2))
    moved = Metric(metric.inputs + 0.1 * random_metric(90, seed=3), metric.outputs)
    start = fit_factors(kind, weight, (12,), metric)
    other = weight + 0.05 * normal(12, 10, 3, 3, seed=5)
    decomposition = DECOMPOSITIONS[kind]
    errors = [
        error_in(moved, other, decomposition.dense_weight(factors, tuple(weight.shape)))
        for factors in (
            start,
            fit_factors(kind, other, (12,), moved, start=start),
            fit_factors(kind, other, (12,), moved),
        )
    ]
    assert errors[1] < errors[0]
    assert errors[1] < 1.05 * errors[2]

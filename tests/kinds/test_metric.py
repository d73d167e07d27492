"""Decompositions in the metric of the inputs, ‖(W − Ŵ) S^½‖, and of the outputs too, ‖G^½ (W − Ŵ) S^½‖."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, fit_factors
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

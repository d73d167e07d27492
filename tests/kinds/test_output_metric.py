"""Decompositions in the metric of the outputs: predicted errors, optima, its scale."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.kinds.metric import OUTPUT_FLOOR, Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, fit_factors, rank_errors
from tests.support.errors import error_in
from tests.support.zoo import KIND_SHAPES, normal, random_metric


@pytest.mark.parametrize("kind", KIND_SHAPES)
def test_predicted_error_in_both_metrics_is_the_measured_one(kind):
    weight = normal(*KIND_SHAPES[kind])
    metric = Metric(random_metric(weight[0].numel(), condition=50), 7 * random_metric(len(weight), 1, condition=20))
    profile = rank_errors(kind, weight, metric)
    step = max(3, len(profile.ranks) // 8)
    for ranks, predicted in zip(profile.ranks[::step].tolist(), profile.errors[::step], strict=True):
        fitted = DECOMPOSITIONS[kind].dense_weight(fit_factors(kind, weight, tuple(ranks), metric), KIND_SHAPES[kind])
        assert error_in(metric, weight, fitted) == pytest.approx(predicted, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("kind", ["svd", "channel_svd"])
def test_matrix_kinds_are_optimal_in_both_metrics(kind):
    weight = normal(*KIND_SHAPES[kind])
    inputs, outputs = random_metric(weight[0].numel(), condition=50), random_metric(len(weight), 1, condition=20)
    floored = (1 - OUTPUT_FLOOR) * outputs / outputs.diagonal().mean() + OUTPUT_FLOOR * torch.eye(len(weight)).double()
    left, right = torch.linalg.cholesky(floored), torch.linalg.cholesky(inputs)
    energies = torch.linalg.svdvals(left.T @ weight.flatten(1) @ right).square()
    expected = 1 - energies.cumsum(0) / energies.sum()
    errors = torch.from_numpy(rank_errors(kind, weight, Metric(inputs, outputs)).errors)
    torch.testing.assert_close(errors, expected[: len(errors)], rtol=1e-8, atol=1e-10)


def test_scale_of_the_output_metric_does_not_matter_and_zero_is_the_identity():
    weight, inputs, outputs = normal(6, 5), random_metric(5, condition=10), random_metric(6, 1, condition=10)
    errors = [
        torch.from_numpy(rank_errors("svd", weight, Metric(inputs, g)).errors)
        for g in (outputs, 1e6 * outputs, None, torch.zeros(6, 6, dtype=torch.float64))
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(errors[2], errors[3], rtol=0, atol=0)

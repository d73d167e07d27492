"""One first factor for several weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_compress.kinds.joint_svd import joint_errors, joint_factors
from lightning_compress.kinds.metric import Metric
from tests.support.errors import error_in
from tests.support.zoo import normal, random_metric


@pytest.mark.parametrize("weighed", [False, True])
def test_errors_are_those_of_the_factors(weighed):
    weights = [scale * normal(out, 16, seed=out) for scale, out in ((1, 20), (5, 12), (0.1, 30))]
    inputs = random_metric(16, condition=50)
    metrics = [Metric(inputs, random_metric(len(w), 1)) if weighed else None for w in weights]
    errors = joint_errors(weights, metrics)
    assert errors.shape == (16, 3)
    assert (np.diff(errors, axis=0) <= 1e-12).all()
    for rank in (1, 5, 16):
        reduce, expand = joint_factors(weights, metrics, rank)
        assert reduce.shape == (rank, 16)
        found = [error_in(m, w, own @ reduce) for w, own, m in zip(weights, expand, metrics, strict=True)]
        assert found == pytest.approx(errors[rank - 1], abs=1e-5)


def test_without_a_metric_the_first_factor_is_the_svd_of_the_stacked_weights():
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(20, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    weights = [weight / weight.norm() for weight in weights]
    tail = torch.linalg.svdvals(torch.cat(weights))[4:].square().sum()
    assert joint_errors(weights, [None, None])[3].sum() == pytest.approx(float(tail))

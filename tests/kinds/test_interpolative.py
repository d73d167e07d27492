"""The interpolative decomposition: the SVD's factors without what is redundant in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_compress import Budget, compress_, search_ranks
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, fit_factors
from lightning_compress.layers.interpolation import Interpolation
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.zoo import normal

KIND = DECOMPOSITIONS["interpolative"]


@pytest.mark.parametrize("shape", [(10, 14), (14, 10), (9, 9)])
@pytest.mark.parametrize("known", [False, True])
def test_every_rank_is_the_svd_with_an_identity_inside(shape, known):
    weight, rows = normal(*shape), normal(40, shape[1], seed=1)
    gradients = normal(30, shape[0], seed=2)
    metric = Metric(rows.T @ rows / 40, gradients.T @ gradients) if known else None
    for rank in range(1, min(shape) + 1):
        found, svd = (fit_factors(kind, weight, (rank,), metric) for kind in ("interpolative", "svd"))
        products = [KIND.dense_weight(factors, shape) for factors in (found, svd)]
        torch.testing.assert_close(*products, rtol=1e-7, atol=1e-9)
        assert int((found["expand"] == 1).any(dim=1).sum()) >= rank
        assert float(found["expand"].abs().max()) < 2 * rank  # pivots keep the interpolation small


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_costs_are_below_those_of_svd(rank):
    shape, ranks = (8, 12, 1, 1), np.array([[rank]])
    svd = DECOMPOSITIONS["svd"].parameters(shape, ranks)
    assert int(KIND.parameters(shape, ranks)[0]) == rank * (20 - rank) < int(svd[0])


def test_layer_without_energy_and_one_of_low_rank_are_reproduced():
    for weight in (torch.zeros(6, 5, dtype=torch.float64), normal(6, 1) @ normal(1, 5)):
        factors = fit_factors("interpolative", weight, (3,))
        torch.testing.assert_close(KIND.dense_weight(factors, (6, 5)), weight, rtol=1e-9, atol=1e-9)


def test_places_survive_averages_of_copies():
    """Averages with use_buffers=True round whole numbers down; the outputs must stay in their places."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20))
    compress_(model, Budget(params=0.8), kinds="interpolative", **WEIGHTS_ALONE)
    assert any(isinstance(module, Interpolation) for module in model.modules())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(200):
        average.update_parameters(model)
    x = torch.randn(5, 30)
    torch.testing.assert_close(average(x), model(x))


def test_it_wins_over_svd_where_little_is_to_go():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
    both = search_ranks(net, Budget(params=0.8), kinds=["svd", "interpolative"])
    assert {layer.kind for layer in both.factorised} == {"interpolative"}
    assert both.signal_loss < 0.7 * search_ranks(net, Budget(params=0.8), kinds="svd").signal_loss

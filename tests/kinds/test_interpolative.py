"""The interpolative decomposition: the SVD's factors without what is redundant in them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_compress import Budget, apply_plan_, load_compressed, save_compressed, search_ranks
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, factorise_in
from lightning_compress.layers.families import operator_of
from lightning_compress.layers.interpolation import Interpolation

KIND = DECOMPOSITIONS["interpolative"]


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compressed(net: nn.Module, keep: float = 0.8) -> nn.Module:
    model = copy.deepcopy(net)
    apply_plan_(model, search_ranks(model, Budget(params=keep), kinds="interpolative", objective="weight"))
    return model


@pytest.mark.parametrize("shape", [(10, 14), (14, 10), (9, 9)])
@pytest.mark.parametrize("known", [False, True])
def test_every_rank_is_the_svd_with_an_identity_inside(shape, known):
    weight, rows = weight_of(*shape), weight_of(40, shape[1], seed=1)
    gradients = weight_of(30, shape[0], seed=2)
    metric = Metric(rows.T @ rows / 40, gradients.T @ gradients) if known else None
    for rank in range(1, min(shape) + 1):
        found, svd = (factorise_in(kind, weight, (rank,), metric) for kind in ("interpolative", "svd"))
        products = [KIND.dense_weight(factors, shape) for factors in (found, svd)]
        torch.testing.assert_close(*products, rtol=1e-7, atol=1e-9)
        assert int((found["expand"] == 1).any(dim=1).sum()) >= rank
        assert float(found["expand"].abs().max()) < 2 * rank  # pivots keep the interpolation small


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_costs_are_those_of_the_built_layer_and_below_those_of_svd(rank):
    net = nn.Sequential(nn.Conv2d(12, 8, 1, stride=2))
    shape, ranks = (8, 12, 1, 1), np.array([[rank]])
    assert int(KIND.parameters(shape, ranks)[0]) == rank * (20 - rank)
    assert int(KIND.parameters(shape, ranks)[0]) < int(DECOMPOSITIONS["svd"].parameters(shape, ranks)[0])
    plan = search_ranks(
        net, Budget(params=0.99), kinds="interpolative", objective="weight", overrides={"0": {"max_rank": rank}}
    )
    apply_plan_(net, plan)
    assert plan.layers[0].ranks == (rank,)
    assert sum(p.numel() for p in net.parameters()) == rank * (20 - rank) + 8 == plan.compressed.params
    assert sum(t.numel() * t.element_size() for t in net.state_dict().values()) == plan.compressed.bytes


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Embedding(9, 4)]
)
def test_other_layers_are_refused(layer):
    assert "nn.Linear and 1x1 convolutions of one group only" in KIND.unsupported(operator_of(layer))


def test_layer_without_energy_and_one_of_low_rank_are_reproduced():
    for weight in (torch.zeros(6, 5, dtype=torch.float64), weight_of(6, 1) @ weight_of(1, 5)):
        factors = factorise_in("interpolative", weight, (3,))
        torch.testing.assert_close(KIND.dense_weight(factors, (6, 5)), weight, rtol=1e-9, atol=1e-9)


def test_places_survive_averages_of_copies():
    """Averages with use_buffers=True round whole numbers down; the outputs must stay in their places."""
    torch.manual_seed(0)
    model = compressed(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20)))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(200):
        average.update_parameters(model)
    x = torch.randn(5, 30)
    torch.testing.assert_close(average(x), model(x))


def test_model_is_saved_loaded_and_trained(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(12, 16, 1), nn.ReLU(), nn.Conv2d(16, 10, 1))
    model = compressed(net)
    assert any(isinstance(module, Interpolation) for module in model.modules())
    save_compressed(model, tmp_path)
    again = copy.deepcopy(net)
    load_compressed(again, tmp_path)
    x = torch.randn(3, 12, 5, 5)
    assert torch.equal(again(x), model(x))
    model(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


def test_it_wins_over_svd_where_little_is_to_go():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
    both = search_ranks(net, Budget(params=0.8), kinds=["svd", "interpolative"])
    assert {layer.kind for layer in both.factorised} == {"interpolative"}
    assert both.signal_loss < 0.7 * search_ranks(net, Budget(params=0.8), kinds="svd").signal_loss

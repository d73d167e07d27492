"""Second moments from few samples: how far they are trusted, and what unseen samples show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.shrinkage import FOLDS, SampleSums
from lightning_compress.search.candidates import tabulate


def samples(count: int, size: int = 30, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size
    return 2 + torch.randn(count, size, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(size))


def summed(rows: torch.Tensor, weight: torch.Tensor | None = None, **settings: bool) -> SampleSums:
    """Returns the sums over samples of one position, (n, D)."""
    sums = SampleSums(rows[None, :, None, :], weight, **settings)
    sums.add(rows[None, :, None, :])
    return sums


@pytest.mark.parametrize(("count", "centred"), [(5, True), (40, True), (400, True), (12, False)])
def test_single_positions_are_shrunk_as_scikit_learn_does(count, centred):
    rows = samples(count)
    found, mean = summed(rows, centred=centred).estimate(), rows.mean(dim=0)
    covariance, alpha = ledoit_wolf(rows.numpy(), assume_centered=not centred)
    expected = torch.from_numpy(covariance) + (mean[:, None] * mean if centred else 0)
    assert found.samples == count
    assert found.shrinkage == pytest.approx(alpha, rel=1e-9)
    torch.testing.assert_close(found.second[0], expected, rtol=1e-9, atol=1e-12)
    if centred:
        torch.testing.assert_close(found.mean[0], mean)


def test_positions_of_one_sample_do_not_count_as_samples():
    """The same row at every position says nothing more than once."""
    rows = samples(20)
    everywhere = rows[None, :, None, :].expand(1, 20, 7, 30)
    repeated = SampleSums(everywhere)
    repeated.add(everywhere)
    once, many = summed(rows).estimate(), repeated.estimate()
    assert (many.samples, many.shrinkage) == (20, pytest.approx(once.shrinkage))
    torch.testing.assert_close(many.second, once.second)


def test_samples_are_shrunk_the_less_the_more_there_are():
    alphas = [summed(samples(count)).estimate().shrinkage for count in (64, 1024, 16384)]
    assert alphas == sorted(alphas, reverse=True)
    assert alphas[-1] < 0.05


def test_a_single_sample_says_nothing_of_the_spread():
    found = summed(samples(1)).estimate()
    assert found.shrinkage == 1
    assert summed(samples(1), torch.ones(1, 2, 30)).estimate().folds is None


@pytest.mark.usefixtures("unshrunk")
def test_batches_and_positions_add_up():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 12, 5, 8, generator=generator, dtype=torch.float64) + 3  # groups, samples, positions, inputs
    weight = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    whole, parts = SampleSums(rows, weight), SampleSums(rows[:, :3], weight)
    whole.add(rows)
    for part in rows.split([3, 1, 8], dim=1):
        parts.add(part)
    flat, found = rows.flatten(1, 2), [sums.estimate() for sums in (whole, parts)]
    for estimate in found:
        torch.testing.assert_close(estimate.mean, flat.mean(dim=1))
        torch.testing.assert_close(estimate.second, flat.mT @ flat / 60)
    products = [torch.einsum("f,fgoi->goi", each.folds.weights, each.folds.products) for each in found]
    outputs = flat @ weight.mT
    for product in products:
        torch.testing.assert_close(product, outputs.mT @ outputs / 60)


class Pooled(nn.Module):
    """A wide classifier behind a pooling: each input gives it one row."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.classifier = nn.Linear(features, classes)

    def forward(self, x):  # (B, features, side, side)
        return self.classifier(self.body(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("count", [16, 64, 1024])
def test_estimated_error_of_every_rank_is_near_the_true_one(count, decay):
    """The layer's inputs have a known covariance; the error is that of the factors that would be made."""
    features, classes = 320, 250
    generator = torch.Generator().manual_seed(count)
    net = Pooled(features, classes)
    with torch.no_grad():
        net.classifier.weight.copy_(torch.randn(classes, features, generator=generator) / features**0.5)
    energies = torch.arange(1, features + 1, dtype=torch.float64) ** -decay
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))[0]
    root = basis * energies.div(energies.mean()).sqrt()
    mean = torch.rand(features, generator=generator, dtype=torch.float64)
    rows = torch.randn(count, features, generator=generator, dtype=torch.float64) @ root.T + mean
    images = rows.float()[:, :, None, None].expand(-1, -1, 2, 2)
    statistics = gather_statistics(net, calibration=list(images.split(64)))
    metric = Metric(statistics.metric("classifier").inputs, None, statistics.metric("classifier").folds)
    (layer,) = [layer for layer in take_inventory(net, kinds="svd") if layer.reason is None]
    table = tabulate(layer, compared=("params",), metric=metric)
    weight, true = layer.double_weight(), root @ root.T + mean[:, None] * mean
    directions = torch.linalg.eigh(weight @ metric.inputs @ weight.T)[1].flip(1)
    lost = ((directions.T @ weight @ true) * (directions.T @ weight)).sum(dim=1)
    expected = 1 - (lost.cumsum(0) / lost.sum()).numpy()
    ranks = np.array([ranks[0] for ranks in table.ranks[:-1]])
    ratio = table.unseen_errors[:-1] / expected[ranks - 1]
    assert len(ranks) > 100
    assert 0.8 < ratio.min() <= ratio.max() < 1.2
    assert statistics.moments["classifier"].samples == count


def test_plan_says_how_many_samples_an_error_is_from_and_how_far_it_can_be_off():
    torch.manual_seed(0)
    net = Pooled(24, 20)
    plan = search_ranks(net, Budget(params=0.6), calibration=[torch.randn(FOLDS * 3, 24, 3, 3)], objective="moments")
    layer = next(layer for layer in plan.layers if layer.name == "classifier")
    assert layer.samples == FOLDS * 3
    assert 0 < layer.error_spread < layer.error
    assert f"{layer.error:.4f} ± {layer.error_spread:.4f}" in str(plan)
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    alone = search_ranks(net, Budget(params=0.6), objective="weight")
    assert {(layer.samples, layer.error_spread) for layer in alone.layers} == {(None, None)}

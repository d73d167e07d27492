"""The candidates of each layer: their costs, their errors, what they write."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.effort import EFFORTS
from lightning_compress.core.plan import signal_loss
from lightning_compress.core.settings import RESOURCES
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, LayerCall
from lightning_compress.search.candidates import Candidates
from tests.support.searching import table_of
from tests.support.zoo import normal


def test_candidates_of_a_linear_are_its_useful_ranks_and_dense():
    table = table_of(nn.Linear(6, 10), compared=("params", "macs"), example=(1, 4, 6), kinds="svd")
    assert table.kinds == ("svd",) * 3 + ("dense",)
    assert table.ranks == ((1,), (2,), (3,), ())
    assert table.costs.tolist() == [[16 * r, 64 * r, 64 * r, 0] for r in (1, 2, 3)] + [[60, 240, 240, 0]]
    assert table.errors[-1] == 0
    assert table.losses == pytest.approx(-np.log(1 - table.errors))


@pytest.mark.parametrize("budgeted", [("params",), ("macs",), ("params", "macs"), RESOURCES])
def test_candidates_hold_no_dominated_row_and_miss_no_other(budgeted):
    conv = nn.Conv2d(4, 6, (3, 5), stride=2)
    columns = [RESOURCES.index(name) for name in budgeted]
    table = table_of(conv, compared=budgeted, example=(1, 4, 11, 13), kinds="tucker2")
    (entry,) = take_inventory(nn.Sequential(conv), kinds="tucker2")
    tucker, shape = DECOMPOSITIONS["tucker2"], (6, 4, 3, 5)
    profile = tucker.profile(entry.weight.detach().double())
    params = tucker.parameters(shape, profile.ranks)
    macs = tucker.macs(shape, profile.ranks, LayerCall((11, 13), (5, 5), 1))
    costs = np.column_stack([params, macs, 4 * params, 0 * params])
    points = np.column_stack([costs[:, columns], profile.errors])
    expected = set()
    for row, ranks in enumerate(profile.ranks.tolist()):
        cheaper = params[row] < conv.weight.numel() and macs[row] <= conv.weight.numel() * 25
        usable = (params < conv.weight.numel()) & (macs <= conv.weight.numel() * 25)
        better = (points <= points[row]).all(axis=1) & (points < points[row]).any(axis=1) & usable
        if cheaper and not better.any():
            expected.add(tuple(ranks))
    assert set(table.ranks[:-1]) == expected
    assert len(table.ranks) == len(set(table.ranks))


def test_many_ranks_are_thinned_with_both_ends_kept():
    table = table_of(nn.Linear(1100, 1100, bias=False), kinds="svd")
    ranks = [r for (r,) in table.ranks[:-1]]
    assert 1 in ranks
    assert len(ranks) <= EFFORTS["balanced"].ranks
    assert ranks[:20] == list(range(1, 21))
    assert max(ranks) < 550
    tucker = table_of(nn.Conv2d(80, 70, 3, bias=False), kinds="tucker2")
    for mode in (0, 1):
        assert len({ranks[mode] for ranks in tucker.ranks[:-1]}) <= EFFORTS["balanced"].ranks_per_mode


def test_signal_loss_is_the_negative_logarithm_and_finite():
    assert signal_loss(np.array([0.0, 0.5, 0.9])) == pytest.approx([0, math.log(2), math.log(10)])
    assert signal_loss(np.array([1.0]))[0] == pytest.approx(9 * math.log(10), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "layer"), [("svd", nn.Linear(9, 14)), ("svd", nn.Conv2d(12, 10, 1)), ("channel_svd", nn.Conv2d(6, 20, 3))]
)
@pytest.mark.parametrize("known", ["weight", "inputs", "inputs and outputs"])
def test_energy_is_that_of_the_weight_times_the_roots_of_its_metric(kind, layer, known):
    weight = layer.weight.detach().double().flatten(1)
    moment, outputs = (torch.cov(normal(n, 100, seed=n)) for n in (weight.shape[1], len(weight)))
    metric = None if known == "weight" else Metric(moment, outputs if "outputs" in known else None)
    floored = 0.95 * outputs / outputs.diagonal().mean() + 0.05 * torch.eye(len(weight), dtype=torch.float64)
    left = torch.linalg.cholesky(floored).T if "outputs" in known else torch.eye(len(weight), dtype=torch.float64)
    right = torch.linalg.cholesky(moment) if metric is not None else torch.eye(weight.shape[1], dtype=torch.float64)
    expected = float((left @ weight @ right).square().sum())
    assert table_of(layer, kinds=kind, metric=metric).energy == pytest.approx(expected, rel=1e-10)


def test_what_runs_multiplied_out_takes_the_macs_of_the_dense_layer_and_only_as_long_as_it_does():
    costs = np.array([[10.0, 20.0, 40.0, 1.0], [30.0, 50.0, 120.0, 2.0]])
    table = Candidates("layer", ("svd", "dense"), ((1,), ()), np.array([0.1, 0.0]), 1.0, costs)
    merged = replace(table, merged=np.array([True, False]))
    assert merged.costs_as_run(0).tolist() == [10.0, 50.0, 40.0, 1.0]
    assert replace(merged, merged=None).costs_as_run(0).tolist() == costs[0].tolist()

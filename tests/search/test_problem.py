"""What is chosen between, and budgets that no choice keeps."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import InfeasibleBudgetError
from lightning_compress.search.candidates import tabulate
from lightning_compress.search.problem import Problem
from tests.support.nets import SHAPE
from tests.support.searching import METHODS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resource", ["params", "macs", "bytes"])
def test_stated_smallest_budget_can_be_kept(net, unchanged, method, resource):
    before, settings = unchanged(net), {"example_input": SHAPE, "method": method, "objective": "weight"}
    with pytest.raises(InfeasibleBudgetError, match=f"no plan keeps {resource} <= 1 %: the smallest reachable is") as e:
        search_ranks(net, Budget(**{resource: 0.01}), **settings)
    before.check()
    stated = float(re.search(rf"reachable is {resource}=(\d\.\d+)\.", str(e.value)).group(1))
    plan = search_ranks(net, Budget(**{resource: stated}), **settings)
    assert stated - 1.01e-4 < plan.kept[resource] <= stated
    with pytest.raises(InfeasibleBudgetError, match=f"{resource}={stated:.4f}"):
        search_ranks(net, Budget(**{resource: stated - 1.1e-4}), **settings)


def test_infeasible_pair_states_both(net):
    with pytest.raises(
        InfeasibleBudgetError, match=r"params <= 1 %, macs <= 90 %.* params=0\.\d{4}, macs=0\.\d{4} \(each"
    ):
        search_ranks(net, Budget(params=0.01, macs=0.9), example_input=SHAPE)


def test_fixed_part_of_the_model_counts():
    net = nn.Sequential(nn.Bilinear(10, 10, 10, bias=False), nn.Linear(10, 10))
    with pytest.raises(InfeasibleBudgetError, match=r"params <= 50 %: the smallest reachable is params=0\.9271"):
        search_ranks(net, Budget(params=0.5))  # (1000 + 10 + 19) / 1110 of them remain at rank 1


def separable(terms):
    """A convolution of which CP and spatial_svd of that rank lose nothing."""
    conv, rng = nn.Conv2d(32, 32, 3, padding=1, bias=False), np.random.default_rng(terms)
    factors = [rng.standard_normal((terms, size)) for size in conv.weight.shape]
    conv.weight.data = torch.from_numpy(np.einsum("ro,ri,rh,rw->oihw", *factors)).float()
    return nn.Sequential(conv)


@pytest.mark.parametrize(("slow", "fast"), [("cp3", "spatial_svd"), ("spatial_svd", "cp3")])
def test_of_kinds_that_lose_the_same_the_one_that_takes_less_time_is_chosen(stand_in, slow, fast):
    net, kinds, stand_in.kinds = separable(4), ["cp3", "spatial_svd"], {slow: 10.0}
    plan = search_ranks(net, Budget(params=0.2), kinds=kinds, example_input=(1, 32, 8, 8), objective="weight")
    assert plan.layers[0].kind == fast
    assert plan.layers[0].ranks == (4,)  # more ranks are no better and take longer
    assert plan.signal_loss < 1e-6
    tight = search_ranks(net, Budget(params=0.04), kinds=kinds, example_input=(1, 32, 8, 8), objective="weight")
    assert tight.layers[0].kind == "cp3"


def test_restricted_problem_keeps_what_is_known_of_the_layers():
    entries = take_inventory(nn.Sequential(nn.Linear(9, 14), nn.Conv2d(8, 10, 3)))
    tables = tuple(tabulate(entry, compared=("params",)) for entry in entries)
    problem = Problem(tables, ("params",), np.array([500.0]), units=entries)
    rows = [np.array([1, 0]), np.array([2, len(tables[1]) - 1])]
    restricted = problem.restricted(rows)
    assert restricted.units is entries
    for small, table, kept in zip(restricted.layers, tables, rows, strict=True):
        assert (small.energy, small.name, small.costs.tolist(), small.errors.tolist()) == (
            table.energy,
            table.name,
            table.costs[kept].tolist(),
            table.errors[kept].tolist(),
        )

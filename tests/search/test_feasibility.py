"""What a budget that cannot be kept is told of: the layers that hold the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.core.errors import InfeasibleBudgetError
from lightning_compress.search.feasibility import MOST_HOLDERS


class Own(nn.Module):
    """A layer of the user's, which no kind factorises."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight.T + self.bias


def net():
    return nn.Sequential(nn.Linear(20, 50), Own(50, 100), nn.Linear(100, 10), nn.BatchNorm1d(10))


def infeasible(model, **settings):
    with pytest.raises(InfeasibleBudgetError) as error:
        search_ranks(model, Budget(**settings.pop("budget")), objective="weight", method="exact", **settings)
    return str(error.value)


@pytest.mark.parametrize("resource", ["params", "bytes"])
def test_layers_that_hold_most_of_the_rest_are_named_with_their_reasons(resource):
    said = infeasible(net(), budget={resource: 0.1}, exclude="2")
    total = 20 * 50 + 50 + 50 * 100 + 100 + 100 * 10 + 10 + 20
    held = [(50 * 100 + 100) / total, (100 * 10 + 10) / total, (20 + 50 - 1 + 50) / total]
    assert "Most of the rest is in '1' (Own, " in said
    places = [said.index(f"{100 * share:.1f} % of the parameters") for share in held]
    assert places == sorted(places)
    assert "no kind factorises Own" in said
    assert "matched by exclude" in said
    assert "that much is left of it at its smallest ranks" in said


def test_a_few_are_named():
    said = infeasible(nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))), budget={"params": 0.01})
    assert said.count("(Linear, ") == MOST_HOLDERS


def test_nothing_is_named_where_parameters_are_not_bounded():
    said = infeasible(net(), budget={"macs": 0.05}, example_input=(2, 20), target=None)
    assert "smallest reachable is macs=" in said
    assert "Most of the rest" not in said

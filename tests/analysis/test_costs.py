"""Parameters, MACs and bytes of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.core.costs import Costs


def test_costs_of_the_whole_model(net):
    params = 3 * 8 * 9 + 8 + 16 + 8 * 16 * 9 + 16 * 16 + 16 + 16 * 32 + 32 + 32 * 4 + 4
    costs = measure_costs(net, (1, 3, 8, 8))
    assert costs == Costs(params=params, macs=36992, bytes=4 * params + 4 * 16 + 8)  # running statistics, int64 counter
    assert measure_costs(net) == Costs(params, None, costs.bytes)
    assert measure_costs(net, macs=5).macs == 5
    assert measure_costs(net.double()).bytes == 8 * params + 8 * 16 + 8


def test_tied_parameters_count_once_and_unsaved_buffers_not_at_all():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    model["head"].register_buffer("cache", torch.zeros(100), persistent=False)
    model["head"].register_buffer("kept", torch.zeros(3, dtype=torch.int16))
    model["again"] = model["head"]
    assert measure_costs(model) == Costs(params=40, macs=None, bytes=4 * 40 + 2 * 3)


def test_kept_fractions():
    dense = Costs(100, 1000, 400)
    assert Costs(25, 100, 200).kept_of(dense) == {"params": 0.25, "macs": 0.1, "bytes": 0.5, "latency": None}
    assert Costs(25, None, 200).kept_of(dense)["macs"] is None
    assert Costs(25, 100, 200).kept_of(Costs(100, None, 400))["macs"] is None
    assert Costs(25, 100, 200, 0.3).kept_of(Costs(100, 1000, 400, 0.4))["latency"] == pytest.approx(0.75)
    assert Costs(25, 100, 200, 0.3).kept_of(dense)["latency"] is None


def test_latency_is_not_compared():
    assert Costs(25, 100, 200, 0.3) == Costs(25, 100, 200, 0.4) == Costs(25, 100, 200)

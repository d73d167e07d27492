"""Parameters, MACs, bytes and latency of a model."""

from __future__ import annotations

import torch
from torch import nn

from lightning_compress.analysis.costs import measure_costs, measure_latency
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
    assert Costs(25, 100, 200).kept_of(dense) == {"params": 0.25, "macs": 0.1, "bytes": 0.5}
    assert Costs(25, None, 200).kept_of(dense)["macs"] is None
    assert Costs(25, 100, 200).kept_of(Costs(100, None, 400))["macs"] is None


def test_latency_is_positive_for_each_model_and_changes_nothing(net, unchanged):
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    before = [unchanged(net), unchanged(small)]
    found = measure_latency([net, small], (1, 3, 8, 8), rounds=2, seconds=0.01)
    assert len(found) == 2
    assert all(isinstance(seconds, float) and 0 < seconds < 1 for seconds in found)
    for check in before:
        check.check()


def test_latency_shows_which_model_is_slower():
    small, large = nn.Linear(4, 4), nn.Sequential(*[nn.Linear(256, 256) for _ in range(20)], nn.Linear(256, 4))
    example = torch.zeros(1, 4)
    large = nn.Sequential(nn.Linear(4, 256), *large)
    quick, slow = measure_latency([small, large], example, rounds=3, seconds=0.01)
    assert slow > 3 * quick

"""Models against each other, by the clock."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.analysis.latency.bench import PRESERVED
from lightning_compress.analysis.latency.compare import measure_latency
from lightning_compress.layers.memory_format import CHANNELS_LAST


def test_latency_is_positive_for_each_model_and_changes_nothing(net, unchanged):
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    before = [unchanged(net), unchanged(small)]
    found = measure_latency([net, small], (1, 3, 8, 8), seconds=0.01)
    assert len(found) == 2
    assert all(isinstance(seconds, float) and 0 < seconds < 1 for seconds in found)
    for check in before:
        check.check()


def test_latency_shows_which_model_is_slower():
    small, large = nn.Linear(4, 4), nn.Sequential(*[nn.Linear(256, 256) for _ in range(20)], nn.Linear(256, 4))
    example = torch.zeros(1, 4)
    large = nn.Sequential(nn.Linear(4, 256), *large)
    quick, slow = measure_latency([small, large], example, seconds=0.01)
    assert slow > 3 * quick


@pytest.mark.parametrize("faster", [(), (0, 1)])
def test_each_model_has_one_time_in_however_many_formats_it_is_run(net, stand_in, faster):
    stand_in.formats = dict.fromkeys((PRESERVED, CHANNELS_LAST), 1.0)
    found = measure_latency([net, nn.Conv2d(3, 4, 3)], (1, 3, 8, 8), seconds=0.01, faster=faster)
    assert len(found) == 2
    assert found[0] > found[1] > 0

"""How many inputs are enough."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.analysis.enough import ROWS, enough_inputs
from lightning_compress.analysis.synthetic import LEAST_COUNT, LEAST_UNMATCHED, drawable, synthesise
from lightning_compress.analysis.trace import trace
from lightning_compress.layers.unfused import unfused


@pytest.mark.parametrize(
    ("model", "shape", "rows", "positions"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 5)), (1, 12), 12, 1),
        (lambda: nn.Sequential(nn.Linear(12, 5)), (1, 10, 12), 12, 10),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 5)), (1, 4, 14), 20, 10),
        (lambda: nn.Sequential(nn.Conv1d(8, 6, 300, padding=150)), (1, 8, 99), 8, 100),  # moments of channels
        (lambda: nn.Sequential(nn.GRU(6, 10, batch_first=True)), (1, 5, 6), 10, 5),
    ],
    ids=["linear", "sequence", "convolution", "long kernel", "recurrent"],
)
def test_each_row_of_a_moment_needs_so_many_positions(model, shape, rows, positions):
    net = model()
    calls = trace(net, shape).calls
    with unfused(net):
        assert enough_inputs(net, calls) == -(-ROWS * rows // positions)


def test_lookups_need_none():
    net = nn.Sequential(nn.Embedding(5, 4))
    calls = trace(net, torch.zeros(1, 3, dtype=torch.int64)).calls
    assert calls["0"][0].lookup
    assert enough_inputs(net, calls) == 1


def test_long_signals_are_drawn_less_often():
    made = synthesise(nn.Sequential(nn.Conv1d(2, 3, 5)), (1, 2, 4000))
    assert [len(args[0]) for args, _ in made.batches] == [LEAST_COUNT]


def test_as_many_are_drawn_as_are_affordable():
    assert drawable(10**6, 100, 6 * 10**7) == 10
    assert drawable(10**6, 100, 1) == LEAST_UNMATCHED
    assert drawable(1, 100, 10**9) == 100
    assert drawable(1, 3, 10**9) == LEAST_COUNT

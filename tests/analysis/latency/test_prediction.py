"""Times of all sizes from a few."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.latency.prediction import KindTimes, sizes_to_measure, stage_work
from lightning_compress.analysis.trace import trace
from lightning_compress.kinds.registry import DECOMPOSITIONS


def layer_of(module, example, kind):
    model = nn.Sequential(module)
    return take_inventory(model, kinds=kind, trace=trace(model, example))[0]


CASES = {
    "svd": (nn.Linear(96, 128), (1, 5, 96)),
    "tucker2": (nn.Conv2d(48, 64, 3, padding=1), (1, 48, 7, 7)),
    "cp3": (nn.Conv2d(40, 64, 3, stride=2), (1, 40, 9, 9)),
    "spatial_svd": (nn.Conv2d(24, 32, 3, groups=2), (1, 24, 8, 8)),
    "tt": (nn.ConvTranspose2d(32, 48, 3), (1, 32, 5, 5)),
}


def all_ranks(layer, kind):
    largest = DECOMPOSITIONS[kind].max_ranks(layer.operator.shape)
    return np.unique(np.ceil(np.linspace(0.02, 1, 60)[:, None] * np.array(largest)).astype(np.int64), axis=0)


@pytest.mark.parametrize("kind", list(CASES))
def test_work_of_the_stages_is_what_the_kind_says(kind):
    layer = layer_of(*CASES[kind], kind)
    ranks = all_ranks(layer, kind)
    work = stage_work(layer, kind, ranks)
    shape, groups, (call,) = layer.operator.shape, layer.operator.groups, layer.calls
    assert work[:, :, 1].sum(axis=0).tolist() == (groups * DECOMPOSITIONS[kind].macs(shape, ranks, call)).tolist()
    written = groups * DECOMPOSITIONS[kind].activations(shape, ranks, call)
    assert work[:, :, 2].sum(axis=0).tolist() == written.tolist()


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("kind", list(CASES))
def test_device_that_works_on_blocks_of_channels_is_predicted_between_its_measurements(kind, parts):
    """A call costs 10 µs, a MAC 1 ns, and what is left of a block of 16 outputs a whole block per power of two."""
    layer = layer_of(*CASES[kind], kind)
    prices = np.array([1e-5, 0.0, 2e-9, 1e-9, 1e-9])

    def seconds(ranks):
        stages = (stage_work(layer, kind, ranks) @ prices).T  # (n, stages)
        return np.column_stack([stages, np.full(len(ranks), 1e-6)]) if parts else stages.sum(axis=1, keepdims=True)

    measured = sizes_to_measure(layer, kind, 8)
    times = KindTimes(layer, kind, measured, seconds(measured))
    assert times.at(measured) == pytest.approx(seconds(measured).sum(axis=1), rel=1e-6)
    others = all_ranks(layer, kind)
    error = np.abs(times.at(others) / seconds(others).sum(axis=1) - 1)
    assert np.median(error) < 0.05
    assert error.max() < 0.2


@pytest.mark.parametrize("kind", list(CASES))
def test_sizes_reach_from_small_to_nearly_dense_and_every_other_one_has_whole_blocks(kind):
    layer = layer_of(*CASES[kind], kind)
    ranks = sizes_to_measure(layer, kind, 8)
    share = DECOMPOSITIONS[kind].parameters(layer.operator.shape, ranks) / np.prod(layer.operator.shape)
    assert 5 <= len(ranks) <= 8
    assert (np.diff(share) > 0).all()
    assert share[0] < 0.1
    assert 0.4 < share[-1] <= 0.9
    assert sum(((row % 16 == 0) | (row & (row - 1) == 0)).all() for row in ranks) >= 3

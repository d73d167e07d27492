"""Factors descend the distance of the outputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.distance import output_distance
from lightning_compress.layers.unfused import unfused
from lightning_compress.layers.unfused.recurrent import UnfusedRecurrent
from lightning_compress.surgery.distillation import EVERY, LEARNING_RATE, SLOWER, _shuffled, descend, distil
from lightning_compress.surgery.state import BestState
from tests.support.healing import image_case


def test_distillation_descends_the_distance_of_the_outputs():
    case = image_case(0.4)
    before = case.distance(case.fitting)
    looks = list(distil(case.dense, case.model, case.replacements, case.fitting, 50, 0, LEARNING_RATE))
    assert looks == [20, 40, 50]
    assert case.distance(case.fitting) < before


@pytest.mark.parametrize(("distances", "expected"), [([0.9], 1), ([1.5, 0.9], 2), ([math.inf, math.nan, 0.9], 3)])
def test_distillation_starts_anew_at_a_smaller_rate_where_the_first_look_proves_it_too_high(distances, expected):
    model, rates, looks = nn.Linear(2, 2), [], iter(distances)
    states, start = BestState(model, lambda: 1.0), model.weight.detach().clone()

    def attempt(rate):
        assert torch.equal(model.weight, start)  # what the attempt before did is undone
        rates.append(rate)
        with torch.no_grad():
            model.weight.add_(1)
        yield EVERY

    descend(attempt, states, lambda _: next(looks))
    assert rates == [LEARNING_RATE / SLOWER**i for i in range(expected)]


@pytest.mark.slow
def test_distillation_takes_all_its_steps_though_it_does_not_help_at_first(monkeypatch):
    case, looks = image_case(0.4), []
    distances = iter([1.0, 0.95, 0.9, 0.9, *[1.05] * 7, 0.5])
    monkeypatch.setattr("lightning_compress.surgery.repair.output_distance", lambda *_: next(distances))
    healing = case.heal(steps=160, progress=lambda what, done: looks.append(done) if "distil" in what else None)
    assert looks[-1] == 1
    assert healing.after == 0.5


def test_batches_are_mixed_without_repeating_a_sample():
    batches = [((torch.arange(8.0)[:, None] + 100 * i, {"n": 3}), {}) for i in range(3)]
    (values, other), kwargs = _shuffled(batches, torch.Generator().manual_seed(0))
    assert (other, kwargs) == ({"n": 3}, {})
    assert sorted((values.flatten() % 100).tolist()) == list(range(8))
    assert len(set((values.flatten() // 100).tolist())) > 1


def test_batches_of_different_sizes_are_mixed_up_to_the_smallest():
    batches = [((torch.zeros(n, 2),), {}) for n in (5, 3)]
    (values,), _ = _shuffled(batches, torch.Generator().manual_seed(0))
    assert values.shape == (3, 2)


def test_recurrent_layers_run_on_their_kernels_while_they_are_distilled(monkeypatch):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.LSTM(6, 12, 2, batch_first=True))
    model = copy.deepcopy(dense)
    replacements = apply_plan_(model, search_ranks(model, Budget(params=0.5)))
    assert {r.aliases[0].split("_")[0] for r in replacements} == {"0.ih", "0.hh"}
    batches = [((torch.randn(4, 7, 6),), {})]
    loops = []
    looped = UnfusedRecurrent._looped
    monkeypatch.setattr(UnfusedRecurrent, "_looped", lambda self, *args: loops.append(args) or looped(self, *args))
    with unfused(dense):
        before = output_distance(dense, model, batches)
        list(distil(dense, model, replacements, batches, 20, 0, LEARNING_RATE))
        assert output_distance(dense, model, batches) < before
    assert not loops

"""Time as a cost of the search, on a device with known times."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from lightning_compress import Budget, Compress, Plan, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.latency.bench import PRESERVED
from lightning_compress.core.errors import (
    BudgetError,
    CompressionWarning,
    ConfigurationError,
    ExampleInputError,
    InfeasibleBudgetError,
    TargetError,
)
from lightning_compress.core.target import Target
from lightning_compress.layers.memory_format import CHANNELS_LAST, is_channels_last
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.nets import TinyNet
from tests.support.unchanged import Unchanged

EXAMPLE = (1, 3, 8, 8)
SETTINGS = {"example_input": EXAMPLE, "objective": "weight"}


@pytest.mark.parametrize("method", ["continuous", "exact", "uniform"])
@pytest.mark.parametrize("bound", [0.7, 0.4])
def test_time_of_the_whole_model_is_bounded_as_a_fraction_of_dense(net, stand_in, bound, method):
    plan = search_ranks(net, Budget(latency=bound), method=method, **SETTINGS)
    assert plan.compressed.latency <= 1.03 * bound * plan.dense.latency
    assert plan.kept["latency"] > bound / 2
    assert plan.predicted_latency == pytest.approx(plan.compressed.latency, rel=0.05)


@pytest.mark.slow
def test_milliseconds_are_an_absolute_bound_and_hold_with_others(net, stand_in):
    dense = search_ranks(net, Budget(params=0.9), **SETTINGS).dense.latency
    same = search_ranks(net, Budget(latency_ms=0.5e3 * dense), **SETTINGS)
    assert ranks_of(same) == ranks_of(search_ranks(net, Budget(latency=0.5), **SETTINGS))
    both = search_ranks(net, Budget(latency_ms=0.5e3 * dense, params=0.3), **SETTINGS)
    assert both.compressed.latency <= 1.03 * 0.5 * dense
    assert both.kept["params"] <= 0.3
    assert str(both.budget) == f"params <= 30 %, latency <= {0.5e3 * dense:g} ms"


def test_kind_that_is_slower_on_the_target_is_not_taken_where_another_loses_little_more(net, stand_in):
    kinds = ["tucker2", "spatial_svd", "svd"]
    free = search_ranks(net, Budget(params=0.5), kinds=kinds, **SETTINGS)
    used = max({layer.kind for layer in free.factorised if layer.kind != "svd"})
    stand_in.kinds = {used: 20.0}
    plan = search_ranks(net, Budget(params=0.5), kinds=kinds, target=Target(merge=False), **SETTINGS)  # another table
    assert used not in {layer.kind for layer in plan.factorised}
    assert plan.kept["latency"] <= 1.03
    assert plan.kept["params"] <= 0.5


def test_budget_that_cannot_be_kept_without_a_slower_network_holds_and_the_plan_says_how_much_slower(net, stand_in):
    stand_in.kinds = dict.fromkeys(("svd", "channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "interpolative"), 50.0)
    plan = search_ranks(net, Budget(params=0.3), target=Target(merge=False), **SETTINGS)
    assert plan.kept["params"] <= 0.3
    assert plan.kept["latency"] > 1.5
    assert plan.slower
    assert all(layer.latency_after > layer.latency_before for layer in plan.slower)
    text = str(plan)
    assert f"({1 / plan.kept['latency']:.2f}x; torch, batch 1" in text
    assert f"slower than dense: {plan.slower[0].name} " in text


def test_prediction_that_the_whole_model_belies_is_corrected_until_the_bound_holds(net, stand_in):
    stand_in.whole_factor = 1.5
    plan = search_ranks(net, Budget(latency=0.6), **SETTINGS)
    assert plan.compressed.latency <= 1.03 * 0.6 * plan.dense.latency
    assert plan.predicted_latency == pytest.approx(plan.compressed.latency, rel=0.05)


def test_bound_out_of_reach_is_an_error_with_the_fastest_that_is_not(net, stand_in):
    before = Unchanged(net)
    message = failure(net, Budget(latency=0.001))
    before.check()
    assert "latency <= 0.1 %: the smallest reachable is latency=" in message
    floor = float(re.search(r"latency=([\d.]+)", message)[1])
    assert search_ranks(net, Budget(latency=min(1.0, 1.1 * floor)), **SETTINGS).kept["latency"] <= 1.03 * 1.1 * floor
    stand_in.whole_factor = 3.0  # far more than layers promise: corrections end
    with pytest.raises(
        InfeasibleBudgetError, match=r"the fastest that was measured takes [\d.]+ ms, latency=|smallest"
    ):
        search_ranks(net, Budget(latency=1.2 * floor), target=Target(threads=2), **SETTINGS)


def failure(net, budget):
    with pytest.raises(InfeasibleBudgetError) as error:
        search_ranks(net, budget, **SETTINGS)
    return str(error.value)


def test_time_needs_an_example_input_and_a_target_and_a_steady_machine(net, stand_in):
    with pytest.raises(ExampleInputError, match=r"a budget in latency \(latency <= 50 %\) needs example_input"):
        search_ranks(net, Budget(latency=0.5))
    with pytest.raises(ConfigurationError, match="target=None leaves time out: pass target='torch'"):
        search_ranks(net, Budget(latency=0.5), target=None, **SETTINGS)
    stand_in.spread, before = 0.4, Unchanged(net)
    with pytest.raises(TargetError, match=r"too noisy to judge, .* spreads by ± 40 %"):
        search_ranks(net, Budget(latency=0.5), **SETTINGS)
    before.check()


def test_without_a_target_or_an_example_time_is_left_out(net, stand_in):
    for settings in ({**SETTINGS, "target": None}, {"objective": "weight"}):
        plan = search_ranks(net, Budget(params=0.5), **settings)
        assert (plan.target, plan.compressed.latency, plan.memory_format) == (None, None, None)
        assert plan.kept["latency"] is None
        assert "latency" not in plan.summary()
    assert stand_in.asked == []


def test_device_without_room_for_copies_leaves_time_out(net, stand_in, monkeypatch):
    def full(*_):
        msg = "CUDA out of memory"
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr("lightning_compress.search.latency.time_model", full)
    with pytest.warns(CompressionWarning, match=r"no room for copies of the model to be timed \(CUDA out of memory\)"):
        assert search_ranks(net, Budget(params=0.5), **SETTINGS).target is None
    with pytest.warns(CompressionWarning), pytest.raises(TargetError, match="the latency could not be measured"):
        search_ranks(net, Budget(latency=0.5), **SETTINGS)


class Board:
    """Layers cost 10 µs and 0.1 µs per parameter."""

    def __init__(self, answer=None):
        self.answer = answer
        self.asked = 0

    def seconds(self, module, example):
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer
        assert not module.training
        module(*example)
        layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return sum(1e-5 + 1e-7 * layer.weight.numel() for layer in layers)


def test_device_of_ones_own_is_asked_for_layers_and_models(net, stand_in):
    board = Board()
    plan = search_ranks(net, Budget(latency=0.5), target=board, **SETTINGS)
    compressed = copy.deepcopy(net)
    compress_(compressed, Budget(latency=0.5), target=Board(), heal=False, **SETTINGS)
    measured = Board().seconds(compressed.eval(), (torch.zeros(EXAMPLE),))
    assert measured == pytest.approx(plan.compressed.latency, rel=0.03)
    assert measured <= 1.03 * 0.5 * plan.dense.latency
    assert plan.target["backend"] == "Board"
    assert board.asked > 20
    assert "parts" not in stand_in.asked


@pytest.mark.parametrize("answer", [RuntimeError("adb: no devices"), 0.0, float("nan"), "fast", True])
def test_device_that_fails_or_returns_nonsense_is_named_and_the_model_untouched(net, answer):
    said = "fails on the dense model: RuntimeError: adb" if isinstance(answer, Exception) else "expected the seconds of"
    before = Unchanged(net)
    with pytest.raises(TargetError, match=said):
        search_ranks(net, Budget(params=0.5), target=Board(answer), **SETTINGS)
    before.check()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("tourch", "target='tourch' is unknown. Did you mean 'torch'?"),
        (7, "target=7: expected 'torch', 'onnxruntime' or a Target"),
        (Board, "expected 'torch', 'onnxruntime' or a Target"),
        ({"treads": 1}, "target: unknown key 'treads'. Did you mean 'threads'?"),
        ({"batch": 0}, r"Target(batch=0): expected a whole number of at least 1"),
        ({"dtype": "float8"}, "Target(dtype='float8') is unknown"),
        ({"backend": "onnxruntime", "compiled": True}, "that is a setting of backend='torch'"),
    ],
)
def test_unknown_target_is_an_error_at_every_entrance(net, target, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        search_ranks(net, Budget(params=0.5), target=target)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        Compress(Budget(params=0.5), target=target)


@pytest.mark.parametrize("value", [0, -1.0, "fast", float("inf"), True])
def test_milliseconds_are_above_zero(value):
    with pytest.raises(BudgetError, match=r"latency_ms=.* expected the most milliseconds of a forward pass, above 0"):
        Budget(latency_ms=value)


@pytest.mark.parametrize("faster", [PRESERVED, CHANNELS_LAST])
def test_faster_memory_format_is_chosen_and_the_model_put_in_it(stand_in, faster):
    net = TinyNet()
    stand_in.formats = {name: 1.0 if name == faster else 1.6 for name in (PRESERVED, CHANNELS_LAST)}
    plan = compress_(net, Budget(params=0.5), heal=False, **SETTINGS)
    assert plan.memory_format == (CHANNELS_LAST if faster == CHANNELS_LAST else None)
    assert is_channels_last(net) == (faster == CHANNELS_LAST)
    assert plan.dense.latency < plan.compressed.latency * 3
    assert ("channels_last" in plan.summary()) == (faster == CHANNELS_LAST)


def ranks_of(plan):
    return [(layer.name, layer.kind, layer.ranks) for layer in plan.layers]


MERGEABLE = ("svd", "channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "interpolative")


def test_layers_whose_factors_would_take_longer_run_merged(net, stand_in):
    stand_in.kinds = dict.fromkeys(MERGEABLE, 50.0)
    plan = search_ranks(net, Budget(params=0.3), **SETTINGS)
    assert plan.kept["params"] <= 0.3
    assert plan.kept["latency"] <= 1.03
    assert not plan.slower
    merged = [layer for layer in plan.layers if layer.merged]
    assert merged == list(plan.factorised)
    assert all(
        layer.latency_after == layer.latency_before and layer.macs_after == layer.macs_before for layer in merged
    )
    assert plan.kept["macs"] == 1
    assert f"merged: {len(merged)} layers run as dense ones in eval" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    apply_plan_(net, plan)
    assert [layer.merged for layer in embodied_plan(net, EXAMPLE).factorised] == [True] * len(merged)
    assert embodied_plan(net, EXAMPLE).compressed.macs == plan.compressed.macs


@pytest.mark.parametrize("how", [{"budget": Budget(params=0.3, macs=0.9)}, {"target": Target(merge=False)}])
def test_nothing_is_merged_where_macs_are_bounded_or_the_target_forbids_it(net, stand_in, how):
    stand_in.kinds = dict.fromkeys(MERGEABLE, 50.0)
    plan = search_ranks(net, **{"budget": Budget(params=0.3), **SETTINGS, **how})
    assert not any(layer.merged for layer in plan.layers)
    assert plan.slower


def test_embeddings_and_projections_of_attention_are_not_merged(stand_in):
    model = nn.Sequential(nn.Embedding(64, 32), nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    stand_in.kinds = dict.fromkeys((*MERGEABLE, "tt_embedding"), 50.0)
    plan = search_ranks(
        model, Budget(params=0.3), example_input=torch.zeros(1, 6, dtype=torch.int64), objective="weight"
    )
    assert {layer.name for layer in plan.layers if layer.merged} == {"1.linear1", "1.linear2"}


def test_merged_layers_that_take_longer_than_dense_ones_are_corrected(net, stand_in):
    stand_in.kinds, stand_in.merged_factor = dict.fromkeys(MERGEABLE, 50.0), 1.4
    plan = search_ranks(net, Budget(params=0.3), **SETTINGS)
    assert plan.predicted_latency == pytest.approx(plan.compressed.latency, rel=0.05)

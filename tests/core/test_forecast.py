"""How long a compression will take, and what a limit does to it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_compress import Budget, Plan, compress_, search_ranks
from lightning_compress.analysis import forecast as of_models
from lightning_compress.core import forecast as forecasts
from lightning_compress.core.effort import EFFORTS, current_effort
from lightning_compress.core.errors import CompressionWarning, ConfigurationError, InfeasibleBudgetError
from lightning_compress.core.forecast import (
    DECOMPOSING,
    FITTING,
    HEALING,
    INPUTS,
    MEASURING,
    MOMENTS,
    PARTS,
    Forecast,
    current_forecast,
    forecasting,
    watched,
)
from lightning_compress.core.parallel import Processes, sharing_work
from tests.support.compressing import entrances
from tests.support.nets import SHAPE, pooled, trained_like

SLOW = 10**5
"""MACs per second of a machine on which nothing fits into any limit."""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as a test says."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(forecasts.time, "perf_counter", lambda: now.seconds)
    return now


@pytest.fixture
def slow_machine(monkeypatch):
    monkeypatch.setattr(of_models, "_speed", lambda *_: SLOW)
    monkeypatch.setattr(of_models, "_operations_per_second", lambda: SLOW)


def limited(limit, seconds, speed=100.0) -> Forecast:
    forecast = Forecast(limit)
    forecast.expect(seconds, speed)
    return forecast


def test_each_part_gets_its_share_of_what_is_left(clock):
    forecast = limited(100.0, {INPUTS: 20.0, MOMENTS: 20.0, HEALING: 60.0})
    whole = 95.0  # less the reserve
    assert forecast.grant(INPUTS) == pytest.approx(0.2 * whole)
    clock.seconds = 35.0  # the inputs took longer: later parts have less
    assert forecast.grant(MOMENTS) == pytest.approx((whole - 35) * 20 / 80)
    assert forecast.grant(HEALING) == pytest.approx(whole - 35)
    clock.seconds = 200.0
    assert forecast.grant(HEALING) == 0


def test_without_a_limit_nothing_depends_on_the_clock(clock):
    forecast = limited(None, {INPUTS: 20.0})
    clock.seconds = 1e9
    assert math.isinf(forecast.grant(HEALING))
    assert forecast.work(INPUTS) == current_effort().work
    assert forecast.effort() == EFFORTS["balanced"]
    forecast.note(INPUTS, "fewer")
    assert forecast.cut == {}


def test_work_is_what_the_seconds_are_good_for_and_never_more_than_the_effort_grants(clock):
    forecast = limited(100.0, {INPUTS: 50.0, HEALING: 50.0}, speed=1000.0)
    assert forecast.work(INPUTS) == pytest.approx(0.5 * 95.0 * 1000, abs=1)
    fast = limited(100.0, {INPUTS: 50.0, HEALING: 50.0}, speed=1e15)
    assert fast.work(INPUTS) == EFFORTS["balanced"].work


def test_fits_have_fewer_sweeps_and_the_solver_less_patience(clock):
    forecast = limited(10.0, {DECOMPOSING: 25.0, FITTING: 13.0})
    assert forecast.effort().fits == pytest.approx(9.5 / 38)
    assert forecast.tried == forecast.effort()
    assert forecast.tried.solver_seconds == pytest.approx(20 * 9.5 / 38)
    assert forecast.cut == {DECOMPOSING: "25% of the sweeps"}


def test_all_processes_get_the_first_ones_answer():
    class Others(Processes):
        rank, size = 1, 2

        def exchange(self, what, own):
            return [3.0, own]

    forecast = limited(100.0, {INPUTS: 20.0, HEALING: 60.0})
    with sharing_work(Others()):
        assert forecast.grant(INPUTS, everywhere=True) == 3.0
        assert forecast.grant(INPUTS) > 3.0


def test_fractions_of_the_whole_rise_to_one():
    forecast = limited(None, dict.fromkeys(PARTS, 1.0))
    started = ("synthetic inputs", "moments", "decomposing layers", "timing the dense model", "fitting layers")
    ended = ("measuring layers", "fitting layers", "end-to-end search", "factorising layers", "healing")
    seen = [*(forecast.fraction(what, 0.0) for what in started), *(forecast.fraction(what, 1.0) for what in ended)]
    assert seen == pytest.approx([0, 1 / 9, 2 / 9, 3 / 9, 4 / 9, 6 / 9, 6 / 9, 7 / 9, 8 / 9, 1])
    assert Forecast().fraction("moments", 0.3) == 0.3  # of the part, where nothing is forecast


def test_nothing_is_forecast_where_nobody_looks(less_work):
    net, calls = trained_like(), []
    next(net.children()).register_forward_hook(lambda *_: calls.append(current_forecast().expected))
    search_ranks(net, Budget(params=0.5), example_input=SHAPE, target=None, objective="weight")
    assert calls == [{}]  # the trace
    with watched():
        search_ranks(net, Budget(params=0.5), example_input=SHAPE, target=None, objective="weight")
    assert len(calls) == 4  # and two runs that say how fast the model is


def test_the_outer_limit_holds():
    with forecasting(5.0) as outer, forecasting(1.0) as inner:
        assert inner is outer
        assert inner.limit == 5.0
    assert current_forecast().limit is None


def test_expected_seconds_are_those_of_the_parts_that_are_done(slow_machine):
    seen = []

    def look(*_):
        seen.append(dict(current_forecast().expected))

    net = trained_like()
    settings = {"example_input": SHAPE, "progress": look, "effort": "fast"}
    with watched():
        search_ranks(net, Budget(params=0.5), target=None, **settings)
        search_ranks(net, Budget(params=0.5), target=None, objective="weight", **settings)
    on_outputs, on_weights = seen[0], seen[-1]
    assert list(on_outputs) == list(PARTS)
    assert on_outputs[INPUTS] > 0
    assert on_outputs[MOMENTS] > 0
    assert on_weights[INPUTS] == on_weights[MOMENTS] == on_weights[HEALING] == on_outputs[HEALING] == 0
    assert on_weights[DECOMPOSING] > 0


@pytest.mark.usefixtures("slow_machine")
def test_what_takes_too_long_is_cut_and_said_and_the_budget_holds(less_work):
    net = trained_like()
    with pytest.warns(CompressionWarning, match=r"the compression took .* s, time_limit=0\.01: what cannot be cut"):
        plan = compress_(
            net, Budget(params=0.5), example_input=SHAPE, kinds=["cp3", "svd"], target=None, time_limit=0.01
        )
    assert plan.kept["params"] <= 0.5
    assert plan.cut[INPUTS] == "16 inputs in 10 steps"
    assert plan.cut[DECOMPOSING] == "10% of the sweeps"
    assert plan.cut[MEASURING] == "left out"
    assert "cut short to keep the time limit: synthetic inputs (16 inputs in 10 steps), decomp" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.usefixtures("slow_machine", "less_work")
@pytest.mark.filterwarnings("ignore:.*the compression took.*")
def test_kinds_that_are_fitted_in_sweeps_are_left_out_where_there_is_no_time_for_them():
    kinds = ["cp3", "cp", "channel_svd", "svd"]
    net, budget = trained_like(), Budget(params=0.5)
    plan = search_ranks(net, budget, example_input=SHAPE, kinds=kinds, target=None, time_limit=0.01)
    assert {layer.kind for layer in plan.factorised} <= {"channel_svd", "svd"}
    assert plan.cut[DECOMPOSING] == "without cp, cp3"
    assert plan.kept["params"] <= 0.5


@pytest.mark.usefixtures("slow_machine", "less_work")
@pytest.mark.filterwarnings("ignore:.*the compression took.*")
def test_a_budget_that_cannot_be_kept_without_the_kinds_left_out_names_them():
    settings = {"example_input": SHAPE, "kinds": ["cp3", "channel_svd", "svd"], "target": None, "time_limit": 0.01}
    with pytest.raises(
        InfeasibleBudgetError, match=r"smallest reachable.*time_limit=0\.01 \(without cp3\): allow more"
    ):
        search_ranks(trained_like(), Budget(params=1e-3), **settings)


def test_time_that_fits_would_have_taken_is_the_other_parts(clock):
    forecast = limited(100.0, {DECOMPOSING: 1000.0, FITTING: 800.0, HEALING: 200.0})
    assert forecast.leaves_out_fits()
    assert forecast.grant(HEALING) == pytest.approx(95.0)
    assert forecast.grant(DECOMPOSING) == pytest.approx(95.0 * 200 / 400)
    assert not limited(1000.0, {DECOMPOSING: 1000.0, FITTING: 800.0, HEALING: 200.0}).leaves_out_fits()
    assert not limited(None, {DECOMPOSING: 1000.0}).leaves_out_fits()


@pytest.mark.usefixtures("less_work")
def test_a_search_alone_warns_of_a_limit_that_it_missed():
    with pytest.warns(CompressionWarning, match=r"the compression took .* s, time_limit=1e-06"):
        search_ranks(trained_like(), Budget(params=0.5), objective="weight", time_limit=1e-6)


def test_a_limit_that_is_long_enough_changes_nothing(less_work):
    plans = [
        search_ranks(pooled(), Budget(params=0.5), example_input=(1, 3, 16, 16), target=None, time_limit=limit)
        for limit in (None, 10**6)
    ]
    torch.testing.assert_close(*([layer.error for layer in plan.layers] for plan in plans))
    assert plans[0].layers == plans[1].layers
    assert plans[1].cut == {}


@pytest.mark.parametrize("value", [0, -1.0, "60", True, math.nan, [5]])
def test_wrong_limits_are_errors_whatever_the_entrance(net, value):
    for call in entrances(net, time_limit=value):
        with pytest.raises(ConfigurationError, match=r"time_limit=.*: expected seconds, a number above 0, or None"):
            call()

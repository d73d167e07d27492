"""How many turns are taken."""

from __future__ import annotations

import itertools

import pytest

from lightning_compress.analysis.latency import turns
from lightning_compress.analysis.latency.turns import MOST_RUNS, TURNS, in_turns


class Clocked:
    """Something that takes times of the test's own, and moves its clock on by them."""

    def __init__(self, clock, times) -> None:
        self.clock, self.times, self.runs = clock, itertools.cycle(times), 0

    def __call__(self) -> float:
        self.runs += 1
        seconds = next(self.times)
        self.clock[0] += seconds
        return seconds


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    return now


def test_turns_end_where_the_ratio_is_certain(clock):
    found = in_turns([Clocked(clock, [1e-3]), Clocked(clock, [2e-3])], 1.0, certain=0.005)
    assert [len(own) for own in found] == [TURNS, TURNS]
    assert found[1] == pytest.approx([2e-3] * TURNS)


def test_all_turns_are_taken_where_certainty_does_not_matter(clock):
    found = in_turns([Clocked(clock, [1e-3]), Clocked(clock, [2e-3])], 1.0)
    assert len(found[0]) > 2 * TURNS


def test_all_turns_are_taken_while_the_ratio_is_uncertain(clock):
    noisy = [value for factor in (1.0, 1.6, 0.7, 1.3) for value in [factor * 2e-3] * 10]
    runs = [Clocked(clock, [1e-3]), Clocked(clock, noisy)]
    assert len(in_turns(runs, 0.4, certain=0.005)[0]) == len(in_turns(runs, 0.4)[0]) > 2 * TURNS


def test_drift_of_the_machine_leaves_ratios_certain(clock):
    steps = [1e-3 * (1 + 0.05 * step) for step in range(200)]

    class Drifting(Clocked):
        def __call__(self) -> float:
            self.times = itertools.repeat(1e-3 * self.scale * (1 + 0.2 * self.clock[0]))
            return super().__call__()

    one, other = Drifting(clock, steps), Drifting(clock, steps)
    one.scale, other.scale = 1.0, 2.0
    assert len(in_turns([one, other], 1.0, certain=0.01)[0]) < len(in_turns([one, other], 1.0)[0])


def test_what_shows_the_drift_runs_less_often(clock):
    dense, timed = Clocked(clock, [1e-4]), Clocked(clock, [1e-4])
    found = in_turns([dense, timed], 0.03, 3, rarer=4)
    assert len(found[0]) == len(found[1])
    assert (timed.runs - 2) == 4 * (dense.runs - 2) == MOST_RUNS * len(found[1])


def test_what_shows_the_drift_runs_once_a_turn_at_least(clock):
    dense, timed = Clocked(clock, [1.0]), Clocked(clock, [1.0])
    found = in_turns([dense, timed], 0.03, 3, rarer=4)
    assert len(found[0]) == len(found[1]) == 2
    assert dense.runs == timed.runs == 3

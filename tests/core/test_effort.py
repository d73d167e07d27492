from __future__ import annotations

import threading

import pytest
import torch

from lightning_compress import Budget, Compress, search_ranks
from lightning_compress.core.effort import EFFORTS, Effort, current_effort, effort_of, trying
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.parallel import in_threads
from tests.support.nets import SHAPE


def test_presets_try_ever_harder():
    fast, balanced, thorough = (vars(EFFORTS[name]) for name in ("fast", "balanced", "thorough"))
    for name in fast:
        assert fast[name] <= balanced[name] <= thorough[name], name


def test_effort_is_that_of_the_innermost_block_in_threads_too():
    own = Effort(inputs=7)
    torch.set_num_threads(2)  # with one there are no threads
    with trying("fast"), trying(own):
        assert current_effort() is own
        found = in_threads(lambda _: (current_effort().inputs, threading.current_thread()), range(3))
        assert [inputs for inputs, _ in found] == [7, 7, 7]
        assert threading.main_thread() not in [thread for _, thread in found]
        with trying(None) as same:
            assert same is own
    assert current_effort() == EFFORTS["balanced"]


@pytest.mark.parametrize("value", ["fastest", 3, ["fast"]])
def test_unknown_effort_is_an_error_whatever_the_entrance(net, value):
    for call in (lambda: effort_of(value), lambda: Compress(Budget(params=0.5), effort=value)):
        with pytest.raises(ConfigurationError, match=r"effort=.* is unknown: expected an Effort or a preset"):
            call()
    with pytest.raises(ConfigurationError, match="effort="):
        search_ranks(net, Budget(params=0.5), effort=value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"inputs": 0}, r"Effort\(inputs=0\): expected a whole number of at least 1"),
        ({"descent_steps": 2.5}, r"Effort\(descent_steps=2\.5\): expected a whole number of at least 1"),
        ({"corrections": -1}, r"Effort\(corrections=-1\): expected a whole number of at least 0"),
        ({"fits": 0.0}, r"Effort\(fits=0\.0\): expected a number above 0"),
        ({"solver_seconds": "5"}, r"Effort\(solver_seconds='5'\): expected a number above 0"),
    ],
)
def test_effort_checks_itself(fields, said):
    with pytest.raises(ConfigurationError, match=said):
        Effort(**fields)


def test_a_search_that_tries_less_makes_fewer_inputs_and_keeps_the_budget(net):
    reports = []
    for effort in ("fast", Effort(inputs=16, input_steps=1, descent_steps=1)):
        reports.append([])
        report = lambda what, _, to=reports[-1]: to.append(what)  # noqa: E731
        plan = search_ranks(net, Budget(params=0.6), example_input=SHAPE, effort=effort, progress=report)
        assert plan.kept["params"] <= 0.6
    fast, least = (report.count("synthetic inputs") for report in reports)
    assert least < fast

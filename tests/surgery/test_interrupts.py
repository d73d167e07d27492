"""Ctrl-C in the middle of a swap: the model is dense or factorised, never both."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from torch import nn

from lightning_compress import Budget, FactorisedLayer, apply_plan_, compress_, merge_, search_ranks
from lightning_compress.core.interrupts import uninterrupted
from lightning_compress.surgery import swap

SETTINGS = {"target": None, "objective": "weight"}


@pytest.fixture(autouse=True)
def _default_handler():
    """A process that runs in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


@pytest.fixture
def interrupting(monkeypatch):
    """Presses Ctrl-C when so many layers have been put in."""

    def after(count: int) -> None:
        put, calls = swap.put_, []

        def interrupted(*arguments) -> None:
            put(*arguments)
            calls.append(arguments)
            if len(calls) == count:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(swap, "put_", interrupted)

    return after


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_interrupted_swap_leaves_the_model_dense(interrupting, count):
    model = network()
    before = [*model.children()]
    plan = search_ranks(model, Budget(params=0.6), **SETTINGS)
    interrupting(count)
    with pytest.raises(KeyboardInterrupt):
        apply_plan_(model, plan)
    assert all(a is b for a, b in zip(model.children(), before, strict=True))
    interrupting(count)
    with pytest.raises(KeyboardInterrupt):
        compress_(model, Budget(params=0.6), heal=False, **SETTINGS)
    assert all(a is b for a, b in zip(model.children(), before, strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_merge_is_whole(interrupting, count):
    model = network()
    compress_(model, Budget(params=0.6), heal=False, **SETTINGS)
    interrupting(count)
    with pytest.raises(KeyboardInterrupt):
        merge_(model)
    assert not any(isinstance(module, FactorisedLayer) for module in model.modules())


def test_a_failing_swap_is_undone(monkeypatch):
    model = network()
    before = [*model.children()]
    monkeypatch.setattr(swap, "follow_structure", lambda _, calls=[]: calls.append(1) or 1 // (len(calls) - 1))
    with pytest.raises(ZeroDivisionError):
        apply_plan_(model, search_ranks(model, Budget(params=0.6), **SETTINGS))
    assert all(a is b for a, b in zip(model.children(), before, strict=True))


def test_other_threads_and_other_handlers_are_left_alone():
    found = []

    def work() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
    calls = []
    signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not calls
        assert calls == [1]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""Threads: one for small linear algebra, whoever else asks for it, and as many for steps as are faster."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from lightning_compress.core import parallel
from lightning_compress.core.parallel import Pace, in_threads, one_thread


@pytest.fixture(autouse=True)
def _four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def limits() -> set[int]:
    return {library["num_threads"] for library in parallel._libraries().info()}


def test_threads_of_two_users_at_once_are_put_back_by_the_last():
    before = torch.get_num_threads(), limits()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with one_thread():
        thread.start()
        entered.wait(10)
        assert torch.get_num_threads() == 1
        assert limits() == {1}
    assert torch.get_num_threads() == 4
    leave.set()
    thread.join()
    assert (torch.get_num_threads(), limits()) == before
    with one_thread(), one_thread():
        assert limits() == {1}
    assert (torch.get_num_threads(), limits()) == before


def test_threads_are_put_back_after_an_error_in_one_of_many():
    before = torch.get_num_threads(), limits()

    def failing(item: int) -> int:
        assert torch.get_num_threads() == 1
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        in_threads(failing, [1, 2, 0, 3])
    assert (torch.get_num_threads(), limits()) == before


@pytest.mark.parametrize(("together", "expected"), [(2.0, 1), (0.6, 4), (1.1, 4)])
def test_steps_take_one_thread_where_more_take_longer(monkeypatch, together, expected):
    now, seen = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with contextlib.closing(Pace()) as pace:
        for step in range(9):
            with pace.step():
                seen.append(torch.get_num_threads())
                now[0] += 100.0 if step == 0 else {1: 1.0, 4: together}[torch.get_num_threads()]
    assert seen == [4, 4, 4, 1, 1, *[expected] * 4]
    assert torch.get_num_threads() == 4

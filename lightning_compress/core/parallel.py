"""Work shared out over processes that hold the same model; by default there is one."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar, cast

import torch
from threadpoolctl import ThreadpoolController

from lightning_compress.core.workers import current_workers

Item = TypeVar("Item")
Result = TypeVar("Result")


TRIED = 2
"""Steps that are measured with all threads, and with one."""
SLOWER = 1.2
"""How much longer a step must take with all threads for one to be used; those that wait for a core take far longer."""


class Processes:
    """The processes that work is shared out over, seen from one of them; this base class is one process alone.

    All of them exchange the same things in the same order.

    Attributes:
        rank: Number of this process. The first, 0, decides what must be decided once.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def exchange(self, what: str, own: Any) -> list[Any]:
        """Returns what every process has, by rank.

        Args:
            what: A description, the same in all processes.
            own: What this process has.
        """
        del what
        return [own]


_ALONE = Processes()
_CURRENT: ContextVar[Processes] = ContextVar("processes", default=_ALONE)


def current_processes() -> Processes:
    """Returns the processes that work is now shared out over."""
    return _CURRENT.get()


@contextlib.contextmanager
def sharing_work(processes: Processes) -> Iterator[None]:
    """Shares out the work done inside; all processes must run the same."""
    token = _CURRENT.set(processes)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def from_first(what: str, own: Result) -> Result:
    """Returns what the first process has, in all of them."""
    return cast(Result, current_processes().exchange(what, own)[0])


def shared_map(
    what: str,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    work: Sequence[float] | None = None,
    *,
    threads: bool = False,
) -> list[Result]:
    """Returns the function's results of all items, in order, each worked out by one process.

    An error of one process is raised in all: that of the first of them.

    Args:
        what: See `Processes.exchange`.
        function: Any function; its results must be picklable.
        items: The same in all processes.
        work: How long each item takes, in any unit; None for all alike.
        threads: Whether a process works on several items at once, see `in_threads`.
    """
    processes = current_processes()
    owners = _owners(work if work is not None else [1.0] * len(items), processes.size)
    own: dict[int, Result] | Exception
    try:
        mine = [index for index in range(len(items)) if owners[index] == processes.rank]
        each = in_threads if threads else _one_by_one
        own = dict(zip(mine, each(function, [items[index] for index in mine]), strict=True))
    except Exception as error:
        if processes.size == 1:
            raise
        own = error
    results: dict[int, Result] = {}
    for part in processes.exchange(what, own):
        if isinstance(part, Exception):
            raise part
        results.update(part)
    return [results[index] for index in range(len(items))]


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Returns the function's results of all items, in order, worked out on as many threads as torch has, or workers.

    Each item has one thread for itself: small linear algebra gains nothing from more. Gradients are off.
    """
    workers = current_workers()
    count = min(torch.get_num_threads() if workers is None else workers.size, len(items))
    if count < 2:  # noqa: PLR2004
        return _one_by_one(function, items)
    with one_thread(), ThreadPoolExecutor(count) as pool:
        return list(pool.map(as_here(function), items))


def as_here(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """Returns a function for other threads: with the effort and the workers of this one, and without gradients."""
    here = copy_context()

    def there(item: Item) -> Result:
        with torch.no_grad():  # which is of each thread
            return here.copy().run(function, item)

    return there


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for what torch, numpy and scipy work out, whatever the process is set to.

    Counted over the process: of the user's own threads that are in it at once the first one saw what there was.
    """
    _LIMIT.enter()
    try:
        yield
    finally:
        _LIMIT.leave()


class _Limit:
    """Who has asked for one thread, and what there was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._threads = 1
        self._libraries: Any = None
        self._own = threading.local()  # torch's count is one of each thread

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._threads = torch.get_num_threads()
                self._libraries = _libraries().limit(limits=1)
            elif not getattr(self._own, "depth", 0):
                _libraries().limit(limits=1)  # OpenMP's count is one of each thread too
            self._inside += 1
            self._own.depth = getattr(self._own, "depth", 0) + 1
            torch.set_num_threads(1)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            self._own.depth -= 1
            if not self._own.depth:
                self._libraries.restore_original_limits()
                torch.set_num_threads(self._threads)


_LIMIT = _Limit()


class Pace:
    """Threads of torch for many steps of one kind: one alone where more take longer, as on a machine that is busy.

    A few steps are measured with all and with one; where nothing else runs, all are kept.
    """

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self._seconds: dict[int, list[float]] = {self._all: [], 1: []}
        self._left = [self._all] * (1 + TRIED) + [1] * TRIED if self._all > 1 else []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measures a step while it is not known what is faster."""
        if not self._left:
            yield
            return
        threads = self._left.pop(0)
        torch.set_num_threads(threads)
        start = time.perf_counter()
        yield
        self._seconds[threads].append(time.perf_counter() - start)
        if not self._left:
            busy = min(self._seconds[self._all][1:]) > SLOWER * min(self._seconds[1])  # the first one was cold
            torch.set_num_threads(1 if busy else self._all)

    def close(self) -> None:
        """Puts back what there was."""
        torch.set_num_threads(self._all)


@functools.cache
def _libraries() -> ThreadpoolController:
    """Returns the libraries that have threads: looking for them takes longer than a small decomposition."""
    return ThreadpoolController()


def _one_by_one(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _owners(work: Sequence[float], size: int) -> list[int]:
    """Returns who does what: the longest first, each to the one with the least to do."""
    loads, owners = [0.0] * size, [0] * len(work)
    for index in sorted(range(len(work)), key=lambda i: -work[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += work[index]
    return owners

"""Ctrl-C while a model's layers are exchanged: it waits until they all are."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps Ctrl-C (SIGINT) until the end of the block, and lets it happen there.

    Signals reach the main thread alone: in others, and where SIGINT is not handled in Python, the block runs as it is.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    caught = False

    def note(*_: object) -> None:
        nonlocal caught
        caught = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        signal.raise_signal(signal.SIGINT)

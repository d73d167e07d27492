"""What breaks off a fit or an import, or damages a file."""

from __future__ import annotations

import builtins
import itertools


def interrupting(phase: str, after: float, seen: list | None = None):
    """Ctrl-C as soon as more than a fraction of a phase is done, as a `progress`; `seen` gets all that was done."""

    def interrupt(what: str, done: float) -> None:
        if seen is not None:
            seen.append((what, done))
        if what == phase and done > after:
            raise KeyboardInterrupt

    return interrupt


def failing_at(call: int, exception: BaseException | type[BaseException]):
    """A forward pre-hook that raises at one of its calls."""
    calls = itertools.count(1)

    def interrupt(_module, _args) -> None:
        if next(calls) == call:
            raise exception

    return interrupt


def spoil(path, change) -> None:
    """Changes the bytes of a file."""
    path.write_bytes(change(path.read_bytes()))


def block_imports(monkeypatch, name):
    real = builtins.__import__

    def fails(module, *args, **kwargs):
        if module.split(".")[0] == name:
            msg = f"No module named {name!r}"
            raise ModuleNotFoundError(msg)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)

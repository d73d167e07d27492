"""What breaks off a fit or an import."""

from __future__ import annotations

import builtins


def interrupting(phase: str, after: float):
    """Ctrl-C as soon as more than a fraction of a phase is done, as a `progress`."""

    def interrupt(what: str, done: float) -> None:
        if what == phase and done > after:
            raise KeyboardInterrupt

    return interrupt


def block_imports(monkeypatch, name):
    real = builtins.__import__

    def fails(module, *args, **kwargs):
        if module.split(".")[0] == name:
            msg = f"No module named {name!r}"
            raise ModuleNotFoundError(msg)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)

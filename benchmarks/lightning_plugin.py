"""A plugin of pytest that puts `Compress` into every Trainer; see `benchmarks.lightning_suite`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_compress import Budget, Compress

KEEP = 0.6
"""Of the parameters: the smallest module of those tests, a layer of 32 by 2, keeps 55 % at rank 1."""


def _with_compression(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Trainer, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        own = [] if callbacks is None else [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks]
        compress = Compress(
            Budget(params=KEEP), objective="weight", heal=False, target=None, require_used=False, method="exact"
        )
        init(self, *args, callbacks=[*own, compress], **kwargs)

    return wrapped


def pytest_configure() -> None:
    """Puts the callback in."""
    Trainer.__init__ = _with_compression(Trainer.__init__)  # type: ignore[method-assign]

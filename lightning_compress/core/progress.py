"""How long jobs say how far they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from lightning_compress.core.checks import shown
from lightning_compress.core.errors import ConfigurationError

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, in [0, 1]."""


def silent(_what: str, _done: float) -> None:
    """Says nothing."""


def reporting(progress: Progress | None) -> Progress:
    """Returns an argument `progress` as it is, for None what says nothing.

    Raises:
        ConfigurationError: If it cannot be called.
    """
    if progress is not None and not callable(cast(Any, progress)):
        msg = f"progress={shown(progress)}: expected a function of what is being done and the fraction done, or None."
        raise ConfigurationError(msg)
    return progress if progress is not None else silent

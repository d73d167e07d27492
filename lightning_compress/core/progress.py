"""How long jobs say how far they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, in [0, 1]."""


def silent(_what: str, _done: float) -> None:
    """Says nothing."""

"""How long jobs say how far they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lightning_compress.core.checks import shown
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.forecast import current_forecast, watched

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, in [0, 1]."""


def silent(_what: str, _done: float) -> None:
    """Says nothing."""


@contextlib.contextmanager
def bar(*, shown_at_all: bool = True) -> Iterator[Progress]:
    """Shows one bar with what is being done and the time that is left, in a terminal or a notebook; else nothing."""
    console = Console(stderr=True)
    if not shown_at_all or not (console.is_terminal or console.is_jupyter):
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    left = (TextColumn("left:"), TimeRemainingColumn())
    with RichProgress(*columns, *left, console=console, transient=True) as progress, watched():
        task = progress.add_task("Compress", total=1.0)

        def show(what: str, done: float) -> None:
            fraction = current_forecast().fraction(what, done)
            progress.update(task, description=f"Compress: {what}", completed=fraction)

        yield show


def reporting(progress: Progress | None) -> Progress:
    """Returns an argument `progress` as it is, for None what says nothing.

    Raises:
        ConfigurationError: If it cannot be called.
    """
    if progress is not None and not callable(cast(Any, progress)):
        msg = f"progress={shown(progress)}: expected a function of what is being done and the fraction done, or None."
        raise ConfigurationError(msg)
    return progress if progress is not None else silent

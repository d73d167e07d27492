"""What a run says: on the terminal, and in the log file that Hydra keeps in its folder."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

from rich.console import Console
from rich.text import Text
from typing_extensions import override

NAME = "lightning_compress.run"
_LIGHTNING = "lightning."
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")


def say(message: str, *, error: bool = False) -> None:
    """Prints a message with rich's markup, and logs it without.

    Args:
        message: One or more lines.
        error: Whether it goes to the standard error stream and is logged as an error.
    """
    show(message, error=error)
    log(Text.from_markup(message, emoji=False).plain, error=error)


def show(message: str, *, error: bool = False) -> None:
    """Prints a message with rich's markup, for what is no part of a run's log.

    Args:
        message: One or more lines.
        error: Whether it goes to the standard error stream.
    """
    Console(stderr=error).print(message, soft_wrap=True, highlight=False, emoji=False)


def log(text: str, *, error: bool = False) -> None:
    """Logs what the terminal is shown elsewhere.

    Args:
        text: One or more lines.
        error: Whether it is logged as an error.
    """
    logging.getLogger(NAME).log(logging.ERROR if error else logging.INFO, "%s", text)


def keep_log() -> None:
    """Lets log files have the stages, warnings, and what Lightning says; the terminal stays as it is.

    Log files are the handlers of the root logger that Hydra has set up for the job. Calling it again changes nothing.
    """
    logging.getLogger(NAME).setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.FileHandler):
            _once(handler)
    for lightning in map(logging.getLogger, _LOGGERS):
        lightning.propagate = True
        for handler in lightning.handlers:
            handler.setLevel(logging.WARNING)
    if not isinstance(warnings.showwarning, _Logged):
        warnings.showwarning = cast(Any, _Logged(warnings.showwarning))


def _once(handler: logging.Handler) -> None:
    if not any(isinstance(each, _NotTwice) for each in handler.filters):
        handler.addFilter(_NotTwice())


class _NotTwice(logging.Filter):
    """Keeps from the terminal what has been printed there, or is for the log alone."""

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to show a record."""
        if not record.name.startswith(_LIGHTNING):
            return record.name != NAME
        shown = any(logging.getLogger(name).handlers for name in _LOGGERS)  # by handlers of Lightning's own
        return record.levelno >= logging.WARNING and not shown


class _Logged:
    """Shows a warning as before, and logs it."""

    def __init__(self, show: Any) -> None:
        self._show = show

    def __call__(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        self._show(message, category, filename, lineno, *rest)
        logging.getLogger(NAME).warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)

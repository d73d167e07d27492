"""Checks of single values, and the end of messages about unknown names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lightning_compress.core.errors import ConfigurationError

LARGEST = 2**63 - 1
"""The largest whole number that torch, numpy and file formats take."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def shown(value: object) -> str:
    """Returns a value as an error message shows it; of one that cannot be written out, its class."""
    try:
        text = repr(value)
    except Exception:  # whole numbers of thousands of digits, lists in lists in lists, a foreign __repr__
        return f"<{type(value).__name__}>"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} …"


_MOST_SHOWN = 200


def did_you_mean(word: object, known: Iterable[str], *, most: int = 20) -> str:
    """Returns the end of an error message: a suggestion if one is close, then the known names."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    more = f", … ({len(known) - most} more)" if len(known) > most else ""
    return f"{hint} Known: {', '.join(known[:most])}{more}."


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number, no larger than a float can be."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # 10**400
        return False


def require_count(what: str, value: object, least: int) -> None:
    """Checks a whole number.

    Args:
        what: The input as the user wrote it, for the message.
        value: Its value.
        least: The smallest allowed.

    Raises:
        ConfigurationError: If it is none, too small, or larger than `LARGEST`.
    """
    if not is_count(value, least):
        msg = f"{what}: expected a whole number of at least {least}."
        raise ConfigurationError(msg)


def is_count(value: object, least: int = 0) -> bool:
    """Returns whether a value is a whole number from `least` to `LARGEST`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def require_flag(name: str, value: object) -> None:
    """Checks an argument that is true or false.

    Raises:
        ConfigurationError: If it is neither: a word such as "no" would mean true.
    """
    if not isinstance(value, bool):
        msg = f"{name}={shown(value)}: expected true or false."
        raise ConfigurationError(msg)


def path_of(name: str, value: object) -> Path:
    """Returns an argument that is a path, as one.

    Raises:
        ConfigurationError: If it is none, or one that no file can have.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
        usable = isinstance(text, str) and text != "" and b"\0" not in os.fsencode(text)
    except (TypeError, UnicodeError):
        usable = False
    if not usable:
        msg = f"{name}={shown(value)}: expected a path, as a string or a pathlib.Path."
        raise ConfigurationError(msg)
    return Path(text)


def readable(path: Path) -> Path:
    """Returns a path that can be read to its end.

    Raises:
        OSError: If something else than a file is there: reading from a pipe waits, from a device it may never end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        msg = "it is no file"
        raise OSError(msg)
    return path


def require_type(owner: str, name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Checks the type of one value of a settings class, `owner(name=value)`.

    Raises:
        ConfigurationError: If it is of another type than `kind`.
    """
    if not isinstance(value, kind):
        msg = f"{owner}({name}={shown(value)}): expected {expected}."
        raise ConfigurationError(msg)


def from_mapping(cls: type[_T], value: Mapping[Any, Any], owner: str) -> _T:
    """Returns a settings class made from a mapping of its fields.

    Raises:
        ConfigurationError: If a key is unknown.
    """
    require_known(value, [field.name for field in dataclasses.fields(cls)], owner, "key")  # type: ignore[arg-type]
    return cls(**value)


def require_known(names: Iterable[Any], known: Iterable[str], owner: str, what: str = "argument") -> None:
    """Checks the names of keyword arguments that a function takes as `**settings`, or of the keys of a mapping.

    Raises:
        ConfigurationError: If one is unknown; the message has a suggestion.
    """
    known = list(known)
    for name in names:
        if name not in known:
            msg = f"{owner}: unknown {what} {name!r}.{did_you_mean(name, known)}"
            raise ConfigurationError(msg)


def with_known_keywords(owner: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Decorates a function: an unknown keyword is an error of our own tree, with a suggestion.

    The signature stays as it is for editors, jsonargparse and Hydra.

    Args:
        owner: Name of the function, for the message.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            require_known(kwargs, known, owner)
            return function(*args, **kwargs)

        return checked

    return decorate

"""Checks of single values, and the end of messages about unknown names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from lightning_compress.core.errors import ConfigurationError

_P = ParamSpec("_P")
_T = TypeVar("_T")


def did_you_mean(word: object, known: Iterable[str], *, most: int = 20) -> str:
    """Returns the end of an error message: a suggestion if one is close, then the known names."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    more = f", … ({len(known) - most} more)" if len(known) > most else ""
    return f"{hint} Known: {', '.join(known[:most])}{more}."


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_count(what: str, value: object, least: int) -> None:
    """Checks a whole number.

    Args:
        what: The input as the user wrote it, for the message.
        value: Its value.
        least: The smallest allowed.

    Raises:
        ConfigurationError: If it is none, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{what}: expected a whole number of at least {least}."
        raise ConfigurationError(msg)


def require_type(owner: str, name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Checks the type of one value of a settings class, `owner(name=value)`.

    Raises:
        ConfigurationError: If it is of another type than `kind`.
    """
    if not isinstance(value, kind):
        msg = f"{owner}({name}={value!r}): expected {expected}."
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

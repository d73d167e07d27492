"""Settings as Hydra delivers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def plain(value: Any) -> Any:
    """Returns plain dicts and lists in place of other mappings and sequences, such as those of Hydra."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [plain(entry) for entry in value]
    return value

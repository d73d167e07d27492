"""Kinds of decomposition, in one registry."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.config import did_you_mean
from lightning_compress.decompositions.base import (
    Decomposition,
    FactorisedLayer,
    LayerCall,
    RankProfile,
)
from lightning_compress.decompositions.split_svd import SplitSvd
from lightning_compress.decompositions.svd import ChannelSvd, SpatialSvd, Svd
from lightning_compress.decompositions.tucker import Tucker2
from lightning_compress.errors import ConfigurationError

DECOMPOSITIONS: dict[str, Decomposition] = {
    d.kind: d for d in (Svd(), ChannelSvd(), SpatialSvd(), Tucker2(), SplitSvd(2), SplitSvd(4))
}
"""Kind to decomposition."""

AUTOMATIC = ("svd", "channel_svd", "spatial_svd", "tucker2")
"""The kinds that "auto" stands for; the others are used where they are named."""


def resolve_kinds(kinds: str | Sequence[str], automatic: tuple[str, ...] = AUTOMATIC) -> tuple[str, ...]:
    """Returns the kinds a user asked for: "auto", one name, or a sequence of names.

    Args:
        kinds: What the user passed.
        automatic: What "auto" stands for.

    Raises:
        ConfigurationError: If a kind is unknown, the sequence is empty, or the type is wrong.
    """
    if kinds in ("auto", ["auto"], ("auto",)):
        return automatic
    names = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(names, Sequence) or not names:
        msg = f"kinds={kinds!r}: expected 'auto', a kind, or a list of kinds.{did_you_mean('', DECOMPOSITIONS)}"
        raise ConfigurationError(msg)
    for name in names:
        if not isinstance(name, str) or name not in DECOMPOSITIONS:
            msg = f"kinds={kinds!r}: unknown kind {name!r}.{did_you_mean(name, ['auto', *DECOMPOSITIONS])}"
            raise ConfigurationError(msg)
    return tuple(dict.fromkeys(names))


__all__ = [
    "AUTOMATIC",
    "DECOMPOSITIONS",
    "Decomposition",
    "FactorisedLayer",
    "LayerCall",
    "RankProfile",
    "resolve_kinds",
]

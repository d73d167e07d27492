"""Kinds of decomposition, in one registry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_compress.config import did_you_mean
from lightning_compress.decompositions.base import (
    Decomposition,
    FactorisedLayer,
    LayerCall,
    RankProfile,
)
from lightning_compress.decompositions.metric import Metric
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


def profile_in(kind: str, weight: Tensor, metric: Metric | None = None) -> RankProfile:
    """Returns the errors ‖G^½ (W − Ŵ) S^½‖² / ‖G^½ W S^½‖² of every rank of a kind.

    Args:
        kind: A key of `DECOMPOSITIONS`.
        weight: The dense weight.
        metric: S and G; None for the identity in both.
    """
    if metric is None:
        return DECOMPOSITIONS[kind].profile(weight)
    return DECOMPOSITIONS[kind].profile(metric.weigh(weight), metric.inputs)


def factorise_in(kind: str, weight: Tensor, ranks: tuple[int, ...], metric: Metric | None = None) -> dict[str, Tensor]:
    """Returns the weights of the child layers, fitted in the metric; see `profile_in`.

    Every kind leaves the output channels to its last factor, so G is a change of their basis.
    """
    if metric is None:
        return DECOMPOSITIONS[kind].factorise(weight, ranks)
    factors = DECOMPOSITIONS[kind].factorise(metric.weigh(weight), ranks, metric.inputs)
    last = list(factors)[-1]
    return {**factors, last: metric.unweigh(factors[last])}


__all__ = [
    "AUTOMATIC",
    "DECOMPOSITIONS",
    "Decomposition",
    "FactorisedLayer",
    "LayerCall",
    "RankProfile",
    "resolve_kinds",
]

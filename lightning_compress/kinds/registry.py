"""Kinds of decomposition, in one registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.kinds.base import Decomposition, LayerCall, Operator, RankProfile
from lightning_compress.kinds.cp import Cp, Cp3
from lightning_compress.kinds.interpolative import Interpolative
from lightning_compress.kinds.metric import Metric, energy
from lightning_compress.kinds.split_svd import SplitSvd
from lightning_compress.kinds.svd import ChannelSvd, SpatialSvd, Svd
from lightning_compress.kinds.tensor_train import TensorTrain
from lightning_compress.kinds.tensorised import TtEmbedding
from lightning_compress.kinds.tucker import Tucker2

DECOMPOSITIONS: dict[str, Decomposition] = {
    d.kind: d
    for d in (
        *(Svd(), Interpolative(), ChannelSvd(), SpatialSvd(), Tucker2(), SplitSvd(2), SplitSvd(4)),
        *(TensorTrain(), Cp(), Cp3(), TtEmbedding()),
    )
}
"""Kind to decomposition."""

AUTOMATIC = ("svd", "interpolative", "channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "cp", "tt_embedding")
"""The kinds that "auto" chooses from, where they say so (`Decomposition.automatic`)."""


def is_automatic(kinds: str | Sequence[str]) -> bool:
    """Returns whether a user left the choice of kinds to the search."""
    return kinds in ("auto", ["auto"], ("auto",))


def resolve_kinds(kinds: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the kinds a user asked for: "auto", one name, or a sequence of names.

    Raises:
        ConfigurationError: If a kind is unknown, the sequence is empty, or the type is wrong.
    """
    if is_automatic(kinds):
        return AUTOMATIC
    names = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(names, Sequence) or not names:
        msg = f"kinds={kinds!r}: expected 'auto', a kind, or a list of kinds.{did_you_mean('', DECOMPOSITIONS)}"
        raise ConfigurationError(msg)
    for name in names:
        if not isinstance(name, str) or name not in DECOMPOSITIONS:
            msg = f"kinds={kinds!r}: unknown kind {name!r}.{did_you_mean(name, ['auto', *DECOMPOSITIONS])}"
            raise ConfigurationError(msg)
    return tuple(dict.fromkeys(names))


def profile_in(kind: str, weight: Tensor, metric: Metric | None = None, groups: int = 1) -> RankProfile:
    """Returns the errors ‖G^½ (W − Ŵ) S^½‖² / ‖G^½ W S^½‖² of every rank of a kind.

    Args:
        kind: A key of `DECOMPOSITIONS`.
        weight: The dense weight, (groups · out, in, *kernel).
        metric: S and G; None for the identity in both.
        groups: Blocks of the weight that are factorised each on its own, with the same ranks.
    """
    if groups == 1:
        return _profile(DECOMPOSITIONS[kind], weight, metric)
    profiles, energies = [], []
    for index, block in enumerate(weight.chunk(groups)):
        own = _usable(DECOMPOSITIONS[kind], metric.group(index) if metric is not None else None)
        profiles.append(_profile(DECOMPOSITIONS[kind], block, own))
        energies.append(weighted_energy(block, own))
    shares = np.array(energies) / max(sum(energies), np.finfo(float).tiny)
    return RankProfile(profiles[0].ranks, np.sum([s * p.errors for s, p in zip(shares, profiles, strict=True)], axis=0))


def _profile(decomposition: Decomposition, weight: Tensor, metric: Metric | None) -> RankProfile:
    metric = _usable(decomposition, metric)
    if metric is None:
        return decomposition.profile(weight)
    return decomposition.profile(metric.weigh(weight), metric.inputs)


def _usable(decomposition: Decomposition, metric: Metric | None) -> Metric | None:
    """Returns the metric a kind is fitted in: S alone where it splits the outputs."""
    return replace(metric, outputs=None) if metric is not None and decomposition.splits_outputs else metric


def weighted_energy(weight: Tensor, metric: Metric | None, groups: int = 1) -> float:
    """Returns ‖G^½ W S^½‖²_F of a weight, (groups · out, in, *kernel)."""
    if metric is None:
        return float(weight.square().sum())
    if groups > 1:
        return sum(weighted_energy(block, metric.group(i)) for i, block in enumerate(weight.chunk(groups)))
    weighed = metric.weigh(weight).flatten(1)
    return float(weighed.square().sum()) if metric.inputs is None else energy(weighed, metric.inputs)


def factorise_in(
    kind: str,
    weight: Tensor,
    ranks: tuple[int, ...],
    metric: Metric | None = None,
    groups: int = 1,
    *,
    draft: bool = False,
) -> dict[str, Tensor]:
    """Returns the canonical weights of the child layers, fitted in the metric; see `profile_in`.

    Those of several groups are one after the other along the first dimension. Every kind leaves the
    output channels to its last factor, so G is a change of their basis; kinds that split them ignore it.

    Args:
        kind: A key of `DECOMPOSITIONS`.
        weight: See `profile_in`.
        ranks: Of the kind.
        metric: See `profile_in`.
        groups: See `profile_in`.
        draft: Whether a quick fit will do, see `Decomposition.draft`.
    """
    decomposition = DECOMPOSITIONS[kind]
    if groups > 1:
        parts = [
            factorise_in(kind, block, ranks, metric.group(index) if metric is not None else None, draft=draft)
            for index, block in enumerate(weight.chunk(groups))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    metric = _usable(decomposition, metric)
    fit = decomposition.draft if draft else decomposition.factorise
    if metric is None:
        factors = fit(weight, ranks)
    else:
        factors = fit(metric.weigh(weight), ranks, metric.inputs)
        last = list(factors)[-1]
        factors = {**factors, last: metric.unweigh(factors[last])}
    return factors if draft else decomposition.finished(factors)  # gates need components in their order


def gated_weight(
    kind: str, factors: Mapping[str, Tensor], operator: Operator, gates: Callable[[int, int], Tensor]
) -> Tensor:
    """Returns the weight (groups · out, in, *kernel) of canonical factors with each ordered component times its gate.

    Args:
        kind: A key of `DECOMPOSITIONS`.
        factors: As from `factorise_in`.
        operator: Of the layer.
        gates: Called with the index of a rank and the number of its components, returns (count,).
    """
    decomposition = DECOMPOSITIONS[kind]
    gated = by_group(lambda own: decomposition.gated(own, gates), factors, operator.groups)
    return multiplied_out(decomposition, gated, operator.shape, operator.groups)


def by_group(
    function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], factors: Mapping[str, Tensor], groups: int
) -> dict[str, Tensor]:
    """Returns a function's results for the factors of each group, one after the other along the first dimension."""
    if groups == 1:
        return dict(function(factors))
    parts = {name: factor.chunk(groups) for name, factor in factors.items()}
    results = [function({name: part[group] for name, part in parts.items()}) for group in range(groups)]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def multiplied_out(
    decomposition: Decomposition, factors: Mapping[str, Tensor], shape: tuple[int, ...], groups: int = 1
) -> Tensor:
    """Returns the weight (groups · out, in, *kernel) of canonical factors.

    Args:
        decomposition: Their kind.
        factors: Of all groups, one after the other along the first dimension.
        shape: Of the weight of one group.
        groups: Their number.
    """
    return by_group(lambda own: {"weight": decomposition.dense_weight(own, shape)}, factors, groups)["weight"]


__all__ = [
    "AUTOMATIC",
    "DECOMPOSITIONS",
    "Decomposition",
    "LayerCall",
    "Operator",
    "RankProfile",
    "factorise_in",
    "gated_weight",
    "is_automatic",
    "multiplied_out",
    "profile_in",
    "resolve_kinds",
    "weighted_energy",
]

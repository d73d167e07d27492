"""Kinds of decomposition, in one registry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core import store
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.plan import DENSE
from lightning_compress.core.workers import outsourced
from lightning_compress.kinds.base import Decomposition, LayerCall, Operator, RankProfile
from lightning_compress.kinds.cp import Cp, Cp3
from lightning_compress.kinds.interpolative import Interpolative
from lightning_compress.kinds.metric import Metric, energy
from lightning_compress.kinds.svd import ChannelSvd, SpatialSvd, Svd
from lightning_compress.kinds.tensor_train import TensorTrain
from lightning_compress.kinds.tensorised import TtEmbedding
from lightning_compress.kinds.tucker import Tucker2

DECOMPOSITIONS: dict[str, Decomposition] = {
    d.kind: d
    for d in (
        *(Svd(), Interpolative(), ChannelSvd(), SpatialSvd(), Tucker2()),
        *(TensorTrain(), Cp(), Cp3(), TtEmbedding()),
    )
}
"""Kind to decomposition."""

AUTOMATIC = ("svd", "interpolative", "channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "cp", "tt_embedding")
"""The kinds that "auto" chooses from, where they say so (`Decomposition.automatic`)."""

_OWN = "lightning_compress."
"""Where the kinds are from whose errors and fits are kept on disk."""

_D = TypeVar("_D", bound=Decomposition)


def register_kind(decomposition: _D) -> _D:
    """Adds a kind of your own, which can then be named in `kinds=` and in overrides; "auto" does not try it.

        from lightning_compress.kinds.base import Decomposition
        from lightning_compress.kinds.registry import register_kind

        class Halves(Decomposition):
            kind = "halves"
            ...  # the abstract methods of Decomposition

        register_kind(Halves())

    Call it where your module is imported, and import that module before a plan with the kind is applied or a folder
    with it is loaded, in every process: what is stored is the name alone.

    Args:
        decomposition: An instance; its `kind` is the name.

    Returns:
        The same instance.

    Raises:
        ConfigurationError: If it is no instance of `Decomposition`, or its name is taken or no name.
    """
    if not isinstance(cast(Any, decomposition), Decomposition):
        hint = " Make an instance of the class." if isinstance(decomposition, type) else ""
        msg = f"register_kind({decomposition!r}): expected an instance of Decomposition.{hint}"
        raise ConfigurationError(msg)
    name = getattr(decomposition, "kind", None)
    where = f"register_kind({type(decomposition).__name__})"
    if not isinstance(name, str) or not name:
        msg = f"{where}: its kind is {name!r}, expected a name such as 'svd'."
        raise ConfigurationError(msg)
    if name in {"auto", DENSE, *DECOMPOSITIONS}:
        msg = f"{where}: the name {name!r} is taken. Call it otherwise, and register it only once, in a module."
        raise ConfigurationError(msg)
    DECOMPOSITIONS[name] = decomposition
    return decomposition


def known_kinds(name: object, *others: str) -> str:
    """Returns the end of a message about an unknown kind.

    Args:
        name: What was given.
        others: What else could have been.
    """
    hint = did_you_mean(name, [*others, *DECOMPOSITIONS])
    return f"{hint} A kind of your own is known once the module that calls register_kind is imported."


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
            msg = f"kinds={kinds!r}: unknown kind {name!r}.{known_kinds(name, 'auto')}"
            raise ConfigurationError(msg)
    return tuple(dict.fromkeys(names))


def decomposition_of(kind: str | Decomposition) -> Decomposition:
    """Returns the decomposition of a key of `DECOMPOSITIONS`, or the one given, which need not be among them."""
    return DECOMPOSITIONS[kind] if isinstance(kind, str) else kind


def rank_errors(
    kind: str | Decomposition, weight: Tensor, metric: Metric | None = None, groups: int = 1
) -> RankProfile:
    """Returns the errors ‖G^½ (W − Ŵ) S^½‖² / ‖G^½ W S^½‖² of every rank of a kind.

    Args:
        kind: A key of `DECOMPOSITIONS`, or a decomposition.
        weight: The dense weight, (groups · out, in, *kernel).
        metric: S and G; None for the identity in both.
        groups: Blocks of the weight that are factorised each on its own, with the same ranks.
    """
    decomposition = decomposition_of(kind)
    if groups == 1:
        return _profile(decomposition, weight, metric)
    profiles, energies = [], []
    for index, block in enumerate(weight.chunk(groups)):
        own = _usable(decomposition, metric.group(index) if metric is not None else None)
        profiles.append(_profile(decomposition, block, own))
        energies.append(weighted_energy(block, own))
    shares = np.array(energies) / max(sum(energies), np.finfo(float).tiny)
    return RankProfile(profiles[0].ranks, np.sum([s * p.errors for s, p in zip(shares, profiles, strict=True)], axis=0))


def kept_rank_errors(
    kinds: Sequence[str], weight: Tensor, metric: Metric | None = None, groups: int = 1
) -> list[RankProfile]:
    """Returns the `rank_errors` of some kinds, found again on disk where all of them are our own; see `core.store`.

    Args:
        kinds: Keys of `DECOMPOSITIONS`.
        weight: See `rank_errors`.
        metric: See `rank_errors`.
        groups: See `rank_errors`.
    """
    if not store.is_kept() or not all(_is_own(DECOMPOSITIONS[kind]) for kind in kinds):
        return [rank_errors(kind, weight, metric, groups) for kind in kinds]
    own = metric.digest if metric is not None else None
    name = store.key_of("profiles", tuple(kinds), groups, current_effort().fits, weight, own)
    stored = store.find(name)
    if stored is None:
        profiles = [rank_errors(kind, weight, metric, groups) for kind in kinds]
        parts = {
            f"{kind}.{part}": value
            for kind, found in zip(kinds, profiles, strict=True)
            for part, value in vars(found).items()
        }
        store.keep(name, {part: torch.from_numpy(value) for part, value in parts.items()})
        return profiles
    return [RankProfile(stored[f"{kind}.ranks"].numpy(), stored[f"{kind}.errors"].numpy()) for kind in kinds]


def _is_own(decomposition: Decomposition) -> bool:
    """Returns whether a kind is of this library, which knows when its code changes."""
    return type(decomposition).__module__.startswith(_OWN)


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


def fit_factors(
    kind: str | Decomposition,
    weight: Tensor,
    ranks: tuple[int, ...],
    metric: Metric | None = None,
    groups: int = 1,
    *,
    draft: bool = False,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Returns the canonical weights of the child layers, fitted in the metric; see `rank_errors`.

    Those of several groups are one after the other along the first dimension. Every kind leaves the
    output channels to its last factor, so G is a change of their basis; kinds that split them ignore it.

    Args:
        kind: See `rank_errors`.
        weight: See `rank_errors`.
        ranks: Of the kind.
        metric: See `rank_errors`.
        groups: See `rank_errors`.
        draft: Whether a quick fit will do, see `Decomposition.draft`.
        start: Factors that were fitted to a weight and in a metric near these, see `Decomposition.refit`.

    Iterative fits are kept in the metric, and found there again for the same weight and `Effort`; those of our own
    kinds on disk too, see `core.store`.
    """
    decomposition = decomposition_of(kind)
    if groups > 1:
        starts = {name: factor.chunk(groups) for name, factor in (start or {}).items()}
        parts = [
            fit_factors(
                kind,
                block,
                ranks,
                metric.group(index) if metric is not None else None,
                draft=draft,
                start={name: own[index] for name, own in starts.items()} or None,
            )
            for index, block in enumerate(weight.chunk(groups))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    metric = _usable(decomposition, metric)
    if start is not None and metric is not None and decomposition.fits_roughly:

        def again(weighed: Tensor, ranks: tuple[int, ...], inputs: Tensor | None) -> dict[str, Tensor]:
            return decomposition.refit(weighed, start, ranks, inputs)

        return _fitted(weight, ranks, metric, again)  # here: what it starts from is here
    fit = decomposition.draft if draft else decomposition.factorise
    if metric is None or not decomposition.fits_roughly:
        factors = outsourced(_fitted, weight, ranks, metric, fit)
        return factors if draft else decomposition.finished(factors)  # gates need components in their order
    key = (decomposition.kind, ranks, draft, current_effort().fits, _digest(weight))
    if key not in metric.fits:
        name = store.key_of("fit", *key, metric.digest) if _is_own(decomposition) else None
        stored = store.find(name) if name is not None else None
        if stored is None:
            factors = outsourced(_fitted, weight, ranks, metric, fit)
            stored = factors if draft else decomposition.finished(factors)
            if name is not None:
                store.keep(name, {f"{index}.{own}": factor for index, (own, factor) in enumerate(stored.items())})
        else:
            stored = {own.partition(".")[2]: stored[own] for own in sorted(stored)}
        metric.fits[key] = stored
    return {name: factor.clone() for name, factor in metric.fits[key].items()}


def _fitted(
    weight: Tensor,
    ranks: tuple[int, ...],
    metric: Metric | None,
    fit: Callable[..., dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Returns factors of a weight in a metric, by what fits those of the weighed one."""
    if metric is None:
        return fit(weight, ranks)
    factors = fit(metric.weigh(weight), ranks, metric.inputs)
    first, *_, last = factors
    factors = {**factors, first: metric.unweigh_inputs(factors[first])}
    return {**factors, last: metric.unweigh(factors[last])}


def _digest(weight: Tensor) -> bytes:
    return hashlib.blake2b(weight.contiguous().numpy().data, digest_size=16).digest()


def gated_weight(
    kind: str | Decomposition,
    factors: Mapping[str, Tensor],
    operator: Operator,
    gates: Callable[[int, int], Tensor],
) -> Tensor:
    """Returns the weight (groups · out, in, *kernel) of canonical factors with each ordered component times its gate.

    Args:
        kind: See `rank_errors`.
        factors: As from `fit_factors`.
        operator: Of the layer.
        gates: Called with the index of a rank and the number of its components, returns (count,).
    """
    decomposition = decomposition_of(kind)
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
    "fit_factors",
    "gated_weight",
    "is_automatic",
    "known_kinds",
    "multiplied_out",
    "rank_errors",
    "register_kind",
    "resolve_kinds",
    "weighted_energy",
]

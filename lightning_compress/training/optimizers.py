"""Hands the factors to optimizers that were built for the dense weights.

Param groups are patched in place: groups, hyper-parameters and order stay, so that schedulers,
closures and aliases keep working. Adding groups would break several schedulers (LambdaLR, OneCycleLR,
ReduceLROnPlateau), building the optimizers again would leave prebuilt ones stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.compat import caches_parameter_count, forget_parameter_count_
from lightning_compress.core.errors import OrphanParameterError, ResumeError, UnsupportedError
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.folding import weight_parameters
from lightning_compress.surgery.swap import Replacement

_MATRIX_ONLY = "Muon"
_SHARDED = "ZeroRedundancyOptimizer"


@dataclass(frozen=True)
class Exchange:
    """The Parameters of one layer that give way to others.

    Attributes:
        name: Of the layer.
        old: Weights that optimizers may hold, each with its name within the layer.
        new: What takes their place, likewise, in forward order.
        bias: The layer's bias, the same Parameter before and after, None without one.
        bias_names: Its name within the layer afterwards, then those it may have before, the longest first.
    """

    name: str
    old: tuple[tuple[str, nn.Parameter], ...]
    new: tuple[tuple[str, nn.Parameter], ...]
    bias: nn.Parameter | None = None
    bias_names: tuple[str, ...] = ()


def exchanges_of(replacements: Sequence[Replacement]) -> list[Exchange]:
    """Returns what the swap of dense layers by factorised ones means for optimizers."""
    exchanges = []
    for r in replacements:
        bias = cast("nn.Parameter | None", getattr(r.dense, "bias", None))
        names = (f"{list(r.factorised.factors())[-1]}.bias", "bias")
        exchanges.append(Exchange(r.aliases[0], dense_weight(r.dense), factor_weights(r.factorised), bias, names))
    return exchanges


def dense_weight(layer: nn.Module) -> tuple[tuple[str, nn.Parameter], ...]:
    """Returns the weight of a dense layer with its name, or what it is computed from."""
    return weight_parameters(layer)


def factor_weights(layer: FactorisedLayer) -> tuple[tuple[str, nn.Parameter], ...]:
    """Returns the factors of a layer in forward order with their names."""
    return tuple((f"{child}.weight", cast(nn.Parameter, factor)) for child, factor in layer.factors().items())


def require_patchable(optimizers: Iterable[Optimizer], exchanges: Sequence[Exchange]) -> None:
    """Checks that every optimizer can take over the new Parameters of those it holds.

    Raises:
        UnsupportedError: If an optimizer shards its parameters, or accepts matrices only and
            some factor it would receive is not one.
    """
    for optimizer in optimizers:
        held = held_by(optimizer)
        factors = [p for e in exchanges if any(id(old) in held for _, old in e.old) for _, p in e.new]
        matrices_only = all(factor.ndim == 2 for factor in factors)  # noqa: PLR2004
        name = type(optimizer).__name__
        if name == _SHARDED:
            msg = f"{name} keeps its own parameter shards and cannot take over factors: use a plain optimizer."
            raise UnsupportedError(msg)
        if name == _MATRIX_ONLY and not matrices_only:
            msg = (
                f"{name} trains matrices only and some factors are 4-D convolution weights: exclude the convolutions "
                "(exclude='Conv2d') or train with another optimizer."
            )
            raise UnsupportedError(msg)


def exchange_parameters_(optimizers: Sequence[Optimizer], exchanges: Sequence[Exchange]) -> None:
    """Puts new Parameters in place of old ones, in every param group of every optimizer.

    The state of a replaced Parameter is dropped, that of all others kept; `param_names` follow.
    Biases are the same Parameters as before and need nothing. LBFGS, whose state is that of all
    Parameters together, starts its history anew.

    Raises:
        UnsupportedError: If an optimizer cannot take over the new ones; nothing is changed then.
        OrphanParameterError: If a new one did not reach the optimizer that held the old ones.
    """
    if not exchanges:
        return
    require_patchable(optimizers, exchanges)
    anchors = _anchors(exchanges)
    held = [held_by(optimizer) for optimizer in optimizers]
    for optimizer in optimizers:
        seen: set[int] = set()
        for group in optimizer.param_groups:
            _patch_group(group, exchanges, anchors, seen)
        for exchange in exchanges:
            for _, parameter in exchange.old:
                optimizer.state.pop(parameter, None)
        if caches_parameter_count(optimizer):
            forget_parameter_count_(optimizer)
    _require_no_orphans(optimizers, held, exchanges, anchors)


class OptimizersBefore:
    """What optimizers hold, to be put back in place.

    Args:
        optimizers: The optimizers, before anything is exchanged.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._kept = [(o, o.param_groups, list(o.param_groups), o.state, dict(o.state)) for o in optimizers]
        self._groups = [
            (group, dict(group), {name: list(value) for name, value in group.items() if isinstance(value, list)})
            for optimizer, *_ in self._kept
            for group in optimizer.param_groups
        ]

    def put_back_(self) -> None:
        """Makes groups, Parameters and state what they were, in the same lists and dictionaries."""
        for group, settings, lists in self._groups:
            group.clear()
            group.update(settings)
            for name, content in lists.items():
                group[name][:] = content
        for optimizer, groups, content, state, by_parameter in self._kept:
            if caches_parameter_count(optimizer):
                forget_parameter_count_(optimizer)
            groups[:] = content
            state.clear()
            state.update(by_parameter)
            optimizer.param_groups, optimizer.state = groups, state


def optimizer_layout(optimizers: Sequence[Optimizer], model: nn.Module) -> list[dict[str, Any]]:
    """Returns class and parameter names by group of each optimizer; "?" for one the model lacks."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {
            "type": type(optimizer).__name__,
            "groups": [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups],
        }
        for optimizer in optimizers
    ]


def carried_states(
    saved: Sequence[dict[str, Any]], before: Sequence[Sequence[Sequence[nn.Parameter]]], optimizers: Sequence[Optimizer]
) -> list[dict[str, Any]]:
    """Returns state dicts of a dense run for the optimizers after an exchange.

    The state of a Parameter that is still there goes with it, that of a replaced one is dropped. LBFGS starts anew.

    Args:
        saved: State dicts of the optimizers of the dense run.
        before: The Parameters of the dense run, by optimizer and group.
        optimizers: The optimizers now.

    Raises:
        ResumeError: If the saved states are of other optimizers.
    """
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in saved]
    if sizes != [[len(group) for group in groups] for groups in before]:
        msg = (
            f"the dense checkpoint's optimizers hold {sizes} parameters by group, those of configure_optimizers "
            f"{[[len(group) for group in groups] for groups in before]}. Resume with the same optimizers."
        )
        raise ResumeError(msg)
    carried = []
    for state, groups, optimizer in zip(saved, before, optimizers, strict=True):
        places: dict[int, int] = {}
        now = [[places.setdefault(id(p), len(places)) for p in g["params"]] for g in optimizer.param_groups]
        kept = {
            places[id(parameter)]: state["state"][key]
            for group, parameters in zip(state["param_groups"], groups, strict=True)
            for key, parameter in zip(group["params"], parameters, strict=True)
            if id(parameter) in places and key in state["state"]
        }
        settings = [
            {**group, "params": keys, **({"param_names": list(own["param_names"])} if "param_names" in own else {})}
            for group, keys, own in zip(state["param_groups"], now, optimizer.param_groups, strict=True)
        ]
        carried.append({"state": {} if caches_parameter_count(optimizer) else kept, "param_groups": settings})
    return carried


def held_by(optimizer: Optimizer) -> set[int]:
    """Returns the `id`s of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _anchors(exchanges: Sequence[Exchange]) -> list[set[int]]:
    """Returns for each layer the old Parameters that stand for it: its own ones, if it has any.

    A factor that several layers share may be in the group of one of them and belongs to all.
    """
    users: dict[int, set[frozenset[int]]] = {}
    for exchange in exchanges:
        for _, parameter in exchange.old:
            users.setdefault(id(parameter), set()).add(frozenset(id(p) for _, p in exchange.new))
    return [{id(p) for _, p in e.old if len(users[id(p)]) == 1} or {id(p) for _, p in e.old} for e in exchanges]


def _patch_group(
    group: dict[str, Any], exchanges: Sequence[Exchange], anchors: Sequence[set[int]], seen: set[int]
) -> None:
    """Exchanges the Parameters of one group; `seen` holds the new ones some group of the optimizer has."""
    old_names: list[str | None] = list(group.get("param_names", [None] * len(group["params"])))
    leaves = {id(p): leaf for e in exchanges for leaf, p in e.old}
    biases = {id(e.bias): e for e in exchanges if e.bias is not None}
    params: list[nn.Parameter] = []
    names: list[str | None] = []
    for parameter, name in zip(group["params"], old_names, strict=True):
        if id(parameter) not in leaves:
            owner = biases.get(id(parameter))
            params.append(parameter)
            names.append(_renamed(name, owner.bias_names[1:], owner.bias_names[0]) if owner is not None else name)
        for exchange, own in zip(exchanges, anchors, strict=True):
            for leaf, new in exchange.new if id(parameter) in own else ():
                if id(new) not in seen:  # layers may share a factor
                    params.append(new)
                    names.append(_renamed(name, [leaves[id(parameter)]], leaf))
                    seen.add(id(new))
    group["params"][:] = params  # the same list object: LBFGS and others hold an alias of it
    if "param_names" in group:
        group["param_names"][:] = names


def _renamed(name: str | None, before: Sequence[str], after: str) -> str | None:
    if name is None:
        return None
    leaf = next((leaf for leaf in before if name.endswith(leaf)), "")
    return name.removesuffix(leaf) + after


def _require_no_orphans(
    optimizers: Sequence[Optimizer],
    held: Sequence[set[int]],
    exchanges: Sequence[Exchange],
    anchors: Sequence[set[int]],
) -> None:
    for optimizer, before in zip(optimizers, held, strict=True):
        now, kind = held_by(optimizer), type(optimizer).__name__
        for exchange, own in zip(exchanges, anchors, strict=True):
            if any(id(p) in now for _, p in exchange.old):
                msg = f"{kind} still holds the dense weight of {exchange.name!r}, which the model lost."
                raise OrphanParameterError(msg)
            if own & before and not all(id(p) in now for _, p in exchange.new):
                msg = f"a factor of {exchange.name!r} did not reach {kind} and would never be trained."
                raise OrphanParameterError(msg)

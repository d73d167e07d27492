"""Which layers of a model can be factorised, and why the others cannot."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.foreign import frozen, in_metrics
from lightning_compress.analysis.reasons import why_dense
from lightning_compress.analysis.trace import Trace
from lightning_compress.core.compat import held_parameters
from lightning_compress.core.errors import (
    NothingToFactoriseError,
    SelectionError,
)
from lightning_compress.core.settings import Override, Patterns, overrides_of, require_patterns
from lightning_compress.kinds.registry import DECOMPOSITIONS, LayerCall, Operator, is_automatic, resolve_kinds
from lightning_compress.layers.adapters import adapter_of
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import canonical, operator_of, own_layout
from lightning_compress.layers.folding import foldings, is_of, spared_by, type_name
from lightning_compress.layers.unfused import UnfusedModule, inside_factorised, unfusable

TIED_KINDS = ("svd",)
"""Kinds whose factors can serve a weight and its transpose."""

_TIED_PART = "its weight is tied to another module's, and {!r} is a projection of an unfused layer"
_MOST_LISTED = 20  # layers in an error message


@dataclass(frozen=True)
class Layer:
    """One parameterised module of the model.

    Attributes:
        name: Its first name in `model.named_modules()`.
        aliases: Every name it is registered under, the first included.
        module: The module.
        parameters: Number of parameters it holds itself, its children's left out.
        kinds: Kinds of decomposition to choose from; empty if `reason` is given.
        min_rank: Lower bound on every rank.
        max_rank: Upper bound on every rank, None for no bound.
        calls: Sizes of its calls in the traced forward pass, None if none was traced.
        reason: Why the layer stays dense, None if it can be factorised.
        partners: Modules that hold the same weight (an embedding and the output layer of a language
            model), each with its names: they become factorised layers of the same factors.
        whole: Names of the unfused attention or recurrent layer it is a projection of, none otherwise.
        whole_type: The torch class of that.
        folded: The plain layer that a module with a computed weight is now, None for other modules.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    parameters: int
    kinds: tuple[str, ...] = ()
    min_rank: int = 1
    max_rank: int | None = None
    calls: tuple[LayerCall, ...] | None = None
    reason: str | None = None
    partners: tuple[tuple[tuple[str, ...], nn.Module], ...] = ()
    whole: tuple[str, ...] = ()
    whole_type: type[nn.Module] | None = None
    folded: nn.Module | None = None

    @property
    def type(self) -> str:
        """Name of the module's class; one for all factorised layers."""
        factorised = isinstance(self.module, FactorisedLayer)
        return FactorisedLayer.__name__ if factorised else type_name(self.module)

    @property
    def plain(self) -> nn.Module:
        """The module, or the plain layer that it is when its weight is computed."""
        return self.folded if self.folded is not None else self.module

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return cast(Tensor, self.plain.weight)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return tuple(self.weight.shape)

    @property
    def operator(self) -> Operator:
        """What a layer that can be factorised does."""
        return operator_of(self.plain)

    @property
    def spared(self) -> tuple[int, int]:
        """Parameters and bytes beside the dense weight that are gone with it, those that it is computed from."""
        return spared_by(self.plain)

    def canonical_weight(self) -> Tensor:
        """Returns the dense weight as (groups · out, in, *kernel)."""
        return canonical(self.plain, self.weight)

    def double_weight(self) -> Tensor:
        """Returns the canonical weight as decompositions take it, float64 on the CPU."""
        return self.canonical_weight().detach().to("cpu", torch.float64)

    def own_layout(self, weight: Tensor) -> Tensor:
        """Returns a canonical weight in the layout of the module's own."""
        return own_layout(self.plain, weight)


def take_inventory(
    model: nn.Module,
    *,
    kinds: str | Sequence[str] = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Mapping[str, Any] | None = None,
    trace: Trace | None = None,
    spare_frozen: bool = False,
) -> tuple[Layer, ...]:
    """Returns every parameterised module in order, each with its kinds or its reason.

    Args:
        model: Any module; it is not changed.
        kinds: "auto", a kind, or a list of kinds to choose from.
        include: Names, globs over names, class names or classes; only layers that match one
            are factorised. None means all.
        exclude: Likewise; layers that match one stay dense.
        overrides: Pattern to `Override` (or a mapping of its fields, or "dense"). Where several
            match one layer, the later ones win field by field.
        trace: What a forward pass showed, if one was possible.
        spare_frozen: Whether frozen networks inside a model that is trained stay dense unless `include` names them.

    Raises:
        ConfigurationError: If a kind or an override is malformed.
        SelectionError: If a pattern matches no layer.
        NothingToFactoriseError: If every layer has a reason to stay dense.
    """
    resolve_kinds(kinds)
    layers = list_layers(model, trace)
    chosen = _match_all(layers, include, "include")
    refused = _match_all(layers, exclude, "exclude")
    special = _overrides(layers, overrides)
    spared = frozen(model) if spare_frozen else {}
    result = []
    for layer in layers:
        reason = layer.reason
        if reason is None and include is not None and layer.name not in chosen:
            reason = "not matched by include"
        if reason is None and layer.name in refused:
            reason = "matched by exclude"
        if reason is None and layer.name not in chosen:
            reason = spared.get(id(layer.module))
        result.append(_with_kinds(layer, reason, special.get(layer.name, Override()), kinds, trace))
    if all(layer.reason for layer in result):
        raise NothingToFactoriseError(_nothing_message(model, result))
    return tuple(result)


def list_layers(model: nn.Module, trace: Trace | None = None) -> list[Layer]:
    """Returns every parameterised module in order, with a reason where it cannot be factorised."""
    aliases: dict[int, list[str]] = {}
    inside = inside_factorised(model)
    wholes: dict[int, UnfusedModule] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
        if isinstance(module, UnfusedModule):
            wholes.update({id(child): module for child in module.children()})
    folds = foldings(model, inside)
    inside |= {id(part) for f in folds.values() if f.plain for part in f.layer.modules() if part is not f.layer}
    holders, ties, fused = _holders(model), _ties(model), unfusable(model)
    shared = {key for key, count in holders.items() if count > 1}
    layers = []
    for name, module in model.named_modules():
        fold = folds.get(id(module))
        plain = fold.plain if fold is not None else None
        own = list(module.parameters(recurse=isinstance(module, FactorisedLayer) or plain is not None))
        if own and id(module) not in inside:
            count = sum(p.numel() for p in own) + spared_by(module)[0]
            reason = f"it cannot be unfused: {fused[name]}" if fused.get(name) else fold and fold.reason
            reason = reason or why_dense(plain or module, shared, trace, name)
            partners: list[tuple[tuple[str, ...], nn.Module]] = []
            first, *others = ties.get(id(module), [(name, module)])
            if others and reason is not None and id(held_parameters(module).get("weight")) in shared:
                parts = [holder for holder, tied in (first, *others) if id(tied) in wholes]
                reason = _why_tied(first, others, holders, trace) if not parts else _TIED_PART.format(parts[0])
                if reason is None and first[1] is module:
                    partners = [(tuple(aliases[id(other)]), other) for _, other in others]
                elif reason is None:
                    reason = f"its weight is that of {first[0]!r} and is factorised with it"
            names = tuple(aliases[id(module)])
            layer = Layer(name, names, module, count, reason=reason, partners=tuple(partners), folded=plain)
            if (whole := wholes.get(id(module))) is not None:
                layer = replace(layer, whole=tuple(aliases[id(whole)]), whole_type=whole.fused_type)
            layers.append(layer)
    return _without_metrics(model, layers)


def _without_metrics(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Returns the layers, those of metrics with the reason that they are no part of the model."""
    foreign = in_metrics(model)
    reasons = [foreign.get(id(layer.module)) for layer in layers]
    return [replace(la, reason=why, partners=()) if why else la for la, why in zip(layers, reasons, strict=True)]


def _ties(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Returns the modules that hold the same weight, by the id of each: embeddings first, then linear layers."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if (weight := held_parameters(module).get("weight")) is not None:
            holders.setdefault(id(weight), []).append((name, module))
    groups = [sorted(g, key=lambda named: not isinstance(named[1], nn.Embedding)) for g in holders.values()]
    return {id(module): group for group in groups if len(group) > 1 for _, module in group}


def _why_tied(
    first: tuple[str, nn.Module],
    others: Sequence[tuple[str, nn.Module]],
    holders: Mapping[int, int],
    trace: Trace | None,
) -> str | None:
    """Returns why modules of one weight cannot be factorised together, None if they can."""
    simple = all(_plain_class(module) in (nn.Embedding, nn.Linear) for _, module in (first, *others))
    if not simple or holders[id(first[1].weight)] != 1 + len(others):
        return "its weight is tied to another module's, factorising would untie it"
    unshared = {key for key, count in holders.items() if count > 1} - {id(first[1].weight)}
    for name, module in (first, *others):
        reason = why_dense(module, unshared, None, name)
        if reason is not None:
            return f"its weight is tied to that of {name!r}, of which holds: {reason}"
        if trace is not None and name in trace.read_elsewhere:
            return "its weight is used outside its own forward"
    if trace is not None and not any(trace.calls[name] for name, _ in (first, *others)):
        return "it is not called in the forward pass on the example input"
    return None


def _plain_class(module: nn.Module) -> type[nn.Module]:
    adapter = adapter_of(module)
    return adapter.plain if adapter is not None and adapter.weight is None else type(module)


def matches(layer: Layer, pattern: str | type) -> bool:
    """Returns whether a name, a glob over names, a class name or a class matches the layer, or what it is a part of."""
    whole = layer.whole_type
    if isinstance(pattern, type):
        return is_of(layer.module, pattern) or (whole is not None and issubclass(whole, pattern))
    class_name = pattern.rpartition(".")[2] if pattern.startswith(("nn.", "torch.nn.")) else pattern
    if class_name in (layer.type, whole.__name__ if whole is not None else None):
        return True
    return any(fnmatch.fnmatchcase(alias, pattern) for alias in (*layer.aliases, *layer.whole))


def _match_all(layers: Iterable[Layer], patterns: Patterns | None, argument: str) -> set[str]:
    found: set[str] = set()
    for pattern in require_patterns(argument, patterns):
        found |= _names_matching(list(layers), pattern, argument)
    return found


def _names_matching(layers: Sequence[Layer], pattern: str | type, argument: str) -> set[str]:
    names = {layer.name for layer in layers if matches(layer, pattern)}
    if not names:
        known = [layer.name for layer in layers]
        close = difflib.get_close_matches(str(pattern), known, n=3, cutoff=0.4) or known[:3]
        msg = (
            f"{argument}: {pattern!r} matches no layer. Names are those of model.named_modules(), "
            f"such as {', '.join(map(repr, close))}; globs such as '*.conv1' and types such as 'Conv2d' work too."
        )
        raise SelectionError(msg)
    return names


def _overrides(layers: Sequence[Layer], overrides: Mapping[str, Any] | None) -> dict[str, Override]:
    merged: dict[str, Override] = {}
    for pattern, override in overrides_of(overrides).items():
        if override.kinds is not None:
            resolve_kinds(override.kinds)
        fields = {name: v for name, v in vars(override).items() if v is not None}
        for name in _names_matching(layers, pattern, "overrides"):
            merged[name] = replace(merged.get(name, Override()), **fields)
    return merged


def _with_kinds(
    layer: Layer, reason: str | None, override: Override, general: str | Sequence[str], trace: Trace | None
) -> Layer:
    if reason is None and override.dense:
        reason = "kept dense by overrides"
    if reason is not None:
        return replace(layer, reason=reason)
    asked = override.kinds if override.kinds is not None else general
    refusals = {kind: DECOMPOSITIONS[kind].unsupported(layer.operator) for kind in resolve_kinds(asked)}
    if is_automatic(asked):
        refusals = {
            kind: refusal
            for kind, refusal in refusals.items()
            if refusal is not None or DECOMPOSITIONS[kind].automatic(layer.operator)
        }
    if layer.partners:
        others = "its weight is tied to another module's, which svd alone can share"
        refusals.update({kind: others for kind in refusals if kind not in TIED_KINDS and refusals[kind] is None})
    kinds = tuple(kind for kind, refusal in refusals.items() if refusal is None)
    if not kinds:
        return replace(layer, reason="; ".join(filter(None, refusals.values())))
    return replace(
        layer,
        kinds=kinds,
        min_rank=override.min_rank or 1,
        max_rank=override.max_rank,
        calls=_calls(layer, trace) if trace else None,
    )


def _calls(layer: Layer, trace: Trace) -> tuple[LayerCall, ...]:
    """Returns the calls of a layer and of those that share its weight."""
    partners = [call for aliases, _ in layer.partners for call in trace.calls[aliases[0]]]
    return (*trace.calls[layer.name], *partners)


def _holders(model: nn.Module) -> dict[int, int]:
    """Returns how often each parameter is held, by its id."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in held_parameters(module).values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return holders


def _nothing_message(model: nn.Module, layers: Sequence[Layer]) -> str:
    shown = layers[:_MOST_LISTED]
    lines = [f"  {layer.name or '(the model itself)'} ({layer.type}): {layer.reason}" for layer in shown]
    more = [f"  … and {len(layers) - len(shown)} more"] if len(layers) > len(shown) else []
    listed = "\n".join([*lines, *more]) or "  it has no parameters at all"
    return f"{type(model).__name__} holds no layer that can be factorised:\n{listed}"

"""Surgery: checks a whole plan against the model, then replaces the layers; all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import Layer, list_layers, require_module, require_usable_weights
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.analysis.trace import ExampleInput, Trace, trace
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError, PlanMismatchError
from lightning_compress.core.plan import DENSE, LayerPlan, Plan
from lightning_compress.core.progress import Progress, silent
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.joint_svd import shared_factors
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, Decomposition, factorise_in, known_kinds
from lightning_compress.kinds.tensorised import TtEmbedding
from lightning_compress.layers.factorised import (
    FactorisedBag,
    FactorisedLayer,
    FactorisedLookup,
    FactorisedTransposed,
    channels_last_format,
)
from lightning_compress.layers.families import TransposedLinear, children_of, operator_of, stored_factor
from lightning_compress.layers.unfused import Unfusing, put_, redo_, share_hooks, undo_, unfusable, unfuse_, unfused


@dataclass(frozen=True)
class Replacement:
    """One layer that was replaced.

    Attributes:
        aliases: Every name the layer is registered under.
        dense: The module that was there.
        factorised: The module that is there now; both hold the same bias Parameter.
        unfusing: Of the attention or recurrent layer that was unfused for it, None if none was.
    """

    aliases: tuple[str, ...]
    dense: nn.Module
    factorised: FactorisedLayer
    unfusing: Unfusing | None = None


def apply_plan_(
    model: nn.Module, plan: Plan, *, statistics: Statistics | None = None, progress: Progress | None = None
) -> tuple[Replacement, ...]:
    """Replaces the planned layers by factorised ones, in place.

    The whole plan is checked and every factor computed before the first layer is touched, so a
    failure leaves the model as it was. Biases stay the same Parameters and forward and backward
    hooks move along with their handles; dtype, device, memory format, mode and `requires_grad`
    are inherited; the global random state is not used. Layers that are already factorised as
    planned are left alone. Attention and recurrent layers are unfused if one of their projections
    is factorised; the others stay as they are.

    Args:
        model: The model the plan was made for, or one of the same architecture.
        plan: From `search_ranks` or `Plan.from_json`.
        statistics: From `gather_statistics`: the factors are fitted to the layers' outputs on
            inputs of these moments, else to the weights; also where the plan's errors are those of the weights.
        progress: Called with what is being done and the fraction done.

    Returns:
        What was replaced by what.

    Raises:
        ConfigurationError: If `plan` is no Plan.
        PlanMismatchError: If a planned layer is missing, of another type or shape, cannot be
            factorised, or its kind or ranks are impossible.
        NonFiniteWeightError: If a parameter holds NaN or infinite values.
    """
    require_usable_weights(model)
    return _replace(model, plan, progress or silent, statistics, decompose=True)


def apply_shells_(model: nn.Module, plan: Plan) -> tuple[Replacement, ...]:
    """Like `apply_plan_`, with factors of zeros: the structure that a state dict is loaded into."""
    require_module(model)
    return _replace(model, plan, silent, None, decompose=False)


def _replace(
    model: nn.Module, plan: Plan, progress: Progress, statistics: Statistics | None, *, decompose: bool
) -> tuple[Replacement, ...]:
    if not isinstance(cast(Any, plan), Plan):
        msg = f"plan={plan!r}: expected a Plan, as search_ranks returns it."
        raise ConfigurationError(msg)
    unfusings = _unfuse_for(model, plan)
    try:
        pairs = _checked(model, plan)
        replacements = []
        for group in _groups(pairs):
            metrics = [_metric_of(layer, planned, statistics) for layer, planned in group]
            with torch.inference_mode(mode=False):
                made = _build_shared(group, metrics, decompose=decompose)
            replacements += [
                replace(r, unfusing=_unfusing_of(layer, unfusings)) for r, (layer, _) in zip(made, group, strict=True)
            ]
        pairs = [(layer, planned) for layer, planned in pairs if planned.shares is None]
        for index, (layer, planned) in enumerate(pairs):
            progress("factorising layers", index / len(pairs))
            with torch.inference_mode(mode=False):  # parameters made in inference mode could never be trained
                new = _build(layer, planned, _metric_of(layer, planned, statistics), decompose=decompose)
            replacements.append(Replacement(layer.aliases, layer.module, new, _unfusing_of(layer, unfusings)))
            for aliases, partner in layer.partners:
                replacements.append(Replacement(aliases, partner, _sharing(partner, new)))
        progress("factorising layers", 1.0)
    except BaseException:
        undo_(model, unfusings)
        raise
    install(model, replacements)
    return tuple(replacements)


def _metric_of(layer: Layer, planned: LayerPlan, statistics: Statistics | None) -> Metric | None:
    """Returns the metric that the error of a planned layer is of: none where the plan is of the weights alone."""
    return statistics.metric(layer.name) if statistics is not None and planned.source != "weight" else None


def _unfuse_for(model: nn.Module, plan: Plan) -> tuple[Unfusing, ...]:
    """Unfuses the attention and recurrent layers of which the plan factorises a projection."""
    parts = {planned.name.rpartition(".")[0] for planned in plan.factorised}
    return unfuse_(model, [name for name, reason in unfusable(model).items() if reason is None and name in parts])


def _unfusing_of(layer: Layer, unfusings: Sequence[Unfusing]) -> Unfusing | None:
    return next((unfusing for unfusing in unfusings if set(layer.whole) & set(unfusing.aliases)), None)


def _unfusings(replacements: Sequence[Replacement]) -> list[Unfusing]:
    return list({id(r.unfusing): r.unfusing for r in replacements if r.unfusing is not None}.values())


def install(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Puts the factorised layers in, under every name."""
    redo_(model, _unfusings(replacements))
    for replacement in replacements:
        put_(model, replacement.aliases, replacement.factorised)


def uninstall(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Puts the dense layers back, under every name."""
    for replacement in replacements:
        put_(model, replacement.aliases, replacement.dense)
    undo_(model, _unfusings(replacements))


def plan_of(model: nn.Module, example_input: ExampleInput | None = None) -> Plan:
    """Returns the plan that an already factorised model embodies; without budget and search.

    Args:
        model: A model after `apply_plan_`.
        example_input: See `search_ranks`; without it MACs are unknown.

    Raises:
        ExampleInputError: If the model fails on the example input.
    """
    with unfused(model):
        return _embodied(model, example_input)


def _embodied(model: nn.Module, example_input: ExampleInput | None) -> Plan:
    traced = trace(model, example_input) if example_input is not None else None
    listed = list_layers(model)
    owners = owners_of(listed)
    layers, saved_params, saved_bytes, saved_macs = [], 0, 0, 0
    counted: dict[int, str] = {}
    for layer in listed:
        module, owner = layer.module, owners.get(layer.name)
        if not isinstance(module, FactorisedLayer) or owner != layer.name:
            reason = f"its weight is that of {owner!r} and is factorised with it" if owner else layer.reason
            name = module.dense_type if isinstance(module, FactorisedLayer) else layer.type
            plan = LayerPlan(layer.name, name, DENSE, (), (), 0.0, layer.parameters, layer.parameters, reason=reason)
            layers.append(plan)
            continue
        factors = list(module.factors().values())
        again = [f for f in factors if id(f) in counted]  # that of a layer before
        counted.update({id(f): layer.name for f in factors if id(f) not in counted})
        shares = counted[id(factors[0])] if _is_shared(factors[0], listed, owners) else None
        saved = (
            torch.Size(module.weight_shape).numel() - sum(f.numel() for f in factors) + sum(f.numel() for f in again)
        )
        saved_params += saved
        saved_bytes += saved * factors[0].element_size() - sum(b.numel() * b.element_size() for b in module.buffers())
        before, after = None, None
        if traced is not None:
            twins = [twin for twin in listed if owners.get(twin.name) == layer.name]
            counts = [_macs_of(twin.name, cast(FactorisedLayer, twin.module), traced) for twin in twins]
            before, after = (sum(values) for values in zip(*counts, strict=True))
        saved_macs += (before or 0) - (after or 0)
        layers.append(
            LayerPlan(
                layer.name,
                module.dense_type,
                module.kind,
                module.ranks,
                module.weight_shape,
                module.error if module.error is not None else 0.0,
                params_before=layer.parameters - sum(f.numel() for f in again) + saved,
                params_after=layer.parameters - sum(f.numel() for f in again),
                macs_before=before,
                macs_after=after,
                shares=shares,
            )
        )
    now = measure_costs(model, macs=traced.macs if traced is not None else None)
    macs = now.macs + saved_macs if now.macs is not None else None
    return Plan(tuple(layers), Costs(now.params + saved_params, macs, now.bytes + saved_bytes), now)


def _is_shared(factor: Tensor, layers: Sequence[Layer], owners: Mapping[str, str]) -> bool:
    """Returns whether layers that own their other factors have this one in common."""
    holders = [
        layer
        for layer in layers
        if isinstance(layer.module, FactorisedLayer)
        and owners[layer.name] == layer.name
        and any(own is factor for own in layer.module.factors().values())
    ]
    return len(holders) > 1


def owners_of(layers: Sequence[Layer]) -> dict[str, str]:
    """Returns for each factorised layer the one whose factors it uses: itself, or that it shares a weight with."""
    groups: dict[frozenset[int], list[Layer]] = {}
    for layer in layers:
        if isinstance(layer.module, FactorisedLayer):
            groups.setdefault(frozenset(map(id, layer.module.factors().values())), []).append(layer)
    owners = {}
    for group in groups.values():
        first = next((one for one in group if cast(FactorisedLayer, one.module).operator.lookup), group[0])
        owners.update({layer.name: first.name for layer in group})
    return owners


def _macs_of(name: str, module: FactorisedLayer, traced: Trace) -> tuple[int, int]:
    """Returns the MACs of the dense layer and of its factors, over all traced calls."""
    operator, calls = module.operator, traced.calls[name]
    ranks = np.array([module.ranks])
    after = sum(int(DECOMPOSITIONS[module.kind].macs(operator.shape, ranks, call)[0]) for call in calls)
    before = torch.Size(module.weight_shape).numel() * sum(call.positions for call in calls)
    return before, after * operator.groups


def _checked(model: nn.Module, plan: Plan) -> list[tuple[Layer, LayerPlan]]:
    """Returns what is to be replaced, or raises before anything is."""
    listed = list_layers(model)
    found = {alias: layer for layer in listed for alias in layer.aliases}
    owners = owners_of(listed)
    pairs = []
    planned = {p.name: p for p in plan.factorised}
    kept = {p.name for p in plan.layers if p.is_dense and p.type == FactorisedLayer.__name__}  # by an earlier plan
    for name, layer in found.items():
        expected = owners.get(name, name) in planned or name in kept
        if isinstance(layer.module, FactorisedLayer) and name == layer.name and not expected:
            msg = f"layer {name!r} is factorised in the model ({_text(layer.module)}) but dense in the plan."
            raise PlanMismatchError(msg)
    for name, layer_plan in planned.items():
        known = found.get(name)
        if known is None:
            msg = f"the plan's layer {name!r} is not in the model.{did_you_mean(name, found)}"
            raise PlanMismatchError(msg)
        if isinstance(known.module, FactorisedLayer):
            _require_same(known.module, layer_plan)
        else:
            _require_applicable(known, layer_plan)
            pairs.append((known, layer_plan))
    return pairs


def _text(module: FactorisedLayer) -> str:
    return f"{module.kind}, ranks {module.ranks}"


def _require_same(module: FactorisedLayer, planned: LayerPlan) -> None:
    if (module.kind, module.ranks, module.weight_shape) != (planned.kind, planned.ranks, planned.weight_shape):
        msg = (
            f"layer {planned.name!r} is already factorised ({_text(module)}), the plan wants "
            f"{planned.kind}, ranks {planned.ranks}: apply the plan to the dense model."
        )
        raise PlanMismatchError(msg)


def _require_applicable(layer: Layer, planned: LayerPlan) -> None:
    where = f"layer {planned.name!r}"
    if layer.reason is not None:
        msg = f"{where} cannot be factorised: {layer.reason}."
        raise PlanMismatchError(msg)
    if layer.type != planned.type or layer.weight_shape != planned.weight_shape:
        msg = (
            f"{where} is a {layer.type} with weight {layer.weight_shape} in the model, "
            f"a {planned.type} with weight {planned.weight_shape} in the plan."
        )
        raise PlanMismatchError(msg)
    decomposition = DECOMPOSITIONS.get(planned.kind)
    if decomposition is None:
        msg = f"{where} has the unknown kind {planned.kind!r} in the plan.{known_kinds(planned.kind)}"
        raise PlanMismatchError(msg)
    refusal = decomposition.unsupported(layer.operator)
    largest = decomposition.max_ranks(layer.operator.shape) if refusal is None else ()
    fits = len(planned.ranks) == len(largest) and all(1 <= r <= m for r, m in zip(planned.ranks, largest, strict=True))
    if refusal is not None or not fits:
        why = refusal or f"its ranks go up to {largest}"
        msg = f"{where} cannot become {planned.kind} with ranks {planned.ranks}: {why}."
        raise PlanMismatchError(msg)


def _groups(pairs: Sequence[tuple[Layer, LayerPlan]]) -> list[list[tuple[Layer, LayerPlan]]]:
    """Returns the layers that share their first factor."""
    groups: dict[str, list[tuple[Layer, LayerPlan]]] = {}
    for layer, planned in pairs:
        if planned.shares is not None:
            groups.setdefault(planned.shares, []).append((layer, planned))
    for name, group in groups.items():
        if (
            len({(p.kind, p.ranks, p.weight_shape[1], layer.type) for layer, p in group}) > 1
            or group[0][1].kind != "svd"
        ):
            msg = f"the plan's layers that share the first factor of {name!r} differ in kind, rank or inputs."
            raise PlanMismatchError(msg)
    return list(groups.values())


def _build_shared(
    group: Sequence[tuple[Layer, LayerPlan]], metrics: Sequence[Metric | None], *, decompose: bool
) -> list[Replacement]:
    """Returns the factorised layers of one first factor."""
    layers, (rank,) = [layer for layer, _ in group], group[0][1].ranks
    decomposition = DECOMPOSITIONS[group[0][1].kind]
    if decompose:
        with threads_for(layers[0].weight):
            weights = [layer.double_weight() for layer in layers]
            reduce, expand = shared_factors(weights, metrics, rank)
    else:
        reduce = torch.zeros(rank, layers[0].weight_shape[1])
        expand = [torch.zeros(layer.weight_shape[0], rank) for layer in layers]
    trained = any(layer.weight.requires_grad for layer in layers)
    first = nn.Parameter(_like(reduce, layers[0].weight), requires_grad=trained)
    replacements = []
    for (layer, planned), values in zip(group, expand, strict=True):
        children = children_of(decomposition, layer.module, planned.ranks)
        children["reduce"].register_parameter("weight", first)
        own = nn.Parameter(_like(values, layer.weight), requires_grad=layer.weight.requires_grad)
        children["expand"].register_parameter("weight", own)
        new = _finished(children, layer.module, decomposition, planned.ranks, planned.error)
        replacements.append(Replacement(layer.aliases, layer.module, new))
    return replacements


def _build(layer: Layer, planned: LayerPlan, metric: Metric | None, *, decompose: bool) -> FactorisedLayer:
    dense, weight = layer.module, cast(nn.Parameter, layer.module.weight)
    decomposition = DECOMPOSITIONS[planned.kind]
    children = children_of(decomposition, dense, planned.ranks)
    factors: dict[str, Tensor] = {}
    if decompose:
        with threads_for(weight):
            whole = layer.double_weight()
            factors = factorise_in(planned.kind, whole, planned.ranks, metric, layer.operator.groups)
    padding = getattr(dense, "padding_idx", None)
    for name, child in children.items():
        shape = cast(Tensor, child.weight).shape
        value = stored_factor(child, factors[name]).reshape(shape) if decompose else torch.zeros(shape)
        child.weight = nn.Parameter(_like(value, weight), requires_grad=weight.requires_grad)
        for key, buffer in child.named_buffers():
            child.register_buffer(key, buffer.to(weight.device))
        table = isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        if decompose and table and padding is not None and not bool(weight[padding].any()):  # to the last bit
            child.weight.detach()[padding] = 0
    return _finished(children, dense, decomposition, planned.ranks, planned.error)


def _finished(
    children: dict[str, nn.Module],
    dense: nn.Module,
    decomposition: Decomposition,
    ranks: tuple[int, ...],
    error: float | None,
) -> FactorisedLayer:
    """Returns the layer of some children, with bias, hooks and mode of the dense one."""
    if "bias" in dense._parameters:
        last = children[list(children)[-1]]
        last.register_parameter("bias", cast("nn.Parameter | None", dense.bias))
    new = _class_for(dense, decomposition)(children, dense=dense, decomposition=decomposition, ranks=ranks)
    new.error = error
    share_hooks(dense, new)
    return new.train(dense.training)


def _class_for(dense: nn.Module, decomposition: Decomposition) -> type[FactorisedLayer]:
    if isinstance(decomposition, TtEmbedding):
        return FactorisedLookup
    if isinstance(dense, nn.EmbeddingBag):
        return FactorisedBag
    return FactorisedTransposed if isinstance(dense, _ConvTransposeNd) else FactorisedLayer


def _sharing(dense: nn.Module, other: FactorisedLayer) -> FactorisedLayer:
    """Returns the factorised layer of a module with the same weight: of the same Parameters."""
    decomposition = DECOMPOSITIONS[other.kind]
    children = children_of(decomposition, dense, other.ranks)
    twins = list(children)
    flipped = operator_of(dense).lookup != other.operator.lookup  # the one's weight is the other's transposed
    if flipped:
        twins.reverse()
    for name, twin in zip(children, twins, strict=True):
        weight = other.factors()[twin]
        # the table of an embedding lies as the weight of nn.Linear; shapes cannot tell, square at full rank
        if flipped and isinstance(children[name], nn.Linear) and isinstance(other.get_submodule(twin), nn.Linear):
            children[name] = TransposedLinear(*weight.shape)
        children[name].register_parameter("weight", cast(nn.Parameter, weight))
    return _finished(children, dense, decomposition, other.ranks, other.error)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """Returns the value in the weight's dtype, device and memory format."""
    value = value.to(weight.device, weight.dtype)
    return value.contiguous(memory_format=channels_last_format(weight) or torch.contiguous_format)

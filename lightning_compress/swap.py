"""Surgery: checks a whole plan against the model, then replaces the layers; all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.candidates import DENSE
from lightning_compress.config import did_you_mean
from lightning_compress.costs import Costs, measure_costs
from lightning_compress.decompositions import DECOMPOSITIONS, FactorisedLayer, factorise_in
from lightning_compress.decompositions.base import threads_for
from lightning_compress.decompositions.factorised import FactorisedBag
from lightning_compress.decompositions.layer_types import children_of, own_layout
from lightning_compress.decompositions.metric import Metric
from lightning_compress.errors import ConfigurationError, PlanMismatchError
from lightning_compress.inventory import Layer, list_layers, require_module, require_usable_weights
from lightning_compress.moments import Statistics
from lightning_compress.opening import HOOKS, Opening, open_, openable, redo_, undo_, with_opened
from lightning_compress.plan import LayerPlan, Plan
from lightning_compress.progress import Progress, silent
from lightning_compress.tracing import ExampleInput, Trace, trace


@dataclass(frozen=True)
class Replacement:
    """One layer that was replaced.

    Attributes:
        aliases: Every name the layer is registered under.
        dense: The module that was there.
        factorised: The module that is there now; both hold the same bias Parameter.
        opening: Of the attention or recurrent layer that was opened for it, None if none was.
    """

    aliases: tuple[str, ...]
    dense: nn.Module
    factorised: FactorisedLayer
    opening: Opening | None = None


def apply_plan_(
    model: nn.Module, plan: Plan, *, statistics: Statistics | None = None, progress: Progress | None = None
) -> tuple[Replacement, ...]:
    """Replaces the planned layers by factorised ones, in place.

    The whole plan is checked and every factor computed before the first layer is touched, so a
    failure leaves the model as it was. Biases stay the same Parameters and forward and backward
    hooks move along with their handles; dtype, device, memory format, mode and `requires_grad`
    are inherited; the global random state is not used. Layers that are already factorised as
    planned are left alone. Attention and recurrent layers are opened if one of their projections
    is factorised; the others stay as they are.

    Args:
        model: The model the plan was made for, or one of the same architecture.
        plan: From `search_ranks` or `Plan.from_json`.
        statistics: From `gather_statistics`: the factors are fitted to the layers' outputs on
            inputs of these moments, else to the weights.
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
    openings = _open_for(model, plan)
    try:
        pairs = _checked(model, plan)
        replacements = []
        for index, (layer, planned) in enumerate(pairs):
            progress("factorising layers", index / len(pairs))
            with torch.inference_mode(mode=False):  # parameters made in inference mode could never be trained
                metric = statistics.metric(layer.name) if statistics is not None else None
                new = _build(layer, planned, metric, decompose=decompose)
            opening = next((o for o in openings if set(layer.whole) & set(o.aliases)), None)
            replacements.append(Replacement(layer.aliases, layer.module, new, opening))
        progress("factorising layers", 1.0)
    except BaseException:
        undo_(model, openings)
        raise
    install(model, replacements)
    return tuple(replacements)


def _open_for(model: nn.Module, plan: Plan) -> tuple[Opening, ...]:
    """Opens the attention and recurrent layers of which the plan factorises a projection."""
    parts = {planned.name.rpartition(".")[0] for planned in plan.factorised}
    return open_(model, [name for name, reason in openable(model).items() if reason is None and name in parts])


def _openings(replacements: Sequence[Replacement]) -> list[Opening]:
    return list({id(r.opening): r.opening for r in replacements if r.opening is not None}.values())


def install(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Puts the factorised layers in, under every name."""
    redo_(model, _openings(replacements))
    for replacement in replacements:
        _put(model, replacement, replacement.factorised)


def uninstall(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Puts the dense layers back, under every name."""
    for replacement in replacements:
        _put(model, replacement, replacement.dense)
    undo_(model, _openings(replacements))


@with_opened
def plan_of(model: nn.Module, example_input: ExampleInput | None = None) -> Plan:
    """Returns the plan that an already factorised model embodies; without budget and search.

    Args:
        model: A model after `apply_plan_`.
        example_input: See `search_ranks`; without it MACs are unknown.

    Raises:
        ExampleInputError: If the model fails on the example input.
    """
    traced = trace(model, example_input) if example_input is not None else None
    layers, saved_params, saved_bytes, saved_macs = [], 0, 0, 0
    for layer in list_layers(model):
        module = layer.module
        if not isinstance(module, FactorisedLayer):
            plan = LayerPlan(
                layer.name, layer.type, DENSE, (), (), 0.0, layer.parameters, layer.parameters, reason=layer.reason
            )
            layers.append(plan)
            continue
        factors = list(module.factors().values())
        saved = torch.Size(module.weight_shape).numel() - sum(f.numel() for f in factors)
        saved_params += saved
        saved_bytes += saved * factors[0].element_size()
        before, after = _macs_of(layer.name, module, traced) if traced is not None else (None, None)
        saved_macs += (before or 0) - (after or 0)
        layers.append(
            LayerPlan(
                layer.name,
                module.dense_type,
                module.kind,
                module.ranks,
                module.weight_shape,
                module.error if module.error is not None else 0.0,
                params_before=layer.parameters + saved,
                params_after=layer.parameters,
                macs_before=before,
                macs_after=after,
            )
        )
    now = measure_costs(model, macs=traced.macs if traced is not None else None)
    macs = now.macs + saved_macs if now.macs is not None else None
    return Plan(tuple(layers), Costs(now.params + saved_params, macs, now.bytes + saved_bytes), now)


def _macs_of(name: str, module: FactorisedLayer, traced: Trace) -> tuple[int, int]:
    """Returns the MACs of the dense layer and of its factors, over all traced calls."""
    prefix = f"{name}." if name else ""
    names = list(module.factors())
    after = sum(
        factor.numel() * call.positions
        for child, factor in module.factors().items()
        for call in traced.calls[f"{prefix}{child}"]
    )
    if module.operator.lookup:
        return 0, after
    # the dense weight is applied where the last factor writes, or, transposed, where the first reads
    ends = traced.calls[f"{prefix}{names[0]}"], traced.calls[f"{prefix}{names[-1]}"]
    positions = sum(
        replace(last, inputs=first.inputs, transposed=module.operator.transposed).positions
        for first, last in zip(*ends, strict=True)
    )
    return torch.Size(module.weight_shape).numel() * positions, after


def _checked(model: nn.Module, plan: Plan) -> list[tuple[Layer, LayerPlan]]:
    """Returns what is to be replaced, or raises before anything is."""
    found = {alias: layer for layer in list_layers(model) for alias in layer.aliases}
    pairs = []
    planned = {p.name: p for p in plan.factorised}
    kept = {p.name for p in plan.layers if p.is_dense and p.type == FactorisedLayer.__name__}  # by an earlier plan
    for name, layer in found.items():
        expected = name in planned or name in kept
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
        msg = f"{where} has the unknown kind {planned.kind!r} in the plan.{did_you_mean(planned.kind, DECOMPOSITIONS)}"
        raise PlanMismatchError(msg)
    refusal = decomposition.unsupported(layer.operator)
    largest = decomposition.max_ranks(layer.operator.shape) if refusal is None else ()
    fits = len(planned.ranks) == len(largest) and all(1 <= r <= m for r, m in zip(planned.ranks, largest, strict=True))
    if refusal is not None or not fits:
        why = refusal or f"its ranks go up to {largest}"
        msg = f"{where} cannot become {planned.kind} with ranks {planned.ranks}: {why}."
        raise PlanMismatchError(msg)


def _build(layer: Layer, planned: LayerPlan, metric: Metric | None, *, decompose: bool) -> FactorisedLayer:
    dense, weight = layer.module, cast(nn.Parameter, layer.module.weight)
    decomposition = DECOMPOSITIONS[planned.kind]
    children = children_of(decomposition, dense, planned.ranks)
    factors: dict[str, Tensor] = {}
    if decompose:
        with threads_for(weight):
            whole = layer.canonical_weight().detach().to("cpu", torch.float64)
            factors = factorise_in(planned.kind, whole, planned.ranks, metric, layer.operator.groups)
    for name, child in children.items():
        shape = cast(Tensor, child.weight).shape
        value = own_layout(child, factors[name]).reshape(shape) if decompose else torch.zeros(shape)
        child.weight = nn.Parameter(_like(value, weight), requires_grad=weight.requires_grad)
    if "bias" in dense._parameters:
        last = children[list(children)[-1]]
        last.register_parameter("bias", cast("nn.Parameter | None", dense.bias))
    make = FactorisedBag if isinstance(dense, nn.EmbeddingBag) else FactorisedLayer
    new = make(children, dense=dense, decomposition=decomposition, ranks=planned.ranks)
    new.error = planned.error
    for hooks in HOOKS:
        new.__dict__[hooks] = dense.__dict__[hooks]  # the same dict objects, so handles keep working
    return new.train(dense.training)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """Returns the value in the weight's dtype, device and memory format."""
    value = value.to(weight.device, weight.dtype).contiguous()
    channels_last = weight.ndim == 4 and not weight.is_contiguous()  # noqa: PLR2004
    if channels_last and weight.is_contiguous(memory_format=torch.channels_last):
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _put(model: nn.Module, replacement: Replacement, module: nn.Module) -> None:
    for alias in replacement.aliases:
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

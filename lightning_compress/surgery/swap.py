"""Checks a whole plan against the model, then replaces the layers; all or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lightning_compress.analysis.agreement import unfusing_as_the_model_allows
from lightning_compress.analysis.inventory import Layer, list_layers
from lightning_compress.analysis.statistics import Statistics, require_inputs
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.analysis.usable import require_module, require_usable_weights
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.compiled_names import plan_as_named, renaming_for
from lightning_compress.core.errors import ConfigurationError, ForwardMismatchError, PlanMismatchError
from lightning_compress.core.interrupts import uninterrupted
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.core.progress import Progress, reporting, silent
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, known_kinds
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.memory_format import (
    CHANNELS_LAST,
    outside_channels_last,
    put_back_,
    put_in_channels_last_,
)
from lightning_compress.layers.unfused import Unfusing, put_, redo_, undo_, unfusable, unfuse_
from lightning_compress.surgery.build import build_joint_layers, build_layer, build_tied_layer
from lightning_compress.surgery.embodied import owners_of
from lightning_compress.surgery.forward_check import ForwardCheck, checked
from lightning_compress.surgery.pretrained import follow_structure
from lightning_compress.surgery.stale import note_replaced, note_restored


@dataclass(frozen=True)
class Replacement:
    """One layer that was replaced.

    Attributes:
        aliases: Every name the layer is registered under.
        dense: The module that was there.
        factorised: The module that is there now; both hold the same bias Parameter.
        unfusing: Of the attention or recurrent layer that was unfused for it, None if none was.
        relaid: Weights of other layers that are put in channels-last format with it; the first replacement has all.
    """

    aliases: tuple[str, ...]
    dense: nn.Module
    factorised: FactorisedLayer
    unfusing: Unfusing | None = None
    relaid: tuple[nn.Parameter, ...] = ()


def apply_plan_(
    model: nn.Module,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    example_input: ExampleInput | None = None,
    progress: Progress | None = None,
) -> tuple[Replacement, ...]:
    """Replaces the planned layers by factorised ones, in place.

    The whole plan is checked and every factor computed before the first layer is touched, so a
    failure leaves the model as it was. Biases stay the same Parameters and forward and backward
    hooks move along with their handles; dtype, device, mode and `requires_grad` are inherited, and
    so is the memory format unless the plan puts the whole model in channels-last format; the global
    random state is not used. Layers that are already factorised as
    planned are left alone. Attention and recurrent layers are unfused if one of their projections
    is factorised; the others stay as they are.

    Args:
        model: The model the plan was made for, or one of the same architecture.
        plan: From `search_ranks` or `Plan.from_json`.
        statistics: From `gather_statistics`: the factors are fitted to the layers' outputs on
            inputs of these moments, else to the weights; also where the plan's errors are those of the weights.
        example_input: See `search_ranks`: the model is run on it once before and once after the swap, see
            `surgery.forward_check`; without it a model whose code looks at the class of its layers goes unnoticed.
        progress: Called with what is being done and the fraction done.

    Returns:
        What was replaced by what.

    Raises:
        ConfigurationError: If `plan` is no Plan.
        PlanMismatchError: If a planned layer is missing, of another type or shape, cannot be
            factorised, or its kind or ranks are impossible.
        NonFiniteWeightError: If a parameter holds NaN or infinite values.
        ForwardMismatchError: If the model runs another computation with the factorised layers.
        InfeasibleBudgetError: If the plan's budget of MACs is missed by what really runs.
    """
    return apply_checked_(model, plan, statistics=statistics, example_input=example_input, progress=progress)[0]


def apply_checked_(
    model: nn.Module,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    example_input: ExampleInput | None = None,
    progress: Progress | None = None,
    decompose: bool = True,
) -> tuple[tuple[Replacement, ...], Plan]:
    """Like `apply_plan_`, and returns the plan with the multiply-accumulates that the model really runs.

    Without decomposing the factors are zeros, as of `apply_shells_`, and the model is checked all the same.
    """
    require_usable_weights(model)
    require_inputs(example_input, None, statistics)
    report = reporting(progress)
    if isinstance(cast(Any, plan), Plan):
        plan = plan_as_named(plan, renaming_for(model))
    with unfusing_as_the_model_allows(model, example_input):
        check = ForwardCheck.of(model, example_input) if example_input is not None else None
        replacements = _replace(model, plan, report, statistics, decompose=decompose)
        if check is None or not replacements:
            return replacements, plan
        return replacements, _checked_plan(model, plan, check, replacements)


def _checked_plan(model: nn.Module, plan: Plan, check: ForwardCheck, replacements: Sequence[Replacement]) -> Plan:
    """Returns the plan as it really runs; an error undoes the swap."""
    pairs = [(r.aliases[0], r.dense, r.factorised) for r in replacements]
    try:
        return checked(check, plan, pairs)
    except ForwardMismatchError:
        uninstall(model, replacements)
        if check.is_reproducible():
            raise
        install(model, replacements)
        return plan
    except BaseException:
        uninstall(model, replacements)
        raise


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
    channels_last = plan.memory_format == CHANNELS_LAST
    try:
        pairs = _checked(model, plan)
        replacements = []
        for group in _groups(pairs):
            metrics = [_metric_of(layer, planned, statistics) for layer, planned in group]
            with torch.inference_mode(mode=False):
                built = build_joint_layers(group, metrics, decompose=decompose)
            for (layer, _), new in zip(group, built, strict=True):
                replacements.append(Replacement(layer.aliases, layer.module, new, _unfusing_of(layer, unfusings)))
        pairs = [(layer, planned) for layer, planned in pairs if planned.joint_with is None]
        for index, (layer, planned) in enumerate(pairs):
            progress("factorising layers", index / len(pairs))
            with torch.inference_mode(mode=False):  # parameters made in inference mode could never be trained
                metric = _metric_of(layer, planned, statistics)
                new = build_layer(layer, planned, metric, decompose=decompose, channels_last=channels_last)
            replacements.append(Replacement(layer.aliases, layer.module, new, _unfusing_of(layer, unfusings)))
            for aliases, partner in layer.partners:
                replacements.append(Replacement(aliases, partner, build_tied_layer(partner, new)))
        progress("factorising layers", 1.0)
    except BaseException:
        undo_(model, unfusings)
        raise
    if channels_last and replacements:
        replacements[0] = dataclasses.replace(replacements[0], relaid=_others(model, replacements))
    try:
        install(model, replacements)
    except BaseException:
        uninstall(model, replacements)
        raise
    return tuple(replacements)


def _others(model: nn.Module, replacements: Sequence[Replacement]) -> tuple[nn.Parameter, ...]:
    """Returns the weights of all layers that are not replaced and are not in channels-last format."""
    replaced = {id(parameter) for r in replacements for parameter in r.dense.parameters()}
    return tuple(p for p in outside_channels_last(model.parameters()) if id(p) not in replaced)


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
    """Puts the factorised layers in, under every name, and the weights of others in their format."""
    with uninterrupted():
        redo_(model, _unfusings(replacements))
        for replacement in replacements:
            put_(model, replacement.aliases, replacement.factorised)
            put_in_channels_last_(replacement.relaid)
        follow_structure(model)
        note_replaced({r.aliases[0]: r.dense for r in replacements})


def uninstall(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Puts the dense layers back, under every name, and the weights of others in the format they had."""
    with uninterrupted():
        note_restored([r.dense for r in replacements])
        for replacement in replacements:
            put_(model, replacement.aliases, replacement.dense)
            put_back_(replacement.relaid)
        undo_(model, _unfusings(replacements))
        follow_structure(model)


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
        if planned.joint_with is not None:
            groups.setdefault(planned.joint_with, []).append((layer, planned))
    for name, group in groups.items():
        if (
            len({(p.kind, p.ranks, p.weight_shape[1], layer.type) for layer, p in group}) > 1
            or group[0][1].kind != "svd"
        ):
            msg = f"the plan's layers that share the first factor of {name!r} differ in kind, rank or inputs."
            raise PlanMismatchError(msg)
        if any(layer.partners or not isinstance(layer.plain, nn.Linear) for layer, _ in group):
            msg = f"the plan's layers that share the first factor of {name!r} are not all linear, with own weights."
            raise PlanMismatchError(msg)
    return list(groups.values())

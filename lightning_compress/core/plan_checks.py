"""Ranges and relations of a plan's fields, the same for plans from code and from files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning_compress.core.checks import is_count, is_number, shown
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.settings import Budget

if TYPE_CHECKING:
    from lightning_compress.core.plan import LayerPlan, Plan

MEMORY_FORMATS = ("channels_last", None)
DEEPEST = 8
"""Lists and mappings in each other in what a plan says of its target."""


def check_layer(layer: LayerPlan) -> None:
    """Checks the fields of a layer's entry.

    Raises:
        ConfigurationError: If one has a wrong type or is out of range.
    """
    where = f"layer {shown(layer.name)}"
    for name in ("name", "type", "kind"):
        _require(isinstance(getattr(layer, name), str), where, name, layer, "a string")
    for name in ("reason", "source", "joint_with"):
        _require(isinstance(getattr(layer, name), (str, type(None))), where, name, layer, "a string or nothing")
    for name in ("ranks", "weight_shape"):
        numbers = cast(Any, getattr(layer, name))
        whole = isinstance(numbers, tuple) and all(is_count(number, 1) for number in numbers)
        _require(whole, where, name, layer, "whole numbers above 0")
    for name in ("params_before", "params_after", "macs_before", "macs_after", "samples"):
        optional = not name.startswith("params")
        _require(_is_size(getattr(layer, name), optional=optional), where, name, layer, _SIZE)
    for name in ("error_spread", "latency_before", "latency_after"):
        _require(_is_amount(getattr(layer, name)), where, name, layer, _AMOUNT)
    _require(is_number(layer.error) and 0 <= layer.error <= 1, where, "error", layer, "a number in [0, 1]")
    _require(isinstance(cast(Any, layer.merged), bool), where, "merged", layer, "true or false")
    _require(
        layer.is_dense == (not layer.ranks),
        where,
        "ranks",
        layer,
        f"{'none' if layer.is_dense else 'some'} for {layer.kind!r}",
    )
    _require(layer.is_dense or bool(layer.weight_shape), where, "weight_shape", layer, f"some for {layer.kind!r}")


def check_plan(plan: Plan) -> None:
    """Checks the fields of a plan, and that its layers fit together.

    Raises:
        ConfigurationError: If a field has a wrong type or is out of range, two layers have one name, or one shares the
            first factor of a layer that the plan does not factorise.
    """
    where = "the plan"
    for name in ("dense", "compressed"):
        _require(isinstance(getattr(plan, name), Costs), where, name, plan, "Costs")
    _require(isinstance(cast(Any, plan.budget), (Budget, type(None))), where, "budget", plan, "a Budget or nothing")
    for name in ("method", "objective", "source"):
        _require(isinstance(getattr(plan, name), (str, type(None))), where, name, plan, "a string or nothing")
    _require(isinstance(cast(Any, plan.data_free), bool), where, "data_free", plan, "true or false")
    for name in ("seconds", "predicted_latency"):
        _require(_is_amount(getattr(plan, name)), where, name, plan, _AMOUNT)
    for name in ("optimality_gap", "output_distance"):
        value = getattr(plan, name)
        _require(_is_amount(value) or value == math.inf, where, name, plan, "a number of at least 0 or nothing")
    _require(plan.seed is None or is_count(plan.seed), where, "seed", plan, _SIZE)
    _require(plan.memory_format in MEMORY_FORMATS, where, "memory_format", plan, "'channels_last' or nothing")
    timings = cast(Any, plan.timings)
    known = isinstance(timings, Mapping) and all(isinstance(k, str) and _is_amount(v) for k, v in timings.items())
    _require(known, where, "timings", plan, "seconds by name")
    cut = cast(Any, plan.cut)
    known = isinstance(cut, Mapping) and all(isinstance(word, str) for item in cut.items() for word in item)
    _require(known, where, "cut", plan, "a text by name")
    target = cast(Any, plan.target)
    known = target is None or (isinstance(target, Mapping) and _is_plain(target, DEEPEST))
    _require(known, where, "target", plan, f"strings and numbers by name, at most {DEEPEST} in each other")
    _check_relations(plan)


def _check_relations(plan: Plan) -> None:
    found: dict[str, LayerPlan] = {}
    layers = cast(Any, plan.layers)
    for layer in layers if isinstance(layers, tuple) else (layers,):
        if not hasattr(layer, "joint_with"):
            msg = f"the plan: 'layers' holds {shown(layer)}, expected a tuple of LayerPlan."
            raise ConfigurationError(msg)
        if layer.name in found:
            msg = f"the plan: layer {layer.name!r} is there twice."
            raise ConfigurationError(msg)
        found[layer.name] = layer
    for layer in found.values():
        first = found.get(layer.joint_with) if layer.joint_with is not None else None
        if layer.joint_with is not None and (layer.is_dense or first is None or first.joint_with != layer.joint_with):
            msg = (
                f"the plan: layer {layer.name!r} shares the first factor of {layer.joint_with!r}, which is no "
                "factorised layer of the plan that shares it."
            )
            raise ConfigurationError(msg)


_SIZE = "a whole number of at least 0"
_AMOUNT = "a number of at least 0, or nothing"


def _require(holds: bool, where: str, name: str, owner: object, expected: str) -> None:
    if not holds:
        value = getattr(owner, name)
        value = list(value) if isinstance(value, tuple) else value
        msg = f"{where}: {name!r} is {shown(value)}, expected {expected}"
        raise ConfigurationError(msg)


def _is_size(value: object, *, optional: bool) -> bool:
    return is_count(value) or (optional and value is None)


def _is_amount(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 0)


def _is_plain(value: object, deepest: int) -> bool:
    """Returns whether a value can be written as JSON and read by people."""
    if isinstance(value, Mapping):
        return deepest > 0 and all(isinstance(k, str) and _is_plain(v, deepest - 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return deepest > 0 and all(_is_plain(entry, deepest - 1) for entry in value)
    return value is None or isinstance(value, (str, bool)) or is_number(value)

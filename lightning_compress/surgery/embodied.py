"""The plan that a factorised model embodies, read off its layers; and which layer the factors belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import Layer, list_layers
from lightning_compress.analysis.trace import ExampleInput, Trace, trace
from lightning_compress.core.costs import Costs
from lightning_compress.core.plan import DENSE, LayerPlan, Plan
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.factorised import FactorisedLayer, is_wrapper
from lightning_compress.layers.families import children_of
from lightning_compress.layers.memory_format import CHANNELS_LAST, is_channels_last
from lightning_compress.layers.unfused import unfused


def embodied_plan(model: nn.Module, example_input: ExampleInput | None = None) -> Plan:
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
    layers, saved_bytes = [], 0
    counted: dict[int, str] = {}
    for layer in listed:
        if owners.get(layer.name) != layer.name:
            layers.append(_not_factorised(layer, owners.get(layer.name)))
            continue
        module = cast(FactorisedLayer, layer.module)
        factors = list(stored_factors(module).values())
        again = sum(f.numel() for f in factors if id(f) in counted)  # that of a layer before
        counted.update({id(f): layer.name for f in factors if id(f) not in counted})
        shares = counted[id(factors[0])] if _is_shared(factors[0], listed, owners) else None
        macs = _macs_of([twin for twin in listed if owners.get(twin.name) == layer.name], traced)
        planned = _as_planned(layer, module, again, macs, shares)
        layers.append(planned)
        saved = planned.params_before - planned.params_after - module.dense_spared[0]
        buffers = sum(b.numel() * b.element_size() for b in module.buffers())
        saved_bytes += saved * factors[0].element_size() - buffers + module.dense_spared[1]
    now = measure_costs(model, macs=traced.macs if traced is not None else None)
    saved_params = sum(p.params_before - p.params_after for p in layers)
    saved_macs = sum((p.macs_before or 0) - (p.macs_after or 0) for p in layers)
    macs_before = now.macs + saved_macs if now.macs is not None else None
    dense = Costs(now.params + saved_params, macs_before, now.bytes + saved_bytes)
    return Plan(tuple(layers), dense, now, memory_format=CHANNELS_LAST if is_channels_last(model) else None)


def stored_factors(layer: FactorisedLayer) -> dict[str, Tensor]:
    """Returns the factors of a layer by name; those inside an adapter or another wrapper where one was put around them.

    Raises:
        UnsupportedError: If a wrapper holds none of the right shape.
    """
    children = dict(layer.named_children())
    if not any(map(is_wrapper, children.values())):
        return layer.factors()
    expected = children_of(DECOMPOSITIONS[layer.kind], layer.template, layer.ranks)
    found: dict[str, Tensor] = {}
    for name, child in children.items():
        shape = cast(Tensor, expected[name].weight).shape
        inside = [p for p in child.parameters() if p.shape == shape] if is_wrapper(child) else [child.weight]
        if not inside:
            return layer.factors()
        found[name] = cast(Tensor, inside[0])
    return found


def _not_factorised(layer: Layer, owner: str | None) -> LayerPlan:
    """Returns the entry of a layer that is dense, or whose factors are those of another one, its owner."""
    module = layer.module
    reason = f"its weight is that of {owner!r} and is factorised with it" if owner else layer.reason
    name = module.dense_type if isinstance(module, FactorisedLayer) else layer.type
    return LayerPlan(layer.name, name, DENSE, (), (), 0.0, layer.parameters, layer.parameters, reason=reason)


def _as_planned(
    layer: Layer, module: FactorisedLayer, again: int, macs: tuple[int | None, int | None], joint_with: str | None
) -> LayerPlan:
    """Returns the entry of a factorised layer, of whose numbers so many are counted with an earlier one."""
    stored = sum(factor.numel() for factor in stored_factors(module).values())
    after = layer.parameters - again
    return LayerPlan(
        layer.name,
        module.dense_type,
        module.kind,
        module.ranks,
        module.weight_shape,
        module.error if module.error is not None else 0.0,
        params_before=after + torch.Size(module.weight_shape).numel() - stored + again + module.dense_spared[0],
        params_after=after,
        macs_before=macs[0],
        macs_after=macs[1],
        joint_with=joint_with,
        merged=module.merged,
    )


def _is_shared(factor: Tensor, layers: Sequence[Layer], owners: Mapping[str, str]) -> bool:
    """Returns whether layers that own their other factors have this one in common."""
    holders = [
        layer
        for layer in layers
        if isinstance(layer.module, FactorisedLayer)
        and owners[layer.name] == layer.name
        and any(own is factor for own in stored_factors(layer.module).values())
    ]
    return len(holders) > 1


def owners_of(layers: Sequence[Layer]) -> dict[str, str]:
    """Returns for each factorised layer the one whose factors it uses: itself, or that it shares a weight with."""
    groups: dict[frozenset[int], list[Layer]] = {}
    for layer in layers:
        if isinstance(layer.module, FactorisedLayer):
            groups.setdefault(frozenset(map(id, stored_factors(layer.module).values())), []).append(layer)
    owners = {}
    for group in groups.values():
        first = next((one for one in group if cast(FactorisedLayer, one.module).operator.lookup), group[0])
        owners.update({layer.name: first.name for layer in group})
    return owners


def _macs_of(layers: Sequence[Layer], traced: Trace | None) -> tuple[int | None, int | None]:
    """Returns the MACs of some layers when dense and as they run, over all traced calls."""
    if traced is None:
        return None, None
    before = after = 0
    for layer in layers:
        module, calls = cast(FactorisedLayer, layer.module), traced.calls[layer.name]
        operator, ranks = module.operator, np.array([module.ranks])
        own = torch.Size(module.weight_shape).numel() * sum(call.positions for call in calls)
        operator, ranks, macs = module.operator, np.array([module.ranks]), DECOMPOSITIONS[module.kind].macs
        by_factors = operator.groups * sum(int(macs(operator.shape, ranks, call)[0]) for call in calls)
        before += own
        after += own if module.merged else by_factors
    return before, after

"""Names in a model whose parts are compiled, and in the same model without.

`torch.compile(module)` is a wrapper that holds the module as `_orig_mod`, which becomes a part of every name below it.
What was saved with the wrapper is found without it, and the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_compress.core.plan import Plan

_WRAPPED = "_orig_mod"


def renaming_for(model: nn.Module) -> Callable[[str], str]:
    """Returns what turns the names of a module or tensor, of whichever of the two models, into those of this one."""
    wrappers = [name for name, module in model.named_modules() if _WRAPPED in module._modules]

    def rename(name: str) -> str:
        parts = [part for part in name.split(".") if part != _WRAPPED]
        for wrapper in wrappers:  # from the outside in
            above = wrapper.split(".") if wrapper else []
            if parts[: len(above)] == above and len(parts) > len(above):
                parts.insert(len(above), _WRAPPED)
        return ".".join(parts)

    return rename


def plan_as_named(plan: Plan, rename: Callable[[str], str]) -> Plan:
    """Returns the plan with its layers renamed, itself if no name changes."""
    layers = tuple(
        dataclasses.replace(
            layer, name=rename(layer.name), joint_with=None if layer.joint_with is None else rename(layer.joint_with)
        )
        for layer in plan.layers
    )
    return plan if layers == plan.layers else dataclasses.replace(plan, layers=layers)


def state_as_named(state: Mapping[str, Any], rename: Callable[[str], str]) -> Mapping[str, Any]:
    """Returns a state dict with its entries renamed, itself if no name changes."""
    names = {name: rename(name) for name in state}
    if all(name == now for name, now in names.items()):
        return state
    renamed = {names[name]: value for name, value in state.items()}
    return renamed if len(renamed) == len(state) else state

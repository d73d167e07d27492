"""The names of a plan's layers, as another module sees them."""

from __future__ import annotations

from dataclasses import replace

from lightning_compress.core.checks import shown
from lightning_compress.core.errors import PlanError
from lightning_compress.core.plan import Plan


def plan_below(plan: Plan, name: str) -> Plan:
    """Returns a plan with the names that its layers have in a submodule, which it can be applied to.

    Args:
        plan: Of a module.
        name: Of the submodule that all of its layers are in; "" for the module itself.

    Raises:
        PlanError: If a layer is not in it.
    """
    outside = [layer.name for layer in plan.layers if not _is_below(layer.name, name)]
    if outside:
        msg = f"the plan has layers that are not in {shown(name)}: {', '.join(map(shown, outside[:3]))}."
        raise PlanError(msg)
    layers = [
        replace(
            layer,
            name=_below(layer.name, name),
            joint_with=None if layer.joint_with is None else _below(layer.joint_with, name),
        )
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers))


def _is_below(layer: str, name: str) -> bool:
    return not name or layer == name or layer.startswith(f"{name}.")


def _below(layer: str, name: str) -> str:
    return "" if layer == name else layer.removeprefix(f"{name}.")

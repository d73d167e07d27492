"""Bounds on a submodule alone, as bounds on the whole model of which nothing else is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import list_layers
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.errors import BudgetError
from lightning_compress.core.plan import Plan
from lightning_compress.core.settings import Budget


def outside_excluded(model: nn.Module, budget: Budget, selection: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the selection of layers without those outside the submodule that a budget is of.

    Raises:
        BudgetError: If there is no such submodule, or it holds no parameters.
    """
    if budget.of is None:
        return dict(selection)
    parts = {name for name, part in model.named_modules() if name and any(True for _ in part.parameters())}
    if budget.of not in parts:
        close = did_you_mean(budget.of, sorted(parts))
        msg = f"Budget(of={budget.of!r}): no submodule of {type(model).__name__} with parameters has that name.{close}"
        raise BudgetError(msg)
    outside = [layer.name for layer in list_layers(model) if not is_within(layer.name, budget.of)]
    given = selection.get("exclude") or ()
    return {**selection, "exclude": [*([given] if isinstance(given, str) else given), *filter(None, outside)]}


def of_the_whole(model: nn.Module, budget: Budget) -> Budget:
    """Returns the budget of the whole model that a budget of a submodule is, where nothing else changes."""
    if budget.of is None:
        return budget
    whole, part = measure_costs(model), measure_costs(model.get_submodule(budget.of))
    limits = {
        name: 1 - (1 - limit) * getattr(part, name) / getattr(whole, name) for name, limit in budget.limits().items()
    }
    return replace(budget, of=None, **limits)


def is_within(name: str, part: str) -> bool:
    """Returns whether a module is a part or in it."""
    return name == part or name.startswith(f"{part}.")


def kept_of(plan: Plan, resource: str, part: str | None) -> float | None:
    """Returns the kept fraction of a resource, of the whole model or of the parameters of a part."""
    if part is None:
        return plan.kept[resource]
    layers = [layer for layer in plan.layers if is_within(layer.name, part)]
    before = sum(layer.params_before for layer in layers)
    return sum(layer.params_after for layer in layers) / before if before else None

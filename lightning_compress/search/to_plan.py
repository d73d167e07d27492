"""From a choice to the plan that says it."""

from __future__ import annotations

from dataclasses import replace
from warnings import warn

import numpy as np

from lightning_compress.analysis.inspection import Inspection
from lightning_compress.analysis.reasons import NEEDS_ADAPTER
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.plan import DENSE, LayerPlan, Plan, percent
from lightning_compress.core.settings import Budget, SearchSettings
from lightning_compress.kinds.base import Ints
from lightning_compress.search.choice import Choice
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import output_distance
from lightning_compress.search.problem import Problem, costs_after
from lightning_compress.search.safeguards import MOST_OF_A_LAYER, gives_up_most
from lightning_compress.search.units import Unit, planned_layer

CERTIFICATE_GAP = 1e-3
"""Relative gap to which the lower bound of the certificate is worked out."""


def to_plan(
    found: Choice, inspection: Inspection, budget: Budget, settings: SearchSettings, timings: dict[str, float]
) -> Plan:
    """Returns the plan of a choice.

    Args:
        found: The choice.
        inspection: Of the model.
        budget: That it keeps.
        settings: Of the search.
        timings: Seconds by part.
    """
    statistics, outputs, weighs = found.statistics, found.outputs, found.objective == "weight"
    timing, compressed = found.problem.timing, costs_after(found.problem, found.rows, inspection.costs)
    layers = tuple(_layer_plans(found, inspection))
    return Plan(
        layers=layers,
        dense=replace(inspection.costs, latency=timing.best if timing is not None else None),
        compressed=replace(compressed, latency=found.measured or compressed.latency),
        budget=budget,
        method=settings.method,
        objective=found.objective,
        source="weight" if statistics is None or weighs else statistics.source,
        data_free=statistics is None or statistics.data_free,
        optimality_gap=_gap(found.problem, found.rows),
        output_distance=output_distance(outputs, found.problem, found.rows) if outputs is not None else None,
        timings=timings,
        seed=settings.seed,
        target=timing.as_dict() if timing is not None else None,
        predicted_latency=compressed.latency,
        memory_format=timing.changed_format if timing is not None and any(not p.is_dense for p in layers) else None,
    )


def warn_of_layers_given_up(plan: Plan) -> None:
    """Warns of each layer that loses most of itself while most of the model stays dense."""
    for layer in gives_up_most(plan.layers):
        msg = (
            f"layer {layer.name!r} loses {100 * layer.error:.0f} % of its energy ({layer.kind}, ranks {layer.ranks}) "
            "while most of the model stays dense: let more layers be factorised (include, exclude, kinds), raise its "
            "min_rank by overrides, or raise the budget."
        )
        warn(msg, CompressionWarning, stacklevel=4)
    _warn_of_classes(plan)


def _warn_of_classes(plan: Plan) -> None:
    """Warns of layers that lose most of themselves because the classes of most of the model are not known."""
    unknown: dict[str, int] = {}
    for layer in plan.layers:
        if layer.reason is not None and layer.reason.endswith(NEEDS_ADAPTER):
            unknown[layer.type] = unknown.get(layer.type, 0) + layer.params_before
    share = sum(unknown.values()) / plan.dense.params
    for layer in plan.layers if share > MOST_OF_A_LAYER else ():
        if layer.error > MOST_OF_A_LAYER:
            largest = max(unknown, key=lambda name: unknown[name])
            msg = (
                f"layer {layer.name!r} loses {percent(layer.error)} of its energy ({layer.kind}, ranks {layer.ranks}) "
                f"while {percent(share)} of the parameters stay dense because nothing is known of their class "
                f"({', '.join(unknown)}). Say what such a layer does, as in register_layer_adapter({largest}, "
                "LayerAdapter(nn.Conv2d, before=…)), or raise the budget."
            )
            warn(msg, CompressionWarning, stacklevel=5)


def _layer_plans(found: Choice, inspection: Inspection) -> list[LayerPlan]:
    planned: dict[str, LayerPlan] = {}
    for unit, table, row in zip(found.units, found.problem.layers, found.rows, strict=True):
        for plan in unit.plans(table, int(row), inspection.trace, found.statistics):
            planned[plan.name] = _timed(plan, unit, found)
    return [
        planned[layer.name] if layer.name in planned else planned_layer(layer, None, 0, inspection.trace, None)
        for layer in inspection.layers
    ]


def _timed(plan: LayerPlan, unit: Unit, found: Choice) -> LayerPlan:
    """Returns the entry of a layer with its predicted seconds."""
    timing = found.problem.timing
    layer = next((layer for layer in unit.layers if layer.name == plan.name), None)
    if timing is None or layer is None:
        return plan
    form = (DENSE, ()) if plan.merged else (plan.kind, plan.ranks)
    before, after = timing.layer_seconds(layer, DENSE, ()), timing.layer_seconds(layer, *form)
    return replace(plan, latency_before=before, latency_after=after)


def _gap(problem: Problem, choice: Ints) -> float:
    value, bound = problem.loss_of(choice), solve(problem, rel_gap=CERTIFICATE_GAP).bound
    if value <= max(bound, np.finfo(float).eps):
        return 0.0
    return (value - bound) / bound if bound > 0 else float("inf")

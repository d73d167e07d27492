"""`search_ranks`: from a model and a budget to a plan. The model is never changed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from lightning_compress.candidates import DENSE, Candidates, dense_macs, tabulate
from lightning_compress.config import RESOURCES, Budget, did_you_mean, require_count
from lightning_compress.costs import Costs, measure_costs
from lightning_compress.decompositions import AUTOMATIC, resolve_kinds
from lightning_compress.decompositions.base import Floats, Ints
from lightning_compress.errors import (
    ConfigurationError,
    ExampleInputError,
    InfeasibleBudgetError,
    UnsupportedError,
)
from lightning_compress.inventory import Layer, Patterns, require_usable_weights, take_inventory
from lightning_compress.moments import Statistics, gather_statistics
from lightning_compress.plan import LayerPlan, Plan
from lightning_compress.progress import Progress, silent
from lightning_compress.search.alds import ALDS_KINDS, search_alds
from lightning_compress.search.continuous import search_continuous
from lightning_compress.search.energy import search_energy
from lightning_compress.search.exact import search_exact, smallest, solve
from lightning_compress.search.paper import search_paper
from lightning_compress.search.problem import Problem, Strategy
from lightning_compress.search.uniform import search_uniform
from lightning_compress.tracing import ExampleInput, Trace, trace

STRATEGIES: dict[str, Strategy] = {
    "continuous": search_continuous,
    "exact": search_exact,
    "uniform": search_uniform,
    "energy": search_energy,
    "alds": search_alds,
    "paper": search_paper,
}
"""Method to strategy."""

ON_WEIGHTS = ("alds", "paper")
"""Published methods whose criterion is on the weights: objective "auto" is "weight" for them."""

CERTIFICATE_GAP = 1e-3
"""Relative gap to which the lower bound of the certificate is worked out."""

OBJECTIVES = ("auto", "weight", "moments")
_RESERVED_OBJECTIVES = ("end_to_end",)


def search_ranks(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    *,
    example_input: ExampleInput | None = None,
    method: str = "continuous",
    objective: str = "auto",
    kinds: str | Sequence[str] = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Mapping[str, Any] | None = None,
    rank_multiple: int = 1,
    seed: int = 0,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Chooses kind and ranks of every layer, from the weights alone.

    The plan keeps every budget, makes no layer larger than dense or, where MACs are known,
    slower in MACs, and says how far it is at most from the optimum (`plan.optimality_gap`).

    Args:
        model: Any module; it is not changed.
        budget: Upper bounds, see `Budget`.
        example_input: A tensor, a tuple or dict of a forward pass's arguments, or a shape with
            its batch dimension. Needed for a budget in MACs; used to find layers whose weight
            is used outside their own forward.
        method: "continuous", "exact", "uniform", "energy", or a published method to compare with:
            "alds" (Liebenwein et al. 2021), "paper" (arXiv 2409.03555).
        objective: What e is in Σ −log(1 − e): "weight", the relative error of the weights;
            "moments", that of the layers' outputs, for inputs with the second moments of
            `statistics`; "auto" is "moments" if statistics are given, else "weight", and always
            "weight" for the published methods, whose criterion is on the weights.
        kinds: "auto", a kind, or a list of kinds to choose from. "auto" is svd, channel_svd,
            spatial_svd and tucker2; for "alds" svd, channel_svd, split2_svd and split4_svd.
        include: Names, globs, class names or classes of layers to factorise, None for all.
        exclude: Likewise for layers to leave alone.
        overrides: Pattern to `Override`, a mapping of its fields, or "dense".
        rank_multiple: Ranks are multiples of this number.
        seed: Of the synthetic inputs.
        statistics: From `gather_statistics`; made with `example_input` if they are needed.
        progress: Called with what is being done and the fraction done.

    Returns:
        A frozen plan for `apply_plan_`.

    Raises:
        ConfigurationError: If an argument has a wrong type, name or value.
        BudgetError: If a budget is malformed; InfeasibleBudgetError, with the smallest
            reachable budget, if no plan keeps it.
        SelectionError: If a pattern matches no layer.
        ModelError: If the model has lazy or non-finite weights, fails on the example input,
            or holds nothing to factorise.
    """
    start = time.perf_counter()
    budget = Budget.from_value(budget)
    check_settings(method, objective, rank_multiple, seed)
    require_usable_weights(model)
    automatic = ALDS_KINDS if method == "alds" else AUTOMATIC
    kinds = resolve_kinds(kinds, automatic)
    selection: dict[str, Any] = {"kinds": kinds, "include": include, "exclude": exclude, "overrides": overrides}
    take_inventory(model, **selection)  # a wrong pattern shows before the model is run
    if "macs" in budget.limits() and example_input is None:
        msg = f"a budget in MACs ({budget}) needs example_input: a tensor, or a shape such as (1, 3, 224, 224)."
        raise ExampleInputError(msg)
    traced = trace(model, example_input) if example_input is not None else None
    layers = take_inventory(model, **selection, trace=traced)
    dense = measure_costs(model, macs=traced.macs if traced else None)
    report = progress or silent
    if objective == "weight" or (objective == "auto" and method in ON_WEIGHTS):
        statistics = None
    elif objective == "moments" and statistics is None:
        if example_input is None:
            msg = "objective='moments' needs statistics, or an example_input to make synthetic inputs with."
            raise ExampleInputError(msg)
        statistics = gather_statistics(model, example_input, seed=seed, progress=report)
    tables = _tabulate(layers, tuple(budget.limits()), rank_multiple, statistics, report)
    problem = _problem(tables, dense, budget)
    _require_feasible(problem, dense, budget)
    choice = STRATEGIES[method](problem, progress=report)
    return Plan(
        layers=tuple(_layer_plans(layers, problem, choice, traced)),
        dense=dense,
        compressed=_costs_after(problem, choice, dense),
        budget=budget,
        method=method,
        objective="weight" if statistics is None else "moments",
        source="weight" if statistics is None else statistics.source,
        data_free=statistics is None or statistics.data_free,
        optimality_gap=_gap(problem, choice),
        seconds=time.perf_counter() - start,
        seed=seed,
    )


def check_settings(method: object, objective: object, rank_multiple: object, seed: object) -> None:
    """Checks the settings of a search that need no model.

    Raises:
        ConfigurationError: If one is unknown or out of range.
        UnsupportedError: If the objective is not in this version.
    """
    if not isinstance(method, str) or method not in STRATEGIES:
        msg = f"search method {method!r} is unknown.{did_you_mean(method, STRATEGIES)}"
        raise ConfigurationError(msg)
    if objective in _RESERVED_OBJECTIVES:
        msg = f"objective={objective!r} is not in this version: use 'weight', or 'auto' for the best that is."
        raise UnsupportedError(msg)
    if objective not in OBJECTIVES:
        msg = f"objective={objective!r} is unknown.{did_you_mean(objective, OBJECTIVES)}"
        raise ConfigurationError(msg)
    require_count(f"rank_multiple={rank_multiple!r}", rank_multiple, 1)
    require_count(f"seed={seed!r}", seed, 0)


def _tabulate(
    layers: Sequence[Layer],
    budgeted: tuple[str, ...],
    rank_multiple: int,
    statistics: Statistics | None,
    progress: Progress,
) -> tuple[Candidates, ...]:
    chosen = [layer for layer in layers if layer.reason is None]
    tables = []
    for index, layer in enumerate(chosen):
        progress("decomposing layers", index / len(chosen))
        metric = statistics.metric(layer.name) if statistics is not None else None
        tables.append(tabulate(layer, budgeted=budgeted, rank_multiple=rank_multiple, metric=metric))
    progress("decomposing layers", 1.0)
    return tuple(tables)


def _problem(tables: tuple[Candidates, ...], dense: Costs, budget: Budget) -> Problem:
    totals = _vector(dense)
    rest = totals - np.sum([table.costs[-1] for table in tables], axis=0)
    budgeted = tuple(budget.limits())
    columns = [RESOURCES.index(name) for name in budgeted]
    fractions = np.array(list(budget.limits().values()))
    return Problem(tables, budgeted, limits=np.floor(totals[columns] * fractions + 1e-6) - rest[columns])


def _vector(costs: Costs) -> Floats:
    return np.array([costs.params, costs.macs or 0, costs.bytes], dtype=np.float64)


def _require_feasible(problem: Problem, dense: Costs, budget: Budget) -> None:
    cheapest = np.array([problem.costs(i).min(axis=0) for i in range(len(problem.layers))])  # (layers, b)
    totals = _vector(dense)[[RESOURCES.index(name) for name in problem.budgeted]]
    rest = totals - np.sum([problem.costs(i)[-1] for i in range(len(problem.layers))], axis=0)
    floor = (cheapest.sum(axis=0) + rest) / totals
    together = problem.fits(smallest(problem)) if (problem.limits > 0).all() else False
    if together:
        return
    floors = ", ".join(f"{name}={_round_up(value)}" for name, value in zip(problem.budgeted, floor, strict=True))
    alone = "" if len(problem.budgeted) == 1 else " (each alone; together they need more)"
    msg = (
        f"no plan keeps {budget}: the smallest reachable is {floors}{alone}. Layers that cannot be factorised, biases "
        "and norms count too; raise the budget, allow more kinds or layers, or lower min_rank."
    )
    raise InfeasibleBudgetError(msg)


def _round_up(fraction: float) -> str:
    return f"{np.ceil(fraction * 1e4) / 1e4:.4f}"


def _gap(problem: Problem, choice: Ints) -> float:
    value, bound = problem.loss_of(choice), solve(problem, rel_gap=CERTIFICATE_GAP).bound
    if value <= max(bound, np.finfo(float).eps):
        return 0.0
    return (value - bound) / bound if bound > 0 else float("inf")


def _costs_after(problem: Problem, choice: Ints, dense: Costs) -> Costs:
    saved = np.sum([t.costs[-1] - t.costs[row] for t, row in zip(problem.layers, choice, strict=True)], axis=0)
    params, macs, size = (_vector(dense) - saved).round().astype(int).tolist()
    return Costs(params, macs if dense.macs is not None else None, size)


def _layer_plans(layers: Sequence[Layer], problem: Problem, choice: Ints, traced: Trace | None) -> list[LayerPlan]:
    chosen = {table.name: (table, int(row)) for table, row in zip(problem.layers, choice, strict=True)}
    plans = []
    for layer in layers:
        table, row = chosen.get(layer.name, (None, 0))
        plans.append(_layer_plan(layer, table, row, traced))
    return plans


def _layer_plan(layer: Layer, table: Candidates | None, row: int, traced: Trace | None) -> LayerPlan:
    factorisable = table is not None
    known = traced is not None and factorisable
    if table is None:
        table = Candidates(layer.name, (DENSE,), ((),), np.zeros(1), np.zeros(1), 0.0, np.zeros((1, len(RESOURCES))))
        reason = layer.reason
    elif len(table) == 1:
        reason = "every candidate is larger or slower than the dense layer"
    else:
        reason = "the search keeps it dense: the budget is better spent here" if table.kinds[row] == DENSE else None
    saved = table.costs[-1] - table.costs[row]
    before = dense_macs(layer) if known else None
    return LayerPlan(
        name=layer.name,
        type=layer.type,
        kind=table.kinds[row],
        ranks=table.ranks[row],
        weight_shape=layer.weight_shape if factorisable else (),
        error=float(table.errors[row]),
        params_before=layer.parameters,
        params_after=layer.parameters - int(saved[0]),
        macs_before=before,
        macs_after=before - int(saved[1]) if before is not None else None,
        reason=reason,
    )


__all__ = ["OBJECTIVES", "STRATEGIES", "Strategy", "check_settings", "search_ranks"]

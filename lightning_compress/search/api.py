"""`search_ranks`: from a model and a budget to a plan. The model is never changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from warnings import warn

import numpy as np
from torch import nn
from typing_extensions import Unpack

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import (
    Layer,
    require_usable_weights,
    sharing_groups,
    take_inventory,
)
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.analysis.trace import ExampleInput, Trace, trace
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import (
    CompressionWarning,
    ExampleInputError,
    InfeasibleBudgetError,
)
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.parallel import current_processes, from_first, shared_map
from lightning_compress.core.plan import BETTER_ELSEWHERE, DENSE, LayerPlan, Plan
from lightning_compress.core.progress import Progress, silent
from lightning_compress.core.settings import RESOURCES, Budget, SearchKeywords, SearchSettings
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.kinds.registry import is_automatic
from lightning_compress.layers.unfused import with_opened
from lightning_compress.search.candidates import Candidates, dense_macs, tabulate, tabulate_shared, unseen_shared_errors
from lightning_compress.search.end_to_end import (
    LEAST_INPUTS,
    Outputs,
    affordable_inputs,
    output_distance,
    search_outputs,
)
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.refine import refined
from lightning_compress.search.safeguards import gives_up_most, spend_what_is_left, weights_alone
from lightning_compress.search.sensitivity import nearer, weighted
from lightning_compress.search.strategies import RegisteredStrategy, search_continuous, strategy_of

ACTIVATION_WEIGHT = 0.01
"""The signal loss that is accepted to write as many numbers less as all the dense layers write together."""

CERTIFICATE_GAP = 1e-3
"""Relative gap to which the lower bound of the certificate is worked out."""

BISECTIONS = 12
"""Plans tried for a quality target."""


def search_ranks(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    *,
    example_input: ExampleInput | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Plan:
    """Chooses kind and ranks of every layer, without data.

    The plan keeps every budget, makes no layer larger than dense or, where MACs are known,
    slower in MACs, and says how far it is at most from the optimum (`plan.optimality_gap`).
    The projections of attention and recurrent layers are layers of their own in it (see `layers.unfused`).

    Args:
        model: Any module; it is not changed.
        budget: Upper bounds, see `Budget`.
        example_input: A tensor, a tuple or dict of a forward pass's arguments, or a shape with
            its batch dimension. Needed for a budget in MACs; used to find layers whose weight
            is used outside their own forward.
        calibration: Batches of real inputs, in the place of synthetic ones; the plan then says that it
            is not data-free.
        statistics: From `gather_statistics`; made with `example_input` if they are needed.
        progress: Called with what is being done and the fraction done.
        **settings: The fields of `SearchSettings`: method, objective, kinds, include, exclude, overrides,
            rank_multiple, seed.

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
    beside = ("example_input", "calibration", "statistics", "progress")
    return search_with_statistics(
        model,
        budget,
        SearchSettings.of(settings, owner="search_ranks", beside=beside),
        example_input=example_input,
        calibration=calibration,
        statistics=statistics,
        progress=progress,
    )[0]


@with_opened
@freed_memory_kept()
def search_with_statistics(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    settings: SearchSettings,
    *,
    example_input: ExampleInput | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, Statistics | None]:
    """Like `search_ranks`, and returns the statistics the errors were measured in, None for the weights alone."""
    start = time.perf_counter()
    budget = Budget.from_value(budget)
    strategy, rank_multiple = strategy_of(settings), settings.rank_multiple
    require_usable_weights(model)
    selection = settings.selection
    if strategy.kinds is not None and is_automatic(settings.kinds):
        selection["kinds"] = strategy.kinds
    take_inventory(model, **selection)  # a wrong pattern shows before the model is run
    if "macs" in budget.limits() and example_input is None:
        msg = f"a budget in MACs ({budget}) needs example_input: a tensor, or a shape such as (1, 3, 224, 224)."
        raise ExampleInputError(msg)
    traced = trace(model, example_input) if example_input is not None else None
    layers = take_inventory(model, **selection, trace=traced)
    dense = measure_costs(model, macs=traced.macs if traced else None)
    report = progress or silent
    statistics, objective = _statistics(
        model, strategy, settings, example_input, calibration, statistics, traced, report
    )
    automatic = (
        settings.objective == "auto" and objective != "weight" and statistics is not None and statistics.data_free
    )
    searched = time.perf_counter()
    tables = _tabulate(layers, budget.budgeted, rank_multiple, statistics, report)
    if current_processes().rank:  # the first process chooses
        return cast(Plan, from_first("the search", None)), statistics
    chosen = [layer for layer in layers if layer.reason is None]
    if strategy.thorough:
        chosen, tables = _shared(chosen, tables, sharing_groups(chosen, traced), budget, rank_multiple, statistics)
    outputs = None
    if statistics is not None:
        inputs = max(LEAST_INPUTS, affordable_inputs(traced.macs)) if traced is not None else LEAST_INPUTS
        outputs = Outputs(model, tuple(chosen), statistics, inputs)
        outputs = outputs if outputs.exist else None
    if budget.max_error is not None:
        problem, choice = _within_error(tables, dense, budget, strategy, outputs, report)
        found = _Found(
            problem, choice, chosen, "moments" if objective == "end_to_end" else objective, statistics, outputs
        )
    else:
        plain = _problem(tables, dense, budget)
        _require_feasible(plain, dense, budget)
        problem, choice, objective = _search(plain, strategy, objective, outputs, report)
        found = _Found(problem, choice, chosen, objective, statistics, outputs)
        if automatic:
            single = [layer for layer in layers if layer.reason is None]
            found = _never_behind_the_weights(found, plain, single, rank_multiple)
    problem, choice, statistics, outputs = found.problem, found.choice, found.statistics, found.outputs
    plan = Plan(
        layers=tuple(_layer_plans(layers, found.layers, problem, choice, traced, statistics)),
        dense=dense,
        compressed=_costs_after(problem, choice, dense),
        budget=budget,
        method=strategy.name,
        objective=found.objective,
        source="weight" if statistics is None or found.objective == "weight" else statistics.source,
        data_free=statistics is None or statistics.data_free,
        optimality_gap=_gap(problem, choice),
        output_distance=output_distance(outputs, problem, choice) if outputs is not None else None,
        seconds=time.perf_counter() - start,
        timings={**(statistics.seconds if statistics is not None else {}), "search": time.perf_counter() - searched},
        seed=settings.seed,
    )
    if strategy.thorough:
        _warn_of_given_up_layers(plan)
    return from_first("the search", plan), statistics


@dataclass(frozen=True)
class _Found:
    """A choice and what it is of.

    Attributes:
        problem: The problem.
        choice: One row per layer.
        layers: Those of the problem.
        objective: What was minimised.
        statistics: In whose metric the factors are fitted.
        outputs: Of the model, None if none are known.
    """

    problem: Problem
    choice: Ints
    layers: list[Layer]
    objective: str
    statistics: Statistics | None
    outputs: Outputs | None


def _search(
    problem: Problem, strategy: RegisteredStrategy, objective: str, outputs: Outputs | None, progress: Progress
) -> tuple[Problem, Ints, str]:
    """Returns the problem that a method has solved, its choice, and the objective it is of."""
    if outputs is not None and strategy.thorough:
        problem = refined(problem, outputs, lambda done: progress("fitting layers", done))
        problem = nearer(problem, outputs, progress)
    choice, objective = _choose(problem, strategy, objective, outputs, progress)
    if strategy.thorough:
        choice = spend_what_is_left(problem, choice)
    return problem, choice, objective


def _never_behind_the_weights(found: _Found, plain: Problem, layers: list[Layer], rank_multiple: int) -> _Found:
    """Returns the choice of the weights alone if it is better on inputs of another kind, else what was found."""
    known, outputs = found.statistics, found.outputs
    if known is None or outputs is None or not known.judging or found.objective == "weight":
        return found
    other = weights_alone(
        found.problem, found.choice, outputs, layers, known.judging, rank_multiple=rank_multiple, settings=plain
    )
    if other is None or other.distance >= other.other:
        return found
    bare = replace(known, moments={})  # the factors are fitted to the weights as well
    outputs = Outputs(outputs.model, tuple(layers), bare, outputs.inputs)
    return _Found(other.problem, other.choice, layers, "weight", bare, outputs)


def _warn_of_given_up_layers(plan: Plan) -> None:
    for layer in gives_up_most(plan.layers):
        msg = (
            f"layer {layer.name!r} loses {100 * layer.error:.0f} % of its energy ({layer.kind}, ranks {layer.ranks}) "
            "while most of the model stays dense: let more layers be factorised (include, exclude, kinds), raise its "
            "min_rank by overrides, or raise the budget."
        )
        warn(msg, CompressionWarning, stacklevel=4)


def _statistics(  # noqa: PLR0917
    model: nn.Module,
    strategy: RegisteredStrategy,
    settings: SearchSettings,
    example_input: ExampleInput | None,
    calibration: Iterable[Any] | None,
    given: Statistics | None,
    traced: Trace | None,
    progress: Progress,
) -> tuple[Statistics | None, str]:
    """Returns the statistics an objective needs, and the objective that can be had with them."""
    objective, best = settings.objective, strategy.objectives[-1]
    if objective == "weight" or best == "weight":
        return None, "weight"
    known = given is not None or example_input is not None or calibration is not None
    if objective == "auto" and given is None and not (known and strategy.thorough):
        return None, "weight"
    if not known:
        msg = f"objective={objective!r} needs an example_input to make inputs with, statistics or calibration."
        raise ExampleInputError(msg)
    statistics = given
    if statistics is None:
        try:
            statistics = gather_statistics(
                model, example_input, calibration=calibration, seed=settings.seed, progress=progress
            )
        except ExampleInputError as error:
            if calibration is not None:
                raise
            warn(f"the search falls back to objective='weight': {error}", CompressionWarning, stacklevel=3)
            return None, "weight"
    if objective != "auto":
        return statistics, objective
    few = traced is not None and affordable_inputs(traced.macs) < LEAST_INPUTS
    return statistics, "moments" if few else best


def _choose(
    problem: Problem, strategy: RegisteredStrategy, objective: str, outputs: Outputs | None, progress: Progress
) -> tuple[Ints, str]:
    """Returns the choice, and the objective it is of."""
    if objective == "end_to_end" and outputs is None:
        msg = "the search falls back to objective='moments': the model returns no floating-point tensor."
        warn(msg, CompressionWarning, stacklevel=3)
        objective = "moments"
    if objective != "end_to_end" or outputs is None:
        return strategy.solve(problem, progress=progress), objective
    progress("end-to-end search", 0.0)
    start = solve(problem).choice
    start = start if start is not None else search_continuous(problem, progress=progress)
    try:
        choice = search_outputs(problem, outputs, start, lambda done: progress("end-to-end search", done))
    except RuntimeError as error:
        warn(
            f"the search falls back to objective='moments': the model cannot be differentiated on synthetic inputs "
            f"({type(error).__name__}: {error}).",
            CompressionWarning,
            stacklevel=3,
        )
        return start, "moments"
    progress("end-to-end search", 1.0)
    return choice, objective


def _within_error(  # noqa: PLR0917
    tables: tuple[Candidates, ...],
    dense: Costs,
    budget: Budget,
    strategy: RegisteredStrategy,
    outputs: Outputs | None,
    progress: Progress,
) -> tuple[Problem, Ints]:
    """Returns the smallest choice whose output distance stays under the target, by bisection."""
    if outputs is None:
        msg = (
            f"{budget} is judged on synthetic inputs: pass an example_input (or calibration), and another objective "
            "than 'weight'."
        )
        raise ExampleInputError(msg)
    target = cast(float, budget.max_error)
    full = _problem(tables, dense, Budget(params=1.0))
    floor = _smallest_share(full, dense)
    middle = _problem(tables, dense, Budget(params=floor**0.5))
    weights = weighted(middle, solve(middle).choice, outputs).weights if strategy.thorough else None
    best, problem, low, high = np.array([len(t) - 1 for t in tables]), full, floor, 1.0
    for step in range(BISECTIONS):
        progress("quality target", step / BISECTIONS)
        share = low if step == 0 else (low * high) ** 0.5
        plain = _problem(tables, dense, Budget(params=min(1.0, share)))
        found = []
        for tried in (plain, replace(plain, weights=weights))[: 1 if weights is None else 2]:
            choice = strategy.solve(tried, progress=silent)
            found.append((output_distance(outputs, tried, choice), tried, choice))
        distance, tried, choice = min(found, key=lambda each: each[0])
        if distance <= target:
            best, problem, high = choice, tried, share
            if step == 0:
                break
        else:
            low = share
    progress("quality target", 1.0)
    return problem, best


def _smallest_share(problem: Problem, dense: Costs) -> float:
    """Returns the smallest fraction of the parameters that can be reached."""
    rest = _rest(problem.layers, dense)[RESOURCES.index("params")]
    return float((problem.cost_of(smallest(problem))[0] + rest + 1) / dense.params)


def _tabulate(
    layers: Sequence[Layer],
    budgeted: tuple[str, ...],
    rank_multiple: int,
    statistics: Statistics | None,
    progress: Progress,
) -> tuple[Candidates, ...]:
    chosen = [layer for layer in layers if layer.reason is None]

    def table(index: int) -> Candidates:
        progress("decomposing layers", index / len(chosen))
        layer = chosen[index]
        metric = statistics.metric(layer.name) if statistics is not None else None
        return tabulate(layer, budgeted=budgeted, rank_multiple=rank_multiple, metric=metric)

    what = f"decomposing layers, source {statistics.source if statistics is not None else 'weight'}"
    work = [layer.weight.numel() * min(layer.weight.flatten(1).shape) for layer in chosen]
    tables = shared_map(what, table, range(len(chosen)), work, threads=True)
    progress("decomposing layers", 1.0)
    return tuple(tables)


def _shared(  # noqa: PLR0917
    chosen: list[Layer],
    tables: tuple[Candidates, ...],
    groups: Sequence[Layer],
    budget: Budget,
    rank_multiple: int,
    statistics: Statistics | None,
) -> tuple[list[Layer], tuple[Candidates, ...]]:
    """Puts the layers that read the same together where sharing their first factor loses less at the budget's share."""
    own = {table.name: table for table in tables}
    fractions = np.array([budget.limits().get(name, 1.0) for name in budget.budgeted])
    units = {layer.name: layer for layer in chosen}
    for group in groups:
        metrics = [statistics.metric(m.name) if statistics is not None else None for m in group.members]
        together = tabulate_shared(group, budgeted=budget.budgeted, rank_multiple=rank_multiple, metrics=metrics)
        apart = tuple(own[member.name] for member in group.members)
        columns = [RESOURCES.index(name) for name in budget.budgeted]
        limits = together.costs[-1, columns] * fractions
        losses = []
        for alternative in (apart, (together,)):
            problem = Problem(alternative, budget.budgeted, limits)
            best = solve(problem).choice if problem.fits(smallest(problem)) else None
            losses.append(problem.loss_of(best) if best is not None else np.inf)
        if losses[1] < losses[0]:
            for member in group.members:
                del units[member.name], own[member.name]
            units[group.name], own[group.name] = group, together
    return list(units.values()), tuple(own[name] for name in units)


def _problem(tables: tuple[Candidates, ...], dense: Costs, budget: Budget) -> Problem:
    totals, rest = _vector(dense), _rest(tables, dense)
    budgeted = tuple(budget.limits())
    columns = [RESOURCES.index(name) for name in budgeted]
    fractions = np.array(list(budget.limits().values()))
    limits = np.floor(totals[columns] * fractions + 1e-6) - rest[columns]
    written = sum(table.dense_activations for table in tables)
    return Problem(tables, budgeted, limits, activation_weight=ACTIVATION_WEIGHT / written if written else 0.0)


def _vector(costs: Costs) -> Floats:
    return np.array([costs.params, costs.macs or 0, costs.bytes], dtype=np.float64)


def _rest(tables: Sequence[Candidates], dense: Costs) -> Floats:
    """Returns what everything but the layers costs, shape (3,)."""
    rest: Floats = _vector(dense) - np.sum([table.costs[-1] for table in tables], axis=0)
    return rest


def _require_feasible(problem: Problem, dense: Costs, budget: Budget) -> None:
    cheapest = np.array([problem.costs(i).min(axis=0) for i in range(len(problem.layers))])  # (layers, b)
    columns = [RESOURCES.index(name) for name in problem.budgeted]
    floor = (cheapest.sum(axis=0) + _rest(problem.layers, dense)[columns]) / _vector(dense)[columns]
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


def _layer_plans(  # noqa: PLR0917
    layers: Sequence[Layer],
    units: Sequence[Layer],
    problem: Problem,
    choice: Ints,
    traced: Trace | None,
    statistics: Statistics | None,
) -> list[LayerPlan]:
    chosen: dict[str, tuple[Candidates, int]] = {}
    shared: dict[str, LayerPlan] = {}
    for unit, found, row in zip(units, problem.layers, choice, strict=True):
        if unit.members:
            shared.update({p.name: p for p in _member_plans(unit, found, int(row), traced, statistics)})
        else:
            chosen[unit.name] = (found, int(row))
    plans = []
    for layer in layers:
        if layer.name in shared:
            plans.append(shared[layer.name])
            continue
        table, row = chosen.get(layer.name, (None, 0))
        known = statistics if table is not None else None
        plans.append(_layer_plan(layer, table, row, traced, known))
    return plans


def _member_plans(
    unit: Layer, table: Candidates, row: int, traced: Trace | None, statistics: Statistics | None
) -> list[LayerPlan]:
    """Returns the plans of layers that share their first factor, which the first of them counts."""
    members, ranks, plans = unit.members, table.ranks[row], []
    metrics = [statistics.metric(member.name) if statistics is not None else None for member in members]
    errors = np.zeros(len(members))
    if table.kinds[row] != DENSE:
        weights = [member.double_weight() for member in members]
        errors = unseen_shared_errors(weights, metrics)[ranks[0] - 1]
    for index, (member, error) in enumerate(zip(members, errors, strict=True)):
        out, in_ = member.weight_shape
        plan = _layer_plan(member, Candidates.of_dense(member.name), 0, traced, statistics)
        if table.kinds[row] != DENSE:
            positions = sum(call.positions for call in member.calls or ())
            plan = replace(
                plan,
                kind=table.kinds[row],
                ranks=ranks,
                error=float(error),
                params_after=member.parameters - out * in_ + ranks[0] * (out + (in_ if index == 0 else 0)),
                macs_after=None if plan.macs_before is None else ranks[0] * (out + in_) * positions,
                reason=None,
                shares=unit.name,
            )
        else:
            plan = replace(plan, reason=BETTER_ELSEWHERE)
        plans.append(plan)
    return plans


def _layer_plan(
    layer: Layer, table: Candidates | None, row: int, traced: Trace | None, statistics: Statistics | None
) -> LayerPlan:
    factorisable = table is not None
    source = statistics.source_of(layer.name) if statistics is not None else None
    known = traced is not None and factorisable
    if table is None:
        table = Candidates.of_dense(layer.name)
        reason = layer.reason
    elif len(table) == 1:
        reason = "every candidate is larger or slower than the dense layer"
    else:
        reason = BETTER_ELSEWHERE if table.kinds[row] == DENSE else None
    saved = table.costs[-1] - table.costs[row]
    before = dense_macs(layer) if known else None
    return LayerPlan(
        name=layer.name,
        type=layer.type,
        kind=table.kinds[row],
        ranks=table.ranks[row],
        weight_shape=layer.weight_shape if factorisable else (),
        error=float(table.unseen_errors[row]),
        params_before=layer.parameters,
        params_after=layer.parameters - int(saved[0]),
        macs_before=before,
        macs_after=before - int(saved[1]) if before is not None else None,
        reason=reason,
        source=source or ("weight" if factorisable else None),
        samples=statistics.samples_of(layer.name) if statistics is not None else None,
        error_spread=table.unseen.spread_at(float(table.errors[row])) if table.unseen is not None else None,
    )


__all__ = ["search_ranks", "search_with_statistics"]

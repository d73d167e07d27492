"""`search_ranks`: from a model and a budget to a plan. The model is never changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn
from typing_extensions import Unpack

from lightning_compress.analysis.agreement import unfusing_as_the_model_allows
from lightning_compress.analysis.forecast import expected_seconds, without_slow_kinds
from lightning_compress.analysis.inspection import Inspection, inspect_model
from lightning_compress.analysis.statistics import Statistics, require_inputs
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.analysis.usable import require_usable_weights
from lightning_compress.core.effort import trying
from lightning_compress.core.errors import ConfigurationError, ExampleInputError, InfeasibleBudgetError
from lightning_compress.core.forecast import DECOMPOSING, current_forecast, forecasting
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.parallel import current_processes, from_first
from lightning_compress.core.plan import Plan
from lightning_compress.core.progress import Progress, reporting
from lightning_compress.core.settings import Budget, SearchKeywords, SearchSettings
from lightning_compress.core.workers import working_on
from lightning_compress.kinds.registry import is_automatic
from lightning_compress.layers.unfused import unfused
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.choice import Choice, choose, never_behind_the_weights
from lightning_compress.search.latency import timings_of
from lightning_compress.search.objective import statistics_for, weighs_alone
from lightning_compress.search.outputs import evaluator_of
from lightning_compress.search.part import of_the_whole, outside_excluded
from lightning_compress.search.quality_target import within_error
from lightning_compress.search.strategies import strategy_of
from lightning_compress.search.tables import compared_resources, join_where_better, tabulate_units
from lightning_compress.search.timed import require_sizes_feasible, settled, timed_problem
from lightning_compress.search.to_plan import to_plan, warn_of_layers_given_up
from lightning_compress.search.units import SingleLayer, Unit, units_of

_BESIDE = ("example_input", "calibration", "statistics", "progress")


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

    The plan keeps every budget, makes no layer larger than dense or, where they are known, take more MACs, and says how
    far it is at most from the optimum (`plan.optimality_gap`). With an example input layers are timed on the target,
    and the model is no slower there than dense where the budget allows it. Projections of attention and recurrent
    layers are layers of their own in it (see `layers.unfused`).

    Args:
        model: Any module; it is not changed.
        budget: Upper bounds, see `Budget`.
        example_input: Arguments of a forward pass or a shape, see `ExampleInput`; needed for MACs and latency.
        calibration: Batches of real inputs, in the place of synthetic ones; the plan then is not data-free.
        statistics: From `gather_statistics`; made with `example_input` if they are needed.
        progress: Called with what is being done and the fraction done.
        **settings: The fields of `SearchSettings`.

    Returns:
        A frozen plan for `apply_plan_`.

    Raises:
        ConfigurationError: If an argument has a wrong type, name or value.
        BudgetError: If a budget is malformed; InfeasibleBudgetError, with the smallest one, if no plan keeps it.
        SelectionError: If a pattern matches no layer.
        ModelError: If weights are lazy or not finite, the model fails on the example input, or there is nothing to do.
        TargetError: If the target cannot be measured on.
    """
    own = SearchSettings.of(settings, owner="search_ranks", beside=_BESIDE)
    return search_with_statistics(
        model,
        budget,
        own,
        example_input=example_input,
        calibration=calibration,
        statistics=statistics,
        progress=progress,
    )[0]


def search_with_statistics(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    settings: SearchSettings,
    *,
    example_input: ExampleInput | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
    spare_frozen: bool = False,
) -> tuple[Plan, Statistics | None]:
    """Like `search_ranks`, and returns the statistics the errors were measured in, None for the weights alone.

    Frozen networks inside a model that is trained may be spared, see `take_inventory`.
    """
    require_inputs(example_input, calibration, statistics)
    allowed, report = unfusing_as_the_model_allows(model, example_input), reporting(progress)
    limited, workers = forecasting(settings.time_limit), working_on(settings.parallel)
    with limited, workers, allowed, unfused(model), freed_memory_kept(), trying(settings.effort):
        return _search_unfused(
            model, budget, settings, example_input, calibration, statistics, report, spare_frozen=spare_frozen
        )


def _search_unfused(  # noqa: PLR0917
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    settings: SearchSettings,
    example_input: ExampleInput | None,
    calibration: Iterable[Any] | None,
    statistics: Statistics | None,
    report: Progress,
    *,
    spare_frozen: bool,
) -> tuple[Plan, Statistics | None]:
    start = time.perf_counter()
    budget = Budget.from_value(budget)
    strategy = strategy_of(settings)
    require_usable_weights(model)
    _require_measurable(budget, example_input, settings)
    selection = {**settings.selection, "spare_frozen": spare_frozen}
    if strategy.kinds is not None and is_automatic(settings.kinds):
        selection["kinds"] = strategy.kinds
    inspection = inspect_model(model, outside_excluded(model, budget, selection), example_input)
    asked, budget = budget, of_the_whole(model, budget)
    timed = settings.target is not None and example_input is not None
    forecast = current_forecast()
    if forecast.is_wanted:
        alone = weighs_alone(strategy, settings, known=example_input is not None)
        made = (forecast.heals or not alone) and calibration is None and statistics is None
        descends = settings.objective == "end_to_end"
        known = {"inputs": made, "timed": timed, "heals": forecast.heals, "descends": descends}
        forecast.expect(*expected_seconds(inspection, example_input, **known))
    statistics, objective = statistics_for(
        inspection, strategy, settings, example_input, calibration, statistics, report
    )
    searched = time.perf_counter()
    inspection, left_out = _with_time_for(inspection)
    units = units_of(inspection.layers)
    compared = compared_resources(budget.budgeted, timed=timed)
    try:
        with trying(forecast.effort()):
            tables = tabulate_units(units, compared, settings.rank_multiple, statistics, report)
            if current_processes().rank:  # the first process measures and chooses
                return cast(Plan, from_first("the search", None)), statistics
            found = _search(inspection, units, tables, budget, settings, statistics, objective, example_input, report)
    except InfeasibleBudgetError as error:
        msg = str(error)
        if asked.of is not None:
            msg = f"{asked} cannot be kept; as bounds on the whole model, of which nothing else is compressed: {msg}"
        if left_out is not None:
            msg = f"{msg} Kinds were left out to keep time_limit={forecast.limit:g} ({left_out}): allow more time."
        if msg == str(error):
            raise
        raise InfeasibleBudgetError(msg) from error
    parts = {**(statistics.seconds if statistics is not None else {}), "search": time.perf_counter() - searched}
    plan = to_plan(found, inspection, asked, settings, parts)
    plan = replace(plan, seconds=time.perf_counter() - start, cut=dict(forecast.cut))
    if strategy.thorough:
        warn_of_layers_given_up(plan)
    return from_first("the search", plan), found.statistics


def _with_time_for(inspection: Inspection) -> tuple[Inspection, str | None]:
    """Returns the inspection without the kinds that a limit leaves no time for, and which they are."""
    forecast = current_forecast()
    if not forecast.leaves_out_fits():
        return inspection, None
    layers, what = without_slow_kinds(inspection.layers)
    if what is not None:
        forecast.note(DECOMPOSING, what)
    return replace(inspection, layers=layers), what


def _search(  # noqa: PLR0917
    inspection: Inspection,
    single: tuple[SingleLayer, ...],
    tables: tuple[Candidates, ...],
    budget: Budget,
    settings: SearchSettings,
    statistics: Statistics | None,
    objective: str,
    example_input: ExampleInput | None,
    progress: Progress,
) -> Choice:
    strategy, units = strategy_of(settings), cast("tuple[Unit, ...]", single)
    if strategy.thorough:
        timed = settings.target is not None and example_input is not None
        compared = compared_resources(budget.budgeted, timed=timed)
        units, tables = join_where_better(
            single, tables, inspection, budget, compared, settings.rank_multiple, statistics
        )
    require_sizes_feasible(tables, inspection.costs, budget, inspection.layers)  # before anything is measured
    timings = timings_of(inspection, example_input, budget, settings, progress)
    outputs = evaluator_of(inspection, units, statistics) if statistics is not None else None
    if budget.max_error is not None:
        timing = timings[0] if timings else None
        tables = timing.filled(units, tables) if timing is not None else tables
        problem, rows = within_error(units, tables, inspection.costs, budget, strategy, outputs, progress, timing)
        objective = "moments" if objective == "end_to_end" else objective
        reading = timing.whole(units, problem.layers, rows) if timing is not None else None
        seconds = reading.seconds if reading is not None else None
        return Choice(problem, rows, units, objective, statistics, outputs, seconds)
    plain = timed_problem(tables, units, inspection.costs, budget, timings, no_slower=strategy.thorough)
    problem, rows, reached = choose(plain, strategy, objective, outputs, progress)
    found = Choice(problem, rows, units, reached, statistics, outputs)
    if settings.objective == "auto" and statistics is not None and statistics.data_free:
        found = never_behind_the_weights(found, plain, single, settings.rank_multiple)
    return settled(found, budget)


def _require_measurable(budget: Budget, example_input: ExampleInput | None, settings: SearchSettings) -> None:
    """Checks that what the budget bounds can be measured."""
    if budget.bounds_latency and settings.target is None:
        msg = f"{budget} bounds time on a target, and target=None leaves time out: pass target='torch'."
        raise ConfigurationError(msg)
    if budget.needs_example_input and example_input is None:
        what = "latency" if budget.bounds_latency else "MACs"
        msg = f"a budget in {what} ({budget}) needs example_input: a tensor, or a shape such as (1, 3, 224, 224)."
        raise ExampleInputError(msg)

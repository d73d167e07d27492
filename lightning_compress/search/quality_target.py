"""The smallest model within a distance of the dense model's outputs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast

import numpy as np

from lightning_compress.core.costs import Costs
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.core.forecast import SEARCHING, current_forecast
from lightning_compress.core.progress import Progress, silent
from lightning_compress.core.settings import Budget
from lightning_compress.kinds.base import Ints
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.exact import solve
from lightning_compress.search.feasibility import is_feasible, smallest_share
from lightning_compress.search.latency import Timing
from lightning_compress.search.outputs import OutputEvaluator, output_distance
from lightning_compress.search.problem import Problem, problem_of
from lightning_compress.search.sensitivity import weighted
from lightning_compress.search.strategies import RegisteredStrategy
from lightning_compress.search.units import Unit


def within_error(  # noqa: PLR0917
    units: tuple[Unit, ...],
    tables: tuple[Candidates, ...],
    dense: Costs,
    budget: Budget,
    strategy: RegisteredStrategy,
    outputs: OutputEvaluator | None,
    progress: Progress,
    timing: Timing | None = None,
) -> tuple[Problem, Ints]:
    """Returns the smallest choice whose output distance stays under the target, by bisection, and its problem.

    Raises:
        ExampleInputError: If no outputs are known.
    """
    if outputs is None:
        msg = (
            f"{budget} is judged on synthetic inputs: pass an example_input (or calibration), and another objective "
            "than 'weight'."
        )
        raise ExampleInputError(msg)

    def at(share: float) -> Problem:
        own = Budget(params=share)
        bound = problem_of(tables, dense, own, units, timing, no_slower=strategy.thorough)
        return bound if is_feasible(bound) else problem_of(tables, dense, own, units, timing)

    full = at(1.0)
    floor = smallest_share(full, dense)
    middle = at(floor**0.5)
    weights = weighted(middle, solve(middle).choice, outputs).weights if strategy.thorough else None
    best, problem, low, high = np.array([len(t) - 1 for t in tables]), full, floor, 1.0
    bisections = current_effort().bisections
    forecast, last = current_forecast(), 0.0
    for step in range(bisections):
        if forecast.grant(SEARCHING) < last:
            forecast.note(SEARCHING, f"{step} of {bisections} bisections")
            break
        progress("quality target", step / bisections)
        started = time.perf_counter()
        share = low if step == 0 else (low * high) ** 0.5
        distance, tried, choice = _nearest(at(min(1.0, share)), weights, strategy, outputs)
        last = time.perf_counter() - started
        if distance > cast(float, budget.max_error):
            low = share
            continue
        best, problem, high = choice, tried, share
        if step == 0:
            break
    progress("quality target", 1.0)
    return problem, best


def _nearest(
    plain: Problem, weights: tuple[float, ...] | None, strategy: RegisteredStrategy, outputs: OutputEvaluator
) -> tuple[float, Problem, Ints]:
    """Returns the choice that leaves the outputs nearer, with measured weights or without, its problem and distance."""
    found = []
    for tried in (plain, replace(plain, weights=weights))[: 1 if weights is None else 2]:
        choice = strategy.solve(tried, progress=silent)
        found.append((output_distance(outputs, tried, choice), tried, choice))
    return min(found, key=lambda each: each[0])

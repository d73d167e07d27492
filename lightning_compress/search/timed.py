"""The problem with time in it, and whole models measured against what their layers promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.turns import Reading
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import InfeasibleBudgetError
from lightning_compress.core.settings import Budget
from lightning_compress.kinds.base import Ints
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.choice import Choice
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.feasibility import is_feasible, require_feasible
from lightning_compress.search.latency import LATENCY, TOLERANCE, Timing, latency_of
from lightning_compress.search.problem import TIME_WEIGHT, Problem, problem_of
from lightning_compress.search.safeguards import spend_what_is_left
from lightning_compress.search.units import Unit

CORRECTIONS = 4
"""Times that predictions are corrected by whole models and the search is repeated, at most."""
SLACK = 0.05
"""Of a bound on time: a plan that leaves more of it unused is searched once more."""
DEARER, LITTLE = 0.25, 0.02
"""What being no slower than dense may cost where no budget asks for it: a share of the signal loss, and signal loss."""
ROUGH_GAP = 1e-3
"""Relative gap to the optimum of choices that only correct predictions."""
NEAR_ENOUGH = 0.02
"""Relative difference of prediction and measurement that is not corrected."""


def require_sizes_feasible(
    tables: tuple[Candidates, ...], dense: Costs, budget: Budget, layers: Sequence[Layer] = ()
) -> None:
    """Checks that a choice keeps what a budget bounds besides time; the message names some of the layers.

    Raises:
        InfeasibleBudgetError: If none does.
    """
    if any(name != "latency" for name in budget.limits()):
        own = replace(budget, latency=None, latency_ms=None)
        require_feasible(problem_of(tables, dense, own), dense, own, layers)


def timed_problem(
    tables: tuple[Candidates, ...],
    units: tuple[Unit, ...],
    dense: Costs,
    budget: Budget,
    timings: tuple[Timing, ...],
    *,
    no_slower: bool,
) -> Problem:
    """Returns the problem of a budget, in the memory format in which its optimum is better.

    Args:
        tables: Candidates of each unit.
        units: What they belong to.
        dense: Costs of the whole dense model.
        budget: With bounds.
        timings: The target in each format, none where time is left out.
        no_slower: Whether the model may be no slower than dense, where the budget allows it.

    Raises:
        InfeasibleBudgetError: If no choice keeps the budget.
    """
    if not timings:
        plain = problem_of(tables, dense, budget, units)
        require_feasible(plain, dense, budget)
        return plain
    found = [_in_format(tables, units, dense, budget, timing, no_slower=no_slower) for timing in timings]
    objective, best = min(found, key=lambda each: each[0])
    if objective == np.inf:
        require_feasible(best, dense, budget)
    return best


def _in_format(
    tables: tuple[Candidates, ...],
    units: tuple[Unit, ...],
    dense: Costs,
    budget: Budget,
    timing: Timing,
    *,
    no_slower: bool,
) -> tuple[float, Problem]:
    """Returns the objective of the optimum in a memory format, and its problem, corrected by its measured time."""
    for step in range(CORRECTIONS + 1):
        filled = timing.filled(units, tables)
        problem = problem_of(filled, dense, budget, units, timing)
        best = _roughly_best(problem)
        if best is None:
            return np.inf, problem
        choice: Ints = best
        if no_slower:
            bounded = problem_of(filled, dense, budget, units, timing, no_slower=True)
            fast = choice if bounded.fits(choice) else _roughly_best(bounded)
            if fast is not None and not _is_dear(signal_loss(bounded, fast), signal_loss(problem, choice)):
                problem, choice = bounded, fast
        predicted = latency_of(filled, choice, timing)
        reading = timing.whole(units, filled, choice) if step < CORRECTIONS else None
        if reading is None or abs(reading.seconds - predicted) <= NEAR_ENOUGH * reading.seconds:
            break
        timing = timing.corrected(filled, choice, reading.seconds)
    layers = sum(float(table.costs[row, LATENCY]) for table, row in zip(filled, choice, strict=True))
    return problem.loss_of(choice) + TIME_WEIGHT * (predicted - layers) / timing.best, problem


def _roughly_best(problem: Problem) -> Ints | None:
    """Returns a choice that keeps the budgets, None if there is none."""
    if not (problem.limits > 0).all():
        return None
    best = solve(problem, rel_gap=ROUGH_GAP).choice
    return best if best is not None else smallest(problem) if is_feasible(problem) else None


def _is_dear(loss: float, free: float) -> bool:
    """Returns whether a signal loss is too high a price for time that no budget bounds.

    Args:
        loss: Within the time.
        free: Of what takes longer.
    """
    return loss > free + max(LITTLE, DEARER * free)


def signal_loss(problem: Problem, rows: Ints) -> float:
    """Returns the objective of a choice without its time."""
    return replace(problem, timing=None).loss_of(rows)


def settled(found: Choice, budget: Budget) -> Choice:
    """Returns the choice whose measured time keeps its bound, by correcting predictions and solving again.

    Args:
        found: By the search.
        budget: With bounds.

    Raises:
        InfeasibleBudgetError: If the time that the budget bounds is missed by every choice that was tried.
    """
    timing = found.problem.timing
    if timing is None:
        return found
    bound = budget.limits(timing.best).get("latency", 1.0) * timing.best
    tried = _tried(found, timing, bound, exhausting=budget.bounds_latency)
    if not tried:
        return found
    losses = {id(choice): signal_loss(choice.problem, choice.rows) for choice in tried}
    if not budget.bounds_latency:
        tried = [choice for choice in tried if not _is_dear(losses[id(choice)], losses[id(tried[0])])]
    keeping = [choice for choice in tried if _seconds(choice) <= (1 + TOLERANCE) * bound]
    if keeping:
        return min(keeping, key=lambda choice: losses[id(choice)])
    if budget.bounds_latency:
        fastest = min(map(_seconds, tried))
        share = np.ceil(1e4 * fastest / timing.best) / 1e4
        msg = (
            f"no plan keeps {budget}: the fastest that was measured takes {1e3 * fastest:.3g} ms, latency={share:.4f} "
            f"of the dense model's {1e3 * timing.best:.3g} ms. Raise the budget, or allow more kinds or layers."
        )
        raise InfeasibleBudgetError(msg)
    return min(tried, key=_seconds)


def _tried(found: Choice, timing: Timing, bound: float, *, exhausting: bool) -> list[Choice]:
    """Returns choices with their measured times, each found with what was learnt of the one before.

    Args:
        found: The first one.
        timing: Of its problem.
        bound: Of the seconds.
        exhausting: Whether to go on as well while the bound is not used because predictions were too long.
    """
    tried: list[Choice] = []
    problem, rows = found.problem, found.rows
    for _ in range(CORRECTIONS + 1):
        reading = timing.whole(found.units, problem.layers, rows)
        if reading is None:
            break
        tried.append(replace(found, problem=problem, rows=rows, measured=reading.seconds))
        predicted = latency_of(problem.layers, rows, timing)
        wasted = exhausting and reading.seconds < (1 - SLACK) * bound <= predicted
        missed = reading.seconds > (1 + TOLERANCE) * bound
        again = _solved_again(problem, rows, timing, found.units, reading) if missed or wasted else None
        if again is None or (again[1] == rows).all():
            break
        problem, rows, timing = again
    return tried


def _seconds(choice: Choice) -> float:
    return cast(float, choice.measured)


def _solved_again(
    problem: Problem, rows: Ints, timing: Timing, units: tuple[Unit, ...], reading: Reading
) -> tuple[Problem, Ints, Timing] | None:
    """Returns the problem with corrected times and its optimum; None if nothing keeps the bounds then."""
    timing = timing.corrected(problem.layers, rows, reading.seconds)
    layers = timing.filled(units, problem.layers)
    if "latency" not in problem.budgeted:
        return None
    column = problem.budgeted.index("latency")
    before, after = (sum(float(t.costs[-1, LATENCY]) for t in each) for each in (problem.layers, layers))
    limits = problem.limits.copy()
    limits[column] += after - before  # what the rest of the model takes stays
    problem = replace(problem, layers=layers, limits=limits, timing=timing)
    choice = solve(problem, rel_gap=ROUGH_GAP).choice if (limits > 0).all() else None
    return None if choice is None else (problem, spend_what_is_left(problem, choice), timing)

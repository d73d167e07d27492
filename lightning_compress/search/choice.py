"""From a problem to a choice: errors corrected, layers weighed, a strategy, and a last comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from warnings import warn

from lightning_compress.analysis.statistics import Statistics
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.end_to_end import search_outputs
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import OutputEvaluator
from lightning_compress.search.problem import Problem
from lightning_compress.search.refine import Corrections, refined
from lightning_compress.search.safeguards import spend_what_is_left, weights_alone
from lightning_compress.search.sensitivity import nearer
from lightning_compress.search.strategies import RegisteredStrategy, search_continuous
from lightning_compress.search.units import SingleLayer, Unit


@dataclass(frozen=True)
class Choice:
    """One row of candidates per unit, and what it is of.

    Attributes:
        problem: That was solved.
        rows: One per unit.
        units: Those of the problem.
        objective: What was minimised.
        statistics: In whose metric the factors are fitted.
        outputs: Of the model, None if none are known.
        measured: Seconds of the whole model, None where it was not measured.
    """

    problem: Problem
    rows: Ints
    units: tuple[Unit, ...]
    objective: str
    statistics: Statistics | None
    outputs: OutputEvaluator | None
    measured: float | None = None


def choose(
    problem: Problem, strategy: RegisteredStrategy, objective: str, outputs: OutputEvaluator | None, progress: Progress
) -> tuple[Problem, Ints, str]:
    """Returns the problem that a strategy has solved, its choice, and the objective it is of."""
    if outputs is not None and strategy.thorough:
        predicted, known = problem, Corrections()
        problem = refined(predicted, outputs, lambda done: progress("fitting layers", done), known)
        problem = nearer(problem, predicted, known, outputs, progress)
    rows, objective = _solved(problem, strategy, objective, outputs, progress)
    if strategy.thorough:
        rows = spend_what_is_left(problem, rows)
    return problem, rows, objective


def never_behind_the_weights(found: Choice, plain: Problem, units: Sequence[SingleLayer], rank_multiple: int) -> Choice:
    """Returns the choice of the weights alone if it is better on inputs of another kind, else what was found.

    Args:
        found: By the search.
        plain: The problem before errors were corrected and layers weighed.
        units: The layers that can be factorised, each on its own.
        rank_multiple: See `SearchSettings`.
    """
    known, outputs = found.statistics, found.outputs
    if known is None or outputs is None or not known.judging or found.objective == "weight":
        return found
    other = weights_alone(
        found.problem, found.rows, outputs, units, known.judging, rank_multiple=rank_multiple, settings=plain
    )
    if other is None or other.distance >= other.other:
        return found
    bare = replace(known, moments={})  # the factors are fitted to the weights as well
    outputs = OutputEvaluator(outputs.model, tuple(units), bare, outputs.inputs)
    return Choice(other.problem, other.choice, tuple(units), "weight", bare, outputs)


def _solved(
    problem: Problem, strategy: RegisteredStrategy, objective: str, outputs: OutputEvaluator | None, progress: Progress
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

"""What is looked at once more before a plan is final.

Moments and synthetic inputs are estimates, and a search believes them. So its choice is compared with the one that
the weights alone lead to, on inputs of another kind than those it was made from; what is left of the budget is
spent; and a layer that gives up most of itself while the rest of the model stays dense is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_compress.analysis.trace import Arguments
from lightning_compress.core.parallel import in_threads
from lightning_compress.core.plan import BETTER_ELSEWHERE, DENSE, LayerPlan
from lightning_compress.kinds.base import Ints
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import OutputEvaluator, output_distance
from lightning_compress.search.problem import Problem
from lightning_compress.search.tables import compared_resources
from lightning_compress.search.units import SingleLayer

LEAST_GAIN = 1e-4
"""Loss of a layer that more ranks must save to be worth their time."""
MOST_OF_A_LAYER = 0.5
"""Error of a layer, and share of the model that stays dense, above which both together are worth a warning."""


def spend_what_is_left(problem: Problem, choice: Ints) -> Ints:
    """Returns the choice with larger ranks of the same kinds where the budgets allow them and errors fall.

    The term for time favours small ranks where errors are small; of kinds that stay the same, the better ranks are
    worth more than that.
    """
    rows = [np.append(row, _larger(problem, layer, int(row))) for layer, row in enumerate(choice)]
    if all(len(own) == 1 for own in rows):
        return choice
    better = solve(replace(problem.restricted(rows), timing=None)).choice
    if better is None:
        return choice
    return np.array([own[row] for own, row in zip(rows, better, strict=True)])


def _larger(problem: Problem, layer: int, row: int) -> Ints:
    """Returns the rows of a layer of the same kind that cost no less in any budget and lose less."""
    table, costs = problem.layers[layer], problem.costs(layer)
    own = table.rows_of(table.kinds[row]) if table.kinds[row] != DENSE else np.zeros(0, dtype=np.int64)
    better: Ints = own[(costs[own] >= costs[row]).all(axis=1) & (table.losses[own] < table.losses[row] - LEAST_GAIN)]
    return better


@dataclass(frozen=True)
class Alternative:
    """What the weights alone lead to.

    Attributes:
        problem: With the errors of the weights.
        choice: Its optimum.
        distance: Of the outputs on the inputs that judge.
        other: The distance of the choice that it is compared with.
    """

    problem: Problem
    choice: Ints
    distance: float
    other: float


def weights_alone(
    problem: Problem,
    choice: Ints,
    outputs: OutputEvaluator,
    units: Sequence[SingleLayer],
    judging: tuple[Arguments, ...],
    *,
    rank_multiple: int,
    settings: Problem,
) -> Alternative | None:
    """Returns what the weights alone lead to, judged beside the choice; None if they lead nowhere.

    Of a layer's kinds those fitted in closed form are tried, all if there are none.

    Args:
        problem: That of the choice.
        choice: What the search found.
        outputs: With the metric and the factors of the choice.
        units: The layers that can be factorised, each on its own.
        judging: Inputs of another kind.
        rank_multiple: See `tabulate`.
        settings: The problem of the layers on their own, for its budgets and limits.
    """
    plain = tuple(unit.with_kinds(_closed_form(unit.kinds)) for unit in units)
    resources = compared_resources(problem.budgeted, timed=problem.timing is not None)
    tables = tuple(in_threads(lambda unit: unit.tabulate(resources, rank_multiple, None), plain))
    if problem.timing is not None:
        tables = problem.timing.filled(plain, tables)
    alone = replace(settings, layers=tables, units=plain, weights=None)
    found = solve(alone).choice
    if found is None or not alone.fits(found):
        return None
    found = spend_what_is_left(alone, found)
    own = outputs.on(judging)
    bare = OutputEvaluator(outputs.model, plain, replace(own.statistics, moments={}), outputs.inputs)
    return Alternative(alone, found, output_distance(bare, alone, found), output_distance(own, problem, choice))


def _closed_form(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(kind for kind in kinds if not DECOMPOSITIONS[kind].fits_roughly) or kinds


def gives_up_most(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Returns the layers that lose more than half of their energy, if the search keeps most of the others dense."""
    free = [layer for layer in layers if not layer.is_dense or layer.reason == BETTER_ELSEWHERE]
    dense = sum(layer.params_before for layer in free if layer.is_dense)
    if dense <= MOST_OF_A_LAYER * sum(layer.params_before for layer in free):
        return []
    return [layer for layer in free if layer.error > MOST_OF_A_LAYER]

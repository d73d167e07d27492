"""Whether a budget can be kept, and what the smallest is that can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import InfeasibleBudgetError
from lightning_compress.core.plan import percent
from lightning_compress.core.settings import RESOURCES, Budget
from lightning_compress.search.exact import smallest
from lightning_compress.search.problem import Problem, cost_of_the_rest, cost_vector


def is_feasible(problem: Problem) -> bool:
    """Returns whether a choice keeps all that a problem bounds."""
    return bool((problem.limits > 0).all() and problem.fits(smallest(problem)))


MOST_HOLDERS = 5
"""Layers that are named where a budget cannot be kept."""


def require_feasible(problem: Problem, dense: Costs, budget: Budget, layers: Sequence[Layer] = ()) -> None:
    """Checks that a choice keeps the budget.

    Args:
        problem: That of the budget.
        dense: Costs of the whole dense model.
        budget: For the message.
        layers: Of the model, to name those that hold what cannot be saved.

    Raises:
        InfeasibleBudgetError: If none does; the message has the smallest reachable budget, and what holds it.
    """
    cheapest = np.array([problem.costs(i).min(axis=0) for i in range(len(problem.layers))])  # (layers, b)
    columns = [RESOURCES.index(name) for name in problem.budgeted]
    timing = problem.timing
    whole = dense if timing is None else replace(dense, latency=timing.dense)
    totals = cost_vector(dense if timing is None else replace(dense, latency=timing.best))
    floor = (cheapest.sum(axis=0) + cost_of_the_rest(problem.layers, whole)[columns]) / totals[columns]
    if is_feasible(problem):
        return
    floors = ", ".join(f"{name}={_round_up(value)}" for name, value in zip(problem.budgeted, floor, strict=True))
    if timing is not None and "latency" in problem.budgeted:
        seconds = timing.best * floor[problem.budgeted.index("latency")]
        floors += f" ({1e3 * seconds:.3g} ms of {1e3 * timing.best:.3g} ms; as predicted from its layers)"
    alone = "" if len(problem.budgeted) == 1 else " (each alone; together they need more)"
    msg = (
        f"no plan keeps {budget}: the smallest reachable is {floors}{alone}. Layers that cannot be factorised, biases "
        f"and norms count too; raise the budget, allow more kinds or layers, or lower min_rank."
        f"{_held(problem, dense, layers)}"
    )
    raise InfeasibleBudgetError(msg)


def _held(problem: Problem, dense: Costs, layers: Sequence[Layer]) -> str:
    """Returns which layers hold most of the parameters that no plan saves."""
    saved = {table.name: int(table.costs[-1, 0] - table.costs[:, 0].min()) for table in problem.layers}
    known = [layer for layer in layers if layer.reason is not None or layer.name in saved]
    rest = [(layer.parameters - saved.get(layer.name, 0), layer) for layer in known]
    largest = sorted(rest, key=lambda each: -each[0])[:MOST_HOLDERS]
    if not largest or not {"params", "bytes"} & set(problem.budgeted):
        return ""
    named = [
        f"{layer.name!r} ({layer.type}, {percent(kept / dense.params)} of the parameters: "
        f"{layer.reason or 'that much is left of it at its smallest ranks'})"
        for kept, layer in largest
    ]
    return f" Most of the rest is in {', '.join(named)}."


def _round_up(fraction: float) -> str:
    return f"{np.ceil(fraction * 1e4) / 1e4:.4f}"


def smallest_share(problem: Problem, dense: Costs) -> float:
    """Returns the smallest fraction of the parameters that can be reached."""
    rest = cost_of_the_rest(problem.layers, dense)[RESOURCES.index("params")]
    return float((problem.cost_of(smallest(problem))[0] + rest + 1) / dense.params)

"""Whether a budget can be kept, and what the smallest is that can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import InfeasibleBudgetError
from lightning_compress.core.settings import RESOURCES, Budget
from lightning_compress.search.exact import smallest
from lightning_compress.search.problem import Problem, cost_of_the_rest, cost_vector


def is_feasible(problem: Problem) -> bool:
    """Returns whether a choice keeps all that a problem bounds."""
    return bool((problem.limits > 0).all() and problem.fits(smallest(problem)))


def require_feasible(problem: Problem, dense: Costs, budget: Budget) -> None:
    """Checks that a choice keeps the budget.

    Args:
        problem: That of the budget.
        dense: Costs of the whole dense model.
        budget: For the message.

    Raises:
        InfeasibleBudgetError: If none does; the message has the smallest reachable budget.
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
        "and norms count too; raise the budget, allow more kinds or layers, or lower min_rank."
    )
    raise InfeasibleBudgetError(msg)


def _round_up(fraction: float) -> str:
    return f"{np.ceil(fraction * 1e4) / 1e4:.4f}"


def smallest_share(problem: Problem, dense: Costs) -> float:
    """Returns the smallest fraction of the parameters that can be reached."""
    rest = cost_of_the_rest(problem.layers, dense)[RESOURCES.index("params")]
    return float((problem.cost_of(smallest(problem))[0] + rest + 1) / dense.params)

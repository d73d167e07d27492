"""The exact optimum of the separable objective."""

from __future__ import annotations

from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.strategies.registry import register_strategy


@register_strategy("exact", thorough=True)
def search_exact(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the optimum (to a relative gap of 1e-4) of the separable problem."""
    progress("exact search", 0.0)
    choice = solve(problem).choice
    progress("exact search", 1.0)
    return choice if choice is not None else smallest(problem)

"""Search strategies by name, and the decorator that registers one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.progress import Progress
from lightning_compress.core.settings import OBJECTIVES, SearchSettings
from lightning_compress.kinds.base import Ints
from lightning_compress.search.problem import Problem


class Strategy(Protocol):
    """A search strategy: returns one row per layer that keeps every budget.

    It is only called on problems that have such a choice.
    """

    def __call__(self, problem: Problem, *, progress: Progress) -> Ints:
        """Returns the chosen row of each layer, shape (number of layers,)."""


@dataclass(frozen=True)
class RegisteredStrategy:
    """A strategy and what is known of it.

    Attributes:
        name: What a user passes as `method`.
        solve: The strategy.
        objectives: Which it takes; objective "auto" is `automatic` where there are inputs. "end_to_end"
            goes on from the exact optimum and does not call the strategy.
        kinds: What kinds="auto" stands for, None for the usual ones.
        thorough: Whether all is done for it that is done for the default: inputs are made for objective "auto" (with
            the others it is "weight" unless statistics are given), layers may share first factors, errors are
            corrected by whole fits, and what is left of the budget is spent.
    """

    name: str
    solve: Strategy
    objectives: tuple[str, ...] = ("weight", "moments")
    kinds: tuple[str, ...] | None = None
    thorough: bool = False

    @property
    def automatic(self) -> str:
        """What objective "auto" is where there are inputs."""
        return "moments" if "moments" in self.objectives else self.objectives[-1]


STRATEGIES: dict[str, RegisteredStrategy] = {}
"""Name to strategy."""


def register_strategy(
    name: str,
    *,
    objectives: tuple[str, ...] = ("weight", "moments"),
    kinds: tuple[str, ...] | None = None,
    thorough: bool = False,
) -> Callable[[Strategy], Strategy]:
    """Decorates a strategy, which can then be chosen by `method=name`.

        @register_strategy("cheapest", objectives=("weight",))
        def search_cheapest(problem, *, progress):
            return np.array([problem.costs(layer)[:, 0].argmin() for layer in range(len(problem.layers))])

    Args:
        name: What a user passes as `method`.
        objectives: See `RegisteredStrategy`.
        kinds: See `RegisteredStrategy`.
        thorough: See `RegisteredStrategy`.

    Raises:
        ConfigurationError: If the name is taken, or there is no objective or an unknown one.
    """
    if name in STRATEGIES:
        msg = f"register_strategy({name!r}): the name is taken. Call it otherwise, and register it only once."
        raise ConfigurationError(msg)
    known = [objective for objective in OBJECTIVES if objective != "auto"]
    for objective in objectives or ("",):
        if objective not in known:
            msg = f"register_strategy({name!r}): unknown objective {objective!r}.{did_you_mean(objective, known)}"
            raise ConfigurationError(msg)

    def register(solve: Strategy) -> Strategy:
        STRATEGIES[name] = RegisteredStrategy(name, solve, objectives, kinds, thorough)
        return solve

    return register


def strategy_of(settings: SearchSettings) -> RegisteredStrategy:
    """Returns the strategy that was chosen.

    Raises:
        ConfigurationError: If its name is unknown, or it does not take the objective.
    """
    method, objective = settings.method, settings.objective
    if not isinstance(method, str) or method not in STRATEGIES:
        msg = f"search method {method!r} is unknown.{did_you_mean(method, STRATEGIES)}"
        raise ConfigurationError(msg)
    found = STRATEGIES[method]
    if objective != "auto" and objective not in found.objectives:
        takers = ", ".join(repr(name) for name, other in STRATEGIES.items() if objective in other.objectives)
        msg = (
            f"objective={objective!r} is nothing for method={method!r}, which takes "
            f"{', '.join(map(repr, found.objectives))}; the methods that take it: {takers}."
        )
        raise ConfigurationError(msg)
    return found

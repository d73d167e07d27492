"""The separable rank-selection problem every strategy solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_compress.core.costs import Costs
from lightning_compress.core.settings import RESOURCES, Budget
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.latency import LATENCY, Timing, latency_of
from lightning_compress.search.units import Unit

TIME_WEIGHT = 0.1
"""The signal loss that is accepted to save as much time as the dense model takes."""


@dataclass(frozen=True)
class Problem:
    """min Σ_l [−log(1 − e_{l,c(l)}) + λ T(l, c(l))] subject to Σ_l C_b(l, c(l)) ≤ B_b for every budgeted resource b.

    T are seconds on the target; without one they are left out.

    Attributes:
        layers: Candidates of each layer.
        budgeted: The resources that are bounded.
        limits: Absolute bound on what the layers may cost together (what the rest of the model
            costs is already taken off), shape (b,).
        weights: w_l of each layer's term in Σ_l w_l ε_l, None for ones.
        timing: Of the target, None where time is left out.
        units: What the candidates belong to, in the same order, for a strategy that needs
            more of them than errors and costs: the weights `unit.double_weight()`, (groups · out, in, *kernel),
            `unit.operator`, `unit.kinds`. They are to be read, not changed.
    """

    layers: tuple[Candidates, ...]
    budgeted: tuple[str, ...]
    limits: Floats
    weights: tuple[float, ...] | None = None
    timing: Timing | None = None
    units: tuple[Unit, ...] = ()

    def losses(self, layer: int) -> Floats:
        """Returns what each candidate of a layer adds to the objective, shape (n,)."""
        table = self.layers[layer]
        losses = table.losses if self.weights is None else table.losses * self.weights[layer]
        return losses if self.timing is None else losses + TIME_WEIGHT / self.timing.best * table.costs[:, LATENCY]

    def costs(self, layer: int) -> Floats:
        """Returns the budgeted costs of one layer's candidates, shape (n, b)."""
        return self.layers[layer].costs[:, [RESOURCES.index(name) for name in self.budgeted]]

    def cost_of(self, choice: Ints) -> Floats:
        """Returns what a choice of one row per layer costs, shape (b,)."""
        total: Floats = np.sum([self.costs(layer)[row] for layer, row in enumerate(choice)], axis=0)
        return total

    def loss_of(self, choice: Ints) -> float:
        """Returns the objective of a choice."""
        return float(sum(self.losses(layer)[row] for layer, row in enumerate(choice)))

    def fits(self, choice: Ints) -> bool:
        """Returns whether a choice keeps every budget."""
        return bool((self.cost_of(choice) <= self.limits).all())

    def restricted(self, rows: Sequence[Ints]) -> Problem:
        """Returns the same problem with only some rows of each layer."""
        layers = tuple(
            replace(
                c,
                kinds=tuple(c.kinds[r] for r in kept),
                ranks=tuple(c.ranks[r] for r in kept),
                errors=c.errors[kept],
                costs=c.costs[kept],
                merged=c.merged[kept] if c.merged is not None else None,
            )
            for c, kept in zip(self.layers, rows, strict=True)
        )
        return replace(self, layers=layers)


def problem_of(
    tables: tuple[Candidates, ...],
    dense: Costs,
    budget: Budget,
    units: tuple[Unit, ...] = (),
    timing: Timing | None = None,
    *,
    no_slower: bool = False,
) -> Problem:
    """Returns the problem of keeping a budget.

    Args:
        tables: Candidates of each unit.
        dense: Costs of the whole dense model.
        budget: With bounds.
        units: What the candidates belong to.
        timing: Of the target; the tables are filled with its times.
        no_slower: Whether to bound the time by that of the dense model, if the budget leaves it free.
    """
    dense = dense if timing is None else replace(dense, latency=timing.dense)
    totals, rest = cost_vector(dense), cost_of_the_rest(tables, dense)
    best = timing.best if timing is not None else None
    fractions = budget.limits(best)
    if no_slower and timing is not None:
        fractions.setdefault("latency", 1.0)
    limits = []
    for name, fraction in fractions.items():
        column = RESOURCES.index(name)
        most = fraction * best if name == "latency" and best else np.floor(totals[column] * fraction + 1e-6)
        limits.append(most - rest[column])
    return Problem(tables, tuple(fractions), np.array(limits), timing=timing, units=units)


def cost_vector(costs: Costs) -> Floats:
    """Returns costs in the order of `RESOURCES`, 0 where unknown, shape (4,)."""
    return np.array([costs.params, costs.macs or 0, costs.bytes, costs.latency or 0.0], dtype=np.float64)


def cost_of_the_rest(tables: Sequence[Candidates], dense: Costs) -> Floats:
    """Returns what everything but the layers costs, shape (4,)."""
    rest: Floats = cost_vector(dense) - np.sum([table.costs[-1] for table in tables], axis=0)
    return rest


def costs_after(problem: Problem, choice: Ints, dense: Costs) -> Costs:
    """Returns what the whole model costs with a choice."""
    saved = np.sum(
        [t.costs[-1] - t.costs_as_run(int(row)) for t, row in zip(problem.layers, choice, strict=True)], axis=0
    )
    params, macs, size = (cost_vector(dense) - saved)[:3].round().astype(int).tolist()
    latency = latency_of(problem.layers, choice, problem.timing) if problem.timing is not None else None
    return Costs(params, macs if dense.macs is not None else None, size, latency)

"""The separable rank-selection problem every strategy solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.settings import RESOURCES
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.candidates import Candidates


@dataclass(frozen=True)
class Problem:
    """min Σ_l [−log(1 − e_{l,c(l)}) + λ A(l, c(l))] subject to Σ_l C_b(l, c(l)) ≤ B_b for every budgeted resource b.

    A are the numbers that a factorised layer writes beyond the dense one; see `Candidates.activations`.

    Attributes:
        layers: Candidates of each layer.
        budgeted: The resources that are bounded.
        limits: Absolute bound on what the layers may cost together (what the rest of the model
            costs is already taken off), shape (b,).
        weights: w_l of each layer's term in Σ_l w_l ε_l, None for ones.
        activation_weight: λ.
        units: The layers of the model that the candidates belong to, in the same order, for a strategy that needs
            more of them than errors and costs: the weights `unit.double_weight()`, (groups · out, in, *kernel),
            `unit.operator`, `unit.kinds`. They are to be read, not changed. Those that share a first factor are one,
            with `unit.members`.
    """

    layers: tuple[Candidates, ...]
    budgeted: tuple[str, ...]
    limits: Floats
    weights: tuple[float, ...] | None = None
    activation_weight: float = 0.0
    units: tuple[Layer, ...] = ()

    def losses(self, layer: int) -> Floats:
        """Returns what each candidate of a layer adds to the objective, shape (n,)."""
        table = self.layers[layer]
        losses = table.losses if self.weights is None else table.losses * self.weights[layer]
        return losses + self.activation_weight * table.activations

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
                activations=c.activations[kept],
            )
            for c, kept in zip(self.layers, rows, strict=True)
        )
        return replace(self, layers=layers)

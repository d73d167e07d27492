"""The model's outputs with some layers factorised: what compressions are judged by while nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_compress.analysis.distance import OutputDistance
from lightning_compress.analysis.inspection import Inspection
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.analysis.trace import Arguments, inference, output_tensors, sample_counts
from lightning_compress.core.compat import tree_map
from lightning_compress.core.effort import current_effort
from lightning_compress.core.forecast import SEARCHING, current_forecast
from lightning_compress.core.parallel import in_threads
from lightning_compress.core.plan import DENSE
from lightning_compress.kinds.base import Ints
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.search.problem import Problem
from lightning_compress.search.units import SingleLayer, Unit

GROUP = 16
"""Inputs that go through the model at once."""
CACHED = 2**24
"""Numbers of the dense model's outputs that are kept at most; beyond it they are worked out again."""
LEAST_INPUTS = 4
"""With fewer affordable inputs layers are not measured, and the descent takes so many all the same."""
NEAR_SIZE = 0.15
"""What was fitted stands for ranks whose parameters differ by at most this factor."""


@dataclass(frozen=True)
class OutputEvaluator:
    """What the distance of a model's outputs is worked out from.

    Attributes:
        model: The dense model.
        units: Those of the problem, in its order.
        statistics: With the synthetic inputs, and the metric in which factors are fitted.
        inputs: Synthetic inputs per step.
        measured: Distances that were worked out, by kinds and ranks: a search asks for some twice.
        fitted: Factors, by layer, kind and ranks: choices that are compared have most in common.
        cached: Outputs of the dense model, by batch, size of the groups and group.
    """

    model: nn.Module
    units: tuple[Unit, ...]
    statistics: Statistics
    inputs: int = field(default_factory=lambda: current_effort().descent_inputs)
    measured: dict[tuple[Any, ...], float] = field(default_factory=dict, compare=False, repr=False)
    fitted: dict[tuple[int, str, tuple[int, ...]], dict[str, Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )
    cached: dict[tuple[int, int, int], list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def exist(self) -> bool:
        """Whether the model returns any floating-point tensor."""
        args, kwargs = groups_of(self.statistics.batches[0], 2, 2)[0]
        with inference(self.model):
            return bool(output_tensors(self.model(*args, **kwargs)))

    def on(self, batches: Sequence[Arguments]) -> OutputEvaluator:
        """Returns the same on other inputs, with the factors that are fitted already."""
        return replace(self, statistics=replace(self.statistics, batches=tuple(batches)), measured={}, cached={})

    def within(self, inputs: int) -> OutputEvaluator:
        """Returns the same on at most so many inputs: whole batches, or a part of the first."""
        batches = self.statistics.batches
        totals = np.cumsum([min(sample_counts(batch), default=1) for batch in batches])
        whole = int((totals <= inputs).sum())
        if whole == len(batches):
            return self
        return self.on(batches[:whole] or groups_of(batches[0], inputs, inputs)[:1])

    def groups(self, step: int) -> list[Arguments]:
        """Returns the inputs of a step in groups."""
        batches = self.statistics.batches
        return groups_of(batches[step % len(batches)], self.inputs, GROUP)

    def targets(self, key: tuple[int, int, int], arguments: Arguments) -> list[Tensor]:
        """Returns the dense model's outputs on a group of inputs, kept as long as there is room."""
        if key in self.cached:
            return self.cached[key]
        with inference(self.model):
            found = [t.clone() for t in output_tensors(self.model(*arguments[0], **arguments[1]))]
        if sum(t.numel() for kept in (*self.cached.values(), found) for t in kept) <= CACHED:
            self.cached[key] = found
        return found

    def kept_factors(self, layer: int, kind: str, ranks: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns `factors`, fitted once."""
        key = layer, kind, ranks
        if key not in self.fitted:
            self.fitted[key] = self.factors(*key)
        return self.fitted[key]

    def dense_weight(self, layer: int, kind: str, ranks: tuple[int, ...]) -> Tensor:
        """Returns the canonical weight that a layer's fitted factors are equivalent to."""
        return self.units[layer].multiplied_out(kind, self.kept_factors(layer, kind, ranks))

    def near_weight(self, layer: int, kind: str, ranks: tuple[int, ...]) -> Tensor:
        """Returns about what `dense_weight` does where that takes an iterative fit that was not made.

        The weight of the nearest ranks that were fitted (see `NEAR_SIZE`), else that of a draft whose error is made as
        small as a fit typically leaves it.
        """
        if not DECOMPOSITIONS[kind].fits_roughly or (layer, kind, ranks) in self.fitted:
            return self.dense_weight(layer, kind, ranks)
        unit = self.units[layer]
        known = list(self.fitted)  # other threads add theirs
        others = [own for index, other, own in known if (index, other) == (layer, kind)]
        sizes = np.log(DECOMPOSITIONS[kind].parameters(unit.operator.shape, np.array([ranks, *others])))
        away = np.abs(sizes[1:] - sizes[0])
        if len(away) and away.min() <= NEAR_SIZE:
            return self.dense_weight(layer, kind, others[int(away.argmin())])
        dense = unit.canonical_weight().detach()
        drafted = unit.multiplied_out(kind, self.factors(layer, kind, ranks, draft=True))
        return dense.lerp(drafted, DECOMPOSITIONS[kind].leaves ** 0.5)

    def lost_energy(self, layer: int, kind: str, ranks: tuple[int, ...]) -> float:
        """Returns ‖G^½ (W − Ŵ) S^½‖² of a layer's fitted factors; see `Candidates.energy`."""
        unit = cast(SingleLayer, self.units[layer])
        return unit.lost_energy(self.dense_weight(layer, kind, ranks), self.statistics)

    def factors(self, layer: int, kind: str, ranks: tuple[int, ...], *, draft: bool = False) -> dict[str, Tensor]:
        """Returns a layer's factors in the metric, in the weight's dtype; for `draft` see `Unit.fit`."""
        return self.units[layer].fit(kind, ranks, self.statistics, draft=draft)


def evaluator_of(inspection: Inspection, units: tuple[Unit, ...], statistics: Statistics) -> OutputEvaluator | None:
    """Returns the outputs of a model on as many inputs as it can afford, None if it has none."""
    if not statistics.batches:
        return None
    traced = inspection.trace
    inputs = max(LEAST_INPUTS, affordable_inputs(traced.macs)) if traced is not None else LEAST_INPUTS
    outputs = OutputEvaluator(inspection.model, units, statistics, inputs)
    return outputs if outputs.exist else None


def output_distance(outputs: OutputEvaluator, problem: Problem, choice: Ints, *, nearly: bool = False) -> float:
    """Returns D of whole ranks over all synthetic inputs, see `OutputDistance`.

    Args:
        outputs: Of the model.
        problem: With the ranks.
        choice: Of the problem.
        nearly: Whether factors near those of the choice will do, see `OutputEvaluator.near_weight`.
    """
    key = (nearly, *((layer.kinds[row], layer.ranks[row]) for layer, row in zip(problem.layers, choice, strict=True)))
    if key not in outputs.measured:
        outputs.measured[key] = _measure(outputs, problem, choice, nearly=nearly)
    return outputs.measured[key]


def _measure(outputs: OutputEvaluator, problem: Problem, choice: Ints, *, nearly: bool) -> float:
    weight = outputs.near_weight if nearly else outputs.dense_weight

    def weight_of(index: int) -> Tensor | None:
        table, row = problem.layers[index], choice[index]
        return None if table.kinds[row] == DENSE else weight(index, table.kinds[row], table.ranks[row])

    found_weights = in_threads(weight_of, range(len(choice)))
    weights = {index: weight for index, weight in enumerate(found_weights) if weight is not None}
    distance = OutputDistance()
    with torch.no_grad():
        for number, batch in enumerate(outputs.statistics.batches):
            for index, group in enumerate(groups_of(batch, None, 4 * GROUP)):
                targets = outputs.targets((number, 4 * GROUP, index), group)
                distance.add(outputs_with(outputs, weights, group), targets)
    return distance.value


def affordable_inputs(macs: int) -> int:
    """Returns how many inputs a step can take at most, for a model of so many MACs; see `Effort`."""
    effort, work = current_effort(), current_forecast().work(SEARCHING)
    return min(effort.descent_inputs, work // (3 * effort.descent_steps * max(1, macs)))


def outputs_with(outputs: OutputEvaluator, weights: dict[int, Tensor], arguments: Arguments) -> list[Tensor]:
    """Returns the model's outputs with some weights in the place of the layers' own."""
    names = {}  # of aliases one is enough: they share the module
    for index, weight in weights.items():
        own = outputs.units[index].dense_weights(weight)
        names.update({f"{name}.weight": part for name, part in own.items()})
    tied = any(outputs.units[index].is_tied for index in weights)
    model = outputs.model
    args, kwargs = arguments
    differentiable = torch.is_grad_enabled()
    with inference(model), torch.set_grad_enabled(differentiable):
        return output_tensors(functional_call(model, names, args, kwargs, tie_weights=tied))


def groups_of(batch: Arguments, inputs: int | None, size: int) -> list[Arguments]:
    """Returns the first inputs of a batch in groups; all at once where the tensors differ in their number."""
    counts = sample_counts(batch)
    if len(counts) != 1:
        return [batch]
    count = min(inputs or max(counts), *counts)

    def cut(start: int) -> Arguments:
        end = min(start + size, count)
        return cast(Arguments, tree_map(lambda t: t[start:end] if isinstance(t, Tensor) and t.ndim else t, batch))

    return [cut(start) for start in range(0, count, size)]

"""Time as a cost of the search: the latency column of the candidates, and its correction by whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from warnings import warn

import numpy as np
import torch

from lightning_compress.analysis.inspection import Inspection
from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.bench import PRESERVED
from lightning_compress.analysis.latency.model import ModelTimes, time_model
from lightning_compress.analysis.latency.shells import Form
from lightning_compress.analysis.latency.turns import NOISY, Reading
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.core.errors import CompressionWarning, TargetError
from lightning_compress.core.plan import DENSE, SLOWER
from lightning_compress.core.progress import Progress
from lightning_compress.core.settings import RESOURCES, Budget, SearchSettings
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.units import Unit

LATENCY = RESOURCES.index("latency")
CORRECTION = (0.5, 2.0)
"""Bounds of the factors by which the predicted times of factorised layers are corrected."""
STIFFNESS = 0.01
"""Squared relative error of a whole model that is accepted to keep a factor at 1 instead of 2."""
TOLERANCE = 0.03
"""By which a measured time may exceed its bound: what it differs by from one day to the next."""
MERGED = "merged"
"""In the place of the kind, for corrections of layers that run multiplied out."""
LEAST = 1e-9
"""Seconds that every row costs at least once a layer's costs are shifted."""


@dataclass(frozen=True)
class Timing:
    """The target in a search, the model in one memory format.

    Attributes:
        times: Of the model.
        memory_format: That it runs in.
        corrections: Factors of the predicted times of layers by kind, 1 where there is none.
        seen: Whole models that were measured: seconds of the layers by kind as predicted without corrections, what
            these took together, and the whole model.
        overhead: Seconds that the model takes longer once its attention and recurrent layers are unfused.
        shares: Of the overhead, by name of a layer that is a projection of those; None without any.
        merges: Whether layers whose factors would be slower may run multiplied out.
    """

    times: ModelTimes
    memory_format: str
    corrections: Mapping[str, float] = field(default_factory=dict)
    seen: tuple[tuple[Mapping[str, float], float, float], ...] = ()
    overhead: float = 0.0
    shares: Mapping[str, float] | None = None
    merges: bool = False

    @property
    def dense(self) -> float:
        """Seconds of the dense model in this format."""
        return self.times.dense[self.memory_format].seconds

    @property
    def best(self) -> float:
        """Seconds of the dense model in its faster format, which bounds are fractions of."""
        return self.times.best

    @property
    def changed_format(self) -> str | None:
        """The format that the model is put in, None for the one it is in."""
        return None if self.memory_format == PRESERVED else self.memory_format

    def filled(self, units: Sequence[Unit], tables: Sequence[Candidates]) -> tuple[Candidates, ...]:
        """Returns the candidates with the seconds of each row in their costs."""
        return tuple(self._filled(unit, table) for unit, table in zip(units, tables, strict=True))

    def layer_seconds(self, layer: Layer, kind: str, ranks: tuple[int, ...]) -> float:
        """Returns the predicted seconds of one layer in some form."""
        if kind == DENSE:
            return self.times.layers[self.memory_format][layer.name]
        found = self.times.of(self.memory_format, layer.name, kind, np.array([ranks], dtype=np.int64))
        return self.corrections.get(kind, 1.0) * float(found[0])

    def whole(self, units: Sequence[Unit], tables: Sequence[Candidates], choice: Ints) -> Reading | None:
        """Returns the measured time of a choice; None where the target cannot be measured on here."""
        forms = {
            layer.name: Form(table.kinds[row], table.ranks[row], table.is_merged(int(row)))
            for unit, table, row in zip(units, tables, choice, strict=True)
            for layer in unit.layers
        }
        return self.times.whole(forms, self.memory_format)

    def corrected(self, tables: Sequence[Candidates], choice: Ints, measured: float) -> Timing:
        """Returns the timing with the factors by which the predictions of all choices are nearest to what they took.

        The least relative squares over all whole models that were measured, each factor held at 1 by `STIFFNESS`.

        Args:
            tables: With the predictions of this timing.
            choice: That was measured.
            measured: Its seconds.
        """
        predicted = latency_of(tables, choice, self)
        own: dict[str, float] = {}
        for table, row in zip(tables, choice, strict=True):
            kind = MERGED if table.is_merged(int(row)) else table.kinds[row]
            if kind != DENSE:
                own[kind] = own.get(kind, 0.0) + float(table.costs[row, LATENCY]) / self.corrections.get(kind, 1.0)
        took = measured - predicted + sum(self.corrections.get(kind, 1.0) * seconds for kind, seconds in own.items())
        seen = (*self.seen, (own, took, measured))
        kinds = list(dict.fromkeys(kind for each, *_ in seen for kind in each))
        rows = np.array([[each.get(kind, 0.0) / whole for kind in kinds] for each, _, whole in seen])
        missed = np.array([together / whole for _, together, whole in seen]) - rows.sum(axis=1)
        change = np.linalg.solve(rows.T @ rows + STIFFNESS * np.eye(len(kinds)), rows.T @ missed)
        factors = np.clip(1 + change, *CORRECTION)
        return replace(self, corrections=dict(zip(kinds, factors.tolist(), strict=True)), seen=seen)

    def as_dict(self) -> dict[str, Any]:
        """Returns what a plan says of the target."""
        return {**self.times.table.identity, "table": self.times.table.fingerprint}

    def _filled(self, unit: Unit, table: Candidates) -> Candidates:
        seconds = np.zeros(len(table))
        for kind in dict.fromkeys(table.kinds):
            rows = table.rows_of(kind)
            for layer in unit.layers:
                if kind == DENSE:
                    lost = self.overhead * (self.shares or {}).get(layer.name, 0.0)
                    seconds[rows] += self.layer_seconds(layer, DENSE, ()) - lost
                else:
                    ranks = np.array([table.ranks[row] for row in rows], dtype=np.int64)
                    found = self.times.of(self.memory_format, layer.name, kind, ranks)
                    seconds[rows] += self.corrections.get(kind, 1.0) * found
        seconds += max(0.0, LEAST - float(seconds.min()))  # unfusing costs: to stay dense may cost less than nothing
        costs = table.costs.copy()
        costs[:, LATENCY] = seconds
        merged = None
        if self.merges and _is_mergeable(unit):
            merged = seconds > (1 + SLOWER) * seconds[-1]
            costs[merged, LATENCY] = self.corrections.get(MERGED, 1.0) * seconds[-1]
        return replace(table, costs=costs, merged=merged)


def timings_of(
    inspection: Inspection,
    example_input: ExampleInput | None,
    budget: Budget,
    settings: SearchSettings,
    progress: Progress,
) -> tuple[Timing, ...]:
    """Returns the target in each memory format to choose from; none where time is left out.

    Raises:
        TargetError: If time is bounded and too noisy to judge; and as `time_model`.
    """
    if settings.target is None or example_input is None or not inspection.chosen:
        return ()
    try:
        times = time_model(inspection.model, inspection.chosen, example_input, settings.target, progress)
    except torch.OutOfMemoryError as error:
        msg = f"time is left out of the search: the device has no room for copies of the model to be timed ({error})."
        warn(msg, CompressionWarning, stacklevel=3)
        times = None
    if times is None and budget.bounds_latency:
        msg = f"{budget}: the latency could not be measured, see the warning before."
        raise TargetError(msg)
    if times is None:
        return ()
    noise = max(reading.spread for reading in times.dense.values())
    if budget.bounds_latency and noise > NOISY:
        msg = (
            f"{budget}: the dense model's time is too noisy to judge, the middle half of its turns spreads by ± "
            f"{100 * noise:.0f} %. Stop what else runs on this machine, use fewer threads "
            "(target={'threads': 1}), or bound macs instead."
        )
        raise TargetError(msg)
    merges = times.bench.merges and "macs" not in budget.limits()
    found = (_timing(times, memory_format, inspection) for memory_format in times.dense)
    return tuple(replace(timing, merges=merges) for timing in found)


def _is_mergeable(unit: Unit) -> bool:
    """Returns whether a unit can run multiplied out: one layer of torch's own that is no table and shares nothing."""
    layer = unit.layers[0]
    return len(unit.layers) == 1 and not (unit.is_tied or layer.operator.lookup or layer.whole)


def _timing(times: ModelTimes, memory_format: str, inspection: Inspection) -> Timing:
    seconds = {layer.name: times.layers[memory_format][layer.name] for layer in inspection.chosen if layer.whole}
    if not seconds:
        return Timing(times, memory_format)
    overhead = times.unfused[memory_format] - times.dense[memory_format].seconds
    total = sum(seconds.values())
    shares = {name: own / total for name, own in seconds.items()}
    return Timing(times, memory_format, overhead=overhead, shares=shares)


def latency_of(tables: Sequence[Candidates], choice: Ints, timing: Timing) -> float:
    """Returns the predicted seconds of the whole model with a choice, more than none."""
    saved: Floats = np.array([t.costs[-1, LATENCY] - t.costs[r, LATENCY] for t, r in zip(tables, choice, strict=True)])
    return max(LEAST, timing.dense - float(saved.sum()))

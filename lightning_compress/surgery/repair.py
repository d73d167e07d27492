"""Data-free repair of the factors, on synthetic inputs, before any fine-tuning.

Three steps, each kept only if it brings the outputs nearer to the dense model's on inputs held out:

1. *Norm statistics.* The running statistics of batch norms are moved by what the factors changed in what
   enters them; again after the regression. See `norm_statistics`.
2. *Regression.* Layer by layer, in forward order, the factors are refitted in closed form so that the compressed
   network's own activations reproduce the dense layer's outputs. See `regression`.
3. *Distillation.* Factors, their biases and the norms' scales descend the distance of the outputs. See `distillation`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from lightning_compress.analysis.distance import NEGLIGIBLE, output_distance
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.analysis.trace import Arguments, sample_counts
from lightning_compress.core.compat import tree_map
from lightning_compress.core.effort import current_effort
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.progress import Progress, reporting, silent
from lightning_compress.layers.unfused import unfused
from lightning_compress.surgery.distillation import affordable_steps, descend, distil
from lightning_compress.surgery.norm_statistics import move_norm_statistics_
from lightning_compress.surgery.products import faster_multiplied_out, multiplied_out
from lightning_compress.surgery.regression import in_forward_order, refit_, shares_factors
from lightning_compress.surgery.state import BestState
from lightning_compress.surgery.swap import Replacement


@dataclass(frozen=True)
class Healing:
    """What the repair did.

    Attributes:
        before: Distance of the outputs on held-out synthetic inputs, see `analysis.distance`.
        regressed: The same after the regression and the norms' statistics.
        after: The same at the end; never larger than before.
        seconds: How long it took, by part: "regression" and "distillation".
        skipped: Why there was no distillation, None if there was.
    """

    before: float
    regressed: float
    after: float
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None


def heal_(
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    statistics: Statistics,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Healing:
    """Repairs the factors of a compressed model in place; keeps them as they were if that does not help.

    Args:
        dense: The dense model.
        model: The compressed one; also its norm layers' scales and running statistics may change.
        replacements: Its factorised layers, in any order.
        statistics: Of the dense model; the last quarter of its batches is held out to judge the
            result.
        steps: Of the distillation at most, None for those of the current `Effort`; fewer where they would cost more
            than its `work`.
        seed: Of the order of the inputs.
        progress: Called with what is being done and the fraction done.
    """
    progress = reporting(progress)
    with freed_memory_kept(), unfused(dense):  # so that it has the layers that are compared
        return _heal(dense, model, replacements, statistics, steps=steps, seed=seed, progress=progress)


def _heal(
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    statistics: Statistics,
    *,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Healing:
    fitting, judging = _held_out(statistics.batches)
    start = time.perf_counter()
    states = BestState(model, lambda: output_distance(dense, model, judging))
    before = states.best
    if before < NEGLIGIBLE:
        seconds = {"regression": time.perf_counter() - start, "distillation": 0.0}
        return Healing(before, before, before, seconds, f"the output distance is below {NEGLIGIBLE:g}")
    repair = _Repair(dense, model, statistics, fitting, states, progress)
    try:
        ordered = repair.regress(replacements)
        regressed, middle = states.best, time.perf_counter()
        skipped = repair.distil(ordered, current_effort().healing_steps if steps is None else steps, seed)
        progress("healing", 1.0)
    except BaseException:
        states.undo()
        raise
    seconds = {"regression": middle - start, "distillation": time.perf_counter() - middle}
    return Healing(before, regressed, states.best, seconds, skipped)


def _held_out(batches: Sequence[Arguments]) -> tuple[Sequence[Arguments], Sequence[Arguments]]:
    """Returns batches to fit to and the last quarter of them, or of the samples of a single one, to judge by."""
    if len(batches) > 1:
        held_out = max(1, len(batches) // 4)
        return batches[:-held_out], batches[-held_out:]
    counts = sample_counts(batches)
    if len(counts) != 1 or min(counts) < 2:  # noqa: PLR2004
        return batches, batches
    at = max(1, min(counts) * 3 // 4)

    def part(samples: slice) -> Arguments:
        cut = tree_map(lambda leaf: leaf[samples] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batches[0])
        return cast(Arguments, cut)

    return [part(slice(at))], [part(slice(at, None))]


@dataclass(frozen=True)
class _Repair:
    dense: nn.Module
    model: nn.Module
    statistics: Statistics
    fitting: Sequence[Arguments]
    states: BestState
    progress: Progress

    def regress(self, replacements: Sequence[Replacement]) -> list[Replacement]:
        """Moves the norms' statistics and refits the factors; returns the layers in forward order."""
        dense, model, states = self.dense, self.model, self.states
        move_norm_statistics_(dense, model, self.fitting)
        states.judge()
        states.restore()
        called = in_forward_order(model, replacements, self.fitting[0])
        ordered = [replacement for replacement, _ in called]
        for index, (replacement, calls) in enumerate(called):
            self.progress("healing: regression", index / len(called))
            if calls and not shares_factors(replacement, ordered):
                metric = self.statistics.metric(replacement.aliases[0])
                refit_(dense, model, replacement, self.fitting, metric=metric, calls=calls)
        states.judge()
        move_norm_statistics_(dense, model, self.fitting)
        states.judge()
        states.restore()
        return ordered

    def distil(self, replacements: Sequence[Replacement], steps: int, seed: int) -> str | None:
        """Distils and goes to the best state; returns why it did not, None if it did."""
        steps, skipped = affordable_steps(self.dense, self.model, replacements, self.fitting, steps)
        if skipped is not None:
            return skipped

        def look(step: int) -> float:
            self.progress("healing: distillation", step / steps)
            return self.states.judge()

        self.progress("healing: distillation", 0.0)
        at_rate = functools.partial(distil, self.dense, self.model, replacements, self.fitting, steps, seed)
        layers = [replacement.factorised for replacement in replacements]
        with multiplied_out(faster_multiplied_out(self.model, layers, self.fitting[0])):
            descend(at_rate, self.states, look)
        self.states.restore()
        return None

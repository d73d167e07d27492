"""Predicted errors of iterative fits, corrected by whole fits at the optimum.

The profile of such a kind (`Decomposition.fits_roughly`) is that of a few sweeps: on the reference
networks up to three times the error that its fitted factors have. The search would spend too much on its
layers and turn to kinds whose errors are exact. So what fits typically leave (`Decomposition.leaves`) is
expected of every layer until one of its own is known: the layers for which the optimum takes such a kind
are fitted there, all errors of the kind in the layer are scaled by the ratio that was found, interpolated
between the ranks that were fitted, and the problem is solved again, until the optimum has been fitted
throughout, or the fits would take too much work: a layer whose fit is too dear is expected to leave what those of the
same kind leave elsewhere. (To let a fit stand for ranks with up to 15 % more or fewer parameters cost the reference VGG
0.2 points at 20 %.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_compress.core.effort import current_effort
from lightning_compress.core.forecast import FITTING, current_forecast
from lightning_compress.core.parallel import in_threads
from lightning_compress.core.plan import DENSE
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import OutputEvaluator
from lightning_compress.search.problem import Problem

LEAST_ERROR = 1e-12
"""A smaller predicted error is not corrected."""
WORK = 1e11
"""Multiply-adds that all fits which only correct predictions take together, at `Effort.fits` of 1; cheap ones first."""


@dataclass
class Corrections:
    """What fits were found to leave.

    Attributes:
        ratios: Errors that fits leave over those of the profile: by layer and kind, by row of the candidates.
        left: Multiply-adds that more of them may take.
        without: Layers and kinds whose fit was too dear.
    """

    ratios: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)
    left: float = field(default_factory=lambda: WORK * current_effort().fits)
    without: set[tuple[int, str]] = field(default_factory=set)

    def expected(self, kind: str) -> float:
        """Returns what a fit of a kind leaves, of a layer of which none is known: as on the other layers."""
        found = [ratio for (_, own), fitted in self.ratios.items() if own == kind for ratio in fitted.values()]
        return float(np.mean(found)) if found else DECOMPOSITIONS[kind].leaves


def refined(
    predicted: Problem, outputs: OutputEvaluator, progress: Callable[[float], None], known: Corrections | None = None
) -> Problem:
    """Returns the problem with the errors of iterative fits corrected around its optimum.

    Args:
        predicted: The separable problem, with the errors of the profiles.
        outputs: Where the fitted factors are kept.
        progress: Called with the fraction done.
        known: From other problems with the same candidates; what is found is added.
    """
    known = Corrections() if known is None else known
    ratios = known.ratios
    for index, table in enumerate(predicted.layers):
        for kind in dict.fromkeys(table.kinds):
            if kind != DENSE and DECOMPOSITIONS[kind].fits_roughly:
                ratios.setdefault((index, kind), {})
    passes, forecast = (current_effort().corrections if ratios else 0), current_forecast()
    last = 0.0
    for done in range(passes):
        if forecast.grant(FITTING) < last:
            forecast.note(FITTING, f"{done} of {passes} corrections")
            break
        start = time.perf_counter()
        problem = _scaled(predicted, known, hopeful=True)
        choice = solve(problem).choice
        if choice is None:
            break
        chosen = [(i, problem.layers[i].kinds[row], int(row)) for i, row in enumerate(choice)]
        rows = [(i, kind, row) for i, kind, row in chosen if (i, kind) in ratios and row not in ratios[i, kind]]
        rows = _affordable(problem, outputs, rows, known)
        if not rows:
            break
        progress(done / passes)
        found = in_threads(lambda row: _ratio(predicted, outputs, row), rows)
        for (i, kind, row), ratio in zip(rows, found, strict=True):
            ratios[i, kind][row] = ratio
        last = time.perf_counter() - start
    if ratios:
        progress(1.0)
    return _scaled(predicted, known, hopeful=False)


def _affordable(
    problem: Problem, outputs: OutputEvaluator, rows: Sequence[tuple[int, str, int]], known: Corrections
) -> list[tuple[int, str, int]]:
    """Returns the rows whose fits there is work left for, cheap ones first, and takes it."""
    table = problem.layers
    works = [outputs.units[i].fit_work(kind, table[i].ranks[row], outputs.statistics) for i, kind, row in rows]
    affordable = []
    for work, item in sorted(zip(works, rows, strict=True)):
        if work <= known.left:
            known.left -= work
            affordable.append(item)
        else:
            known.without.add(item[:2])
    return sorted(affordable)


def _ratio(problem: Problem, outputs: OutputEvaluator, item: tuple[int, str, int]) -> float:
    """Returns what the fit of a row loses, relative to what is predicted."""
    index, kind, row = item
    table = problem.layers[index]
    predicted = table.energy * max(float(table.errors[row]), LEAST_ERROR)
    return outputs.lost_energy(index, kind, table.ranks[row]) / max(predicted, np.finfo(float).tiny)


def _scaled(problem: Problem, known: Corrections, *, hopeful: bool) -> Problem:
    """Returns the problem with errors times the ratios, which are interpolated over the logarithm of the parameters.

    Args:
        problem: With the errors of the profiles.
        known: What fits were found to leave.
        hopeful: Whether what fits typically leave is expected wherever none was made, not only where one is too dear.
    """
    layers = list(problem.layers)
    for (index, kind), fitted in known.ratios.items():
        own, sizes = layers[index].rows_of(kind), np.log(layers[index].costs[:, 0])
        rows = sorted(fitted, key=lambda row: sizes[row])
        expects = hopeful or (index, kind) in known.without
        scale = np.full(len(own), known.expected(kind) if expects else 1.0)
        if rows:
            scale = np.interp(sizes[own], sizes[rows], [fitted[row] for row in rows])
        errors = layers[index].errors.copy()
        errors[own] = np.clip(errors[own] * scale, 0.0, 1.0)
        layers[index] = replace(layers[index], errors=errors)
    return replace(problem, layers=tuple(layers))

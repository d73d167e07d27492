"""What a layer's error does to the model's outputs, measured.

The relative error of a layer says nothing of how much the layer matters: the same error moves the outputs far less in
a block with a shortcut than in one without. So every layer is factorised alone, at the ranks of the separable
optimum, and the distance of the outputs is measured on as many of the inputs as `Effort.work` allows. The weight of its
term is the ratio of the two,

    w_l ∝ log(1 + D_l) / ε_l,

scaled so that the terms at the optimum sum up to what they did. Distances of single layers nearly add up to that
of all where little is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_compress.analysis.forecast import MEASURED
from lightning_compress.analysis.trace import flop_counter, inference, sample_counts
from lightning_compress.core.effort import current_effort
from lightning_compress.core.forecast import MEASURING, current_forecast
from lightning_compress.core.plan import DENSE
from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import LEAST_INPUTS, OutputEvaluator, output_distance
from lightning_compress.search.problem import Problem
from lightning_compress.search.refine import Corrections, refined

LEAST_LOSS = 1e-6
"""Smaller losses and distances count as this much: a layer is never free."""
RANGE = 100.0
"""Weights lie within this factor of their median, either way."""


def nearer(
    problem: Problem, predicted: Problem, known: Corrections, outputs: OutputEvaluator, progress: Progress
) -> Problem:
    """Returns the problem with measured weights if its optimum leaves the outputs nearer, else as it is.

    Where most of a network is given up single layers say little of all together, and the plain sum can be better.

    Args:
        problem: The separable problem, without weights, corrected by `refined`.
        predicted: The same before it was corrected.
        known: With which it was.
        outputs: Of the model.
        progress: Called with what is being done and the fraction done.
    """
    before = solve(problem).choice
    measured = weighted(problem, before, outputs, lambda done: progress("measuring layers", done))
    if before is None or measured is problem:
        return problem
    measured = replace(predicted, weights=measured.weights)
    measured = refined(measured, outputs, lambda done: progress("fitting layers", done), known)
    after = solve(measured).choice
    if after is None:
        return problem
    closer = output_distance(outputs, measured, after, nearly=True) < output_distance(
        outputs, problem, before, nearly=True
    )
    return measured if closer else problem


def weighted(
    problem: Problem, choice: Ints | None, outputs: OutputEvaluator, progress: Callable[[float], None] = lambda _: None
) -> Problem:
    """Returns the problem with each layer's term weighed by what it does to the outputs.

    As it is if nothing fits, or if the model is so large that too few inputs could be afforded.

    Args:
        problem: The separable problem, without weights.
        choice: Its optimum, at whose ranks layers are measured; None if nothing fits.
        outputs: Of the model.
        progress: Called with the fraction done.
    """
    affordable = _affordable(outputs) if choice is not None else None
    if choice is None or affordable is None:
        return problem
    dense = np.array([len(table) - 1 for table in problem.layers])
    losses, distances = (np.full(len(choice), np.nan) for _ in range(2))
    for index, table in enumerate(problem.layers):
        progress(index / len(choice))
        row = int(choice[index]) if table.kinds[choice[index]] != DENSE else _middle(table)
        if row is None:
            continue
        alone = dense.copy()
        alone[index] = row
        losses[index] = max(table.losses[row], LEAST_LOSS)
        distances[index] = max(np.log1p(output_distance(affordable, problem, alone, nearly=True)), LEAST_LOSS)
    progress(1.0)
    known = np.isfinite(losses) & np.isfinite(distances)
    if not known.any():
        return problem
    weights = distances / losses
    middle = float(np.median(weights[known]))
    weights = np.clip(weights, middle / RANGE, middle * RANGE)
    chosen = known & (choice != dense)
    chosen = chosen if chosen.any() else known
    weights = weights * losses[chosen].sum() / (weights[chosen] * losses[chosen]).sum()
    weights[~known] = 1.0
    return replace(problem, weights=tuple(weights.tolist()))


def _affordable(outputs: OutputEvaluator) -> OutputEvaluator | None:
    """Returns the outputs on as many inputs as each layer can be measured on, None if on too few; see `Effort.work`."""
    args, kwargs = outputs.statistics.batches[0]
    with flop_counter() as flops, inference(outputs.model):
        outputs.model(*args, **kwargs)
    each = flops.get_total_flops() // 2 // min(sample_counts((args, kwargs)), default=1)
    forecast, work = current_forecast(), current_effort().work
    granted = forecast.work(MEASURING)
    inputs = min(MEASURED, granted // max(1, each * len(outputs.units)))
    if granted < work:
        forecast.note(MEASURING, f"on {inputs} inputs" if inputs >= LEAST_INPUTS else "left out")
    return outputs.within(inputs) if inputs >= LEAST_INPUTS else None


def _middle(table: Candidates) -> int | None:
    """Returns the row of the first kind that costs about half of the dense layer's parameters, None without any."""
    if len(table) == 1:
        return None
    rows = table.rows_of(table.kinds[0])
    return int(rows[np.abs(table.costs[rows, 0] - table.costs[-1, 0] / 2).argmin()])

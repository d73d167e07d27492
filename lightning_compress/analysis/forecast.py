"""What each part of a compression is expected to take, from the shapes of a model and two short measurements.

Rough: small networks run several times as fast in batches as alone, so that what runs them is forecast too long. It
moves a bar and shares out a limit, and what is cut depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_compress.analysis.enough import enough_inputs, moment_size, positions_of
from lightning_compress.analysis.inspection import Inspection
from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.clock import Clock, device_of
from lightning_compress.analysis.moments import PROBES
from lightning_compress.analysis.synthetic import BATCH, PASSES, affordable, drawable, running_norms
from lightning_compress.analysis.tokens import PASSES as GENERATED
from lightning_compress.analysis.trace import Arguments, ExampleInput, as_arguments, inference
from lightning_compress.core.effort import current_effort
from lightning_compress.core.forecast import (
    DECOMPOSING,
    FACTORISING,
    FITTING,
    HEALING,
    INPUTS,
    MEASURING,
    MOMENTS,
    SEARCHING,
    TIMING,
)
from lightning_compress.kinds.registry import DECOMPOSITIONS

BACKWARD = 3
"""A forward and a backward pass, in forward passes."""
DISTILLED = 4
"""A step of the healing: a forward pass of both models and a backward one."""
RUNS = 2
"""Of what is measured; the faster one counts."""
SIDE = 384
"""Of the matrices whose product measures the speed of linear algebra."""
OPERATIONS = 25.0
"""Floating-point operations of a decomposition of a matrix, times its larger side and the square of its smaller one."""
ITERATIVE = 6e9
"""Multiply-adds that the profile and the fits of a layer by an iterative kind take at most each."""
SWEEPS = 60
"""Sweeps of those over a weight at half of its parameters."""
EFFICIENCY = 1 / 15
"""Of the speed of a matrix product that decompositions reach: ResNet-20's tables took 15 times what it lets expect."""
MEASURED = 64
"""Inputs on which single layers are measured at most."""
FITS = 12
"""Whole fits that correct the profiles, in profiles: ResNet-20's took 14 s beside 1.5 s for all tables."""
SOLVING = 0.02
"""Seconds per layer that the solver takes in all."""


def expected_seconds(
    inspection: Inspection,
    example_input: ExampleInput | None,
    *,
    inputs: bool,
    timed: bool,
    heals: bool,
    descends: bool,
) -> tuple[dict[str, float], float]:
    """Returns the seconds of each part, see `core.forecast`, and the MACs per second of the model's forward pass.

    Args:
        inspection: Of the model.
        example_input: See `search_ranks`.
        inputs: Whether synthetic inputs are made, so that there are moments.
        timed: Whether layers are timed.
        heals: Whether the factors are repaired.
        descends: Whether the search descends on the outputs.
    """
    rate = EFFICIENCY * _operations_per_second()
    layers = inspection.chosen
    algebra = sum(_operations(layer) for layer in layers) / rate
    fits = sum(_iterative(layer) for layer in layers) / rate
    found = {DECOMPOSING: algebra + fits, SEARCHING: SOLVING * len(layers), FACTORISING: algebra / 3}
    if inspection.trace is None or example_input is None:
        return found, math.inf
    arguments = as_arguments(inspection.model, example_input)
    macs = max(1, inspection.trace.macs)
    speed = _speed(inspection.model, arguments, macs)
    found[FACTORISING] += 3 * macs / speed
    if timed:
        found[TIMING] = _timing(layers, macs / speed)
    if inputs:
        passes = _passes(inspection, macs, heals=heals, descends=descends)
        found.update({part: found.get(part, 0.0) + count * macs / speed for part, count in passes.items()})
        count, _ = _inputs(inspection, macs)
        found[MOMENTS] += sum(_moment_operations(layer, count) for layer in layers) * EFFICIENCY / rate
        found[FITTING] = FITS * fits
    return found, speed


def without_slow_kinds(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], str | None]:
    """Returns layers without the kinds that are fitted in sweeps, where they have others, and what to say of it."""
    found, left_out = [], set()
    for layer in layers:
        quick = tuple(kind for kind in layer.kinds if not DECOMPOSITIONS[kind].fits_roughly)
        if quick and quick != layer.kinds:
            left_out |= {*layer.kinds} - {*quick}
            layer = replace(layer, kinds=quick)  # noqa: PLW2901
        found.append(layer)
    return tuple(found), f"without {', '.join(sorted(left_out))}" if left_out else None


def _passes(inspection: Inspection, macs: int, *, heals: bool, descends: bool) -> Mapping[str, float]:
    """Returns the forward passes of one input that each part takes about."""
    effort, most = current_effort(), current_effort().work / macs
    count, steps = _inputs(inspection, macs)
    optimised = bool(running_norms(inspection.model))
    generated = any(isinstance(module, nn.Embedding) for module in inspection.model.modules())  # if it can
    few = min(effort.descent_inputs, most / (BACKWARD * effort.descent_steps)) if descends else 0.0
    return {
        INPUTS: min(most, BACKWARD * count * steps if optimised else GENERATED * count if generated else 0.0),
        MOMENTS: (2 + 2 * PROBES) * count,
        MEASURING: min(most, len(inspection.chosen) * min(count, MEASURED)) + 2 * count,
        SEARCHING: BACKWARD * effort.descent_steps * few + 4 * count,
        HEALING: (PASSES * count + min(most, DISTILLED * effort.healing_steps * min(BATCH, count))) if heals else 0.0,
    }


def _inputs(inspection: Inspection, macs: int) -> tuple[int, int]:
    effort = current_effort()
    if running_norms(inspection.model):
        return affordable(macs, effort.inputs, effort.input_steps, effort.work)
    enough = enough_inputs(inspection.model, inspection.trace.calls) if inspection.trace is not None else effort.inputs
    return min(effort.inputs, drawable(macs, enough, effort.work)), 1


def _operations(layer: Layer) -> float:
    """Returns the floating-point operations of decomposing a layer by all of its kinds."""
    rows, columns = layer.operator.shape[0], math.prod(layer.operator.shape[1:])
    small, large = min(rows, columns), max(rows, columns)
    return OPERATIONS * layer.operator.groups * len(layer.kinds) * large * small**2


def _iterative(layer: Layer) -> float:
    """Returns the multiply-adds of the profiles of a layer by its iterative kinds, and about those of its fits."""
    shape = layer.operator.shape
    size = math.prod(shape)
    rank = max(1, size // (2 * sum((*shape[:2], math.prod(shape[2:])))))
    each = min(ITERATIVE * current_effort().fits, SWEEPS * 2.0 * rank * size)
    return sum(each for kind in layer.kinds if DECOMPOSITIONS[kind].fits_roughly)


def _moment_operations(layer: Layer, count: int) -> float:
    """Returns the floating-point operations of a layer's second moments over so many inputs."""
    size = moment_size(layer.operator)
    positions = sum(call.positions or 1 for call in layer.calls or ())
    rows = min(count * positions, math.ceil(count / BATCH) * positions_of(size))
    return float(layer.operator.groups) * (4 * rows * size**2 + OPERATIONS * size**3)


def _timing(layers: Sequence[Layer], seconds: float) -> float:
    """Returns the seconds that timing all layers takes, of a model that takes so many."""
    effort = current_effort()
    rounds = max((len(layer.kinds) for layer in layers), default=0)
    each = 9 * seconds + 2 * effort.timing_seconds
    return min(effort.timing_limit, 2 * effort.timed_sizes * rounds * each)


def _speed(model: nn.Module, example: Arguments, macs: int) -> float:
    """Returns the MACs per second of a model's forward pass on an example; small models do more in a batch."""
    clock = Clock(device_of(model, example))
    with inference(model):
        return macs / max(min(clock.seconds(lambda: model(*example[0], **example[1])) for _ in range(RUNS)), 1e-9)


def _operations_per_second() -> float:
    """Returns the floating-point operations per second of a product of double precision matrices."""
    matrix, clock = torch.ones(SIDE, SIDE, dtype=torch.float64), Clock(torch.device("cpu"))
    return 2 * SIDE**3 / max(min(clock.seconds(lambda: matrix @ matrix) for _ in range(RUNS)), 1e-9)

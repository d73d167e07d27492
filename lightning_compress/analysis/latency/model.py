"""The times of a model on its target: of the whole, and of every layer in every form."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
from torch import nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.bench import PRESERVED, Bench, TorchBench
from lightning_compress.analysis.latency.devices import DeviceBench, NoBench
from lightning_compress.analysis.latency.prediction import KindTimes, sizes_to_measure
from lightning_compress.analysis.latency.shells import Form, Forms
from lightning_compress.analysis.latency.table import LatencyTable
from lightning_compress.analysis.latency.turns import SLOW, Reading
from lightning_compress.analysis.trace import ExampleInput, shape_text
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.forecast import TIMING, current_forecast
from lightning_compress.core.plan import DENSE
from lightning_compress.core.progress import Progress
from lightning_compress.core.target import Target, TargetLike, target_of
from lightning_compress.kinds.base import Floats, Ints
from lightning_compress.layers.memory_format import CHANNELS_LAST, is_channels_last

LEAST_SIZES = 3
RUNS_PER_SIZE = {True: 5, False: 9}
"""Forward passes of the dense model that one measurement of layers takes about, of a slow one and of others."""
PATIENCE = 2.5
"""By which the least number of sizes may exceed the limit of the effort."""


@dataclass
class ModelTimes:
    """What a model takes on its target, from the table or measured.

    Attributes:
        bench: The model on the target.
        table: Of the target.
        dense: Time of the dense model by memory format.
        layers: Seconds of each dense layer, by format and name.
        kinds: Times of each layer by format, name and kind.
        model: Digest of the architecture and its input.
        unfused: Seconds of the dense model with its attention and recurrent layers unfused, by format; empty if it
            has none.
    """

    bench: Bench
    table: LatencyTable
    dense: Mapping[str, Reading]
    layers: Mapping[str, Mapping[str, float]]
    kinds: Mapping[tuple[str, str, str], KindTimes]
    model: str
    unfused: Mapping[str, float]

    @property
    def best(self) -> float:
        """Seconds of the dense model in its faster memory format."""
        return min(reading.seconds for reading in self.dense.values())

    def of(self, memory_format: str, name: str, kind: str, ranks: Ints) -> Floats:
        """Returns the seconds of a layer by a kind, shape (n, R) to (n,)."""
        return self.kinds[memory_format, name, kind].at(ranks)

    def whole(self, forms: Forms, memory_format: str) -> Reading | None:
        """Returns the time of the model with some layers factorised; None where it is neither known nor measurable."""
        chosen = {name: form for name, form in sorted(forms.items()) if form.kind != DENSE}
        if not chosen:
            return self.dense[memory_format]
        key = f"{self.model} {memory_format} {_digest(str(chosen))}"
        if not self.table.measures and key not in self.table.entries:
            return None

        def measure() -> list[list[float]]:
            reading = self.bench.whole(chosen, memory_format)
            return [[reading.seconds]]

        known = key in self.table.entries
        seconds = self.table.times([key], measure)[0][0]
        if not known:
            self.table.keep()
        return Reading(seconds)


def time_model(
    model: nn.Module,
    layers: Sequence[Layer],
    example_input: ExampleInput,
    target: TargetLike,
    progress: Progress,
) -> ModelTimes | None:
    """Returns the times of a model on a target; None, with a warning, if to measure them would take too long.

    Args:
        model: Attention and recurrent layers unfused; it is not changed.
        layers: Those that can be factorised.
        example_input: See `search_ranks`.
        target: See `SearchSettings`.
        progress: Called with what is being done and the fraction done.

    Raises:
        TargetError: If the target fails, returns no time, or its table lacks some.
        ExampleInputError: If the model cannot be called as the target wants it.
    """
    digest = _architecture(model, example_input)
    bench, table = _bench_and_table(model, layers, example_input, target, digest)
    progress("timing the dense model", 0.0)
    dense = _dense(bench, table, digest)
    sizes = _sizes(layers, max(reading.seconds for reading in dense.values()) * len(bench.formats))
    if sizes < LEAST_SIZES and table.measures:
        limit = min(current_effort().timing_limit, current_forecast().grant(TIMING))
        msg = (
            f"time is left out of the search: one forward pass takes {dense[bench.formats[0]].seconds:.1f} s, and to "
            f"time the layers would take more than {limit:.0f} s. Pass effort='thorough', a longer time_limit if there "
            "is one, or target=None."
        )
        warn(msg, CompressionWarning, stacklevel=3)
        return None
    unfused, seconds, kinds = {}, {}, {}
    try:
        for memory_format in bench.formats:
            if any(layer.whole for layer in layers):
                measure = functools.partial(_unfused, bench, memory_format)
                unfused[memory_format] = table.times([f"{digest} {memory_format} unfused"], measure)[0][0]
            seconds[memory_format], timed = _time_layers(
                bench, table, layers, memory_format, max(sizes, LEAST_SIZES), progress
            )
            kinds.update({(memory_format, *key): times for key, times in timed.items()})
    finally:
        table.keep()
    progress("timing layers", 1.0)
    return ModelTimes(bench, table, dense, seconds, kinds, digest, unfused)


def _bench_and_table(
    model: nn.Module, layers: Sequence[Layer], example_input: ExampleInput, target: TargetLike, digest: str
) -> tuple[Bench, LatencyTable]:
    """Returns what measures a model on a target, and the table of what was measured there."""
    chosen = target_of(target)
    if isinstance(chosen, Path):
        table = LatencyTable.load(chosen)
        known = tuple(own for own in (PRESERVED, CHANNELS_LAST) if f"{digest} {own} dense" in table.entries)
        return NoBench(layers, table.identity, known or (PRESERVED,)), table
    bench = bench_of(model, layers, example_input, chosen)
    return bench, LatencyTable.of(bench.identity)


def _dense(bench: Bench, table: LatencyTable, digest: str) -> dict[str, Reading]:
    """Returns the time of the dense model by memory format, measured or from the table; the bench refers to it."""
    readings: dict[str, Reading] = {}

    def measure() -> list[list[float]]:
        readings.update(bench.dense())
        return [[readings[memory_format].seconds] for memory_format in bench.formats]

    found = table.times([f"{digest} {memory_format} dense" for memory_format in bench.formats], measure)
    dense = {
        memory_format: Reading(times[0], readings[memory_format].spread if readings else 0.0)
        for memory_format, times in zip(bench.formats, found, strict=True)
    }
    bench.refer_to(dense)
    return dense


def bench_of(model: nn.Module, layers: Sequence[Layer], example_input: ExampleInput, target: Any) -> Bench:
    """Returns a model on a `Target` or a `Stopwatch`."""
    if not isinstance(target, Target):
        return DeviceBench(model, layers, example_input, target, Target(threads=1))
    if target.backend == "torch":
        return TorchBench(model, layers, example_input, target)
    from lightning_compress.analysis.latency.onnx import OnnxRuntime  # noqa: PLC0415 (an extra)

    return DeviceBench(model, layers, example_input, OnnxRuntime(target.threads), target)


def _unfused(bench: Bench, memory_format: str) -> list[list[float]]:
    return [[bench.unfused(memory_format).seconds]]


def _sizes(layers: Sequence[Layer], seconds: float) -> int:
    """Returns at how many sizes of each kind layers can be timed, of a model that takes so many seconds."""
    effort = current_effort()
    rounds = max((len(layer.kinds) for layer in layers), default=1)
    each = rounds * (RUNS_PER_SIZE[seconds > SLOW] * seconds + 2 * effort.timing_seconds)
    forecast = current_forecast()
    limit = min(effort.timing_limit, forecast.grant(TIMING))
    affordable = int(limit / each)
    if affordable < LEAST_SIZES and LEAST_SIZES * each <= PATIENCE * limit:
        affordable = LEAST_SIZES
    if affordable < effort.timed_sizes and limit < effort.timing_limit:
        forecast.note(TIMING, f"{affordable} sizes of each kind" if affordable >= LEAST_SIZES else "left out")
    return min(effort.timed_sizes, affordable)


def _time_layers(  # noqa: PLR0917
    bench: Bench,
    table: LatencyTable,
    layers: Sequence[Layer],
    memory_format: str,
    sizes: int,
    progress: Progress,
) -> tuple[dict[str, float], dict[tuple[str, str], KindTimes]]:
    """Returns the seconds of the dense layers, and the times of each layer by each of its kinds."""
    grids = {(layer.name, kind): sizes_to_measure(layer, kind, sizes) for layer in layers for kind in layer.kinds}
    rounds = [{layer.name: Form(DENSE) for layer in layers}]
    for number in range(max(len(layer.kinds) for layer in layers)):
        own = {layer.name: layer.kinds[number] for layer in layers if number < len(layer.kinds)}
        for size in range(sizes):
            ranks = {name: grids[name, kind] for name, kind in own.items()}
            rounds.append(
                {
                    name: Form(kind, tuple(int(r) for r in ranks[name][size]))
                    for name, kind in own.items()
                    if size < len(ranks[name])
                }
            )
    seconds: dict[tuple[str, Form], list[float]] = {}
    laid = any(is_channels_last(layer.module) for layer in layers)  # what the model is in, whatever becomes of it
    described = {
        layer.name: f"{layer.module} {layer.weight.dtype} {CHANNELS_LAST if laid else ''} {_calls_of(layer)}"
        for layer in layers
    }
    for done, forms in enumerate(rounds):
        progress("timing layers", done / len(rounds))
        seconds.update(_timed(bench, table, forms, memory_format, described))
    kinds = {}
    for (name, kind), grid in grids.items():
        times = [seconds[name, Form(kind, tuple(int(r) for r in row))] for row in grid]
        parts = times if len({len(t) for t in times}) == 1 else [[sum(t)] for t in times]
        kinds[name, kind] = KindTimes(bench.layers[name], kind, grid, np.array(parts, dtype=np.float64))
    return {layer.name: sum(seconds[layer.name, Form(DENSE)]) for layer in layers}, kinds


def _timed(
    bench: Bench, table: LatencyTable, forms: Forms, memory_format: str, described: Mapping[str, str]
) -> dict[tuple[str, Form], list[float]]:
    """Returns the times of layers in some form; equal layers have one entry, the median of theirs."""
    names: dict[str, list[str]] = {}
    for name, form in forms.items():
        key = f"{described[name]} {memory_format} {form.kind} {'x'.join(map(str, form.ranks))}".rstrip()
        names.setdefault(key, []).append(name)

    def measure() -> list[list[float]]:
        wanted = [names[key] for key in names if key not in table.entries]
        found = bench.parts({name: forms[name] for group in wanted for name in group}, memory_format)
        times = []
        for key, group in names.items():
            if key in table.entries:
                times.append(table.entries[key])
            else:
                times.append([float(np.median(part)) for part in zip(*(found[name] for name in group), strict=True)])
        return times

    times = table.times(list(names), measure)
    return {(name, forms[name]): own for group, own in zip(names.values(), times, strict=True) for name in group}


def _calls_of(layer: Layer) -> str:
    return " ".join(f"{call.inputs}x{call.rows}" for call in layer.calls or ())


def _architecture(model: nn.Module, example_input: ExampleInput) -> str:
    tensors = [(name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict(keep_vars=True).items()]
    parts = (type(model).__qualname__, tensors, is_channels_last(model), model, shape_text(example_input))
    return "model " + _digest(" ".join(map(str, parts)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

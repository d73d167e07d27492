"""Models against each other: the seconds of each, measured in turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lightning_compress.analysis.latency.bench import TorchBench
from lightning_compress.analysis.latency.turns import CERTAIN, in_turns
from lightning_compress.analysis.trace import ExampleInput, inference
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.target import MemoryFormat, Target

ONE_THREAD = Target(threads=1)


def measure_latency(
    models: Sequence[nn.Module],
    example_input: ExampleInput,
    *,
    target: Target = ONE_THREAD,
    seconds: float = 1.0,
    faster: Sequence[int] = (0,),
) -> list[float]:
    """Returns the seconds of one forward pass for each model.

    The models take turns, so that a machine whose speed drifts slows all of them alike: use
    ratios of one call, never of two.

    Args:
        models: Modules that accept the same input.
        example_input: What to run them on.
        target: With `backend="torch"`; its memory format is left aside.
        seconds: How long the turns of each take together at least, if their ratios are not certain before.
        faster: Which models count in the faster of the memory formats they work in; the others run as they are.
    """
    owners, runs = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(freed_memory_kept())
        for index, model in enumerate(models):
            stack.enter_context(inference(model))
            memory_format: MemoryFormat = "auto" if index in faster else "preserve"
            bench = TorchBench(model, (), example_input, replace(target, memory_format=memory_format))
            found = bench.runners()
            owners += [index] * len(found)
            runs += found
        stack.enter_context(bench.measuring())
        turns = in_turns(runs, seconds, certain=CERTAIN)
    medians = [statistics.median(own) for own in turns]
    return [min(t for owner, t in zip(owners, medians, strict=True) if owner == index) for index in range(len(models))]

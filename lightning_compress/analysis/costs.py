"""Measures what a model costs: parameters, MACs, bytes, and latency."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_compress.analysis.trace import ExampleInput, as_arguments, inference, trace
from lightning_compress.core.costs import Costs


def measure_costs(model: nn.Module, example_input: ExampleInput | None = None, *, macs: int | None = None) -> Costs:
    """Returns the model's costs; MACs from `macs` if known, else from a forward pass if possible.

    Raises:
        ExampleInputError: If an example input is given and the model fails on it.
    """
    if macs is None and example_input is not None:
        macs = trace(model, example_input).macs
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return Costs(
        params=sum(p.numel() for p in model.parameters()),
        macs=macs,
        bytes=sum(t.numel() * t.element_size() for t in stored.values()),
    )


def measure_latency(
    models: Sequence[nn.Module], example_input: ExampleInput, *, rounds: int = 5, seconds: float = 0.2, threads: int = 1
) -> list[float]:
    """Returns the seconds of one forward pass at batch 1 for each model.

    The models take turns, so that a machine whose speed drifts slows all of them alike: use
    ratios of one call, never of two.

    Args:
        models: Modules that accept the same input.
        example_input: What to run them on.
        rounds: Turns of each model.
        seconds: About how long one turn takes.
        threads: Intra-op threads.
    """
    timers, numbers = [], []
    for model in models:
        args, kwargs = as_arguments(model, example_input)
        scope = {"model": model, "args": args, "kwargs": kwargs}
        timers.append(Timer("model(*args, **kwargs)", globals=scope, num_threads=threads))
        with inference(model):
            numbers.append(max(1, round(seconds / timers[-1].timeit(3).mean)))
    found: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, timer, number, times in zip(models, timers, numbers, found, strict=True):
            with inference(model):
                times.append(timer.timeit(number).mean)
    return [statistics.median(times) for times in found]

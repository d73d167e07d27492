"""A model on its target: what measures it."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.arguments import target_arguments
from lightning_compress.analysis.latency.clock import Clock, TimedModel, device_of
from lightning_compress.analysis.latency.shells import Forms, put_shells_
from lightning_compress.analysis.latency.turns import CERTAIN, LAYER_TURNS, Reading, in_turns
from lightning_compress.analysis.trace import ExampleInput, inference, output_tensors, run
from lightning_compress.core.compat import is_compiled, uncompiled
from lightning_compress.core.copies import detached_copy
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import TargetError
from lightning_compress.core.target import Target
from lightning_compress.layers.memory_format import (
    CHANNELS_LAST,
    can_be_channels_last,
    channels_last_format,
    is_channels_last,
    put_in_channels_last_,
)
from lightning_compress.layers.unfused import fuse_

PRESERVED = "preserve"
"""The memory format that the model is in."""
DRIFT = 4
"""By which the dense model runs less often than the one whose layers are timed: it only says how the machine drifts."""
LEAST_TIME = 1e-7
"""Seconds that a layer takes at least: less cannot be told from nothing."""


class Bench(ABC):
    """A dense model on its target.

    Args:
        layers: Those that can be factorised.

    Attributes:
        identity: What tells the times of this target from those of others.
        formats: Memory formats to choose from.
        layers: Those that can be factorised, by name.
        merges: Whether layers may run multiplied out there.
    """

    identity: Mapping[str, Any]
    formats: tuple[str, ...]
    merges: bool = False

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers}

    @abstractmethod
    def dense(self) -> dict[str, Reading]:
        """Returns the time of the dense model in each memory format, measured in turns."""

    def refer_to(self, dense: Mapping[str, Reading]) -> None:  # noqa: B027 (where nothing refers to them)
        """Takes the dense times of the table as they are: others are measured as ratios to them."""

    @abstractmethod
    def unfused(self, memory_format: str) -> Reading:
        """Returns the time of the dense model with its attention and recurrent layers unfused."""

    @abstractmethod
    def whole(self, forms: Forms, memory_format: str) -> Reading:
        """Returns the time of the model with some layers factorised, measured in turns with the dense one."""

    @abstractmethod
    def parts(self, forms: Forms, memory_format: str) -> dict[str, list[float]]:
        """Returns the seconds of each layer in some form, over all its calls in one forward pass.

        They are those of its stages and what is left, or of the whole layer alone.
        """

    def modules_of(self, name: str) -> list[str]:
        """Returns the names of the modules that hold a layer's weight."""
        layer = self.layers[name]
        return [layer.name, *(aliases[0] for aliases, _ in layer.partners)]


class CopyingBench(Bench):
    """One that runs copies of the model.

    Args:
        model: Attention and recurrent layers unfused; it is copied.
        layers: Those that can be factorised.
        target: Its dtype is that of the copies.
        device: Of the copies, None for that of the model.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], target: Target, device: torch.device | None = None
    ) -> None:
        super().__init__(layers)
        self._model = model
        self._dtype = getattr(torch, target.dtype) if target.dtype is not None else None
        self._device = device

    def alone(self, module: nn.Module) -> nn.Module:
        """Returns a copy of a module in eval mode as it runs on the target, without gradients."""
        copied = detached_copy(module).eval().requires_grad_(requires_grad=False)
        return copied.to(device=self._device, dtype=self._dtype)

    def copy(self, forms: Forms, memory_format: str, *, fused: bool = True) -> nn.Module:
        """Returns a copy of the model with shells in it.

        Args:
            forms: Of the shells.
            memory_format: Of the weights.
            fused: Whether attention and recurrent layers of which nothing is factorised are torch's own again.
        """
        model = self.alone(self._model)
        if memory_format == CHANNELS_LAST:
            put_in_channels_last_(model.parameters())
        put_shells_(model, self.layers, forms, channels_last=is_channels_last(model))
        if fused:
            fuse_(model)
        return model


class TorchBench(CopyingBench):
    """Torch in this process: layers are timed inside the model, so that caches and formats are those of its run.

    Args:
        model: Attention and recurrent layers unfused; it is copied.
        layers: Those that can be factorised.
        example_input: See `search_ranks`.
        target: With `backend="torch"`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], example_input: ExampleInput, target: Target) -> None:
        super().__init__(model, layers, target)
        self._target, self.merges = target, target.can_merge
        self._arguments = target_arguments(model, example_input, target)
        self._threads = target.threads or torch.get_num_threads()
        device = device_of(model, self._arguments)
        self._clock = Clock(device)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self.identity = {**target.as_dict(), "threads": self._threads, "gpu": gpu, "torch": torch.__version__}
        self._kept: dict[str, nn.Module] = {}
        self._dense: dict[str, Reading] = {}
        with inference(model):
            advice = " See its batch size and dtype."
            run(self.copy({}, PRESERVED), self._arguments, f"the inputs of {target}", advice)
        self.formats = self._formats()

    def dense(self) -> dict[str, Reading]:
        """See `Bench`."""
        if not self._dense:
            with self.measuring():
                found = in_turns(self.runners(), 8 * current_effort().timing_seconds)
            self._dense = {format: Reading.of(turns) for format, turns in zip(self.formats, found, strict=True)}
        return self._dense

    def refer_to(self, dense: Mapping[str, Reading]) -> None:
        """See `Bench`."""
        self._dense = dict(dense)

    def runners(self) -> list[Callable[[], float]]:
        """Returns what runs the dense model once and returns its seconds, for each memory format."""
        return [self._runner(self._finished(self._kept_dense(own))) for own in self.formats]

    def unfused(self, memory_format: str) -> Reading:
        """See `Bench`."""
        return self._beside_dense(self.copy({}, memory_format, fused=False), memory_format)

    def whole(self, forms: Forms, memory_format: str) -> Reading:
        """See `Bench`."""
        return self._beside_dense(self.copy(forms, memory_format), memory_format)

    def _beside_dense(self, model: nn.Module, memory_format: str) -> Reading:
        models = [self._finished(each) for each in (self._kept_dense(memory_format), model)]
        with self.measuring():
            runs, seconds = [self._runner(each) for each in models], 8 * current_effort().timing_seconds
            dense, own = in_turns(runs, seconds, certain=CERTAIN)
        ratio = Reading.of([b / a for a, b in zip(dense, own, strict=True)])
        return Reading(ratio.seconds * self.dense()[memory_format].seconds, ratio.spread)

    def parts(self, forms: Forms, memory_format: str) -> dict[str, list[float]]:
        """See `Bench`."""
        reference = self._kept_dense(memory_format)
        names = {alias: name for name in forms for alias in self.modules_of(name)}
        model = self.copy(forms, memory_format, fused=False)
        timed = TimedModel(model, names, self._clock, self._arguments)
        found: dict[tuple[str, str], list[float]] = {}

        def run_timed() -> float:
            total, parts = timed.run()
            for key, seconds in parts.items():
                found.setdefault(key, []).append(seconds)
            return total

        with self.measuring(), uncompiled(model):  # a clock inside of compiled code would measure nothing
            runs = [self._runner(reference), run_timed]
            dense, _ = in_turns(runs, current_effort().timing_seconds, LAYER_TURNS, rarer=DRIFT)
        drift = self.dense()[memory_format].seconds / statistics.median(dense)
        medians = {key: drift * statistics.median(times) for key, times in found.items()}
        summed: dict[str, list[float]] = {}
        for alias, name in names.items():
            stages = [seconds for (layer, part), seconds in medians.items() if layer == alias and part]
            own = [*stages, max(LEAST_TIME, medians[alias, ""] - sum(stages))]
            summed[name] = [a + b for a, b in itertools.zip_longest(summed.get(name, []), own, fillvalue=0.0)]
        return summed

    def _formats(self) -> tuple[str, ...]:
        asked = self._target.memory_format
        if asked == PRESERVED or not can_be_channels_last(self._model):
            return (PRESERVED,)
        if self._works_in_channels_last():
            return (CHANNELS_LAST,) if asked == CHANNELS_LAST else (PRESERVED, CHANNELS_LAST)
        if asked == CHANNELS_LAST:
            msg = (
                "target: memory_format='channels_last' changes what the model's code or those who use its outputs rely "
                "on, the order of numbers in memory (as `view` does). Use 'auto', or reshape in the place of view."
            )
            raise TargetError(msg)
        return (PRESERVED,)

    def _works_in_channels_last(self) -> bool:
        """Returns whether the model runs in the format and returns what others can go on with as before.

        Code that calls `view` on what a convolution returns fails on the format, inside the model or behind it.
        """
        model = self.copy({}, CHANNELS_LAST)
        try:
            with inference(model):
                outputs = output_tensors(model(*self._arguments[0], **self._arguments[1]))
        except RuntimeError:
            return False
        return all(channels_last_format(output) is None for output in outputs)

    def _kept_dense(self, memory_format: str) -> nn.Module:
        if memory_format not in self._kept:
            self._kept[memory_format] = self.copy({}, memory_format)
        return self._kept[memory_format]

    def _finished(self, model: nn.Module) -> nn.Module:
        if self._target.compiled or any(map(is_compiled, model.modules())):
            torch.compiler.reset()  # after some models of one class torch would run the next one uncompiled
        return cast(nn.Module, torch.compile(model)) if self._target.compiled else model

    def _runner(self, model: nn.Module) -> Callable[[], float]:
        args, kwargs = self._arguments
        return lambda: self._clock.seconds(lambda: model(*args, **kwargs))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """The number of threads, without gradients and without a trace in the global random state."""
        threads = torch.get_num_threads()
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            torch.set_num_threads(self._threads)
            with torch.random.fork_rng(devices=devices), torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(threads)

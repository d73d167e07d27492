"""Targets that time one module at a time, and one that is not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.arguments import layer_inputs, positional, target_arguments
from lightning_compress.analysis.latency.bench import LEAST_TIME, PRESERVED, Bench
from lightning_compress.analysis.latency.shells import Form, Forms, put_shells_, shell_of
from lightning_compress.analysis.latency.turns import Reading
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.core.copies import detached_copy
from lightning_compress.core.errors import TargetError
from lightning_compress.core.plan import DENSE
from lightning_compress.core.target import Stopwatch, Target
from lightning_compress.layers.memory_format import is_channels_last
from lightning_compress.layers.unfused import fuse_


class DeviceBench(Bench):
    """A device that times one module at a time: the layers on their own, with the inputs they have in the model.

    Args:
        model: Attention and recurrent layers unfused; it is copied.
        layers: Those that can be factorised.
        example_input: See `search_ranks`.
        stopwatch: The device.
        target: What the device is called with; batch and dtype of it count.
    """

    formats = (PRESERVED,)

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        example_input: ExampleInput,
        stopwatch: Stopwatch,
        target: Target,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self._model, self._stopwatch = model, stopwatch
        self._arguments = target_arguments(model, example_input, target)
        self._example = positional(model, self._arguments)
        name = getattr(stopwatch, "name", None) or type(stopwatch).__qualname__
        self.identity = {**target.as_dict(), "backend": str(name), "torch": torch.__version__}
        self._dtype = target.dtype
        self._inputs: dict[str, tuple[Any, ...]] = {}

    def dense(self) -> dict[str, Reading]:
        """See `Bench`."""
        return {PRESERVED: Reading(self._seconds(self._copy({}), self._example, "the dense model"))}

    def unfused(self, memory_format: str) -> Reading:  # noqa: ARG002
        """See `Bench`."""
        return Reading(self._seconds(self._copy({}, fused=False), self._example, "the unfused model"))

    def whole(self, forms: Forms, memory_format: str) -> Reading:  # noqa: ARG002
        """See `Bench`."""
        return Reading(self._seconds(self._copy(forms), self._example, "the compressed model"))

    def parts(self, forms: Forms, memory_format: str) -> dict[str, list[float]]:  # noqa: ARG002
        """See `Bench`."""
        if not self._inputs:
            names = {alias for name in self.layers for alias in self._modules_of(name)}
            model = self._copy({}, fused=False)
            self._inputs = layer_inputs(model, names, self._arguments)
        found = {}
        for name, form in forms.items():
            what = f"layer {name!r} as {form.kind}" + (f" of ranks {form.ranks}" if form.ranks else "")
            called = [alias for alias in self._modules_of(name) if alias in self._inputs]
            times = [self._seconds(self._layer(alias, form), self._inputs[alias], what) for alias in called]
            calls = len(self.layers[name].calls or ()) / max(1, len(called))
            found[name] = [max(LEAST_TIME, calls * sum(times))]
        return found

    def _layer(self, alias: str, form: Form) -> nn.Module:
        dense = detached_copy(self._model.get_submodule(alias)).eval().requires_grad_(requires_grad=False)
        dense = dense if self._dtype is None else dense.to(getattr(torch, self._dtype))
        if form.kind == DENSE:
            return dense
        return shell_of(dense, form, channels_last=is_channels_last(dense))

    def _modules_of(self, name: str) -> list[str]:
        return [name, *(aliases[0] for aliases, _ in self.layers[name].partners)]

    def _copy(self, forms: Forms, *, fused: bool = True) -> nn.Module:
        model = detached_copy(self._model).eval().requires_grad_(requires_grad=False)
        if self._dtype is not None:
            model = model.to(getattr(torch, self._dtype))
        put_shells_(model, self.layers, forms, channels_last=is_channels_last(self._model))
        if fused:
            fuse_(model)
        return model

    def _seconds(self, module: nn.Module, example: tuple[Any, ...], what: str) -> float:
        try:
            with torch.no_grad():
                seconds: Any = self._stopwatch.seconds(module, example)
        except Exception as error:
            msg = f"target={self._stopwatch!r} fails on {what}: {type(error).__name__}: {error}."
            raise TargetError(msg) from error
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
            msg = (
                f"target={self._stopwatch!r} returns {seconds!r} for {what}: expected the seconds of one call, a "
                "finite number above 0."
            )
            raise TargetError(msg)
        return float(seconds)


@dataclass(frozen=True)
class NoBench(Bench):
    """In the place of a target that is not here: its times are in a table that was measured there."""

    identity: Mapping[str, Any]
    formats: tuple[str, ...]
    layers: Mapping[str, Layer]

    def dense(self) -> dict[str, Reading]:
        """See `Bench`."""
        raise NotImplementedError

    def unfused(self, memory_format: str) -> Reading:
        """See `Bench`."""
        raise NotImplementedError

    def whole(self, forms: Forms, memory_format: str) -> Reading:
        """See `Bench`."""
        raise NotImplementedError

    def parts(self, forms: Forms, memory_format: str) -> dict[str, list[float]]:
        """See `Bench`."""
        raise NotImplementedError

"""Targets that time one module at a time, and one that is not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.latency.arguments import layer_inputs, positional, target_arguments
from lightning_compress.analysis.latency.bench import LEAST_TIME, PRESERVED, Bench, CopyingBench
from lightning_compress.analysis.latency.shells import Form, Forms, shell_of
from lightning_compress.analysis.latency.turns import Reading
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.core.compat import tree_map
from lightning_compress.core.errors import TargetError
from lightning_compress.core.plan import DENSE
from lightning_compress.core.target import Stopwatch, Target
from lightning_compress.layers.memory_format import is_channels_last


class DeviceBench(CopyingBench):
    """A device that times one module at a time: the layers on their own, with the inputs they have in the model.

    It is given copies on the processor, wherever the model is.

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
        super().__init__(model, layers, target, torch.device("cpu"))
        self._stopwatch = stopwatch
        arguments = target_arguments(model, example_input, target)
        self._arguments = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, arguments)
        self._example = positional(model, self._arguments)
        name = getattr(stopwatch, "name", None) or type(stopwatch).__qualname__
        self.identity = {**target.as_dict(), "backend": str(name), "torch": torch.__version__}
        self._inputs: dict[str, tuple[Any, ...]] = {}

    def dense(self) -> dict[str, Reading]:
        """See `Bench`."""
        return {PRESERVED: Reading(self._seconds(self.copy({}, PRESERVED), self._example, "the dense model"))}

    def unfused(self, memory_format: str) -> Reading:  # noqa: ARG002
        """See `Bench`."""
        return Reading(self._seconds(self.copy({}, PRESERVED, fused=False), self._example, "the unfused model"))

    def whole(self, forms: Forms, memory_format: str) -> Reading:  # noqa: ARG002
        """See `Bench`."""
        return Reading(self._seconds(self.copy(forms, PRESERVED), self._example, "the compressed model"))

    def parts(self, forms: Forms, memory_format: str) -> dict[str, list[float]]:  # noqa: ARG002
        """See `Bench`."""
        if not self._inputs:
            names = {alias for name in self.layers for alias in self.modules_of(name)}
            model = self.copy({}, PRESERVED, fused=False)
            self._inputs = layer_inputs(model, names, self._arguments)
        found = {}
        for name, form in forms.items():
            what = f"layer {name!r} as {form.kind}" + (f" of ranks {form.ranks}" if form.ranks else "")
            called = [alias for alias in self.modules_of(name) if alias in self._inputs]
            times = [self._seconds(self._layer(alias, form), self._inputs[alias], what) for alias in called]
            calls = len(self.layers[name].calls or ()) / max(1, len(called))
            found[name] = [max(LEAST_TIME, calls * sum(times))]
        return found

    def _layer(self, alias: str, form: Form) -> nn.Module:
        dense = self.alone(self._model.get_submodule(alias))
        return dense if form.kind == DENSE else shell_of(dense, form, channels_last=is_channels_last(dense))

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


class NoBench(Bench):
    """In the place of a target that is not here: its times are in a table that was measured there.

    Args:
        layers: Those that can be factorised.
        identity: Of the target.
        formats: That were measured there.
    """

    def __init__(self, layers: Sequence[Layer], identity: Mapping[str, Any], formats: tuple[str, ...]) -> None:
        super().__init__(layers)
        self.identity, self.formats = identity, formats
        self.merges = bool(identity.get("merge")) and not identity.get("compiled") and identity["backend"] == "torch"

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

"""Times the layers of a model while the whole model runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments
from lightning_compress.core.compat import tree_leaves


class Clock:
    """Seconds on the processor, or on a GPU by its own events."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """Returns a point in time."""
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Returns the seconds between two points; on a GPU when both are past."""
        return 1e-3 * float(start.elapsed_time(end)) if self._cuda else float(end - start)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Returns the seconds of a call; what the GPU was given before and in it is done by then."""
        self._wait()
        start = self.now()
        call()
        end = self.now()
        self._wait()
        return self.between(start, end)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class TimedModel:
    """A model whose layers are timed from within: their `forward` is wrapped, nothing else is changed.

    Args:
        model: A copy of its own, in eval mode.
        names: Of the layers.
        clock: Of the device.
        arguments: Of the forward pass.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], clock: Clock, arguments: Arguments) -> None:
        self._model, self._clock, self._arguments = model, clock, arguments
        self._spans: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
        for name in names:
            layer = model.get_submodule(name)
            for part, module in (("", layer), *layer.named_children()):
                spans = self._spans.setdefault((name, part), [])
                module.forward = self._timed(module.forward, spans)

    def run(self) -> tuple[float, dict[tuple[str, str], float]]:
        """Returns the seconds of one forward pass, and of each layer ("name", "") and child ("name", "child") in it."""
        for spans in self._spans.values():
            spans.clear()
        args, kwargs = self._arguments
        total = self._clock.seconds(lambda: self._model(*args, **kwargs))
        between = self._clock.between
        return total, {key: sum(between(*span) for span in spans) for key, spans in self._spans.items()}

    def _timed(self, forward: Callable[..., Any], spans: list[tuple[Any, Any]]) -> Callable[..., Any]:
        now = self._clock.now

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            output = forward(*args, **kwargs)
            spans.append((start, now()))
            return output

        return timed


def device_of(model: nn.Module, arguments: Arguments) -> torch.device:
    """Returns where a model runs."""
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))]
    return next((tensor.device for tensor in tensors), torch.device("cpu"))

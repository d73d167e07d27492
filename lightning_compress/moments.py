"""Second moments of what enters each layer, from any batches of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.errors import ExampleInputError
from lightning_compress.inventory import list_layers
from lightning_compress.progress import Progress, silent
from lightning_compress.synthesis import Arguments, synthesise
from lightning_compress.tracing import ExampleInput, inference, whole_arguments

POSITIONS = 2**16
"""Rows of an unfolded input that are taken at most per layer and batch, evenly spread."""


@dataclass(frozen=True)
class Moments:
    """Mean and second moment of a layer's unfolded inputs.

    Attributes:
        second: S = E[x xᵀ], (D, D) float64; D = in for Linear, in·k_h·k_w for Conv2d.
        mean: E[x], (D,).
    """

    second: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Statistics:
    """What is known of a model's activations, and from where.

    Attributes:
        batches: The inputs it was worked out on.
        source: "batch norm" (inputs matched to running statistics), "tokens", "noise", or "real".
        moments: Per layer; a layer that was not called is missing.
    """

    batches: tuple[Arguments, ...]
    source: str
    moments: Mapping[str, Moments]

    @property
    def data_free(self) -> bool:
        """Whether no real data was used."""
        return self.source != "real"

    def metric(self, name: str) -> Tensor | None:
        """Returns the second moment of what enters a layer, (D, D), None if unknown."""
        moments = self.moments.get(name)
        return moments.second if moments is not None else None


def gather_statistics(
    model: nn.Module,
    example_input: ExampleInput,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Statistics:
    """Returns input moments of every layer that can be factorised; the model is not changed.

    Args:
        model: Any module, dense.
        example_input: See `search_ranks`.
        calibration: Batches of real inputs, each a tensor, or a tuple or dict of the arguments of
            `forward`; then no inputs are made up and the result is not data-free.
        seed: Of the synthetic inputs.
        progress: Called with what is being done and the fraction done.

    Raises:
        ExampleInputError: If the model fails on an input, or its activations are not finite.
    """
    if calibration is not None:
        batches = tuple(whole_arguments(model, batch) for batch in calibration)
        source = "real"
        if not batches:
            msg = "calibration holds no batch: expected batches of inputs."
            raise ExampleInputError(msg)
    else:
        synthetic = synthesise(model, example_input, seed=seed, progress=progress)
        batches, source = synthetic.batches, synthetic.source
    names = [layer.name for layer in list_layers(model) if layer.reason is None]
    return Statistics(batches, source, input_moments(model, batches, names))


def unfolded(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Returns what the weight is applied to, one row per output position, (rows, D)."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.reshape(-1, inputs.shape[-1])
    inputs = inputs if inputs.ndim == 4 else inputs[None]  # noqa: PLR2004
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)  # (B, D, positions)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def input_moments(model: nn.Module, batches: Iterable[Arguments], names: Iterable[str]) -> Mapping[str, Moments]:
    """Returns the moments of the named layers over some batches.

    Args:
        model: Any module; it is run in eval mode and not changed.
        batches: Arguments of its forward pass.
        names: Layers, nn.Linear or nn.Conv2d.
    """
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    layers = {name: model.get_submodule(name) for name in names}

    def gather(name: str, layer: nn.Module, inputs: Tensor) -> None:
        rows = unfolded(layer, inputs)
        rows = rows[:: max(1, len(rows) // POSITIONS)].float()
        second, mean, count = sums.get(name, (0, 0, 0))
        sums[name] = (second + (rows.T @ rows).double(), mean + rows.sum(dim=0).double(), count + len(rows))

    handles = [
        layer.register_forward_pre_hook(lambda m, args, name=name: gather(name, m, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with inference(model):
            for args, kwargs in batches:
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name, (second, _, _) in sums.items():
        if not bool(torch.isfinite(second).all()):
            msg = (
                f"the inputs of layer {name!r} are not finite on these inputs: use objective='weight', or other inputs."
            )
            raise ExampleInputError(msg)
    return {name: Moments((second / count).cpu(), (mean / count).cpu()) for name, (second, mean, count) in sums.items()}

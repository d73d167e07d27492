"""Second moments of what enters each layer and of what its outputs do to the model's, from any inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer, list_layers
from lightning_compress.analysis.moments import Moments, batch_statistics, input_moments, of_both_kinds, output_moments
from lightning_compress.analysis.synthetic import SyntheticInputs, synthesise
from lightning_compress.analysis.trace import (
    Arguments,
    ExampleInput,
    is_shape,
    require_example_input,
    whole_arguments,
)
from lightning_compress.core.checks import shown
from lightning_compress.core.effort import Effort, EffortName, trying
from lightning_compress.core.errors import ConfigurationError, ExampleInputError
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.progress import Progress, reporting
from lightning_compress.kinds.metric import Metric
from lightning_compress.layers.families import operator_of
from lightning_compress.layers.unfused import unfused


@dataclass(frozen=True)
class Statistics:
    """What is known of a model's activations, and from where.

    Attributes:
        batches: The inputs it was worked out on.
        source: As in `Moments`, of the inputs.
        moments: Per layer; a layer of which nothing is known is missing.
        seconds: How long it took, by part: "synthetic inputs" and "moments".
        judging: Synthetic inputs of another kind, on which plans are compared; none beside real ones.
        scarce: Whether so few inputs could be optimised that the moments are of drawn ones, which are too unlike
            real ones to repair factors on.
    """

    batches: tuple[Arguments, ...]
    source: str
    moments: Mapping[str, Moments]
    seconds: Mapping[str, float] = field(default_factory=dict)
    judging: tuple[Arguments, ...] = ()
    scarce: bool = False

    @property
    def data_free(self) -> bool:
        """Whether no real data was used."""
        return self.source != "real"

    def metric(self, name: str) -> Metric | None:
        """Returns the metric of a layer's errors, None if nothing is known."""
        moments = self.moments.get(name)
        return moments.metric if moments is not None else None

    def samples_of(self, name: str) -> int | None:
        """Returns how many independent inputs a layer's moments are made from, None if from none."""
        moments = self.moments.get(name)
        return moments.samples if moments is not None else None

    def source_of(self, name: str) -> str | None:
        """Returns where a layer's moments come from, None if nothing is known."""
        moments = self.moments.get(name)
        return moments.source if moments is not None else None


def gather_statistics(
    model: nn.Module,
    example_input: ExampleInput | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Sequence[Layer] | None = None,
    effort: EffortName | Effort | None = None,
) -> Statistics:
    """Returns moments of every layer that can be factorised and that the inputs reach; the model is not changed.

    Args:
        model: Any module, dense.
        example_input: See `search_ranks`; not needed beside calibration.
        calibration: Batches of real inputs, each a tensor, or a tuple or dict of the arguments of
            `forward`; then no inputs are made up and the result is not data-free.
        seed: Of the synthetic inputs and the gradients' directions.
        progress: Called with what is being done and the fraction done.
        layers: Those of the model whose moments are wanted, None for all that can be factorised.
        effort: See `SearchSettings`; None for that of the search that runs, "balanced" outside of one.

    Raises:
        ExampleInputError: If there is neither an example input nor calibration, or the model fails on an input, or
            its activations are not finite; the message names the layer.
    """
    require_inputs(example_input, calibration)
    progress = reporting(progress)
    start = time.perf_counter()
    with unfused(model), freed_memory_kept(), trying(effort):
        if calibration is not None:
            inputs = SyntheticInputs(_real(model, calibration), "real")
        elif example_input is not None:
            inputs = synthesise(model, example_input, seed=seed, progress=progress)
        else:
            msg = "there are no moments without inputs: pass an example_input to make some with, or calibration."
            raise ExampleInputError(msg)
        made = time.perf_counter()
        progress("moments", 0.0)
        chosen = [layer for layer in (list_layers(model) if layers is None else layers) if layer.reason is None]
        found = _moments(model, inputs, chosen, seed)
        progress("moments", 1.0)
    seconds = {"synthetic inputs": made - start, "moments": time.perf_counter() - made}
    return Statistics(inputs.batches, inputs.source, found, seconds, inputs.judging, scarce=bool(inputs.drawn))


def _moments(model: nn.Module, inputs: SyntheticInputs, layers: Sequence[Layer], seed: int) -> dict[str, Moments]:
    """Returns the moments of layers on inputs."""
    modules = {layer.name: layer.module for layer in layers}
    partners = {aliases[0]: layer.name for layer in layers for aliases, _ in layer.partners}
    names = (*modules, *partners)
    found = input_moments(model, inputs.drawn or inputs.batches, names, source=inputs.source)
    if inputs.drawn:
        with batch_statistics(model):
            found = of_both_kinds(input_moments(model, inputs.drawn, names, source=inputs.source), found)
    gradients = output_moments(model, inputs.batches, found, seed=seed)
    found = {name: replace(moments, outputs=gradients.get(name)) for name, moments in found.items()}
    for partner, name in partners.items():
        if (moments := found.pop(partner, None)) is not None:
            found[name] = _with_partner(found.get(name), modules[name], moments)
    return found


def _with_partner(own: Moments | None, layer: nn.Module, partner: Moments) -> Moments:
    """Returns the moments of a weight that two layers hold.

    What enters an output layer is what an embedding of the same weight puts out: both second moments
    are then in the same space, and their errors add up, each in units of its own.
    """
    if own is None or partner.second is None or not operator_of(layer).lookup:
        return own if own is not None else partner
    parts = [moment / moment.trace() for moment in (own.outputs, partner.second) if moment is not None]
    return replace(own, outputs=torch.stack(parts).sum(dim=0))


def require_inputs(example_input: Any, calibration: Any, statistics: Any = None) -> None:
    """Checks the types of what says which inputs a search uses, whether it will use them or not.

    Args:
        example_input: See `search_ranks`.
        calibration: Likewise; a list or tuple is looked into, other iterables only when they are used.
        statistics: Likewise.

    Raises:
        ExampleInputError: If the example input or the calibration is of another type.
        ConfigurationError: If the statistics are.
    """
    if example_input is not None:
        require_example_input(example_input)
    if statistics is not None and not isinstance(statistics, Statistics):
        msg = f"statistics={shown(statistics)}: expected what gather_statistics returns, or None."
        raise ConfigurationError(msg)
    if calibration is None:
        return
    if isinstance(calibration, (Tensor, Mapping, str, bytes)) or not isinstance(calibration, Iterable):
        msg = (
            f"calibration={type(calibration).__name__}: expected batches of inputs, a list or a loader; "
            "for one batch write [batch]."
        )
        raise ExampleInputError(msg)
    if isinstance(calibration, (list, tuple)):
        for batch in calibration:
            _batch(batch)
        _require_some(calibration)


def _require_some(batches: Sequence[Any]) -> None:
    if not batches:
        msg = "calibration holds no batch: expected batches of inputs."
        raise ExampleInputError(msg)


def _real(model: nn.Module, calibration: Iterable[Any]) -> tuple[Arguments, ...]:
    batches = tuple(whole_arguments(model, _batch(batch)) for batch in calibration)
    _require_some(batches)
    return batches


def _batch(batch: Any) -> Any:
    if isinstance(batch, (Tensor, Mapping)) or (isinstance(batch, tuple) and not is_shape(batch)):
        return batch
    msg = (
        f"calibration holds a {type(batch).__name__}: expected each batch as a tensor, or a tuple or dict of the "
        "arguments of forward; of batches [inputs, labels] pass the inputs alone."
    )
    raise ExampleInputError(msg)

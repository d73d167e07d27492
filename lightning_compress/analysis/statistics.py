"""Second moments of what enters each layer and of what its outputs do to the model's, from any inputs."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import list_layers
from lightning_compress.analysis.synthetic import running_norms, synthesise
from lightning_compress.analysis.trace import (
    Arguments,
    ExampleInput,
    hooked,
    inference,
    input_of,
    is_shape,
    output_tensors,
    run,
    sample_counts,
    whole_arguments,
)
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.progress import Progress, silent
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.shrinkage import Folds, SampleSums, shrunk
from lightning_compress.layers.families import canonical, family_of, operator_of
from lightning_compress.layers.unfused import unfused

POSITIONS = 2**14
"""Rows of an unfolded input that are taken at most per layer and batch, evenly spread."""
OTHER_KIND = 0.2
"""Share of the covariance of drawn inputs that is put in the place of what real ones may not have."""
PROBES = 2
"""Random combinations of the outputs whose gradients are taken per batch."""


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's unfolded inputs and of what its outputs do.

    Attributes:
        second: S = E[x xᵀ], (D, D) float64, D = in times the kernel's size; (groups, D, D) for
            several groups; None for indices, all of which count alike.
        mean: E[x], (D,) or (groups, D); None likewise.
        outputs: G = Σ g gᵀ, (out, out) or (groups, out, out) float64, of which only the shape
            matters; g the gradient of a random combination of the model's outputs by those of the
            layer at one position; None if unknown.
        source: Where they come from: "batch norm" (synthetic inputs matched to running
            statistics), "tokens" or "noise" (synthetic inputs of that kind), or "real".
        samples: How many independent inputs they are made from, positions of one not counted; None if from none.
        shrinkage: Share of the covariance that was put in the place of what so few samples do not show, see
            `shrinkage`; the largest of the groups.
        folds: What says how the error of every rank grows on unseen inputs; None if unknown.
    """

    second: Tensor | None
    mean: Tensor | None
    outputs: Tensor | None = None
    source: str = "real"
    samples: int | None = None
    shrinkage: float = 0.0
    folds: Folds | None = field(default=None, repr=False)

    @functools.cached_property
    def metric(self) -> Metric:
        """The metric in which the layer's errors are measured."""
        return Metric(self.second, self.outputs, self.folds)


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
    progress: Progress = silent,
) -> Statistics:
    """Returns moments of every layer that can be factorised and that the inputs reach; the model is not changed.

    Args:
        model: Any module, dense.
        example_input: See `search_ranks`; not needed beside calibration.
        calibration: Batches of real inputs, each a tensor, or a tuple or dict of the arguments of
            `forward`; then no inputs are made up and the result is not data-free.
        seed: Of the synthetic inputs and the gradients' directions.
        progress: Called with what is being done and the fraction done.

    Raises:
        ExampleInputError: If there is neither an example input nor calibration, or the model fails on an input, or
            its activations are not finite; the message names the layer.
    """
    with unfused(model), freed_memory_kept():
        return _gather(model, example_input, calibration, seed, progress)


def _gather(
    model: nn.Module,
    example_input: ExampleInput | None,
    calibration: Iterable[Any] | None,
    seed: int,
    progress: Progress,
) -> Statistics:
    start = time.perf_counter()
    drawn: tuple[Arguments, ...] = ()
    judging: tuple[Arguments, ...] = ()
    if calibration is not None:
        batches, source = _real(model, calibration), "real"
    elif example_input is not None:
        synthetic = synthesise(model, example_input, seed=seed, progress=progress)
        batches, source, drawn = synthetic.batches, synthetic.source, synthetic.drawn
        judging = synthetic.judging
    else:
        msg = "there are no moments without inputs: pass an example_input to make synthetic ones with, or calibration."
        raise ExampleInputError(msg)
    made = time.perf_counter()
    chosen = [layer for layer in list_layers(model) if layer.reason is None]
    layers = {layer.name: layer.module for layer in chosen}
    partners = {aliases[0]: layer.name for layer in chosen for aliases, _ in layer.partners}
    progress("moments", 0.0)
    names = (*layers, *partners)
    found = dict(input_moments(model, drawn or batches, names, source=source))
    if drawn:
        with batch_statistics(model):
            found = _of_both_kinds(input_moments(model, drawn, names, source=source), found)
    gradients = output_moments(model, batches, found, seed=seed)
    found = {name: replace(moments, outputs=gradients.get(name)) for name, moments in found.items()}
    for partner, name in partners.items():
        if (moments := found.pop(partner, None)) is not None:
            found[name] = _with_partner(found.get(name), layers[name], moments)
    progress("moments", 1.0)
    seconds = {"synthetic inputs": made - start, "moments": time.perf_counter() - made}
    return Statistics(batches, source, found, seconds, judging, scarce=bool(drawn))


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Lets batch norms take the statistics of each batch, in eval mode too; their own stay as they are."""
    norms = running_norms(model)
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, variance


def _of_both_kinds(normed: Mapping[str, Moments], plain: Mapping[str, Moments]) -> dict[str, Moments]:
    """Returns the mean of each layer's moments over drawn inputs in two ways, shrunk further by `OTHER_KIND`.

    What both have in common is likelier to be true of real inputs as well.

    Args:
        normed: Where norms take the batch's statistics; what says how errors grow is of these.
        plain: Where they take their own.
    """
    pooled = {**plain, **normed}  # a layer that one of the two never reaches has the other's
    for name in plain.keys() & normed.keys():
        first, other = normed[name], plain[name]
        if first.second is None or first.mean is None or other.second is None or other.mean is None:
            continue
        second, mean = (first.second + other.second) / 2, (first.mean + other.mean) / 2
        outer = mean[..., :, None] * mean[..., None, :]
        kept = (1 - OTHER_KIND) * (1 - (first.shrinkage + other.shrinkage) / 2)
        pooled[name] = replace(first, second=shrunk(second - outer, OTHER_KIND) + outer, mean=mean, shrinkage=1 - kept)
    return pooled


def _with_partner(own: Moments | None, layer: nn.Module, partner: Moments) -> Moments:
    """Returns the moments of a weight that two layers hold.

    What enters an output layer is what an embedding of the same weight puts out: both second moments
    are then in the same space, and their errors add up, each in units of its own.
    """
    if own is None or partner.second is None or not operator_of(layer).lookup:
        return own if own is not None else partner
    parts = [moment / moment.trace() for moment in (own.outputs, partner.second) if moment is not None]
    return replace(own, outputs=torch.stack(parts).sum(dim=0))


def _real(model: nn.Module, calibration: Iterable[Any]) -> tuple[Arguments, ...]:
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        msg = (
            f"calibration={type(calibration).__name__}: expected batches of inputs, a list or a loader; "
            "for one batch write [batch]."
        )
        raise ExampleInputError(msg)
    batches = tuple(whole_arguments(model, _batch(batch)) for batch in calibration)
    if not batches:
        msg = "calibration holds no batch: expected batches of inputs."
        raise ExampleInputError(msg)
    return batches


def _batch(batch: Any) -> Any:
    if isinstance(batch, (Tensor, Mapping)) or (isinstance(batch, tuple) and not is_shape(batch)):
        return batch
    msg = (
        f"calibration holds a {type(batch).__name__}: expected each batch as a tensor, or a tuple or dict of the "
        "arguments of forward; of batches [inputs, labels] pass the inputs alone."
    )
    raise ExampleInputError(msg)


def _joined(values: Tensor) -> Tensor:
    """Returns (groups, …) without the first dimension where there is but one group."""
    return values[0] if len(values) == 1 else values


def input_moments(
    model: nn.Module, batches: Iterable[Arguments], names: Iterable[str], *, source: str = "real"
) -> Mapping[str, Moments]:
    """Returns the moments of what enters the named layers over some batches.

    Args:
        model: Any module; it is run in eval mode and not changed.
        batches: Arguments of its forward pass.
        names: Layers that can be factorised.
        source: What the batches are.

    Raises:
        ExampleInputError: If the model fails on a batch, or the inputs of a layer are not finite.
    """
    sums: dict[str, SampleSums] = {}
    lookups: set[str] = set()
    finite, running, inputs_seen = True, 1, 0
    layers = {name: model.get_submodule(name) for name in names}

    def gather(name: str, layer: nn.Module, inputs: Tensor) -> None:
        rows = family_of(layer).rows(layer, inputs)
        if rows is None:
            lookups.add(name)
            return
        samples = _by_sample(rows, running, POSITIONS)
        if name not in sums:
            sums[name] = SampleSums(samples, _grouped_weight(layer))
        sums[name].add(samples)

    with (
        hooked(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: gather(name, m, input_of(args, kwargs)),
                with_kwargs=True,
            )
            for name, layer in layers.items()
        ),
        inference(model),
    ):
        for arguments in batches:
            running = _samples_in(arguments)
            inputs_seen += running
            for output in output_tensors(run(model, arguments, f"{source} inputs")):
                finite = finite and bool(torch.isfinite(output).all())
    estimates = {name: found.estimate() for name, found in sums.items()}
    for name, estimate in estimates.items():
        if not bool(torch.isfinite(estimate.second).all()):
            msg = (
                f"the inputs of layer {name!r} are not finite on {source} inputs: use objective='weight', "
                "or pass real inputs as calibration."
            )
            raise ExampleInputError(msg)
    if not finite:
        msg = f"the model's outputs are not finite on {source} inputs: use objective='weight', or calibration."
        raise ExampleInputError(msg)
    return {name: Moments(None, None, source=source) for name in lookups} | {
        name: Moments(
            _joined(estimate.second),
            _joined(estimate.mean),
            source=source,
            samples=min(estimate.samples, inputs_seen),  # a layer may be called more than once
            shrinkage=estimate.shrinkage,
            folds=estimate.folds,
        )
        for name, estimate in estimates.items()
    }


def _samples_in(arguments: Arguments) -> int:
    """Returns how many independent inputs a batch holds, 1 if its tensors differ."""
    counts = sample_counts(arguments)
    return counts.pop() if len(counts) == 1 else 1


def _grouped_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of a layer that can be factorised as (groups, out, D)."""
    operator = operator_of(layer)
    weight = canonical(layer, cast(Tensor, layer.weight)).detach()
    return weight.reshape(operator.groups, operator.shape[0], -1)


def _by_sample(rows: Tensor, samples: int, most: int) -> Tensor:
    """Returns rows (groups, n, D) as (groups, samples, positions, D), at most so many in all, evenly spread.

    Rows that cannot be told apart by sample count as one each.
    """
    samples = samples if rows.shape[1] % samples == 0 else rows.shape[1]
    rows = rows.reshape(len(rows), samples, -1, rows.shape[2])
    return rows[:, :, :: max(1, rows.shape[1] * rows.shape[2] // most)]


def output_moments(
    model: nn.Module, batches: Iterable[Arguments], names: Iterable[str], *, seed: int = 0
) -> Mapping[str, Tensor]:
    """Returns G = E[g gᵀ] of the named layers, (out, out) float64 each, see `Moments.outputs`.

    Layers that no output depends on differentiably, and those whose gradients are not finite, are
    missing; so are all if the model cannot be differentiated (in-place updates of what is needed
    for it, parameters made in inference mode).

    Args:
        model: Any module; it is run in eval mode and not changed.
        batches: Arguments of its forward pass.
        names: Layers that can be factorised.
        seed: Of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {name: model.get_submodule(name) for name in names}
    sums: dict[str, SampleSums] = {}
    seen: list[tuple[str, Tensor]] = []

    def probe(name: str, output: Tensor) -> Tensor:
        probed = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((name, probed))
        return probed.clone()  # what follows may change it in place

    with hooked(
        layer.register_forward_hook(lambda _m, _args, output, name=name: probe(name, output))
        for name, layer in layers.items()
    ):
        for arguments in batches:
            seen.clear()
            try:
                with inference(model), torch.inference_mode(mode=False), torch.enable_grad():
                    outputs = [out for out in output_tensors(model(*arguments[0], **arguments[1])) if out.requires_grad]
                    for direction in range(PROBES if outputs and seen else 0):
                        gradients = _gradients(outputs, [probed for _, probed in seen], generator, direction)
                        for (name, _), gradient in zip(seen, gradients, strict=True):
                            if gradient is not None:
                                rows = _gradient_rows(layers[name], gradient)
                                samples = _by_sample(rows, _samples_in(arguments), POSITIONS)
                                sums.setdefault(name, SampleSums(samples, centred=False)).add(samples)
            except (RuntimeError, NotImplementedError):
                return {}
    found = {name: _joined(each.estimate().second) for name, each in sums.items()}
    return {name: value for name, value in found.items() if bool(torch.isfinite(value).all()) and bool(value.any())}


def _gradients(
    outputs: list[Tensor], inner: list[Tensor], generator: torch.Generator, direction: int
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of a random combination of the outputs, each in units of its own deviation."""
    combined = torch.zeros(())
    for output in outputs:
        scale = output.detach().float().std().clamp_min(torch.finfo(torch.float32).tiny)
        weights = torch.randn(output.shape, generator=generator).to(output.device) / scale
        combined = combined + (output.float() * weights).sum().cpu()
    return torch.autograd.grad(combined, inner, retain_graph=direction < PROBES - 1, allow_unused=True)


def _gradient_rows(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Returns the gradients of all samples and positions, (groups, n, out)."""
    rows = family_of(layer).output_rows(layer, gradient).float()
    return rows.reshape(len(rows), operator_of(layer).groups, -1).transpose(0, 1)

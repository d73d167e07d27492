"""Second moments of what enters each layer and of what its outputs do to the model's, from any inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.analysis.enough import LARGEST, POSITIONS, is_small, positions_of
from lightning_compress.analysis.synthetic import running_norms
from lightning_compress.analysis.trace import (
    Arguments,
    hooked,
    inference,
    output_tensors,
    run,
    sample_counts,
)
from lightning_compress.core.errors import CompressionWarning, ExampleInputError
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.shrinkage import Folds, SampleSums, few_outputs, shrunk
from lightning_compress.layers.adapters import entering
from lightning_compress.layers.families import canonical, family_of, operator_of

FEW, WAITING = 2**16, 2**24
"""Inputs of at most so many numbers wait for those of the layer's other calls in the batch, up to the second (64 MB).

What is beyond it counts as other positions of as many samples again, so that a shorter rest weighs as much as that.
"""
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
            statistics), "generated", "tokens" or "noise" (synthetic inputs of that kind), or "real".
        samples: How many independent inputs they are made from, positions of one not counted; None if from none.
        shrinkage: Share of the covariance that was put in the place of what so few samples do not show, see
            `shrinkage`; the largest of the groups.
        folds: What says how the error of every rank grows on unseen inputs; None if unknown.
        channels: S of the input channels alone, (in, in), where S would be too large, see `is_small`.
    """

    second: Tensor | None
    mean: Tensor | None
    outputs: Tensor | None = None
    source: str = "real"
    samples: int | None = None
    shrinkage: float = 0.0
    folds: Folds | None = field(default=None, repr=False)
    channels: Tensor | None = None

    @functools.cached_property
    def metric(self) -> Metric:
        """The metric in which the layer's errors are measured."""
        return Metric(self.second, self.outputs, self.folds, self.channels)


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


def of_both_kinds(normed: dict[str, Moments], plain: dict[str, Moments]) -> dict[str, Moments]:
    """Returns the mean of each layer's moments over drawn inputs in two ways, shrunk further by `OTHER_KIND`.

    What both have in common is likelier to be true of real inputs as well.

    Args:
        normed: Where norms take the batch's statistics; what says how errors grow is of these. It is used up.
        plain: Where they take their own; likewise.
    """
    pooled = {**plain, **normed}  # a layer that one of the two never reaches has the other's
    for name in plain.keys() & normed.keys():
        first, other = normed.pop(name), plain.pop(name)  # so that they do not add up
        if first.second is None or first.mean is None or other.second is None or other.mean is None:
            continue
        second, mean = (first.second + other.second).div_(2), (first.mean + other.mean) / 2
        outer = mean[..., :, None] * mean[..., None, :]
        kept = (1 - OTHER_KIND) * (1 - (first.shrinkage + other.shrinkage) / 2)
        second = shrunk(second.sub_(outer), OTHER_KIND).add_(outer)
        pooled[name] = replace(first, second=second, mean=mean, shrinkage=1 - kept)
    return pooled


def _joined(values: Tensor) -> Tensor:
    """Returns (groups, …) without the first dimension where there is but one group."""
    return values[0] if len(values) == 1 else values


def input_moments(
    model: nn.Module, batches: Iterable[Arguments], names: Iterable[str], *, source: str = "real"
) -> dict[str, Moments]:
    """Returns the moments of what enters the named layers over some batches.

    Args:
        model: Any module; it is run in eval mode and not changed.
        batches: Arguments of its forward pass.
        names: Layers that can be factorised.
        source: What the batches are.

    Raises:
        ExampleInputError: If the model fails on a batch, or the inputs of a layer are not finite.
    """
    gatherer = _InputSums({name: model.get_submodule(name) for name in names})
    finite, inputs_seen = True, 0
    with hooked(gatherer.hooks()), inference(model):
        for arguments in batches:
            gatherer.running = _samples_in(arguments)
            inputs_seen += gatherer.running
            for output in output_tensors(run(model, arguments, f"{source} inputs")):
                finite = finite and bool(torch.isfinite(output).all())
            gatherer.finish_batch()
    large = {name for name in gatherer.sums if not is_small(operator_of(gatherer.layers[name]))}
    estimates = {name: gatherer.sums.pop(name).estimate() for name in list(gatherer.sums)}  # one at a time
    _require_finite({name: estimate.second for name, estimate in estimates.items()}, source, outputs=finite)
    return {name: Moments(None, None, source=source) for name in gatherer.unknown} | {
        name: Moments(
            _joined(estimate.second) if name not in large else None,
            _joined(estimate.mean) if name not in large else None,
            source=source,
            samples=min(estimate.samples, inputs_seen),  # a layer may be called more than once
            shrinkage=estimate.shrinkage,
            folds=estimate.folds,
            channels=estimate.second[0] if name in large else None,
        )
        for name, estimate in estimates.items()
    }


class _InputSums:
    """Sums over what enters layers.

    Attributes:
        layers: By name.
        running: Independent inputs in the batch that is running.
        sums: By name, of the layers that were called.
        waiting: Small inputs of earlier calls of the batch that is running, by name: recurrent layers make hundreds.
        unknown: Names of layers of whose inputs there is nothing to know: indices, or inputs that are too long.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers, self.running = layers, 1
        self.sums: dict[str, SampleSums] = {}
        self.waiting: dict[str, list[Tensor]] = {}
        self.unknown: set[str] = set()

    def hooks(self) -> Iterator[RemovableHandle]:
        for name, layer in self.layers.items():
            yield layer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: self.gather(name, module, entering(module, args, kwargs)),
                with_kwargs=True,
            )

    def gather(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        operator = operator_of(layer)
        small, most = is_small(operator), positions_of(torch.Size(operator.shape[1:]).numel())
        rows = family_of(layer).rows(layer, inputs, most) if small else _channel_rows(layer, inputs)
        if rows is None:
            self.unknown.add(name)
            return
        samples = _by_sample(rows, self.running, most)
        if samples.numel() > FEW:
            self._add(name, samples)
            return
        waiting = self.waiting.setdefault(name, [])
        waiting.append(samples.clone())  # what follows may change it in place
        if len(waiting) * samples.numel() >= WAITING:
            self._add_waiting(name)

    def finish_batch(self) -> None:
        """Adds what is waiting; called after each batch."""
        for name in list(self.waiting):
            self._add_waiting(name)

    def _add_waiting(self, name: str) -> None:
        for samples in _as_positions(self.waiting.pop(name)):
            self._add(name, samples)

    def _add(self, name: str, samples: Tensor) -> None:
        if name not in self.sums:
            layer = self.layers[name]
            self.sums[name] = SampleSums(samples, _grouped_weight(layer) if is_small(operator_of(layer)) else None)
        self.sums[name].add(samples)


def _channel_rows(layer: nn.Module, inputs: Tensor) -> Tensor | None:
    """Returns the input channels of a convolution at every position, (1, n, in); None for other layers, and groups."""
    operator = operator_of(layer)
    dims = len(operator.kernel)
    if not dims or operator.groups > 1 or operator.shape[1] > LARGEST:
        return None
    inputs = inputs if inputs.ndim == dims + 2 else inputs[None]
    return inputs.movedim(1, -1).reshape(1, -1, inputs.shape[1])


def _require_finite(moments: Mapping[str, Tensor], source: str, *, outputs: bool) -> None:
    for name, second in moments.items():
        if not bool(torch.isfinite(second).all()):
            msg = (
                f"the inputs of layer {name!r} are not finite on {source} inputs: use objective='weight', "
                "or pass real inputs as calibration."
            )
            raise ExampleInputError(msg)
    if not outputs:
        msg = f"the model's outputs are not finite on {source} inputs: use objective='weight', or calibration."
        raise ExampleInputError(msg)


def _samples_in(arguments: Arguments) -> int:
    """Returns how many independent inputs a batch holds, 1 if its tensors differ."""
    counts = sample_counts(arguments)
    return counts.pop() if len(counts) == 1 else 1


def _grouped_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of a layer that can be factorised as (groups, out, D)."""
    operator = operator_of(layer)
    weight = canonical(layer, cast(Tensor, layer.weight)).detach()
    return few_outputs(weight.reshape(operator.groups, operator.shape[0], -1))


def _by_sample(rows: Tensor, samples: int, most: int) -> Tensor:
    """Returns rows (groups, n, D) as (groups, samples, positions, D), at most so many in all, evenly spread.

    Rows that cannot be told apart by sample count as one each.
    """
    samples = samples if rows.shape[1] % samples == 0 else rows.shape[1]
    rows = rows.reshape(len(rows), samples, -1, rows.shape[2])
    return rows[:, :, :: max(1, rows.shape[1] * rows.shape[2] // most)]


def _as_positions(calls: list[Tensor]) -> list[Tensor]:
    """Returns (groups, B, P, D) of several calls as the positions of the same samples, as they are if B differs."""
    alike = len({call.shape[:2] for call in calls}) == 1
    return [torch.cat(calls, dim=2)] if alike else calls


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
                        by_layer: dict[str, list[Tensor]] = {}
                        for (name, _), gradient in zip(seen, gradients, strict=True):
                            if gradient is not None:
                                by_layer.setdefault(name, []).append(gradient)
                        for name, own in by_layer.items():  # the rows of one layer at a time
                            calls = (_gradient_rows(layers[name], gradient) for gradient in own)
                            count = _samples_in(arguments)
                            for samples in _as_positions([_by_sample(rows, count, POSITIONS) for rows in calls]):
                                sums.setdefault(name, SampleSums(samples, centred=False)).add(samples)
            except (RuntimeError, NotImplementedError) as error:
                _warn_of_alike(f"the model cannot be differentiated ({type(error).__name__}: {error})")
                return {}
    if layers and not sums:
        _warn_of_alike("the model cannot be differentiated: no output depends on a layer's with a gradient")
    found = {name: _joined(each.estimate().second) for name, each in sums.items()}
    return {name: value for name, value in found.items() if bool(torch.isfinite(value).all()) and bool(value.any())}


def _warn_of_alike(why: str) -> None:
    msg = f"errors count alike in all outputs of a layer, whatever they do to the model's: {why}."
    warn(msg, CompressionWarning, stacklevel=2)


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

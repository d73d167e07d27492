"""Inputs made from a model's own statistics, without a single real sample.

Images start as drawings (see `drawing`), other dense inputs as noise. All are optimised until the batch
statistics at every batch norm match the running ones (as in Yin et al. 2020, "Dreaming to
Distill: Data-free Knowledge Transfer via DeepInversion", equation 4; without labels). A model with
one output (B, C) is taken for a classifier: a small term asks for confident predictions that differ
over the batch, as real inputs give them. Where a model keeps no running statistics the inputs stay as
they were drawn; token inputs are drawn at random.

Where so many full-sized images cannot be afforded and the model takes smaller ones as well, they are smaller: the
statistics of a layer need many independent inputs more than they need large ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.analysis.channels import channel_moments
from lightning_compress.analysis.drawing import leaves, noise, textured
from lightning_compress.analysis.enough import enough_inputs
from lightning_compress.analysis.kept_inputs import found_or_made
from lightning_compress.analysis.trace import (
    Arguments,
    ExampleInput,
    as_arguments,
    hooked,
    inference,
    input_of,
    output_tensors,
    run,
    trace,
)
from lightning_compress.core.compat import tree_flatten, tree_map, tree_unflatten
from lightning_compress.core.effort import current_effort
from lightning_compress.core.forecast import INPUTS, MOMENTS, current_forecast
from lightning_compress.core.parallel import Pace, shared_map
from lightning_compress.core.progress import Progress, silent
from lightning_compress.layers.unfused import unfused

LEARNING_RATE = 0.2
BATCH = 64
CONFIDENCE = 0.02
"""Weight of the mean entropy of the predictions, against the mismatch at the norms."""
VARIETY = 0.1
"""Weight of the entropy of the mean prediction, which is to be large."""
LEAST_COUNT = 16
"""Inputs that are made at least."""
LEAST_UNMATCHED = 8
"""Likewise where they are not optimised and too dear."""
DRAWN_PASSES = 10
"""Forward passes that an input drawn for the moments costs about."""
PASSES = 6
"""Forward passes that the moments of an input cost as much as: one for the inputs, two gradients for the outputs."""
LEAST_STEPS = 10
LEAST_SIDE = 96
"""Images whose sides would get shorter than this are not halved to afford more of them."""


@dataclass(frozen=True)
class SyntheticInputs:
    """Batches of arguments of a model's forward pass.

    Attributes:
        batches: Positional and keyword arguments, with a leading batch dimension.
        source: "batch norm" if matched to running statistics, "tokens" if drawn at random from a
            vocabulary, "noise" otherwise.
        mismatch: Mean squared deviation of the batch statistics from the running ones, in units of
            the running deviations; None without batch norms.
        drawn: More batches, as they were drawn: norms that take the statistics of the batch itself make their
            activations what the model knows of real ones at no cost but a forward pass. None where as many
            full-sized inputs as wanted were affordable, images are small, or none are matched to batch norms.
        judging: A batch of another kind than all these, for comparisons: images of shapes and of noise on several
            scales as they were drawn, other values of rising and falling size.
    """

    batches: tuple[Arguments, ...]
    source: str
    mismatch: float | None = None
    drawn: tuple[Arguments, ...] = ()
    judging: tuple[Arguments, ...] = ()


def synthesise(
    model: nn.Module,
    example_input: ExampleInput,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> SyntheticInputs:
    """Returns synthetic inputs; images are smaller and then inputs fewer where they would cost more than `Effort.work`.

    Args:
        model: Any module; it is not changed.
        example_input: See `search_ranks`.
        count: Number of inputs, None for that of the current `Effort`.
        steps: Steps of their optimisation, likewise.
        seed: Of everything random; the inputs are the same under the same.
        progress: Called with what is being done and the fraction done.

    Raises:
        ExampleInputError: If the example input has a wrong type.
    """
    effort, generator = current_effort(), torch.Generator().manual_seed(seed)
    example = as_arguments(model, example_input)
    count, steps = (effort.inputs if count is None else count), (effort.input_steps if steps is None else steps)
    norms, traced, scarce = running_norms(model), trace(model, example_input), False
    macs = traced.macs
    forecast = current_forecast()
    work = forecast.work(INPUTS if norms else MOMENTS, everywhere=True)
    if norms:
        example, macs, scarce = _affordable_example(model, example, macs, (count, steps), work)
        count, steps = affordable(macs, count, steps, work)
    else:
        with unfused(model):
            count = min(count, drawable(macs, enough_inputs(model, traced.calls), work))
    if work < effort.work:
        forecast.note(INPUTS, f"{count} inputs" + (f" in {steps} steps" if norms else ""))
    made = [_draw(model, example, min(BATCH, count - at), generator) for at in range(0, count, BATCH)]
    batches, tokens = [arguments for arguments, _ in made], made[-1][1]
    optimised = bool(norms) and not tokens
    channels_last = optimised and _runs_channels_last(model, example)
    source, mismatch, drawn = "tokens" if tokens else "noise", None, []
    if optimised:
        batches = [_laid_out(a, channels_last=channels_last) for a in batches]
        make = functools.partial(_matched, model, batches, norms, steps, progress)
        batches, mismatch, whole = found_or_made(model, batches, steps, make)
        source = "batch norm" if whole else source
    if source == "batch norm" and scarce and _shows_textures(example):
        granted = min(work, forecast.work(MOMENTS, everywhere=True))
        more = max(1, min(effort.drawn, granted // (DRAWN_PASSES * max(1, macs))) // BATCH)
        drawn = [_draw(model, example, BATCH, generator)[0] for _ in range(more)]
    *drawn, judging = (_laid_out(a, channels_last=channels_last) for a in (*drawn, _judging(model, example, generator)))
    progress("synthetic inputs", 1.0)
    return SyntheticInputs(tuple(batches), source, mismatch, tuple(drawn), (judging,))


def _matched(
    model: nn.Module, start: list[Arguments], norms: list[_BatchNorm], steps: int, progress: Progress
) -> tuple[list[Arguments], float | None, bool]:
    """Returns batches matched to the norms' running statistics, their mean mismatch, and whether they could be matched.

    They cannot where no norm is called, or its inputs are not finite.
    """

    def match(index: int) -> tuple[Arguments, float]:
        return _match(model, start[index], norms, steps, functools.partial(_report, progress, index, len(start)))

    found = shared_map("synthetic inputs", match, range(len(start)))
    known = [mismatch for _, mismatch in found if math.isfinite(mismatch)]
    mean = sum(known) / len(known) if known else None
    return [arguments for arguments, _ in found], mean, math.isfinite(found[-1][1])


def _laid_out(arguments: Arguments, *, channels_last: bool) -> Arguments:
    return _channels_last(arguments) if channels_last else arguments


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _judging(model: nn.Module, example: Arguments, generator: torch.Generator) -> Arguments:
    """Returns a batch of inputs of another kind than those drawn first."""

    def other(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim):
            return leaf
        if _is_image(leaf.shape):
            half = (len(leaf) // 2, *leaf.shape[1:])
            return torch.cat([leaves(half, generator), noise(half, generator)]).to(leaf)
        scales = torch.logspace(-0.5, 0.5, len(leaf)).reshape(-1, *(1 for _ in leaf.shape[1:]))
        return leaf * scales.to(leaf)

    drawn, _ = _draw(model, example, current_effort().judging, generator)
    return cast(Arguments, tree_map(other, drawn))


def _runs_channels_last(model: nn.Module, example: Arguments) -> bool:
    """Returns whether a model runs on images whose channels lie together in memory, faster on most CPUs and GPUs.

    Not those that `view` an activation as flat.
    """
    try:
        with inference(model):
            args, kwargs = _channels_last(example)
            model(*args, **kwargs)
    except RuntimeError:
        return False
    return True


def _channels_last(arguments: Arguments) -> Arguments:
    """Returns the arguments with images (B, C, H, W) in channels-last memory format."""

    def converted(leaf: Any) -> Any:
        is_image = isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.is_floating_point()  # noqa: PLR2004
        return leaf.to(memory_format=torch.channels_last) if is_image else leaf

    return cast(Arguments, tree_map(converted, arguments))


def affordable(macs: int, count: int, steps: int, work: int) -> tuple[int, int]:
    """Returns count and steps, cut so that the optimisation costs at most so many MACs.

    First the inputs become fewer, down to `LEAST_COUNT`, then the steps, down to `LEAST_STEPS`.

    Args:
        macs: MACs of one forward pass of one input; backward costs twice as much.
        count: Inputs wanted.
        steps: Steps wanted.
        work: MACs at most.
    """
    passes = max(1, work // (3 * max(1, macs)))
    count = max(min(count, LEAST_COUNT), min(count, passes // steps))
    return count, max(min(steps, LEAST_STEPS), min(steps, passes // count))


def drawable(macs: int, enough: int, work: int) -> int:
    """Returns how many inputs to draw where none are optimised: what is enough, if it is affordable.

    Args:
        macs: MACs of one forward pass of one input.
        enough: See `enough_inputs`.
        work: MACs at most of their moments.
    """
    return max(LEAST_UNMATCHED, min(max(LEAST_COUNT, enough), work // (PASSES * max(1, macs))))


def _draw(model: nn.Module, example: Arguments, size: int, generator: torch.Generator) -> tuple[Arguments, bool]:
    """Returns arguments like the example's with `size` samples, and whether some are tokens."""
    leaves, spec = tree_flatten(example)
    vocabulary = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    tokens = False
    drawn = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            drawn.append(leaf)
        elif leaf.is_floating_point():
            drawn.append(_values((size, *leaf.shape[1:]), generator).to(leaf.device, leaf.dtype))
        elif vocabulary is not None and leaf.dtype in (torch.int32, torch.int64):
            tokens = True
            drawn.append(torch.randint(vocabulary, (size, *leaf.shape[1:]), generator=generator).to(leaf))
        else:
            drawn.append(leaf.expand(size, *leaf.shape[1:]))
    return tree_unflatten(drawn, spec), tokens


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns values of mean 0 and deviation 1; images (B, C, H, W) are drawn."""
    if not _is_image(shape):
        return torch.randn(shape, generator=generator)
    if min(shape[2:]) >= LEAST_SIDE:
        return textured(shape, generator)
    half = shape[0] // 2
    images = [noise((shape[0] - half, *shape[1:]), generator)]
    if half:
        images.append(leaves((half, *shape[1:]), generator))
    return torch.cat(images)[torch.randperm(shape[0], generator=generator)]


def _shows_textures(example: Arguments) -> bool:
    """Returns whether some images of the arguments are large enough to be drawn with textures."""
    shapes = [leaf.shape for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(_is_image(shape) and min(shape[2:]) >= LEAST_SIDE for shape in shapes)


def _is_image(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and min(shape[2:]) >= 4  # noqa: PLR2004


def _affordable_example(
    model: nn.Module, example: Arguments, macs: int, wanted: tuple[int, int], work: int
) -> tuple[Arguments, int, bool]:
    """Returns the example with images halved until so many are affordable, its MACs, and whether halving was needed.

    Only as long as the model takes them and its outputs keep their shapes.
    """
    scarce = affordable(macs, *wanted, work)[0] < wanted[0]
    while affordable(macs, *wanted, work)[0] < wanted[0]:
        smaller = tree_map(_halved, example)
        if all(a is b for a, b in zip(tree_flatten(smaller)[0], tree_flatten(example)[0], strict=True)):
            break
        try:
            with inference(model):
                shapes = [[t.shape for t in output_tensors(model(*a[0], **a[1]))] for a in (example, smaller)]
        except Exception:  # whatever a model raises on inputs of another size
            break
        if shapes[0] != shapes[1]:
            break
        example, macs = smaller, macs // 4
    return example, macs, scarce


def _halved(leaf: Any) -> Any:
    """Returns an image of half the sides, everything else and small images as they are."""
    if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and _is_image(leaf.shape)):
        return leaf
    return leaf[:, :, ::2, ::2] if min(leaf.shape[2:]) >= 2 * LEAST_SIDE else leaf


def _match(
    model: nn.Module,
    arguments: Arguments,
    norms: list[_BatchNorm],
    steps: int,
    progress: Callable[[float], None],
) -> tuple[Arguments, float]:
    """Returns the arguments after optimisation of their floating-point tensors, and the mismatch."""
    leaves, spec = tree_flatten(arguments)
    free = [leaf.float().requires_grad_() for leaf in leaves if _is_free(leaf)]
    deviations: list[Tensor] = []
    best, best_loss, mismatch = [f.detach().clone() for f in free], math.inf, math.inf

    def loss_now() -> tuple[Tensor, Tensor] | None:
        deviations.clear()
        args, kwargs = tree_unflatten(_with_free(leaves, free), spec)
        outputs = run(model, (args, kwargs), "batch norm inputs")
        if not deviations:  # no norm was called
            return None
        deviation = torch.stack(deviations).mean()
        loss = deviation + _indecision(outputs)
        return (loss, deviation) if bool(torch.isfinite(loss)) else None

    grad = torch.enable_grad()
    with (
        closing(Pace()) as pace,
        _watching(norms, deviations),
        inference(model),
        torch.inference_mode(mode=False),
        grad,
    ):
        optimizer = torch.optim.Adam(free, betas=(0.5, 0.9))
        for step in range(steps + 1):
            with pace.step():
                found = loss_now()
            if found is None:
                break
            loss, deviation = found
            if float(loss.detach()) < best_loss:
                best, best_loss = [f.detach().clone() for f in free], float(loss.detach())
                mismatch = float(deviation.detach())
            if step == steps or not loss.requires_grad:  # or there is nothing the inputs could change
                break
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps) ** 0.5
            gradients = torch.autograd.grad(loss, free, allow_unused=True)  # of the inputs alone
            for leaf, gradient in zip(free, gradients, strict=True):
                leaf.grad = gradient  # None where the outputs do not depend on it: it stays as it is
            optimizer.step()
            progress((step + 1) / steps)
    return tree_unflatten(_with_free(leaves, best), spec), mismatch


def _watching(norms: list[_BatchNorm], deviations: list[Tensor]) -> AbstractContextManager[None]:
    """Collects how far what enters each norm deviates from its running statistics."""
    return hooked(
        norm.register_forward_pre_hook(
            lambda m, args, kwargs: deviations.append(_deviation(m, input_of(args, kwargs))), with_kwargs=True
        )
        for norm in norms
    )


def _indecision(outputs: Any) -> Tensor:
    """Returns the weighted entropies of a classifier's predictions, 0 for any other model."""
    tensors = output_tensors(outputs)
    if len(tensors) != 1 or tensors[0].ndim != 2 or tensors[0].shape[1] < 2:  # noqa: PLR2004
        return torch.zeros(())
    logs = tensors[0].float().log_softmax(dim=1)
    each, whole = logs.exp(), logs.exp().mean(dim=0)
    entropy = -(each * logs).sum(dim=1).mean()
    return CONFIDENCE * entropy + VARIETY * (whole * whole.clamp_min(1e-9).log()).sum()


def _report(progress: Progress, index: int, total: int, done: float) -> None:
    progress("synthetic inputs", (index + done) / total)


def _is_free(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0


def _with_free(leaves: list[Any], free: list[Tensor]) -> list[Any]:
    values = iter(free)
    return [next(values).to(leaf.dtype) if _is_free(leaf) else leaf for leaf in leaves]


def _deviation(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """Returns how far the batch statistics are from the running ones, in running deviations."""
    mean, variance = channel_moments(inputs)
    running_mean, running_variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var) + norm.eps
    by_mean = (mean - running_mean).square() / running_variance
    by_spread = ((variance + norm.eps).sqrt() / running_variance.sqrt() - 1).square()
    return (by_mean + by_spread).mean()

"""Inputs made from a model's own statistics, without a single real sample.

Images start half as noise on several scales, half as overlapping random shapes ("dead leaves": Lee,
Mumford and Huang 2001, "Occlusion Models for Natural Images"; as training images: Baradad et al. 2021,
"Learning to See by Looking at Noise"), other dense inputs as noise. All are optimised until the batch
statistics at every batch norm match the running ones (as in Yin et al. 2020, "Dreaming to
Distill: Data-free Knowledge Transfer via DeepInversion", equation 4; without labels). A model with
one output (B, C) is taken for a classifier: a small term asks for confident predictions that differ
over the batch, as real inputs give them. Where a model keeps no running statistics the inputs stay as
they were drawn; token inputs are drawn at random.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from typing_extensions import override

from lightning_compress.progress import Progress, silent
from lightning_compress.sharing import shared_map
from lightning_compress.tracing import (
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

COUNT = 256
STEPS = 40
LEARNING_RATE = 0.2
BATCH = 64
WORK = 2 * 10**12
"""MACs that the optimisation may cost: a minute or so on a few cores."""
CONFIDENCE = 0.02
"""Weight of the mean entropy of the predictions, against the mismatch at the norms."""
VARIETY = 0.1
"""Weight of the entropy of the mean prediction, which is to be large."""
SHAPES = 12
"""Most shapes in one image."""
LEAST_COUNT = 16
LEAST_STEPS = 10


@dataclass(frozen=True)
class SyntheticInputs:
    """Batches of arguments of a model's forward pass.

    Attributes:
        batches: Positional and keyword arguments, with a leading batch dimension.
        source: "batch norm" if matched to running statistics, "tokens" if drawn at random from a
            vocabulary, "noise" otherwise.
        mismatch: Mean squared deviation of the batch statistics from the running ones, in units of
            the running deviations; None without batch norms.
    """

    batches: tuple[Arguments, ...]
    source: str
    mismatch: float | None = None


def synthesise(
    model: nn.Module,
    example_input: ExampleInput,
    *,
    count: int = COUNT,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress = silent,
) -> SyntheticInputs:
    """Returns synthetic inputs for a model; deterministic under the seed.

    Args:
        model: Any module; it is not changed.
        example_input: See `search_ranks`.
        count: Number of inputs; fewer for models so large that it would cost more than `WORK`.
        steps: Steps of the optimisation, likewise.
        seed: Of everything random.
        progress: Called with what is being done and the fraction done.

    Raises:
        ExampleInputError: If the example input has a wrong type.
    """
    example = as_arguments(model, example_input)
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if norms:
        count, steps = affordable(trace(model, example_input).macs, count, steps)
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    drawn = [_draw(model, example, size, generator) for size in sizes]
    batches, tokens = [arguments for arguments, _ in drawn], drawn[-1][1]
    source = "tokens" if tokens else "noise"
    mismatches: list[float] = []
    if norms and not tokens:
        batches = [_channels_last(a) for a in batches] if _runs_channels_last(model, example) else batches

        def match(index: int) -> tuple[Arguments, float]:
            report = functools.partial(_report, progress, index, len(batches))
            return _match(model, start[index], norms, steps, report)

        start = batches
        _keep_freed_memory()
        matched = shared_map("synthetic inputs", match, range(len(batches)))
        batches = [arguments for arguments, _ in matched]
        mismatches = [mismatch for _, mismatch in matched if math.isfinite(mismatch)]
        if math.isfinite(matched[-1][1]):  # else no norm was called, or its inputs are not finite
            source = "batch norm"
    progress("synthetic inputs", 1.0)
    return SyntheticInputs(tuple(batches), source, sum(mismatches) / len(mismatches) if mismatches else None)


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


def affordable(macs: int, count: int, steps: int) -> tuple[int, int]:
    """Returns count and steps, cut so that the optimisation costs at most `WORK` MACs.

    First the inputs become fewer, down to `LEAST_COUNT`, then the steps, down to `LEAST_STEPS`.

    Args:
        macs: MACs of one forward pass of one input; backward costs twice as much.
        count: Inputs wanted.
        steps: Steps wanted.
    """
    passes = max(1, WORK // (3 * max(1, macs)))
    count = max(min(count, LEAST_COUNT), min(count, passes // steps))
    return count, max(min(steps, LEAST_STEPS), min(steps, passes // count))


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
    """Returns values of mean 0 and deviation 1; for images (B, C, H, W) half of them noise, half shapes."""
    if len(shape) != 4 or min(shape[2:]) < 4:  # noqa: PLR2004
        return torch.randn(shape, generator=generator)
    half = shape[0] // 2
    images = [_noise((shape[0] - half, *shape[1:]), generator)]
    if half:
        images.append(_leaves((half, *shape[1:]), generator))
    return torch.cat(images)[torch.randperm(shape[0], generator=generator)]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns normal noise summed over scales, (B, C, H, W)."""
    noise = torch.randn(shape, generator=generator)
    side = 1
    while side < max(shape[2:]):
        coarse = torch.randn((*shape[:2], min(side, shape[2]), min(side, shape[3])), generator=generator)
        noise = noise + F.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=False)
        side *= 2
    return noise / noise.std()


def _leaves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns overlapping ellipses and rectangles of random place, size, turn and colour, (B, C, H, W)."""
    count, channels, height, width = shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((count, 1, 1), generator=generator)

    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    images = torch.randn((count, channels, 1, 1), generator=generator).expand(shape)
    shapes = torch.randint(2, SHAPES + 1, (count, 1, 1), generator=generator)
    for index in range(SHAPES):
        turn, right, down = uniform(0, math.pi), x - uniform(-0.9, 0.9), y - uniform(-0.9, 0.9)
        along, across = right * turn.cos() + down * turn.sin(), down * turn.cos() - right * turn.sin()
        long, short = 0.9 * uniform(0, 1) ** 1.5 + 0.08, 0.9 * uniform(0, 1) ** 1.5 + 0.08
        power = torch.where(uniform(-1, 1) < 0, 2.0, 8.0)  # an ellipse, or nearly a rectangle
        inside = ((along / long).abs() ** power + (across / short).abs() ** power < 1) & (index < shapes)
        colour = torch.randn((count, channels, 1, 1), generator=generator)
        images = torch.where(inside[:, None], colour, images)
    images = images + 0.1 * torch.randn(shape, generator=generator)
    return (images - images.mean()) / images.std()


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
    with (
        hooked(
            norm.register_forward_pre_hook(
                lambda m, args, kwargs: deviations.append(_deviation(m, input_of(args, kwargs))),
                with_kwargs=True,
            )
            for norm in norms
        ),
        inference(model),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        optimizer = torch.optim.Adam(free, betas=(0.5, 0.9))
        for step in range(steps + 1):
            deviations.clear()
            args, kwargs = tree_unflatten(_with_free(leaves, free), spec)
            outputs = run(model, (args, kwargs), "batch norm inputs")
            if not deviations:  # no norm was called
                break
            deviation = torch.stack(deviations).mean()
            loss = deviation + _indecision(outputs)
            if not bool(torch.isfinite(loss)):
                break
            if float(loss.detach()) < best_loss:
                best, best_loss = [f.detach().clone() for f in free], float(loss.detach())
                mismatch = float(deviation.detach())
            if step == steps:
                break
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps) ** 0.5
            if not loss.requires_grad:  # nothing the inputs could change
                break
            gradients = torch.autograd.grad(loss, free, allow_unused=True)  # of the inputs alone
            for leaf, gradient in zip(free, gradients, strict=True):
                leaf.grad = gradient  # None where the outputs do not depend on it: it stays as it is
            optimizer.step()
            progress((step + 1) / steps)
    return tree_unflatten(_with_free(leaves, best), spec), mismatch


def _keep_freed_memory() -> None:
    """Lets the C library reuse the activations' memory in the place of giving it back after every layer.

    glibc gives back, and lets the kernel clear again, what exceeds twice the largest block freed so far (mallopt(3),
    M_MMAP_THRESHOLD); blocks above 32 MiB do not count. A tenth of the optimisation's time; elsewhere it does nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


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


class _BatchMoments(torch.autograd.Function):
    """Mean and variance of every channel, (C,) each, of (B, C, …); what `var_mean` gives in a fifth of the time.

    On a CPU that reduces over all but the second axis on a path of its own, and half the optimisation was spent there.
    """

    @staticmethod
    @override
    def forward(ctx: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(inputs.ndim) if d != 1]
        mean = inputs.mean(dims, keepdim=True)
        ctx.save_for_backward(inputs, mean)
        return mean.flatten(), (inputs - mean).square_().mean(dims)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        inputs, mean = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        count = inputs.numel() // mean.numel()
        of_mean, of_variance = (g.reshape_as(mean) / count for g in gradients)
        return torch.addcmul(of_mean - 2 * of_variance * mean, inputs, 2 * of_variance)


def _deviation(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """Returns how far the batch statistics are from the running ones, in running deviations."""
    mean, variance = cast(tuple[Tensor, Tensor], _BatchMoments.apply(inputs.float()))
    running_mean, running_variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var) + norm.eps
    by_mean = (mean - running_mean).square() / running_variance
    by_spread = ((variance + norm.eps).sqrt() / running_variance.sqrt() - 1).square()
    return (by_mean + by_spread).mean()

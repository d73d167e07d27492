"""Distillation of a compressed model on synthetic inputs, a step of the repair.

Factors, their biases and the norms' scales descend the distance of the outputs plus that of every factorised layer's
output (hints: Romero et al. 2015, "FitNets"); the state that is best on inputs held out is kept.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.analysis.distance import relative_error
from lightning_compress.analysis.trace import (
    Arguments,
    flop_counter,
    hooked,
    inference,
    output_tensors,
    sample_counts,
)
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.forecast import HEALING, current_forecast
from lightning_compress.core.parallel import Pace
from lightning_compress.layers.unfused.recurrent import UnfusedRecurrent
from lightning_compress.surgery.state import NORMS, BestState
from lightning_compress.surgery.swap import Replacement

FEWEST_STEPS = 20
"""Fewer are not worth the time: then there is no distillation."""
LEARNING_RATE = 1e-3
SLOWER = 4.0
"""By which the rate is divided where it proves too high at the first look, twice at most."""
TOO_HIGH = 1.2
"""Distance at the first look, relative to that before the first step, that proves it."""
WARM_UP = 20
"""Steps over which the rate rises."""
SHIFT = 0.08
"""Largest shift of an image, as a fraction of its sides."""
EVERY = 20
"""Steps between two looks at the held-out inputs."""


def affordable_steps(
    dense: nn.Module, model: nn.Module, replacements: Sequence[Replacement], batches: Sequence[Arguments], steps: int
) -> tuple[int, str | None]:
    """Returns the number of steps, at most `steps`, and why there can be none."""
    if not replacements:
        return 0, "no layer is factorised"
    trained = _trained(model, replacements)
    if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in trained):
        return 0, "the parameters are in half precision"
    with flop_counter() as flops, inference(dense):
        outputs, inner = _run_with_outputs(dense, _compared(dense, replacements), batches[0])
    if not outputs or not any(inner):
        return 0, _unseen(outputs)
    start = time.perf_counter()
    try:
        _gradients(dense, model, replacements, trained, batches[0])
    except RuntimeError as error:
        return 0, f"the model cannot be differentiated ({error})"
    work = current_effort().work
    steps = min(steps, work // max(1, flops.get_total_flops()))  # forward of both, backward of the smaller one
    if steps < FEWEST_STEPS:
        return 0, f"{FEWEST_STEPS} steps would cost more than {work:.0e} MACs"
    return _within_the_limit(steps, time.perf_counter() - start)


def _within_the_limit(steps: int, each: float) -> tuple[int, str | None]:
    """Returns as many steps as there is time for, and why there can be none."""
    forecast = current_forecast()
    affordable = int(min(steps, forecast.grant(HEALING) / each))
    if affordable == steps:
        return steps, None
    few = affordable < FEWEST_STEPS
    forecast.note(HEALING, "no distillation" if few else f"{affordable} of {steps} steps")
    return (0, f"{FEWEST_STEPS} steps would take longer than the time limit leaves") if few else (affordable, None)


def _unseen(outputs: Sequence[Tensor]) -> str:
    """Returns what of a model cannot be compared, with a warning where the layers run unseen."""
    if not outputs:
        return "the model returns no floating-point tensor"
    said = "no hook sees the factorised layers run, as in code that is compiled, or calls layers by their forward()"
    warn(f"the factors are not distilled: {said}.", CompressionWarning, stacklevel=7)
    return said


def descend(distil: Callable[[float], Iterator[int]], states: BestState, look: Callable[[int], float]) -> None:
    """Distils, anew at a smaller rate where the first look at the held-out inputs proves it too high."""
    start = states.best
    for slower in range(3):
        for step in distil(LEARNING_RATE / SLOWER**slower):
            distance = look(step)
            if step <= EVERY and not distance <= TOO_HIGH * start:
                break
        else:
            return
        states.restore()


def _trained(model: nn.Module, replacements: Sequence[Replacement]) -> list[nn.Parameter]:
    """Returns the factors, their biases and the scales of the norms."""
    factors = [p for r in replacements for p in r.factorised.parameters()]
    norms = [p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters() if p.requires_grad]
    return list({id(parameter): parameter for parameter in [*factors, *norms]}.values())


def distil(  # noqa: PLR0917
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    batches: Sequence[Arguments],
    steps: int,
    seed: int,
    rate: float,
) -> Iterator[int]:
    """Descends the distances on one batch after the other; yields every now and then, to be judged.

    All steps are taken: the rate falls along a cosine, and much of the gain comes at its end.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = _trained(model, replacements)
    with torch.inference_mode(mode=False):
        free = [parameter.detach() for parameter in trained]  # the same memory, without the parameters' own gradients
        optimizer = torch.optim.Adam(free, lr=rate)
        with contextlib.closing(Pace()) as pace:
            for step in range(1, steps + 1):
                risen = rate * min(1.0, step / WARM_UP)
                optimizer.param_groups[0]["lr"] = risen * (1 + math.cos(math.pi * step / steps)) / 2
                with pace.step():
                    arguments = _shuffled(batches, generator)
                    gradients = _gradients(dense, model, replacements, trained, arguments)
                for parameter, gradient in zip(free, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                if step % EVERY == 0 or step == steps:
                    yield step


def _gradients(
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    trained: Sequence[nn.Parameter],
    arguments: Arguments,
) -> tuple[Tensor | None, ...]:
    """Returns those of the loss by the trained parameters, which keep their own."""
    with torch.inference_mode(mode=False), _requiring_grad(trained):
        loss = _loss(dense, model, replacements, arguments)
        return torch.autograd.grad(loss, trained, allow_unused=True)


def _loss(dense: nn.Module, model: nn.Module, replacements: Sequence[Replacement], arguments: Arguments) -> Tensor:
    """Returns the normalised distance of the outputs plus the mean one of the factorised layers' outputs."""
    with inference(dense):
        targets, inner_targets = _run_with_outputs(dense, _compared(dense, replacements), arguments)
    with inference(model), torch.enable_grad():
        outputs, inner = _run_with_outputs(model, _compared(model, replacements), arguments)
        loss = torch.stack([relative_error(o, t) for o, t in zip(outputs, targets, strict=True)]).sum()
        hints = [
            relative_error(output, target)
            for own, others in zip(inner, inner_targets, strict=True)
            for output, target in _comparable(own, others)
        ]
        return loss + torch.stack(hints).mean() if hints else loss


def _comparable(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns the outputs of a layer in both models; none where values decide what it is called with."""
    same = [output.shape for output in outputs] == [target.shape for target in targets]
    return [(o, t) for o, t in zip(outputs, targets, strict=True) if len(o)] if same else []


def _compared(model: nn.Module, replacements: Sequence[Replacement]) -> list[nn.Module]:
    """Returns the layers of a model whose outputs are compared: the replaced ones.

    Of projections of a recurrent layer it is the layer itself, which would loop over time in the place of torch's
    kernels while a projection is watched.
    """
    names: dict[str, None] = {}
    for replacement in replacements:
        name = replacement.aliases[0]
        parent = name.rpartition(".")[0]
        names[parent if isinstance(model.get_submodule(parent), UnfusedRecurrent) else name] = None
    return [model.get_submodule(name) for name in names]


def _run_with_outputs(
    model: nn.Module, layers: Sequence[nn.Module], arguments: Arguments
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Returns the model's outputs and those of each of some layers, call by call."""
    inner: list[list[Tensor]] = [[] for _ in layers]

    def keep(own: list[Tensor], output: Any) -> Any:
        own.append(output if isinstance(output, Tensor) else output_tensors(output)[0])
        return output.clone() if isinstance(output, Tensor) else output  # what follows may change it in place

    with hooked(
        layer.register_forward_hook(lambda _module, _args, output, own=own: keep(own, output))
        for layer, own in zip(layers, inner, strict=True)
    ):
        return output_tensors(model(*arguments[0], **arguments[1])), inner


@contextlib.contextmanager
def _requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets parameters require gradients for a while, frozen ones too."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _shuffled(batches: Sequence[Arguments], generator: torch.Generator) -> Arguments:
    """Returns a batch drawn anew from all of them, or one of them where they cannot be mixed."""
    leaves = [tree_flatten(batch)[0] for batch in batches]
    spec = tree_flatten(batches[0])[1]
    size = min(sample_counts(leaves))
    picked = torch.randint(len(batches), (size,), generator=generator), torch.randperm(size, generator=generator)
    mixed: list[Any] = []
    for parts in zip(*leaves, strict=True):
        if not isinstance(parts[0], Tensor) or parts[0].ndim == 0:
            mixed.append(parts[0])
        elif any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            return batches[int(picked[0][0])]
        else:
            varied = _varied(torch.stack([part[:size] for part in parts])[picked], generator)
            mixed.append(torch.empty_like(parts[0][:size]).copy_(varied))  # in the same memory format
    return cast(Arguments, tree_unflatten(mixed, spec))


def _varied(values: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images (B, C, H, W) mirrored or not and shifted by up to `SHIFT` of their sides; other values as is."""
    if values.ndim != 4 or not values.is_floating_point():  # noqa: PLR2004
        return values
    mirror, *shifts = torch.rand(3, generator=generator).tolist()
    values = values.flip(3) if mirror < 0.5 else values  # noqa: PLR2004
    return values.roll([round((2 * s - 1) * SHIFT * n) for s, n in zip(shifts, values.shape[2:], strict=True)], (2, 3))

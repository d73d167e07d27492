"""Data-free repair of the factors, on synthetic inputs, before any fine-tuning.

Three steps, each kept only if it brings the outputs nearer to the dense model's on inputs held out:

1. *Norm statistics.* The running statistics of batch norms are moved by what the factors changed in what
   enters them; again after the regression.
2. *Regression.* Layer by layer, in forward order, the factors are refitted in closed form so that
   the compressed network's own activations reproduce the dense layer's outputs: reduced-rank
   regression min ‖G^½ (W X − M X̂)‖ over M of the layer's kind and ranks, where X enters the layer
   in the dense and X̂ in the already repaired compressed network, and the bias takes care of the
   means (the asymmetric reconstruction of Zhang et al. 2015, "Accelerating Very Deep Convolutional
   Networks", section 3.3, with the data replaced by synthetic inputs and in the metric G of the
   model's outputs, see `Moments`).
3. *Distillation.* Factors, their biases and the norms' scales descend the distance of the outputs
   plus that of every factorised layer's output (hints: Romero et al. 2015, "FitNets"); the state
   that is best on the held-out inputs is kept.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.analysis.statistics import Statistics
from lightning_compress.analysis.synthetic import WORK, channel_moments, running_norms
from lightning_compress.analysis.trace import (
    Arguments,
    flop_counter,
    hooked,
    inference,
    input_of,
    output_tensors,
    sample_counts,
)
from lightning_compress.core.compat import tree_flatten, tree_unflatten
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.core.progress import Progress, silent
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import factorise_in
from lightning_compress.layers.families import canonical, family_of
from lightning_compress.layers.unfused import unfused
from lightning_compress.search.end_to_end import NEGLIGIBLE
from lightning_compress.surgery.swap import Replacement

RIDGE = 1e-3
"""Relative ridge of the regression: synthetic inputs leave some directions almost unseen."""
STEPS = 240
FEWEST_STEPS = 20
"""Fewer are not worth the time: then there is no distillation."""
LEARNING_RATE = 1e-3
LARGEST_FACTOR = 4.0
"""By which a norm's running variance is changed at most."""
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

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Healing:
    """What the repair did.

    Attributes:
        before: Normalised output distance on held-out synthetic inputs, ‖f − f̂‖² / ‖f − mean f‖².
        regressed: The same after the regression and the norms' statistics.
        after: The same at the end; never larger than before.
        seconds: How long it took, by part: "regression" and "distillation".
        skipped: Why there was no distillation, None if there was.
    """

    before: float
    regressed: float
    after: float
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None


def heal_(
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    statistics: Statistics,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress = silent,
) -> Healing:
    """Repairs the factors of a compressed model in place; keeps them as they were if that does not help.

    Args:
        dense: The dense model.
        model: The compressed one; also its norm layers' scales and running statistics may change.
        replacements: Its factorised layers, in any order.
        statistics: Of the dense model; the last quarter of its batches is held out to judge the
            result.
        steps: Of the distillation at most; fewer where they would cost more than `WORK` MACs.
        seed: Of the order of the inputs.
        progress: Called with what is being done and the fraction done.
    """
    with freed_memory_kept(), unfused(dense):  # so that it has the layers that are compared
        return _heal(dense, model, replacements, statistics, steps=steps, seed=seed, progress=progress)


def _heal(
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    statistics: Statistics,
    *,
    steps: int,
    seed: int,
    progress: Progress,
) -> Healing:
    batches = statistics.batches
    held_out = max(1, len(batches) // 4)
    fitting, judging = batches[:-held_out] or batches, batches[-held_out:]
    start = time.perf_counter()
    before = output_distance(dense, model, judging)
    if before < NEGLIGIBLE:
        seconds = {"regression": time.perf_counter() - start, "distillation": 0.0}
        return Healing(before, before, before, seconds, f"the output distance is below {NEGLIGIBLE:g}")
    states = _States(model, before)
    skipped: str | None

    def look(done: float) -> float:
        progress("healing: distillation", done)
        distance = output_distance(dense, model, judging)
        states.judge(distance)
        return distance

    try:
        _renormalise(dense, model, fitting)
        states.judge(output_distance(dense, model, judging))
        states.restore()
        ordered = _in_forward_order(model, replacements, fitting[0])
        replacements = [replacement for replacement, _ in ordered]
        for index, (replacement, calls) in enumerate(ordered):
            progress("healing: regression", index / len(ordered))
            if calls and not _shares_factors(replacement, replacements):
                metric = statistics.metric(replacement.aliases[0])
                _refit(dense, model, replacement, fitting, metric=metric, calls=calls)
        states.judge(output_distance(dense, model, judging))
        _renormalise(dense, model, fitting)
        states.judge(output_distance(dense, model, judging))
        states.restore()
        regressed, middle = states.best, time.perf_counter()
        steps, skipped = _affordable(dense, model, replacements, fitting, steps)
        if skipped is None:
            progress("healing: distillation", 0.0)
            distil = functools.partial(_distil, dense, model, replacements, fitting, steps, seed)
            _descend(distil, states, lambda step: look(step / steps))
        states.restore()
        progress("healing", 1.0)
    except BaseException:
        states.undo()
        raise
    seconds = {"regression": middle - start, "distillation": time.perf_counter() - middle}
    return Healing(before, regressed, states.best, seconds, skipped)


def output_distance(dense: nn.Module, model: nn.Module, batches: Sequence[Arguments]) -> float:
    """Returns ‖f − f̂‖² / ‖f − mean f‖² over all outputs on some batches; infinite if not finite."""
    distance = spread = 0.0
    for args, kwargs in batches:
        with inference(dense), inference(model):
            outputs = zip(output_tensors(dense(*args, **kwargs)), output_tensors(model(*args, **kwargs)), strict=True)
            for target, output in outputs:
                distance += float((target - output).double().square().sum())
                spread += float((target - target.mean(dim=0)).double().square().sum())
    value = distance / spread if spread else distance
    return math.inf if math.isnan(value) else value


def shared_state(model: nn.Module, replacements: Sequence[Replacement]) -> list[tuple[Tensor, Tensor]]:
    """Returns what the repair may change besides the factors, each tensor with a copy of its value.

    That is the biases of the factorised layers and the parameters and buffers of the norms.
    """
    biases = [r.factorised.bias for r in replacements if r.factorised.bias is not None]
    norms = [t for m in model.modules() if isinstance(m, _NORMS) for t in (*m.parameters(), *m.buffers())]
    return [(tensor, tensor.detach().clone()) for tensor in (*biases, *norms)]


@torch.no_grad()
def restore_(state: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts the values of `shared_state` back."""
    for tensor, value in state:
        tensor.copy_(value)


class _States:
    """The state a model came with, and the best one met."""

    def __init__(self, model: nn.Module, distance: float) -> None:
        self._model = model
        self._first = self._best = self._copy()
        self.best = distance

    def _copy(self) -> dict[str, Tensor]:
        state = self._model.state_dict()
        return {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def judge(self, distance: float) -> None:
        """Keeps the present state if it is the best so far."""
        if distance < self.best:
            self.best, self._best = distance, self._copy()

    def restore(self) -> None:
        """Goes back to the best state."""
        self._model.load_state_dict(self._best, strict=False)

    def undo(self) -> None:
        """Goes back to the first state."""
        self._model.load_state_dict(self._first, strict=False)


def _in_forward_order(
    model: nn.Module, replacements: Sequence[Replacement], arguments: Arguments
) -> list[tuple[Replacement, int]]:
    """Returns the factorised layers by their first call, those never called last, each with the number of its calls."""
    called: dict[int, int] = {}

    def note(module: nn.Module, _args: Any) -> None:
        called[id(module)] = called.get(id(module), 0) + 1

    with hooked(r.factorised.register_forward_pre_hook(note) for r in replacements), inference(model):
        model(*arguments[0], **arguments[1])
    order = {key: place for place, key in enumerate(called)}
    ordered = sorted(replacements, key=lambda r: order.get(id(r.factorised), len(order)))
    return [(replacement, called.get(id(replacement.factorised), 0)) for replacement in ordered]


def _shares_factors(replacement: Replacement, others: Sequence[Replacement]) -> bool:
    """Returns whether another layer is made of the same factors, so that refitting one would change both."""
    own = {id(factor) for factor in replacement.factorised.factors().values()}
    return any(
        other is not replacement and own & {id(factor) for factor in other.factorised.factors().values()}
        for other in others
    )


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the layer of interest."""


def _inputs_of(model: nn.Module, layer: nn.Module, arguments: Arguments, calls: int) -> list[Tensor]:
    """Returns what enters a layer in its first calls; the model is not run any further."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(input_of(args, kwargs))
        if len(found) >= calls:
            raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([hook]), inference(model), contextlib.suppress(_Reached):
        model(*arguments[0], **arguments[1])
    return found


@torch.no_grad()
def _refit(
    dense: nn.Module,
    model: nn.Module,
    replacement: Replacement,
    batches: Sequence[Arguments],
    *,
    metric: Metric | None,
    calls: int,
) -> None:
    """Refits one layer to its dense one's outputs over its `calls` calls per batch."""
    layer, new = dense.get_submodule(replacement.aliases[0]), replacement.factorised
    family, operator = family_of(layer), new.operator
    if operator.lookup:  # its inputs are the same in both models
        return
    weight = canonical(layer, cast(Tensor, layer.weight)).detach().double().cpu()
    weight = weight.reshape(operator.groups, -1, weight[0].numel())  # (groups, out, D)
    size = weight.shape[2]
    gram, cross = (torch.zeros(operator.groups, size, size, dtype=torch.float64) for _ in range(2))
    mean_new, mean_dense, count = torch.zeros_like(gram[:, 0]), torch.zeros_like(gram[:, 0]), 0
    for arguments in batches:
        inputs = _inputs_of(dense, layer, arguments, calls), _inputs_of(model, new, arguments, calls)
        if not inputs[0] or len(inputs[0]) != len(inputs[1]):  # never called on these inputs
            return
        rows_dense, rows_new = (
            torch.cat([cast(Tensor, family.rows(layer, value)) for value in values], dim=1).float() for values in inputs
        )
        gram += (rows_new.mT @ rows_new).double().cpu()
        cross += (rows_new.mT @ rows_dense).double().cpu()
        mean_new += rows_new.sum(1).double().cpu()
        mean_dense += rows_dense.sum(1).double().cpu()
        count += rows_new.shape[1]
    gram, cross, mean_new, mean_dense = gram / count, cross / count, mean_new / count, mean_dense / count
    total = _trace(gram)
    if new.bias is not None:  # the bias takes care of the means
        gram = gram - mean_new[:, :, None] * mean_new[:, None, :]
        cross = cross - mean_new[:, :, None] * mean_dense[:, None, :]
    if not bool((_trace(gram) > total * torch.finfo(torch.float32).eps).all()):  # inputs that never vary say nothing
        return
    ridge = RIDGE * (_trace(gram) / size)[:, None, None] * torch.eye(size, dtype=torch.float64)
    with threads_for(weight):
        target = torch.linalg.solve(gram + ridge, (cross + ridge) @ weight.mT).mT  # (groups, out, D)
        outputs = metric.outputs if metric is not None else None
        here = Metric(*((gram + ridge, outputs) if operator.groups > 1 else ((gram + ridge)[0], outputs)))
        whole = target.reshape(-1, *operator.shape[1:])
        new.load_factors(factorise_in(new.kind, whole, new.ranks, here, operator.groups))
    if new.bias is not None and layer.bias is not None:
        fitted = new.canonical_weight().double().cpu().reshape(weight.shape)
        shift = (weight @ mean_dense[:, :, None] - fitted @ mean_new[:, :, None]).flatten()
        new.bias.copy_((cast(Tensor, layer.bias).double().cpu() + shift).to(new.bias))


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _renormalise(dense: nn.Module, model: nn.Module, batches: Sequence[Arguments]) -> None:
    """Moves the running statistics of batch norms by what the factors changed in what enters them.

    The mean by the difference to the dense model's on the same inputs, the variance by the ratio: what synthetic inputs
    themselves differ by from real ones cancels. Norms that take their turn later see the earlier ones corrected.
    """
    names = {id(norm): name for name, norm in model.named_modules()}
    pairs = [(norm, cast(_BatchNorm, dense.get_submodule(names[id(norm)]))) for norm in running_norms(model)]
    first = [(cast(Tensor, n.running_mean).clone(), cast(Tensor, n.running_var).clone()) for n, _ in pairs]
    means, factors = ([torch.zeros_like(mean, dtype=torch.float32) for mean, _ in first] for _ in range(2))
    counts = [0] * len(pairs)
    expected: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pairs]  # of the dense model's calls, in their order

    def note(index: int, inputs: Tensor) -> None:
        expected[index].append(channel_moments(inputs))

    def correct(index: int, norm: _BatchNorm, inputs: Tensor) -> None:
        if not expected[index]:
            return
        (mean, variance), (dense_mean, dense_variance) = channel_moments(inputs), expected[index].pop(0)
        shift = mean - dense_mean
        factor = ((variance + norm.eps) / (dense_variance + norm.eps)).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
        cast(Tensor, norm.running_mean).copy_(first[index][0] + shift)
        cast(Tensor, norm.running_var).copy_(first[index][1] * factor)
        means[index] += shift
        factors[index] += factor
        counts[index] += 1

    hooks = (
        handle
        for index, (norm, other) in enumerate(pairs)
        for handle in (
            other.register_forward_pre_hook(
                lambda _m, args, kwargs, index=index: note(index, input_of(args, kwargs)), with_kwargs=True
            ),
            norm.register_forward_pre_hook(
                lambda m, args, kwargs, index=index: correct(index, m, input_of(args, kwargs)), with_kwargs=True
            ),
        )
    )
    with hooked(hooks):
        for args, kwargs in batches:
            if min(sample_counts((args, kwargs)), default=1) > 1:  # the variance of one sample is none
                for calls in expected:
                    calls.clear()
                with inference(dense):
                    dense(*args, **kwargs)
                with inference(model):
                    model(*args, **kwargs)
    for (norm, _), (mean, variance), shift, factor, count in zip(pairs, first, means, factors, counts, strict=True):
        cast(Tensor, norm.running_mean).copy_(mean + shift / max(1, count))
        cast(Tensor, norm.running_var).copy_(variance * (factor / count if count else 1.0))


def _affordable(
    dense: nn.Module, model: nn.Module, replacements: Sequence[Replacement], batches: Sequence[Arguments], steps: int
) -> tuple[int, str | None]:
    """Returns the number of steps, and why there can be none."""
    if not replacements:
        return 0, "no layer is factorised"
    trained = _trained(model, replacements)
    if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in trained):
        return 0, "the parameters are in half precision"
    args, kwargs = batches[0]
    with flop_counter() as flops, inference(dense):
        outputs = output_tensors(dense(*args, **kwargs))
    if not outputs:
        return 0, "the model returns no floating-point tensor"
    try:
        _gradients(dense, model, replacements, trained, batches[0])
    except RuntimeError as error:
        return 0, f"the model cannot be differentiated ({error})"
    steps = min(steps, WORK // max(1, flops.get_total_flops()))  # forward of both, backward of the smaller one
    if steps < FEWEST_STEPS:
        return 0, f"{FEWEST_STEPS} steps would cost more than {WORK:.0e} MACs"
    return steps, None


def _trained(model: nn.Module, replacements: Sequence[Replacement]) -> list[nn.Parameter]:
    """Returns the factors, their biases and the scales of the norms."""
    factors = [p for r in replacements for p in r.factorised.parameters()]
    norms = [p for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters() if p.requires_grad]
    return list({id(parameter): parameter for parameter in [*factors, *norms]}.values())


def _descend(distil: Callable[[float], Iterator[int]], states: _States, look: Callable[[int], float]) -> None:
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


def _distil(  # noqa: PLR0917
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
        for step in range(1, steps + 1):
            risen = rate * min(1.0, step / WARM_UP)
            optimizer.param_groups[0]["lr"] = risen * (1 + math.cos(math.pi * step / steps)) / 2
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
    """Returns those of the distance by the trained parameters, which keep their own."""
    with torch.inference_mode(mode=False), _requiring_grad(trained):
        distance = _distance(dense, model, replacements, arguments)
        return torch.autograd.grad(distance, trained, allow_unused=True)


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


def _distance(dense: nn.Module, model: nn.Module, replacements: Sequence[Replacement], arguments: Arguments) -> Tensor:
    """Returns the normalised distance of the outputs plus the mean one of the factorised layers' outputs."""
    with inference(dense):
        targets, inner_targets = _run_with_outputs(
            dense, [dense.get_submodule(r.aliases[0]) for r in replacements], arguments
        )
    with inference(model), torch.enable_grad():
        outputs, inner = _run_with_outputs(model, [r.factorised for r in replacements], arguments)
        loss = torch.stack([_normalised(o, t) for o, t in zip(outputs, targets, strict=True)]).sum()
        hints = [_normalised(o, t) for o, t in zip(inner, inner_targets, strict=True)]
        return loss + torch.stack(hints).mean() if hints else loss


def _run_with_outputs(
    model: nn.Module, layers: Sequence[nn.Module], arguments: Arguments
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the model's outputs and those of some layers, call by call."""
    inner: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        inner.append(output)
        return output.clone()  # what follows may change it in place

    with hooked(layer.register_forward_hook(keep) for layer in layers):
        return output_tensors(model(*arguments[0], **arguments[1])), inner


def _normalised(output: Tensor, target: Tensor) -> Tensor:
    spread = (target - target.mean(dim=0)).square().mean().clamp_min(torch.finfo(target.dtype).tiny)
    return (output - target).square().mean() / spread

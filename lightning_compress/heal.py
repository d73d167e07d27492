"""Data-free repair of the factors, on synthetic inputs, before any fine-tuning.

Layer by layer, in forward order, the factors are refitted in closed form so that the compressed
network's own activations reproduce the dense layer's outputs: reduced-rank regression
min ‖W X − M X̂‖ over M of the layer's kind and ranks, where X enters the layer in the dense and X̂
in the already repaired compressed network (the asymmetric reconstruction of Zhang et al. 2015,
"Accelerating Very Deep Convolutional Networks", section 3.3, with the data replaced by synthetic
inputs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.decompositions import DECOMPOSITIONS
from lightning_compress.decompositions.base import threads_for
from lightning_compress.moments import unfolded
from lightning_compress.progress import Progress, silent
from lightning_compress.swap import Replacement
from lightning_compress.synthesis import Arguments
from lightning_compress.tracing import inference

RIDGE = 1e-3
"""Relative ridge of the regression: synthetic inputs leave some directions almost unseen."""


@dataclass(frozen=True)
class Healing:
    """What the repair did.

    Attributes:
        before: Normalised output distance on held-out synthetic inputs, ‖f − f̂‖² / ‖f − mean f‖².
        after: The same afterwards; never larger.
    """

    before: float
    after: float


def heal_(
    dense: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    batches: Sequence[Arguments],
    *,
    progress: Progress = silent,
) -> Healing:
    """Refits the factors of a compressed model in place; keeps them as they were if that does not help.

    Args:
        dense: The dense model.
        model: The compressed one.
        replacements: Its factorised layers, in forward order.
        batches: Synthetic inputs; the last quarter is held out to judge the result.
        progress: Called with what is being done and the fraction done.
    """
    held_out = max(1, len(batches) // 4)
    fitting, judging = batches[:-held_out] or batches, batches[-held_out:]
    before = output_distance(dense, model, judging)
    saved = {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        for index, replacement in enumerate(replacements):
            progress("healing", index / len(replacements))
            _refit(dense, model, replacement, fitting)
        progress("healing", 1.0)
        after = output_distance(dense, model, judging)
    except BaseException:
        model.load_state_dict(saved, strict=False)
        raise
    if not after < before:
        model.load_state_dict(saved, strict=False)
        after = before
    return Healing(before, after)


def output_distance(dense: nn.Module, model: nn.Module, batches: Sequence[Arguments]) -> float:
    """Returns ‖f − f̂‖² / ‖f − mean f‖² over all outputs on some batches; infinite if not finite."""
    distance = spread = 0.0
    for args, kwargs in batches:
        with inference(dense), inference(model):
            outputs = zip(_tensors(dense(*args, **kwargs)), _tensors(model(*args, **kwargs)), strict=True)
            for target, output in outputs:
                distance += float((target - output).double().square().sum())
                spread += float((target - target.mean(dim=0)).double().square().sum())
    value = distance / spread if spread else distance
    return math.inf if math.isnan(value) else value


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the layer of interest."""


def _inputs_of(model: nn.Module, layer: nn.Module, arguments: Arguments) -> Tensor:
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        with inference(model):
            model(*arguments[0], **arguments[1])
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def _refit(dense: nn.Module, model: nn.Module, replacement: Replacement, batches: Sequence[Arguments]) -> None:
    layer, new = dense.get_submodule(replacement.aliases[0]), replacement.factorised
    weight = cast(Tensor, layer.weight).detach().flatten(1).double().cpu()
    size = weight.shape[1]
    gram, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    mean_new, mean_dense, count = torch.zeros(size).double(), torch.zeros(size).double(), 0
    for arguments in batches:
        rows_dense = unfolded(layer, _inputs_of(dense, layer, arguments)).float()
        rows_new = unfolded(layer, _inputs_of(model, new, arguments)).float()
        gram += (rows_new.T @ rows_new).double().cpu()
        cross += (rows_new.T @ rows_dense).double().cpu()
        mean_new += rows_new.sum(0).double().cpu()
        mean_dense += rows_dense.sum(0).double().cpu()
        count += len(rows_new)
    gram, cross, mean_new, mean_dense = gram / count, cross / count, mean_new / count, mean_dense / count
    total = gram.trace()
    if new.bias is not None:  # the bias takes care of the means
        gram, cross = gram - torch.outer(mean_new, mean_new), cross - torch.outer(mean_new, mean_dense)
    if gram.trace() <= total * torch.finfo(torch.float32).eps:  # inputs that never vary say nothing
        return
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    with threads_for(weight):
        target = torch.linalg.solve(gram + ridge, (cross + ridge) @ weight.T).T
        factors = DECOMPOSITIONS[new.kind].factorise(target.reshape(new.weight_shape), new.ranks, gram + ridge)
    for name, child in new.named_children():
        parameter = cast(Tensor, child.weight)
        parameter.copy_(factors[name].reshape(parameter.shape))
    if new.bias is not None and layer.bias is not None:
        fitted = new.dense_weight().flatten(1).double().cpu()
        new.bias.add_((weight @ mean_dense - fitted @ mean_new).to(new.bias))

"""Factorised layers that run as dense ones while they are trained: the factors multiplied out in every step.

Gradients reach the factors through the product. Where a layer works on many positions that is cheaper than to run its
stages one after the other: a product costs what it costs once for the whole batch, and torch's depthwise convolutions
take many times as long on a processor as their multiply-accumulates let expect.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments, hooked, inference
from lightning_compress.kinds.base import LayerCall
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.adapters import entering
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import family_of

DEPTHWISE = 16.0
"""Time of a multiply-accumulate of a grouped convolution, in those of a dense one."""
WRITTEN = 32.0
"""Time of writing one number, likewise."""


@contextlib.contextmanager
def multiplied_out(layers: Iterable[FactorisedLayer]) -> Iterator[None]:
    """Lets layers run by the product of their factors, differentiably."""
    changed = list(layers)
    try:
        for layer in changed:
            layer.__dict__["forward"] = functools.partial(_run, layer)
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def _run(layer: FactorisedLayer, input: Tensor) -> Any:
    dense = copy.copy(layer.template)
    dense.__dict__ = {**dense.__dict__, "_parameters": {}, "weight": layer.dense_weight(), "bias": layer.bias}
    return dense(input)


def faster_multiplied_out(
    model: nn.Module, layers: Sequence[FactorisedLayer], arguments: Arguments
) -> list[FactorisedLayer]:
    """Returns those of some layers that take less time by their product, in a batch like this one.

    Worked out from their sizes, so that the same repair leads to the same numbers again.

    Args:
        model: That they are in.
        layers: To choose from.
        arguments: Of a forward pass.
    """
    calls: dict[int, list[LayerCall]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        layer = cast(FactorisedLayer, module).template
        calls.setdefault(id(module), []).append(family_of(layer).call(layer, entering(layer, args, kwargs), output))

    candidates = [layer for layer in layers if not layer.operator.lookup]
    with hooked(c.register_forward_hook(note, with_kwargs=True) for c in candidates), inference(model):
        model(*arguments[0], **arguments[1])
    return [layer for layer in candidates if _is_cheaper(layer, calls.get(id(layer), []))]


def _is_cheaper(layer: FactorisedLayer, calls: Sequence[LayerCall]) -> bool:
    """Returns whether the calls of a layer cost less by its product."""
    operator, decomposition, ranks = layer.operator, DECOMPOSITIONS[layer.kind], np.array([layer.ranks])
    weight = torch.Size(layer.weight_shape).numel()
    by_stages = dense = 0.0
    for call in calls:
        stages = list(decomposition.stage_positions(operator.shape, ranks, call))
        if not stages:
            return False
        for stage, before, after in stages:
            macs = float(stage.parameters(operator.kernel)[0]) * (before if call.transposed else after) * call.rows
            grouped = int(np.max(stage.groups)) * operator.groups > 1
            written = float(np.max(stage.outputs)) * after * call.rows
            by_stages += operator.groups * (macs * (DEPTHWISE if grouped else 1.0) + WRITTEN * written)
        dense += weight * call.positions + WRITTEN * operator.groups * operator.shape[0] * after * call.rows
    product = weight * float(np.max(layer.ranks)) * len(calls)
    return dense + product < by_stages

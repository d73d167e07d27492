"""Layers with the sizes of a plan and any numbers in them: as fast as the ones they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.plan import DENSE
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import children_of
from lightning_compress.layers.memory_format import in_channels_last
from lightning_compress.layers.unfused import put_
from lightning_compress.layers.variants import make_factorised

_NUMBERS = 4099
"""Random numbers that are repeated: a prime, so that no two rows are the same."""


class Form(NamedTuple):
    """What a layer is factorised into.

    Attributes:
        kind: Of decomposition, or "dense".
        ranks: Of the kind.
        merged: Whether it runs as the dense layer.
    """

    kind: str
    ranks: tuple[int, ...] = ()
    merged: bool = False


Forms = Mapping[str, Form]
"""Name of a layer to its form; the others stay dense."""


def shell_of(dense: nn.Module, form: Form, *, channels_last: bool) -> FactorisedLayer:
    """Returns a factorised layer for a dense one: in eval mode, on its device, in its dtype, without gradients."""
    decomposition = DECOMPOSITIONS[form.kind]
    children = children_of(decomposition, dense, form.ranks)
    like = cast(Tensor, dense.weight)
    for child in children.values():
        weight = _numbers(cast(Tensor, child.weight).shape).to(like)
        child.weight = nn.Parameter(in_channels_last(weight) if channels_last else weight, requires_grad=False)
        for key, buffer in child.named_buffers():
            child.register_buffer(key, buffer.to(like.device))
    if "bias" in dense._parameters:
        last = children[list(children)[-1]]
        last.register_parameter("bias", cast("nn.Parameter | None", dense.bias))
    shell = make_factorised(children, dense=dense, decomposition=decomposition, ranks=form.ranks).eval()
    shell.merged = form.merged
    return shell


def put_shells_(model: nn.Module, layers: Mapping[str, Layer], forms: Forms, *, channels_last: bool) -> None:
    """Puts shells in the place of layers and of those that share their weight, in place.

    Args:
        model: A copy of its own, attention and recurrent layers unfused.
        layers: Of the model it is a copy of, by name.
        forms: Of the layers to replace.
        channels_last: Whether the factors are in that format.
    """
    for name, form in forms.items():
        if form.kind == DENSE:
            continue
        for aliases in (layers[name].aliases, *(names for names, _ in layers[name].partners)):
            dense = model.get_submodule(aliases[0])
            put_(model, aliases, shell_of(dense, form, channels_last=channels_last))


def _numbers(shape: torch.Size) -> Tensor:
    """Returns numbers that keep the scale of what they are multiplied with about the same."""
    few = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0))
    many = few.repeat(-(-shape.numel() // _NUMBERS))[: shape.numel()]
    scaled: Tensor = many.reshape(shape) / max(1, shape[1:].numel()) ** 0.5
    return scaled

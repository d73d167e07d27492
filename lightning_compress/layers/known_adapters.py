"""Adapters of torch's weight norms and of classes in packages that need not be installed.

Classes of packages are known by their names alone, as each package has a copy of its own; whether a layer does what
its name says is tried on random values (`folding`).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lightning_compress.layers.adapter import PLAIN, LayerAdapter

_PARAMETRIZATIONS = (parametrizations._WeightNorm, parametrizations._SpectralNorm, parametrizations._Orthogonal)
_NORM_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
_EPS = 1e-10  # of the first published weight standardisation, which has no attribute for it


def known_adapter(layer: nn.Module) -> LayerAdapter | None:
    """Returns the adapter that comes with the package for a layer, by the name of its class."""
    cls = own_class(layer)
    found = _BY_NAME.get(f"{cls.__module__}.{cls.__name__}", _BY_NAME.get(cls.__name__))
    if found is None and issubclass(cls, nn.Embedding):
        if cls.__name__.endswith("ScaledWordEmbedding"):
            found = _SCALED
        elif cls.__name__.endswith("PositionalEmbedding"):
            found = _positional(_first_argument(cast(Any, cls)))
    return found if found is not None and cls not in PLAIN and issubclass(cls, found.plain) else None


def normed(layer: nn.Module) -> bool:
    """Returns whether torch's weight_norm, spectral_norm or orthogonal, the old or the new ones, compute its weight."""
    if parametrize.is_parametrized(layer):
        lists: Any = layer.parametrizations
        return list(lists) == ["weight"] and all(isinstance(each, _PARAMETRIZATIONS) for each in lists["weight"])
    return norm_hook(layer) is not None


def norm_hook(layer: nn.Module) -> Any:
    """Returns the hook by which the old functions compute a weight, None if there is none."""
    found = [hook for hook in layer._forward_pre_hooks.values() if type(hook).__module__ in _NORM_HOOKS]
    hook: Any = found[0] if len(found) == 1 else None
    return hook if hook is not None and hook.name == "weight" else None


def own_class(layer: nn.Module) -> type[nn.Module]:
    """Returns the class of a layer as it was before torch parametrized it."""
    cls = type(layer)
    return cls.__mro__[1] if parametrize.is_parametrized(layer) else cls


def normed_weight(layer: Any) -> Tensor:
    """Returns the weight that torch's norms compute, as in eval mode: no step of a power iteration is made."""
    hook = norm_hook(layer)
    if hook is None:
        steps = [(each, each.training) for each in layer.parametrizations["weight"]]
        try:
            for each, _ in steps:
                each.training = False
            return cast(Tensor, layer.weight)
        finally:
            for each, training in steps:
                each.training = training
    if type(hook).__name__ == "SpectralNorm":
        return cast(Tensor, hook.compute_weight(layer, do_power_iteration=False))
    return cast(Tensor, hook.compute_weight(layer))


def standardised(layer: Any) -> Tensor:
    """Returns the weight of which every output channel has mean 0 and variance 1, times a gain where there is one."""
    gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
    flat = layer.weight.reshape(1, layer.out_channels, -1)
    eps = getattr(layer, "eps", _EPS)
    return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=eps).reshape_as(layer.weight)


def padded_same(layer: Any, input: Tensor) -> Tensor:
    """Returns an image padded so that the output has its size divided by the stride, more at the end than before."""
    padding: list[int] = []
    for axis in (1, 0):
        size, stride = input.shape[axis - 2], layer.stride[axis]
        extent = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        missing = max((-(-size // stride) - 1) * stride + extent - size, 0)
        padding += [missing // 2, missing - missing // 2]
    return F.pad(input, padding)


def _padded_same_if_asked(layer: Any, input: Tensor) -> Tensor:
    return padded_same(layer, input) if layer.same_pad else input


def _padded_by_static(layer: Any, input: Tensor) -> Tensor:
    padded: Tensor = layer.static_padding(input)
    return padded


def _padded_by_pad(layer: Any, input: Tensor) -> Tensor:
    return cast(Tensor, input if layer.pad is None else layer.pad(input))


def _padded_by_zeros(layer: Any, input: Tensor) -> Tensor:
    padded: Tensor = layer.zero_pad_2d(input)
    return padded


def _scaled(layer: Any, output: Tensor) -> Tensor:
    scale = layer.embed_scale
    return output * (scale.to(output.dtype) if isinstance(scale, Tensor) else scale)


def _by_ids(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Returns positions from a length on, for as many as there are ids; those of Bart and its kin."""
    ids, length, positions = _positional_arguments("input_ids", args, kwargs)
    if positions is None:
        batch, count = ids.shape[:2]
        positions = torch.arange(length, length + count, device=ids.device).expand(batch, -1)
    else:
        positions = positions.unsqueeze(0)
    return cast(Tensor, positions + layer.offset)


def _by_mask(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Returns the positions among what an attention mask leaves; those of OPT and its kin."""
    mask, length, positions = _positional_arguments("attention_mask", args, kwargs)
    if positions is None:
        positions = (torch.cumsum(mask, dim=1) * mask - 1).long()[:, length:]
    return cast(Tensor, positions + layer.offset)


def _positional_arguments(first: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Returns the first argument, the length, by whatever name, and the positions."""
    named = {("length" if name.endswith("length") else name): value for name, value in kwargs.items()}
    given = dict(zip((first, "length", "position_ids"), args, strict=False)) | named
    return given[first], given.get("length", 0), given.get("position_ids")


def _sliced(_layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Returns positions from a length on, one row for all inputs; those of Whisper."""
    ids, length, positions = _positional_arguments("input_ids", args, kwargs)
    return torch.arange(length, length + ids.shape[1], device=ids.device) if positions is None else positions


def _some_ids(layer: Any) -> tuple[Tensor]:
    count = min(3, layer.num_embeddings - getattr(layer, "offset", 0))
    return (torch.zeros(1, count, dtype=torch.long, device=layer.weight.device),)


def _whole_mask(layer: Any) -> tuple[Tensor]:
    return (torch.ones_like(_some_ids(layer)[0]),)


def _by_tokens(layer: Any, input: Tensor, incremental_state: Any = None, positions: Tensor | None = None) -> Tensor:
    """Returns the positions among tokens that are no padding; those of fairseq."""
    if positions is not None:
        return positions
    if incremental_state is not None:
        return torch.full((1, 1), layer.padding_idx + input.shape[1], dtype=torch.long, device=input.device)
    mask = input.ne(layer.padding_idx).int()
    return cast(Tensor, (torch.cumsum(mask, dim=1).type_as(mask) * mask).long() + layer.padding_idx)


def _no_padding(layer: Any) -> tuple[Tensor]:
    token = int(layer.padding_idx == 0)
    return (torch.full((1, min(3, layer.num_embeddings - layer.padding_idx - 1)), token, device=layer.weight.device),)


@functools.cache
def _first_argument(cls: Any) -> str:
    return [*inspect.signature(cls.forward).parameters, "", ""][1]


def _positional(first: str) -> LayerAdapter | None:
    return {"input_ids": _BY_IDS, "attention_mask": _BY_MASK, "input": _BY_TOKENS}.get(first)


_SCALED = LayerAdapter(nn.Embedding, after=_scaled, settings=("embed_scale",))
_BY_IDS = LayerAdapter(nn.Embedding, before=_by_ids, settings=("offset",), example=_some_ids)
_BY_MASK = LayerAdapter(nn.Embedding, before=_by_mask, settings=("offset",), example=_whole_mask)
_BY_TOKENS = LayerAdapter(nn.Embedding, before=_by_tokens, example=_no_padding)
_LINEAR = LayerAdapter(nn.Linear)
_STANDARDISED = LayerAdapter(nn.Conv2d, weight=standardised)
_STANDARDISED_SAME = LayerAdapter(nn.Conv2d, standardised, _padded_same_if_asked, settings=("same_pad",))
_SAME = LayerAdapter(nn.Conv2d, before=padded_same)
_BY_NAME: dict[str, LayerAdapter] = {
    "StdConv2d": _STANDARDISED,
    "ScaledStdConv2d": _STANDARDISED,
    "StdConv2dSame": _STANDARDISED_SAME,
    "ScaledStdConv2dSame": _STANDARDISED_SAME,
    "WeightStandardizedConv2d": LayerAdapter(nn.Conv2d, standardised, _padded_by_pad, settings=("pad",)),
    "Conv2dSame": _SAME,
    "Conv2dDynamicSamePadding": _SAME,
    "Conv2dStaticSamePadding": LayerAdapter(nn.Conv2d, before=_padded_by_static, settings=("static_padding",)),
    "Conv2dSamePadding": LayerAdapter(nn.Conv2d, before=_padded_by_zeros, settings=("zero_pad_2d",)),
    "FalconLinear": _LINEAR,
    "WhisperPositionalEmbedding": LayerAdapter(nn.Embedding, before=_sliced, example=_some_ids),
    "timm.layers.linear.Linear": _LINEAR,
    "whisper.model.Linear": _LINEAR,
}
"""By the name of the class, with that of its module where others may have it too."""

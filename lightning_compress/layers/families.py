"""The classes of layers that can be factorised, each reduced to one `Operator`.

A layer's weight is brought into canonical form, (groups · out, in, *kernel): as it is for nn.Linear
and convolutions, transposed for nn.Embedding, transposed convolutions and Hugging Face's Conv1D. The
child layers of a decomposition are of the same family, so the same rule turns factors into their
weights and back.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_compress.core.compat import is_quantised
from lightning_compress.kinds.base import Decomposition, LayerCall, Operator, Stage
from lightning_compress.kinds.interpolative import Interpolative
from lightning_compress.kinds.tensorised import TtEmbedding
from lightning_compress.layers.adapters import adapter_of, full_name
from lightning_compress.layers.interpolation import Interpolation
from lightning_compress.layers.patches import all_patches, some_patches, stuffed_between
from lightning_compress.layers.tensorised import lookup_cores
from lightning_compress.layers.transposed import TransposedLinear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class LayerType(ABC):
    """What the classes of one family have in common."""

    @abstractmethod
    def operator(self, layer: nn.Module) -> Operator:
        """Returns what the layer does."""

    def refusal(self, layer: nn.Module) -> str | None:  # noqa: ARG002
        """Returns why a layer of the family cannot be factorised, None if it can."""
        return None

    def call_refusal(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        """Returns why a layer called with these arguments cannot be factorised, None if it can."""
        return None

    @abstractmethod
    def call(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> LayerCall:
        """Returns the sizes of one call."""

    @abstractmethod
    def rows(self, layer: nn.Module, inputs: Tensor, most: int | None = None) -> Tensor | None:
        """Returns what the weight of each group is applied to, (groups, n, D), None for indices.

        Args:
            layer: The layer.
            inputs: What enters it.
            most: Rows that are made at most, about, of evenly spread positions; None for all.
        """

    @abstractmethod
    def output_rows(self, layer: nn.Module, output: Tensor) -> Tensor:
        """Returns the output vectors, (n, groups · out)."""

    @abstractmethod
    def child(self, layer: nn.Module, stage: Stage, *, first: bool) -> nn.Module:
        """Returns a child layer without bias, on the meta device; the stage is that of all groups together."""


class _LinearType(LayerType):
    @override
    def operator(self, layer: nn.Module) -> Operator:
        return Operator(tuple(canonical(layer, cast(Tensor, layer.weight)).shape))

    @override
    def call(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> LayerCall:
        return LayerCall((), (), rows=output.shape[:-1].numel())

    @override
    def rows(self, layer: nn.Module, inputs: Tensor, most: int | None = None) -> Tensor:
        return inputs.reshape(1, -1, inputs.shape[-1])

    @override
    def output_rows(self, layer: nn.Module, output: Tensor) -> Tensor:
        return output.reshape(-1, output.shape[-1])

    @override
    def child(self, layer: nn.Module, stage: Stage, *, first: bool) -> nn.Module:
        return nn.Linear(stage.inputs, stage.outputs, bias=False, device="meta")


class _ConvType(LayerType):
    @override
    def operator(self, layer: nn.Module) -> Operator:
        conv = cast(_ConvNd, layer)
        weight = canonical(conv, conv.weight)
        return Operator((len(weight) // conv.groups, *weight.shape[1:]), conv.groups, isinstance(conv, _TRANSPOSED))

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        conv = cast(_ConvNd, layer)
        if conv.groups > 1 and conv.in_channels == conv.groups:
            return f"depthwise convolution (groups={conv.groups}): one channel per group has no low rank"
        return None

    @override
    def call_refusal(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return None if size is None else f"it is called with output_size={size}, which its factors would not know"

    @override
    def call(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> LayerCall:
        dims = len(cast(_ConvNd, layer).kernel_size)
        return LayerCall(
            tuple(inputs.shape[-dims:]),
            tuple(output.shape[-dims:]),
            rows=output.shape[: -dims - 1].numel(),
            transposed=isinstance(layer, _TRANSPOSED),
        )

    @override
    def rows(self, layer: nn.Module, inputs: Tensor, most: int | None = None) -> Tensor:
        """Returns the patches; those of a transposed convolution are taken between the stuffed zeros."""
        conv = cast(_ConvNd, layer)
        dims = len(conv.kernel_size)
        inputs = inputs if inputs.ndim == dims + 2 else inputs[None]
        stride: tuple[int, ...] = conv.stride
        if isinstance(conv, _TRANSPOSED):
            inputs, stride = stuffed_between(conv, inputs), (1,) * dims
        else:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            inputs = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        patches = all_patches(inputs, conv.kernel_size, stride, conv.dilation)  # (B, *outputs, C, *kernel)
        if isinstance(conv, _TRANSPOSED):
            patches = patches.flip(tuple(range(-dims, 0)))
        if most is not None:
            patches = some_patches(patches, dims, most)
        rows = patches.reshape(patches.shape[:-dims].numel() // patches.shape[-dims - 1], conv.groups, -1)
        return rows.transpose(0, 1)

    @override
    def output_rows(self, layer: nn.Module, output: Tensor) -> Tensor:
        dims = len(cast(_ConvNd, layer).kernel_size)
        rows = output.movedim(-dims - 1, -1)
        return rows.reshape(-1, rows.shape[-1])

    @override
    def child(self, layer: nn.Module, stage: Stage, *, first: bool) -> nn.Module:
        """Returns a convolution with the layer's geometry on the axes of the stage.

        String padding ("same", "valid") is worked out per axis by torch itself, so it is passed on.
        """
        conv = cast(_ConvNd, layer)
        axes = stage.axes

        def on_axes(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
            return tuple(v if axis in axes else neutral for axis, v in enumerate(values))

        padding: Any = conv.padding
        if not isinstance(padding, str):
            padding = on_axes(cast("tuple[int, ...]", padding), 0)
        elif not axes:
            padding = 0
        transposed = isinstance(conv, _TRANSPOSED) and bool(axes)
        dims = len(conv.kernel_size)
        settings: dict[str, Any] = {
            "stride": on_axes(conv.stride, 1),
            "padding": padding,
            "dilation": on_axes(conv.dilation, 1),
            "groups": int(stage.groups),
            "padding_mode": conv.padding_mode if axes else "zeros",
            "bias": False,
            "device": "meta",
        }
        if transposed:
            settings["output_padding"] = on_axes(conv.output_padding, 0)
        make: Any = (_TRANSPOSED if transposed else _CONVOLUTIONS)[dims - 1]
        return cast(nn.Module, make(int(stage.inputs), int(stage.outputs), on_axes(conv.kernel_size, 1), **settings))


class _EmbeddingType(LayerType):
    @override
    def operator(self, layer: nn.Module) -> Operator:
        own_gradient = bool(getattr(layer, "sparse", False) or getattr(layer, "scale_grad_by_freq", False))
        shape = tuple(canonical(layer, cast(Tensor, layer.weight)).shape)
        return Operator(shape, lookup=True, rowwise=type(layer) is nn.Embedding and not own_gradient)

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        if getattr(layer, "max_norm", None) is not None:
            return "its max_norm renormalises the rows it looks up"
        if getattr(layer, "sparse", False):
            return "its gradients are sparse, as SparseAdam needs, a second factor's are not: set layer.sparse = False"
        if getattr(layer, "mode", "mean") == "max":
            return "it takes the largest of the rows it looks up (mode='max'), which factors cannot"
        return None

    @override
    def call(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> LayerCall:
        return LayerCall((), (), rows=output.shape[:-1].numel(), lookup=True)

    @override
    def rows(self, layer: nn.Module, inputs: Tensor, most: int | None = None) -> None:
        return None

    @override
    def output_rows(self, layer: nn.Module, output: Tensor) -> Tensor:
        return output.reshape(-1, output.shape[-1])

    @override
    def child(self, layer: nn.Module, stage: Stage, *, first: bool) -> nn.Module:
        if not first:
            return nn.Linear(stage.inputs, stage.outputs, bias=False, device="meta")
        names = ["padding_idx", "scale_grad_by_freq", "sparse"]
        if isinstance(layer, nn.EmbeddingBag):
            names += ["mode", "include_last_offset"]
        make: Any = nn.EmbeddingBag if isinstance(layer, nn.EmbeddingBag) else nn.Embedding
        settings = {name: getattr(layer, name) for name in names}
        return cast(nn.Module, make(stage.inputs, stage.outputs, **settings, device="meta"))


_LINEAR, _CONV, _EMBEDDING = _LinearType(), _ConvType(), _EmbeddingType()
_LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: _LINEAR,
    TransposedLinear: _LINEAR,
    NonDynamicallyQuantizableLinear: _LINEAR,
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), _CONV),
    **dict.fromkeys(_EMBEDDINGS, _EMBEDDING),
}
_BY_NAME: dict[str, LayerType] = {"transformers.pytorch_utils.Conv1D": _LINEAR}
"""Classes of packages that need not be installed."""


_HARMLESS = frozenset(
    {
        *("__init__", "reset_parameters", "extra_repr", "__repr__"),
        *("__module__", "__qualname__", "__doc__", "__annotations__", "__annotate_func__", "__annotations_cache__"),
        *("__firstlineno__", "__static_attributes__", "__constants__"),
    }
)
"""What a subclass may have of its own and still do what its parent does."""


def layer_type(layer: nn.Module) -> LayerType | None:
    """Returns the family of a layer by its class, or by that of which it is a subclass in nothing but the name.

    Another subclass may use its weight in its own way, unless it has an adapter that says how.
    """
    known = _LAYER_TYPES.get(type(layer))
    known = known if known is not None else _BY_NAME.get(full_name(type(layer)))
    if known is None:
        parent, adapter = _plain_parent(layer), adapter_of(layer)
        if parent is None and adapter is not None and adapter.weight is None:
            parent = adapter.plain
        known = _LAYER_TYPES[parent] if parent is not None else None
    return known


def _plain_parent(layer: nn.Module) -> type[nn.Module] | None:
    """Returns the known class that a subclass differs from in its name and static methods alone, else None."""
    lineage = type(layer).__mro__
    parent = next((cls for cls in lineage if cls in _LAYER_TYPES), None)
    if parent is None:
        return None
    for cls in lineage[: lineage.index(parent)]:
        own = {name: value for name, value in vars(cls).items() if name not in _HARMLESS}
        static = all(isinstance(value, (staticmethod, classmethod)) for value in own.values())
        if not issubclass(cls, parent) or not static or any(hasattr(parent, name) for name in own):
            return None
    attributes, parameters = state_of(parent)
    more = {name for name in vars(layer) if not name.startswith("_")} - attributes
    holds = layer._modules or layer._buffers or layer._parameters.keys() - parameters
    return None if more or holds else parent


def state_of(parent: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the names of the attributes and of the parameters that the layers of a known class have."""
    return _state_of(cast(Any, parent))  # mypy takes no class for hashable


@functools.cache
def _state_of(parent: Any) -> tuple[frozenset[str], frozenset[str]]:
    sizes = (1,) * (3 if issubclass(parent, _ConvNd) else 2)
    example: nn.Module = parent(*sizes, device="meta")
    return frozenset({*vars(example), *example._parameters}), frozenset(example._parameters)


def family_of(layer: nn.Module) -> LayerType:
    """Returns the family of a layer that has one."""
    return cast(LayerType, layer_type(layer))


def operator_of(layer: nn.Module) -> Operator:
    """Returns what a layer does that has a family."""
    return family_of(layer).operator(layer)


def known_types() -> list[str]:
    """Returns the names of all classes that can be factorised, for messages."""
    return [t.__name__ for t in _LAYER_TYPES if t not in (NonDynamicallyQuantizableLinear, TransposedLinear)]


def canonical(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns a layer's own weight, or anything of its layout, as (groups · out, in, *kernel)."""
    if isinstance(layer, (*_EMBEDDINGS, TransposedLinear)) or full_name(type(layer)) in _BY_NAME:
        return weight.T
    if isinstance(layer, _ConvTransposeNd):
        return _swapped(weight, layer.groups)
    return weight


def own_layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns a canonical weight in the layout of the layer's own; inverse of `canonical`."""
    if isinstance(layer, _ConvTransposeNd):
        return _swapped(weight, layer.groups)
    return canonical(layer, weight)


def children_of(decomposition: Decomposition, layer: nn.Module, ranks: tuple[int, ...]) -> dict[str, nn.Module]:
    """Returns the child layers in forward order, on the meta device; the last one can hold a bias."""
    operator, family = operator_of(layer), family_of(layer)
    if isinstance(decomposition, TtEmbedding):
        return lookup_cores(operator.shape, ranks)
    children: dict[str, nn.Module] = {}
    for index, stage in enumerate(decomposition.stages(operator.shape, np.array([ranks]))):
        one = Stage(
            stage.name,
            int(np.squeeze(stage.outputs)) * operator.groups,
            int(np.squeeze(stage.inputs)) * operator.groups,
            stage.axes,
            int(np.squeeze(stage.groups)) * operator.groups,
        )
        if index and isinstance(decomposition, Interpolative):
            children[stage.name] = Interpolation(one.outputs, one.inputs, len(operator.kernel))
        else:
            children[stage.name] = family.child(layer, one, first=index == 0)
    return children


def template_of(layer: nn.Module) -> nn.Module:
    """Returns an empty copy of a layer: its settings, with weights on the meta device and without hooks."""
    twin = copy.copy(layer)
    twin.__dict__ = {
        name: OrderedDict() if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) else value
        for name, value in layer.__dict__.items()
    }
    twin._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for name, p in layer._parameters.items()
    }
    twin._modules = {name: template_of(child) for name, child in layer._modules.items() if child is not None}
    twin._buffers = dict(layer._buffers)
    return twin


def canonical_factors(children: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns the weights of child layers in canonical form, by name."""
    weights = {name: _plain(cast(Tensor, child.weight)) for name, child in children.items()}
    return {
        name: child.expanded(weights[name]) if isinstance(child, Interpolation) else canonical(child, weights[name])
        for name, child in children.items()
    }


def _plain(weight: Tensor) -> Tensor:
    """Returns a quantised factor (a tensor of a class of its own) as the numbers that it stands for."""
    return weight.dequantize() if is_quantised(weight) else weight


def stored_factor(child: nn.Module, factor: Tensor) -> Tensor:
    """Returns a canonical factor as a child layer's weight; an `Interpolation` takes over what it does not store."""
    return child.arrange(factor) if isinstance(child, Interpolation) else own_layout(child, factor)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Returns (g · a, b, *kernel) as (g · b, a, *kernel), group by group."""
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)

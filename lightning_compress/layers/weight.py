"""The weight of a factorised layer: asked for its shape or dtype it answers, used it is multiplied out.

It is a tensor without memory. A subclass of torch.Tensor because code asks `isinstance(layer.weight, Tensor)`, hands it
to any torch function, and reads attributes of it; with `__torch_function__`, which puts the product in its place above
autograd, so that gradients reach the factors as they reach any other operand; and with `__torch_dispatch__` and a
node of autograd for what goes past that (functions of one's own, `torch.autograd.Function`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from warnings import warn

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_compress.core.compat import tree_leaves, tree_map
from lightning_compress.core.errors import CompressionWarning

if TYPE_CHECKING:
    from lightning_compress.layers.factorised import FactorisedLayer

_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "output_nr"),
    *("itemsize", "nbytes", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_mtia", "is_xla", "is_meta", "is_sparse"),
    *("is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "_version", "_base", "_backward_hooks"),
)
_METHODS = (
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_same_size", "is_inference", "__len__"),
    *("is_conj", "is_neg", "_is_view", "__hash__"),
)
_FUNCTIONS = ("numel", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_inference", "is_conj")
_ANSWERED = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)]
    + [getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)]
)
"""What is answered without the numbers."""
_ALIKE = frozenset(
    {f"new_{what}" for what in ("empty", "zeros", "ones", "full", "tensor", "empty_strided")}
    | {f"{what}_like" for what in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")}
)
"""What makes tensors of the same dtype, device or shape."""
_LOST = frozenset(
    {f"__i{what}__" for what in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
    | {"__ilshift__", "__irshift__", "__setitem__", "__set__", "__delitem__"}
    | {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
)
"""What changes its tensor, besides functions with a name such as `copy_`."""


class _Guarded(Tensor):
    """A tensor that is the weight of a factorised layer or shares memory with it: read, and never written.

    Attributes:
        layer: The layer.
    """

    layer: FactorisedLayer

    @override
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _respond[0](func, args, kwargs or {})

    def _write(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ARG002
        raise self.layer.refused(_name_of(func))

    def _read(self, *, linked: bool) -> Tensor:
        """Returns the numbers as a plain tensor."""
        raise NotImplementedError


class _View(_Guarded):
    """Shares memory with the product, such as a transpose."""

    @override
    def _read(self, *, linked: bool) -> Tensor:
        return self.as_subclass(Tensor)


class FactorisedWeight(_Guarded):
    """The weight itself, without memory.

    Args:
        layer: The factorised layer.
        detached: Whether it is one that gradients do not go through, as `detach` and `data` return it.
    """

    detached: bool
    _held: Tensor | None = None

    @staticmethod
    def __new__(cls: type[Self], layer: FactorisedLayer, *, detached: bool = False) -> Self:
        """Returns a tensor that is in no graph."""
        shape, like, strides = layer.weight_shape, next(layer.parameters()), None
        if (form := layer.memory_format) != torch.contiguous_format:
            strides = torch.empty(shape, device="meta", memory_format=form).stride()
        made = cast(Any, Tensor)._make_wrapper_subclass(cls, shape, strides, dtype=like.dtype, device=like.device)
        made.layer, made.detached = layer, detached
        return cast(Self, made)

    def __init__(self, layer: FactorisedLayer, *, detached: bool = False) -> None:
        pass

    @override
    def _read(self, *, linked: bool) -> Tensor:
        linked = linked and self.requires_grad and torch.is_grad_enabled()
        if linked and self.detached:
            return cast(Tensor, _Numbers.apply(self))
        with torch.set_grad_enabled(linked):
            return self.layer.read_weight()

    @override
    def _write(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        setting = func == cast(Any, Tensor.requires_grad).__set__
        if setting and self.detached:  # torch.utils.checkpoint gathers gradients in such tensors
            return func(*args)
        if (setting or func is Tensor.requires_grad_) and not self.detached:
            required = [*args[1:], *kwargs.values(), True][0]
            for factor in self.layer.factors().values():
                factor.requires_grad_(required)
            return None if setting else self.layer.weight
        return super()._write(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs what does not ask `__torch_function__`, below autograd."""
        if func._schema.is_mutable and isinstance(args[0], FactorisedWeight):
            raise args[0].layer.refused(_name_of(func))
        plain = tree_map(
            lambda leaf: leaf._read(linked=False) if isinstance(leaf, FactorisedWeight) else leaf, (args, kwargs or {})
        )
        return func(*plain[0], **plain[1])


class _Product(torch.autograd.Function):
    """The node between the factors and their weight, for functions that torch tells nothing of `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, layer: FactorisedLayer, *factors: Tensor) -> Tensor:
        ctx.layer, ctx.factors = layer, factors  # hooks on saved tensors would see them at each look at the dtype
        return FactorisedWeight(layer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            product = ctx.layer.read_weight()
        trained = [factor for factor in ctx.factors if factor.requires_grad]
        found = iter(torch.autograd.grad(product, trained, gradients, create_graph=again, allow_unused=True))
        return (None, *(next(found) if factor.requires_grad else None for factor in ctx.factors))


class _Numbers(torch.autograd.Function):
    """The numbers of a detached weight that gathers a gradient of its own."""

    @staticmethod
    def forward(_ctx: Any, weight: FactorisedWeight) -> Tensor:
        return weight.layer.read_weight().detach()

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def weight_of(layer: FactorisedLayer) -> Tensor:
    """Returns the weight of a factorised layer, which is multiplied out when its numbers are used."""
    if (
        "torch._dynamo" in sys.modules and _respond[0] is _answer
    ):  # compiled code that is given such a weight stops here
        _respond[0] = torch.compiler.disable(_answer)  # type: ignore[no-untyped-call]
    factors = list(layer.factors().values())
    if not any(factor.requires_grad for factor in factors):
        return FactorisedWeight(layer)
    with torch.enable_grad():  # as a Parameter requires gradients also where none are recorded
        return cast(Tensor, _Product.apply(layer, *factors))


def _answer(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns what a function gives for weights: an attribute, or its result for the numbers; writing is an error."""
    with torch._C.DisableTorchFunctionSubclass():
        if func in _ANSWERED or (func is Tensor.type and len(args) == 1 and not kwargs):
            return func(*args, **kwargs)
        if func == cast(Any, Tensor.grad).__get__:  # that of a product is kept nowhere; torch would warn
            return func(*args) if args[0].is_leaf else _without_gradient(args[0])
        weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Guarded)]
        if (target := _written(func, args, kwargs)) is not None:
            return target._write(func, args, kwargs)
        if isinstance(args[0] if args else None, FactorisedWeight):
            if func in (Tensor.detach, torch.detach, cast(Any, Tensor.data).__get__):
                return FactorisedWeight(args[0].layer, detached=True)
            if func is Tensor.__deepcopy__:
                return args[1].setdefault(id(args[0]), args[0]._read(linked=False).clone())
        return _run(func, args, kwargs, weights)


def _without_gradient(weight: Any) -> None:
    """Warns whoever asks for the gradient of a weight after its factors got theirs, as loggers of norms do."""
    factors = weight.layer.factors() if isinstance(weight, FactorisedWeight) else {}
    if any(factor.grad is not None for factor in factors.values()):
        named = ", ".join(f"layer.{name}.weight.grad" for name in factors)
        msg = (
            f"the weight of a factorised {weight.layer.dense_type} has no gradient (layer.weight.grad is None): its "
            f"factors have ({named}). Go through model.named_parameters(), which has them."
        )
        warn(msg, CompressionWarning, stacklevel=5)


_respond: list[Callable[..., Any]] = [_answer]


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], weights: Sequence[_Guarded]) -> Any:
    """Returns what a function gives for the numbers; what shares their memory is guarded too."""
    if _name_of(func) in _ALIKE:
        plain = {id(w): torch.empty((), dtype=w.dtype, device=w.device).expand(w.shape) for w in weights}
    else:
        plain = {id(w): w._read(linked=True) for w in weights}
    args, kwargs = tree_map(lambda leaf: plain[id(leaf)] if isinstance(leaf, _Guarded) else leaf, (args, kwargs))
    found = func(*args, **kwargs)
    if func is Tensor.data_ptr:
        cast(Any, weights[0])._held = plain[id(weights[0])]  # the number is good as long as the weight lives
    if isinstance(found, np.ndarray):
        found.flags.writeable = False
    memory = {place: w.layer for w in weights if (place := _memory_of(plain[id(w)])) is not None}
    return tree_map(lambda leaf: _guarded(leaf, memory), found)


def _guarded(found: Any, memory: Mapping[int, FactorisedLayer]) -> Any:
    layer = memory.get(_memory_of(found) or 0) if isinstance(found, Tensor) else None
    if layer is None:
        return found
    view = found.as_subclass(_View)
    view.layer = layer
    return view


def _memory_of(tensor: Tensor) -> int | None:
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr()


def _written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Guarded | None:
    """Returns the weight that a function would change, None if it changes none."""
    name, out = _name_of(func), tree_leaves(kwargs.get("out"))
    first = args[0] if args else next(iter(kwargs.values()), None)  # torch.nn.init passes its tensor by keyword
    changed = list(out)
    if name in _LOST or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True:
        changed += tree_leaves(first)
    if kwargs.get("max_norm") is not None:  # of torch.nn.functional.embedding: the rows it looks up are rescaled
        changed += tree_leaves((args, dict(kwargs)))
    return next((leaf for leaf in changed if isinstance(leaf, _Guarded)), None)


def _name_of(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "") or str(func)

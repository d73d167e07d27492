"""The one module class that every factorised layer is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import Self, override

from lightning_compress.core.compat import is_recorded, is_wrapped
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.kinds.base import Decomposition
from lightning_compress.kinds.registry import multiplied_out
from lightning_compress.layers.families import (
    canonical_factors,
    operator_of,
    own_layout,
    stored_factor,
    template_of,
)
from lightning_compress.layers.memory_format import channels_last_format, in_channels_last
from lightning_compress.layers.refit import refit_
from lightning_compress.layers.scripted import InOrder, scriptable
from lightning_compress.layers.weight import weight_of

_SHAPE_ATTRIBUTES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "output_padding",
    "dilation",
    "groups",
    "padding_mode",
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "nf",
    "nx",
)

ASSIGNED = "an assignment"
MATRIX = 2
"""Dimensions of a weight that has no memory format."""
HINT = "lightning_compress: "
"""How the name of an entry below a layer begins that is no tensor of it: it is for who loads a state dict elsewhere."""


class _Product(NamedTuple):
    """Factors multiplied out.

    Attributes:
        run: The dense layer's forward.
        weight: Its weight.
        factors: Of each child: its parameters, its factor, and where that lay and how often it had been written.
    """

    run: Callable[[Tensor], Tensor]
    weight: Tensor
    factors: Sequence[tuple[Mapping[str, Tensor | None], Tensor, int, int]]

    def is_current(self) -> bool:
        """Returns whether no factor has changed; on the way of every forward pass."""
        for own, factor, place, version in self.factors:
            if own.get("weight") is not factor or factor._version != version or factor.data_ptr() != place:
                return False
        return True


@scriptable
class FactorisedLayer(InOrder):
    """A dense layer's replacement: its factors as plain torch layers, applied in order.

    It is iterated and indexed as an nn.Sequential is, and is none: code that takes an nn.Sequential for a list of
    layers would call the factors one by one.

    A `merged` layer runs as the dense one in eval mode and without gradients: the factors are multiplied out once and
    the product is kept until one of them changes. In training, with gradients, compiled, traced or exported it runs by
    its factors like any other, and it is saved as such. Only what writes through `.data` in eval mode goes unnoticed.

    `weight` is read-only: it answers shape, dtype and device at once and multiplies the factors out where its numbers
    are used, for code that reads the weight of a layer; writing to it is an error, and `set_weight_` fits the factors
    to another weight. `bias` is the dense layer's own Parameter.

    Attributes:
        kind: Kind of decomposition, a key of `DECOMPOSITIONS`.
        ranks: Its ranks.
        weight_shape: Shape of the dense weight.
        dense_type: Class of the dense layer, such as "Conv2d".
        error: Predicted relative error of the plan it was made from, None if unknown.
        merged: Whether it runs as the dense layer in eval mode.
        shares_first: Whether its first factor is that of other layers, of other weights, too.
        dense_spared: Parameters and bytes that the dense layer had beside its weight to compute it from.
    """

    dense_spared: tuple[int, int] = (0, 0)

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        *,
        dense: nn.Module,
        decomposition: Decomposition,
        ranks: tuple[int, ...],
    ) -> None:
        super().__init__(children)
        self._decomposition = decomposition
        self.kind = decomposition.kind
        self.ranks = ranks
        self.weight_shape = tuple(cast(Tensor, dense.weight).shape)
        self.dense_type = type(dense).__name__
        self.error = cast("float | None", None)
        self.merged = False
        self.shares_first = False
        self._product = cast("_Product | None", None)
        self.operator = operator_of(dense)
        self._template = (template_of(dense),)  # in a tuple: no child
        for name in _SHAPE_ATTRIBUTES:
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))

    @override
    @scriptable
    def forward(self, input: Tensor) -> Tensor:
        """Returns the output."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.scripted(input)
        return self.as_written(input)

    @override
    @torch.jit.unused
    def as_written(self, input: Tensor) -> Tensor:
        if self.merged and not self.training and not torch.is_grad_enabled() and not is_recorded():
            product = self._kept_product()
            return product.run(input) if product is not None else self._by_factors(input)
        return self._by_factors(input)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(cast("dict[str, nn.Module]", self._modules).values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    def _by_factors(self, input: Tensor) -> Tensor:
        output = input
        for module in self:
            output = module(output)
        return output

    @override
    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and forgets the product of the factors."""
        self._product = None
        return super().train(mode)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._product = None
        return cast(Self, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is copied and pickled: all but the product of the factors."""
        return {**self.__dict__, "_product": None}

    @property
    def template(self) -> nn.Module:
        """The dense layer without its weight: its class and settings, on the meta device."""
        return self._template[0]

    def factors(self) -> dict[str, Tensor]:
        """Returns the weights of the child layers by name, the live Parameters.

        Raises:
            UnsupportedError: If an adapter or another wrapper was put in the place of one.
        """
        for name, child in self.named_children():
            if is_wrapper(child):
                raise UnsupportedError(self._wrapped(name, child))
        return {name: cast(Tensor, child.weight) for name, child in self.named_children()}

    def _wrapped(self, name: str, child: nn.Module) -> str:
        """Returns what there is to say where a wrapper was put in the place of a factor."""
        return (
            f"a {type(child).__module__}.{type(child).__name__} was put in the place of the factor {name!r} of a "
            f"factorised {self.dense_type} ({self.kind}, ranks {self.ranks}), so that its weight is not known: merge "
            "it into that factor first, or wrap the whole factorised layer, or keep the layer dense with exclude. The "
            "model itself runs, trains and gives its state_dict as it is."
        )

    @torch.no_grad()
    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Copies factors, as `fit_factors` returns them, into the child layers."""
        for name, child in self.named_children():
            weight = cast(Tensor, child.weight)
            weight.copy_(stored_factor(child, factors[name]).reshape(weight.shape))

    def canonical_weight(self, precision: torch.dtype | None = None) -> Tensor:
        """Returns the equivalent dense weight as (groups · out, in, *kernel), differentiable.

        Args:
            precision: In which the factors are multiplied at least, None for their own.
        """
        factors = canonical_factors(dict(self.named_children()))
        if precision is not None:
            factors = {name: f.to(torch.promote_types(f.dtype, precision)) for name, f in factors.items()}
        return multiplied_out(self._decomposition, factors, self.operator.shape, self.operator.groups)

    def dense_weight(self) -> Tensor:
        """Returns the equivalent dense weight, shape `weight_shape`, differentiable."""
        return own_layout(self.template, self.canonical_weight())

    def to_dense(self) -> nn.Module:
        """Returns the layer as a dense one again, with the factors multiplied out and the same bias.

        Factors in half precision are multiplied in single.
        """
        dense = copy.copy(self.template)
        dense.__dict__ = {name: copy.copy(value) for name, value in dense.__dict__.items()}
        factors = list(self.factors().values())
        weight = own_layout(dense, self.canonical_weight(torch.float32).detach()).to(factors[0].dtype)
        laid = any(channels_last_format(factor) is not None for factor in factors)
        weight = in_channels_last(weight) if laid else weight.contiguous()
        required = all(factor.requires_grad for factor in factors)
        dense._parameters = {**dense._parameters, "weight": nn.Parameter(weight, requires_grad=required)}
        if "bias" in dense._parameters:
            dense._parameters["bias"] = self.bias
        return dense.train(self.training)

    def _kept_product(self) -> _Product | None:
        """Returns the factors as they are now multiplied out, kept until they change; None if nobody would notice."""
        product = self._product
        if product is None or not product.is_current():
            if any(map(is_wrapper, self.children())):
                return None
            factors = [(child._parameters, cast(Tensor, child.weight)) for child in self.children()]
            if any(factor.is_inference() or is_wrapped(factor) for _, factor in factors):
                return None  # these do not count how often they are written
            states = [(own, factor, factor.data_ptr(), factor._version) for own, factor in factors]
            # whoever counts or watches a forward pass: this is none; and it outlives autocast and inference mode
            with _disable_current_modes(), torch.inference_mode(mode=False), torch.no_grad(), self._own_precision():
                dense = self.to_dense()
                cast(nn.Parameter, dense.weight).requires_grad_(False)  # the bias is the layer's own
                weight = cast(Tensor, dense.weight).detach()
            product = self._product = _Product(dense.forward, weight, states)
        return product

    def _own_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Computes in the dtype of the factors, autocast or not: a weight is in that dtype too."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, enabled=False) if is_autocast_available(device) else contextlib.nullcontext()

    def read_weight(self) -> Tensor:
        """Returns the equivalent dense weight as a plain tensor, laid as `memory_format` says.

        In eval mode without gradients it is multiplied out once and kept until a factor changes. It must not be
        written to.
        """
        product = None
        if not self.training and not torch.is_grad_enabled() and not is_recorded():
            product = self._kept_product()
        if product is not None:
            return product.weight
        with self._own_precision():
            weight = self.dense_weight()
        return weight.contiguous() if self.memory_format == torch.contiguous_format else in_channels_last(weight)

    @property
    def memory_format(self) -> torch.memory_format:
        """That of the weight: channels-last if a factor is in it."""
        found = (channels_last_format(factor) for factor in self.factors().values() if factor.ndim > MATRIX)
        last = next((form for form in found if form is not None), None)
        return last if last is not None and len(self.weight_shape) > MATRIX else torch.contiguous_format

    @property
    def weight(self) -> Tensor:
        """The equivalent dense weight: multiplied out when its numbers are used, see `read_weight`."""
        plain = all(type(factor) in {Tensor, nn.Parameter} for factor in self.factors().values())
        return weight_of(self) if plain and not is_recorded() else self.dense_weight()

    def set_weight_(self, weight: Tensor) -> None:
        """Fits the factors to a dense weight, in place, in the layer's kind and ranks.

        What the factors cannot hold of it is lost; `weight` then is what they hold. Layers with the same factors (an
        embedding and an output layer of one weight) change with it; a first factor that serves other weights stays.

        Args:
            weight: Of shape `weight_shape`, any floating-point dtype, any device.

        Raises:
            ConfigurationError: If it is no such tensor.
            NonFiniteWeightError: If it holds NaN or infinite values.
        """
        refit_(self, weight)

    def refused(self, what: str) -> UnsupportedError:
        """Returns the error of something that would change the weight, which is none of the layer's own."""
        return UnsupportedError(
            f"{what} on the weight of a factorised {self.dense_type} ({self.kind}, ranks {self.ranks}, weight "
            f"{self.weight_shape}): the layer holds factors, the weight is their product, and what is done to it would "
            "be lost. Keep the layer dense with exclude, write by layer.set_weight_(weight), which refits the factors, "
            "or work on a copy, layer.weight.clone(). A batch norm behind the layer is fused into its last factor: "
            "torch's fuse_conv_bn_eval(layer[-1], norm)."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise self.refused(ASSIGNED)
        if name == "bias":
            setattr(self[-1], name, value)
        else:
            super().__setattr__(name, value)

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter that is not the weight.

        Raises:
            UnsupportedError: If it is.
        """
        if name == "weight":
            raise self.refused(ASSIGNED)
        super().register_parameter(name, param)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix + HINT)]:
            del state_dict[name]  # torch hands every module a dictionary of its own
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense layer's bias, held by the last factor."""
        return cast("nn.Parameter | None", getattr(self[-1], "bias", None))

    @override
    def extra_repr(self) -> str:
        """Returns kind and ranks for `print(model)`."""
        return f"kind={self.kind}, ranks={self.ranks}"


def is_wrapper(child: nn.Module) -> bool:
    """Returns whether a child of a factorised layer is none of its factors: a weight that it has is that of another."""
    return not ("weight" in child._parameters or "weight" in vars(child) or hasattr(child, "parametrizations"))

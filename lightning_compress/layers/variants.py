"""Factorised layers that are called with more than one input, or do something around their operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from typing_extensions import Self, override

from lightning_compress.core.compat import is_recorded
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.kinds.base import Decomposition
from lightning_compress.kinds.tensorised import TtEmbedding
from lightning_compress.layers.adapter import LayerAdapter
from lightning_compress.layers.adapters import adapter_of
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.scripted import Unscriptable


class FactorisedTransposed(Unscriptable, FactorisedLayer):
    """Replaces a transposed convolution, which may be told the size of its output."""

    @override
    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Returns the output.

        Raises:
            UnsupportedError: If the size of the output is given.
        """
        if output_size is not None:
            msg = (
                f"a factorised {self.dense_type} cannot be called with output_size={output_size}: keep the layer dense "
                "with exclude, or pass an example_input to the search, which then keeps it."
            )
            raise UnsupportedError(msg)
        return super().forward(input)


class FactorisedBag(Unscriptable, FactorisedLayer):
    """Replaces an nn.EmbeddingBag, which takes more than one argument."""

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the bags; arguments are those of nn.EmbeddingBag."""
        first, *others = self
        output = first(input, *args, **kwargs)
        for module in others:
            output = module(output)
        return cast(Tensor, output)


class FactorisedLookup(Unscriptable, FactorisedLayer):
    """Replaces an nn.Embedding by cores that each look up their own part of the index."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Returns the rows, (…, embedding_dim); those of the padding index pass no gradient, as those of nn.Embedding.

        An index beyond the last row is not always noticed: the cores have room for a few more.
        """
        output: Tensor | None = None
        for core in self:
            output = core(input, output)
        rows = cast(Tensor, output)
        padding = getattr(self, "padding_idx", None)
        return rows if padding is None else torch.where((input == padding)[..., None], rows.detach(), rows)


class FactorisedAdapted(FactorisedLayer):
    """Replaces a layer with something before or after its operation, see `LayerAdapter`; it is called as that is."""

    _adapter: LayerAdapter

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output."""
        if self.merged and not self.training and not torch.is_grad_enabled() and not is_recorded():
            product = self._kept_product()
            if product is not None:
                return cast(Callable[..., Tensor], product.run)(*args, **kwargs)
        output = self._by_factors(self._adapter.entering(self.template, args, kwargs))
        return self._adapter.leaving(self.template, output)

    def __prepare_scriptable__(self) -> nn.Module:
        """Is asked by torch.jit.script what to compile.

        Raises:
            UnsupportedError: Always: what an adapter does is code that TorchScript knows nothing of.
        """
        msg = (
            f"torch.jit.script cannot compile a factorised {self.dense_type}, which does something before or after its "
            "factors: use torch.jit.trace or torch.export, or compress with exclude."
        )
        raise UnsupportedError(msg)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and converts also what the adapter reads."""
        for part in self.template.modules():
            part._buffers = {name: None if b is None else fn(b) for name, b in part._buffers.items()}
        return super()._apply(fn, recurse)


def make_factorised(
    children: dict[str, nn.Module], *, dense: nn.Module, decomposition: Decomposition, ranks: tuple[int, ...]
) -> FactorisedLayer:
    """Returns the factorised layer of some children, of the class that its dense layer needs."""
    adapter = adapter_of(dense)
    if adapter is None or not adapter.surrounds:
        cls = _type_of(dense, decomposition)
        return cls(children, dense=dense, decomposition=decomposition, ranks=ranks)
    layer = FactorisedAdapted(children, dense=dense, decomposition=decomposition, ranks=ranks)
    layer._adapter = adapter
    for name in adapter.settings:
        if not isinstance(value := getattr(dense, name), (nn.Module, Tensor)):
            setattr(layer, name, value)
    return layer


def _type_of(dense: nn.Module, decomposition: Decomposition) -> type[FactorisedLayer]:
    if isinstance(decomposition, TtEmbedding):
        return FactorisedLookup
    if isinstance(dense, nn.EmbeddingBag):
        return FactorisedBag
    return FactorisedTransposed if isinstance(dense, _ConvTransposeNd) else FactorisedLayer

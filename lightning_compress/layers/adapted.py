"""Factorised layers with something before or after their operation, see `LayerAdapter`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_compress.core.compat import is_recorded
from lightning_compress.kinds.base import Decomposition
from lightning_compress.layers.adapter import LayerAdapter
from lightning_compress.layers.adapters import adapter_of
from lightning_compress.layers.factorised import FactorisedLayer, factorised_type


class FactorisedAdapted(FactorisedLayer):
    """Replaces a layer whose adapter does something before or after its operation; it is called as that layer is."""

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
        cls = factorised_type(dense, decomposition)
        return cls(children, dense=dense, decomposition=decomposition, ranks=ranks)
    layer = FactorisedAdapted(children, dense=dense, decomposition=decomposition, ranks=ranks)
    layer._adapter = adapter
    for name in adapter.settings:
        if not isinstance(value := getattr(dense, name), (nn.Module, Tensor)):
            setattr(layer, name, value)
    return layer

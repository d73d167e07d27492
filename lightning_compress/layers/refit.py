"""A dense weight written into a factorised layer: its factors are fitted to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError, NonFiniteWeightError
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.registry import fit_factors
from lightning_compress.layers.families import canonical, canonical_factors

if TYPE_CHECKING:
    from lightning_compress.layers.factorised import FactorisedLayer


@torch.no_grad()
def refit_(layer: FactorisedLayer, weight: Tensor) -> None:
    """Fits the factors of a layer to a dense weight, in place; see `FactorisedLayer.set_weight_`."""
    _require_weight(layer, weight)
    whole = canonical(layer.template, weight).detach().to("cpu", torch.float64)
    with threads_for(whole):
        if layer.shares_first:
            first, last = canonical_factors(dict(layer.named_children())).items()
            kept = first[1].detach().to("cpu", torch.float64)
            solved = torch.linalg.lstsq(kept.T, whole.T, driver="gelsd").solution
            factors = {first[0]: kept, last[0]: solved.T}
        else:
            factors = fit_factors(layer.kind, whole, layer.ranks, None, layer.operator.groups)
    layer.load_factors(factors)
    padding = getattr(layer, "padding_idx", None)
    for child in layer:
        table = isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        if table and padding is not None and not bool(weight[padding].any()):  # to the last bit
            cast(Tensor, child.weight)[padding] = 0


def _require_weight(layer: FactorisedLayer, weight: Any) -> None:
    if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.weight_shape:
        given = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        msg = f"set_weight_: expected the dense weight, a tensor of shape {layer.weight_shape}, got {given}."
        raise ConfigurationError(msg)
    if weight.is_meta or not weight.is_floating_point():
        what = "on the meta device, without values" if weight.is_meta else f"of {weight.dtype}"
        msg = f"set_weight_: expected a weight of floating-point numbers, got one {what}."
        raise ConfigurationError(msg)
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        msg = f"set_weight_: the weight holds {bad} NaN or infinite values of {weight.numel()}."
        raise NonFiniteWeightError(msg)

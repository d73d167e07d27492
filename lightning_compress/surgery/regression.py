"""Regression of factors to the dense layer's outputs in closed form, a step of the repair.

Layer by layer, in forward order, the factors are refitted so that the compressed network's own activations reproduce
the dense layer's outputs: reduced-rank regression min ‖G^½ (W X − M X̂)‖ over M of the layer's kind and ranks, where X
enters the layer in the dense and X̂ in the already repaired compressed network, and the bias takes care of the means
(the asymmetric reconstruction of Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks", section 3.3, with
the data replaced by synthetic inputs and in the metric G of the model's outputs, see `Moments`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.enough import is_small, positions_of
from lightning_compress.analysis.trace import Arguments, hooked, inference
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import fit_factors
from lightning_compress.layers.adapters import entering
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import canonical, canonical_factors, family_of
from lightning_compress.surgery.swap import Replacement

RIDGE = 1e-3
"""Relative ridge of the regression: synthetic inputs leave some directions almost unseen."""


@torch.no_grad()
def refit_(
    dense: nn.Module,
    model: nn.Module,
    replacement: Replacement,
    batches: Sequence[Arguments],
    *,
    metric: Metric | None,
    calls: int,
) -> None:
    """Refits one layer to its dense one's outputs over its `calls` calls per batch."""
    layer, new = dense.get_submodule(replacement.aliases[0]), replacement.factorised
    operator = new.operator
    if operator.lookup or not is_small(operator):  # inputs are the same in both models, or too long
        return
    weight = canonical(layer, cast(Tensor, layer.weight)).detach().double().cpu()
    weight = weight.reshape(operator.groups, -1, weight[0].numel())  # (groups, out, D)
    moments = _joint_moments((dense, layer), (model, new), batches, calls)
    if moments is None:
        return
    gram, cross, total = moments.gram, moments.cross, _trace(moments.gram)
    if new.bias is not None:  # the bias takes care of the means
        gram = gram - moments.mean_new[:, :, None] * moments.mean_new[:, None, :]
        cross = cross - moments.mean_new[:, :, None] * moments.mean_dense[:, None, :]
    if not bool((_trace(gram) > total * torch.finfo(torch.float32).eps).all()):  # inputs that never vary say nothing
        return
    size = weight.shape[2]
    ridge = RIDGE * (_trace(gram) / size)[:, None, None] * torch.eye(size, dtype=torch.float64)
    with threads_for(weight):
        target = torch.linalg.solve(gram + ridge, (cross + ridge) @ weight.mT).mT  # (groups, out, D)
        outputs = metric.outputs if metric is not None else None
        here = Metric(*((gram + ridge, outputs) if operator.groups > 1 else ((gram + ridge)[0], outputs)))
        whole = target.reshape(-1, *operator.shape[1:])
        start = {
            name: factor.detach().double().cpu()
            for name, factor in canonical_factors(dict(new.named_children())).items()
        }
        new.load_factors(fit_factors(new.kind, whole, new.ranks, here, operator.groups, start=start))
    if new.bias is not None and layer.bias is not None:
        fitted = new.canonical_weight().double().cpu().reshape(weight.shape)
        shift = (weight @ moments.mean_dense[:, :, None] - fitted @ moments.mean_new[:, :, None]).flatten()
        new.bias.copy_((cast(Tensor, layer.bias).double().cpu() + shift).to(new.bias))


@dataclass(frozen=True)
class _Moments:
    """Of what enters a layer in the dense model, x, and in the compressed one, x̂, float64 on the CPU.

    Attributes:
        gram: E[x̂ x̂ᵀ], (groups, D, D).
        cross: E[x̂ xᵀ], (groups, D, D).
        mean_new: E[x̂], (groups, D).
        mean_dense: E[x], (groups, D).
    """

    gram: Tensor
    cross: Tensor
    mean_new: Tensor
    mean_dense: Tensor


def _joint_moments(
    dense: tuple[nn.Module, nn.Module],
    compressed: tuple[nn.Module, FactorisedLayer],
    batches: Sequence[Arguments],
    calls: int,
) -> _Moments | None:
    """Returns the moments of what enters a layer of either model, None where the two do not call it alike."""
    (_, layer), (_, new) = dense, compressed
    family, operator = family_of(layer), new.operator
    size = math.prod(operator.shape[1:])
    gram, cross = (torch.zeros(operator.groups, size, size, dtype=torch.float64) for _ in range(2))
    mean_new, mean_dense, count = torch.zeros_like(gram[:, 0]), torch.zeros_like(gram[:, 0]), 0
    for arguments in batches:
        inputs = _inputs_of(*dense, arguments, calls), _inputs_of(*compressed, arguments, calls)
        if not inputs[0] or len(inputs[0]) != len(inputs[1]):
            return None
        rows_dense, rows_new = (
            torch.cat([cast(Tensor, family.rows(layer, value, positions_of(size))) for value in values], dim=1).float()
            for values in inputs
        )
        if rows_dense.shape != rows_new.shape:  # values decide what enters it
            return None
        gram += (rows_new.mT @ rows_new).double().cpu()
        cross += (rows_new.mT @ rows_dense).double().cpu()
        mean_new += rows_new.sum(1).double().cpu()
        mean_dense += rows_dense.sum(1).double().cpu()
        count += rows_new.shape[1]
    return _Moments(gram / count, cross / count, mean_new / count, mean_dense / count)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def in_forward_order(
    model: nn.Module, replacements: Sequence[Replacement], arguments: Arguments
) -> list[tuple[Replacement, int]]:
    """Returns the factorised layers by their first call, those never called last, each with the number of its calls."""
    called: dict[int, int] = {}

    def note(module: nn.Module, _args: Any) -> None:
        called[id(module)] = called.get(id(module), 0) + 1

    with hooked(r.factorised.register_forward_pre_hook(note) for r in replacements), inference(model):
        model(*arguments[0], **arguments[1])
    order = {key: place for place, key in enumerate(called)}
    ordered = sorted(replacements, key=lambda r: order.get(id(r.factorised), len(order)))
    return [(replacement, called.get(id(replacement.factorised), 0)) for replacement in ordered]


def shares_factors(replacement: Replacement, others: Sequence[Replacement]) -> bool:
    """Returns whether another layer is made of the same factors, so that refitting one would change both."""
    own = {id(factor) for factor in replacement.factorised.factors().values()}
    return any(
        other is not replacement and own & {id(factor) for factor in other.factorised.factors().values()}
        for other in others
    )


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass at the layer of interest."""


def _inputs_of(model: nn.Module, layer: nn.Module, arguments: Arguments, calls: int) -> list[Tensor]:
    """Returns what enters a layer in its first calls; the model is not run any further."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = module.template if isinstance(module, FactorisedLayer) else module
        found.append(entering(module, args, kwargs))
        if len(found) >= calls:
            raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([hook]), inference(model), contextlib.suppress(_Reached):
        model(*arguments[0], **arguments[1])
    return found

"""Builds what comes in: a factorised layer, layers that share their first factor, a layer of a tied weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.plan import LayerPlan
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.joint_svd import joint_factors
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, Decomposition, fit_factors
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import children_of, operator_of, stored_factor
from lightning_compress.layers.folding import SPARED, spared_by, type_name
from lightning_compress.layers.hooks import share_hooks
from lightning_compress.layers.memory_format import channels_last_format, in_channels_last
from lightning_compress.layers.transposed import TransposedLinear
from lightning_compress.layers.variants import make_factorised


def build_layer(
    layer: Layer, planned: LayerPlan, metric: Metric | None, *, decompose: bool, channels_last: bool = False
) -> FactorisedLayer:
    """Returns the factorised layer of a planned one.

    Args:
        layer: The dense layer.
        planned: Its kind and ranks.
        metric: In which the factors are fitted, None for the weights alone.
        decompose: Whether to compute the factors; else they are zeros.
        channels_last: Whether factors are put in that format; else they are in that of the weight.
    """
    dense, weight = layer.plain, cast(nn.Parameter, layer.weight)
    decomposition = DECOMPOSITIONS[planned.kind]
    children = children_of(decomposition, dense, planned.ranks)
    factors: dict[str, Tensor] = {}
    if decompose:
        with threads_for(weight):
            whole = layer.double_weight()
            factors = fit_factors(planned.kind, whole, planned.ranks, metric, layer.operator.groups)
    padding = getattr(dense, "padding_idx", None)
    for name, child in children.items():
        shape = cast(Tensor, child.weight).shape
        value = stored_factor(child, factors[name]).reshape(shape) if decompose else torch.zeros(shape)
        value = _like(value, weight)
        value = in_channels_last(value) if channels_last else value
        child.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
        for key, buffer in child.named_buffers():
            child.register_buffer(key, buffer.to(weight.device))
        table = isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        if decompose and table and padding is not None and not bool(weight[padding].any()):  # to the last bit
            child.weight.detach()[padding] = 0
    return _finished(children, dense, decomposition, planned)


def build_joint_layers(
    group: Sequence[tuple[Layer, LayerPlan]], metrics: Sequence[Metric | None], *, decompose: bool
) -> list[FactorisedLayer]:
    """Returns the factorised layers that share their first factor, in the order of the group; see `build_layer`."""
    layers, (rank,) = [layer for layer, _ in group], group[0][1].ranks
    decomposition = DECOMPOSITIONS[group[0][1].kind]
    if decompose:
        with threads_for(layers[0].weight):
            weights = [layer.double_weight() for layer in layers]
            reduce, expand = joint_factors(weights, metrics, rank)
    else:
        reduce = torch.zeros(rank, layers[0].weight_shape[1])
        expand = [torch.zeros(layer.weight_shape[0], rank) for layer in layers]
    trained = any(layer.weight.requires_grad for layer in layers)
    first = nn.Parameter(_like(reduce, layers[0].weight), requires_grad=trained)
    built = []
    for (layer, planned), values in zip(group, expand, strict=True):
        children = children_of(decomposition, layer.plain, planned.ranks)
        children["reduce"].register_parameter("weight", first)
        own = nn.Parameter(_like(values, layer.weight), requires_grad=layer.weight.requires_grad)
        children["expand"].register_parameter("weight", own)
        new = _finished(children, layer.plain, decomposition, planned)
        new.shares_first = len(group) > 1
        built.append(new)
    return built


def build_tied_layer(dense: nn.Module, other: FactorisedLayer) -> FactorisedLayer:
    """Returns the factorised layer of a module with the weight of another one: of the other's Parameters."""
    decomposition = DECOMPOSITIONS[other.kind]
    children = children_of(decomposition, dense, other.ranks)
    twins = list(children)
    flipped = operator_of(dense).lookup != other.operator.lookup  # the one's weight is the other's transposed
    if flipped:
        twins.reverse()
    for name, twin in zip(children, twins, strict=True):
        weight = other.factors()[twin]
        # the table of an embedding lies as the weight of nn.Linear; shapes cannot tell, square at full rank
        if flipped and isinstance(children[name], nn.Linear) and isinstance(other.get_submodule(twin), nn.Linear):
            children[name] = TransposedLinear(*weight.shape)
        children[name].register_parameter("weight", cast(nn.Parameter, weight))
    return _finished(children, dense, decomposition, other)


def _finished(
    children: dict[str, nn.Module],
    dense: nn.Module,
    decomposition: Decomposition,
    like: LayerPlan | FactorisedLayer,
) -> FactorisedLayer:
    """Returns the layer of some children, with bias, hooks and mode of the dense one, and ranks as planned."""
    if "bias" in dense._parameters:
        last = children[list(children)[-1]]
        last.register_parameter("bias", cast("nn.Parameter | None", dense.bias))
    new = make_factorised(children, dense=dense, decomposition=decomposition, ranks=like.ranks)
    new.dense_type, new.dense_spared = type_name(dense), spared_by(dense)
    new.template.__dict__.pop(SPARED, None)  # multiplied out it has nothing beside its weight
    new.error, new.merged = like.error, like.merged
    share_hooks(dense, new)
    return new.train(dense.training)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """Returns the value in the weight's dtype, device and memory format."""
    value = value.to(weight.device, weight.dtype)
    return in_channels_last(value) if channels_last_format(weight) is not None else value.contiguous()

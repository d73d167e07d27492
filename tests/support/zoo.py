"""One tiny layer of every type that can be factorised, and every kind that fits it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import FactorisedLayer, apply_plan_
from lightning_compress.core.costs import Costs
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.kinds.registry import AUTOMATIC, DECOMPOSITIONS
from lightning_compress.layers.families import operator_of


class Conv1D(nn.Module):
    """Like the layer of that name in transformers: a linear layer with the weight (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.2)

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


KIND_SHAPES = {"svd": (12, 7), "channel_svd": (8, 6, 3, 3), "spatial_svd": (8, 6, 3, 2), "tucker2": (8, 6, 3, 3)}
"""Of a weight for every kind whose planned error is that of the factors."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_metric(size: int, seed: int = 0, condition: float = 1e3) -> Tensor:
    basis, _ = torch.linalg.qr(normal(size, size, seed=seed))
    return (basis * torch.logspace(0, np.log10(condition), size, dtype=torch.float64)) @ basis.T


def error_in(metric: Tensor, weight: Tensor, product: Tensor) -> float:
    lost, flat = (weight - product).flatten(1), weight.flatten(1)
    return float(((lost @ metric) * lost).sum() / ((flat @ metric) * flat).sum())


def error_of(kind: str, weight: Tensor, factors: dict[str, Tensor], metric: Tensor | None = None) -> float:
    """The relative squared error of factors, in second moments of the inputs."""
    metric = torch.eye(weight[0].numel(), dtype=torch.float64) if metric is None else metric
    return error_in(metric, weight, DECOMPOSITIONS[kind].dense_weight(factors, tuple(weight.shape)))


def randomised(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64 with standard normal parameters; the row of a padding index stays zero."""
    layer = layer.double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + index))
        if getattr(layer, "padding_idx", None) is not None:
            layer.weight[layer.padding_idx] = 0
    return layer


def tokens() -> Tensor:
    return torch.tensor([[3, 0, 7, 7, 2], [1, 8, 0, 0, 11]])


def bags() -> tuple[Tensor, Tensor]:
    return torch.tensor([3, 0, 7, 7, 2, 1, 8]), torch.tensor([0, 3, 5])


@dataclass(frozen=True)
class Example:
    """A layer and arguments of one call, in float64."""

    make: Callable[[], nn.Module]
    call: Callable[[], tuple[Any, ...]]

    def layer(self, seed: int = 0) -> nn.Module:
        return randomised(self.make(), seed)


LAYERS: dict[str, Example] = {
    "Linear": Example(lambda: nn.Linear(8, 6), lambda: (normal(2, 3, 8, seed=9),)),
    "Conv1D": Example(lambda: Conv1D(6, 8), lambda: (normal(2, 3, 8, seed=9),)),
    "Embedding": Example(lambda: nn.Embedding(12, 6, padding_idx=0), lambda: (tokens(),)),
    "Embedding large": Example(lambda: nn.Embedding(1030, 64, padding_idx=0), lambda: (tokens() * 90,)),
    "EmbeddingBag": Example(lambda: nn.EmbeddingBag(12, 6, mode="sum", padding_idx=0), bags),
    "EmbeddingBag mean": Example(lambda: nn.EmbeddingBag(12, 6), bags),
    "Conv1d": Example(lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), lambda: (normal(2, 8, 9, seed=9),)),
    "Conv2d": Example(
        lambda: nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(1, 2)), lambda: (normal(2, 8, 7, 6, seed=9),)
    ),
    "Conv2d 1x1": Example(lambda: nn.Conv2d(8, 6, 1), lambda: (normal(2, 8, 4, 3, seed=9),)),
    "Conv2d grouped": Example(
        lambda: nn.Conv2d(16, 12, 3, padding="same", groups=2, bias=False), lambda: (normal(2, 16, 5, 4, seed=9),)
    ),
    "Conv3d": Example(
        lambda: nn.Conv3d(8, 6, 3, stride=(1, 2, 1), padding=1), lambda: (normal(2, 8, 4, 5, 3, seed=9),)
    ),
    "ConvTranspose1d": Example(
        lambda: nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1), lambda: (normal(2, 8, 5, seed=9),)
    ),
    "ConvTranspose2d": Example(
        lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        lambda: (normal(2, 8, 4, 3, seed=9),),
    ),
    "ConvTranspose2d grouped": Example(
        lambda: nn.ConvTranspose2d(16, 12, 2, stride=2, groups=2), lambda: (normal(2, 16, 3, 4, seed=9),)
    ),
    "ConvTranspose3d": Example(lambda: nn.ConvTranspose3d(8, 6, 2, stride=2), lambda: (normal(2, 8, 3, 2, 2, seed=9),)),
}


def kinds_for(layer: nn.Module) -> list[str]:
    """Every kind of the package that fits the layer."""
    return [kind for kind in AUTOMATIC if DECOMPOSITIONS[kind].unsupported(operator_of(layer)) is None]


def fitting() -> list[Any]:
    """Every (type, kind) that fit each other, as parameters of a test."""
    return [
        pytest.param(name, kind, id=f"{name.replace(' ', '-')}-{kind}")
        for name, example in LAYERS.items()
        for kind in kinds_for(example.make())
    ]


def plan_for(layer: nn.Module, kind: str, ranks: tuple[int, ...], name: str = "0") -> Plan:
    costs = Costs(1, None, 4)
    planned = LayerPlan(name, type(layer).__name__, kind, ranks, tuple(layer.weight.shape), 0.0, 1, 1)
    return Plan((planned,), costs, costs)


def full_ranks(layer: nn.Module, kind: str) -> tuple[int, ...]:
    return DECOMPOSITIONS[kind].max_ranks(operator_of(layer).shape)


def low_ranks(layer: nn.Module, kind: str) -> tuple[int, ...]:
    return tuple(max(1, rank // 2) for rank in full_ranks(layer, kind))


def factorised(layer: nn.Module, kind: str, ranks: tuple[int, ...] | None = None) -> FactorisedLayer:
    """The layer's replacement, of low ranks if none are given; the layer itself is left alone."""
    model = nn.Sequential(copy.deepcopy(layer))
    apply_plan_(model, plan_for(layer, kind, ranks or low_ranks(layer, kind)))
    return model[0]


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of a dense layer with another weight."""
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(weight.detach().clone())
    return other

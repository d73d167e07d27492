"""Plans made by hand."""

from __future__ import annotations

import dataclasses

from lightning_compress import LayerPlan, Plan
from lightning_compress.core.costs import Costs

RANKS = {"conv1": ("tucker2", (4, 2)), "conv2": ("spatial_svd", (5,)), "point": ("svd", (3,)), "fc1": ("svd", (4,))}


def plan_for(model, chosen=RANKS):
    layers = []
    for name, (kind, ranks) in chosen.items():
        module = model.get_submodule(name)
        shape = tuple(module.weight.shape)
        layers.append(LayerPlan(name, type(module).__name__, kind, tuple(ranks), shape, 0.5, 10, 5))
    costs = Costs(1, None, 4)
    return Plan(tuple(layers), costs, costs)


def tampered(plan, index, **fields):
    layers = list(plan.layers)
    layers[index] = dataclasses.replace(layers[index], **fields)
    return dataclasses.replace(plan, layers=tuple(layers))

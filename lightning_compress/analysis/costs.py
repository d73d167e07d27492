"""Measures what a model costs: parameters, MACs, bytes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_compress.analysis.trace import ExampleInput, trace
from lightning_compress.core.costs import Costs
from lightning_compress.layers.folding import spared_by


def measure_costs(model: nn.Module, example_input: ExampleInput | None = None, *, macs: int | None = None) -> Costs:
    """Returns the model's costs; MACs from `macs` if known, else from a forward pass if possible.

    Raises:
        ExampleInputError: If an example input is given and the model fails on it.
    """
    if macs is None and example_input is not None:
        macs = trace(model, example_input).macs
    spared = [spared_by(module) for module in model.modules()]
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return Costs(
        params=sum(p.numel() for p in model.parameters()) + sum(params for params, _ in spared),
        macs=macs,
        bytes=sum(t.numel() * t.element_size() for t in stored.values()) + sum(size for _, size in spared),
    )

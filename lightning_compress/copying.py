"""A deep copy of a module for its own sake."""

from __future__ import annotations

import copy

from torch import nn


def detached_copy(module: nn.Module) -> nn.Module:
    """Deep-copies a module; of a LightningModule, without the trainer it is attached to."""
    attached = {m: m.__dict__["_trainer"] for m in module.modules() if m.__dict__.get("_trainer") is not None}
    try:
        for m in attached:
            m.__dict__["_trainer"] = None
        return copy.deepcopy(module)
    finally:
        for m, trainer in attached.items():
            m.__dict__["_trainer"] = trainer

"""A deep copy of a module for its own sake, and a digest of tensors by which copies are told apart."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.compat import TRAINER_ATTRIBUTE


def detached_copy(module: nn.Module) -> nn.Module:
    """Deep-copies a module; of a LightningModule, without the trainer it is attached to."""
    attached = {
        m: m.__dict__[TRAINER_ATTRIBUTE] for m in module.modules() if m.__dict__.get(TRAINER_ATTRIBUTE) is not None
    }
    try:
        for m in attached:
            m.__dict__[TRAINER_ATTRIBUTE] = None
        return copy.deepcopy(module)
    finally:
        for m, trainer in attached.items():
            m.__dict__[TRAINER_ATTRIBUTE] = trainer


def digest_of(named: Iterable[tuple[str, Any]]) -> str:
    """Returns a SHA-256 over names and the values of those that are tensors."""
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

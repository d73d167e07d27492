"""Smaller and faster networks by tensor decomposition, inside PyTorch Lightning.

    from lightning_compress import Budget, Compress

    trainer = L.Trainer(max_epochs=10, callbacks=[Compress(Budget(params=0.2))])
    trainer.fit(model, datamodule)

The public names are imported on first use, so importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.callback import Compress
    from lightning_compress.checkpoint import CompressedCheckpointMixin, load_compressed_checkpoint
    from lightning_compress.compression import compress_
    from lightning_compress.config import Budget, Distill, Override, Phase, Plateau, Schedule
    from lightning_compress.decompositions import FactorisedLayer
    from lightning_compress.errors import LightningCompressError
    from lightning_compress.export import load_compressed, save_compressed
    from lightning_compress.merge import merge_
    from lightning_compress.plan import LayerPlan, Plan
    from lightning_compress.search import search_ranks
    from lightning_compress.swap import apply_plan_

__version__ = "0.1.0"

_HOMES = {
    "Budget": "config",
    "Compress": "callback",
    "CompressedCheckpointMixin": "checkpoint",
    "Distill": "config",
    "FactorisedLayer": "decompositions",
    "LayerPlan": "plan",
    "LightningCompressError": "errors",
    "Override": "config",
    "Phase": "config",
    "Plan": "plan",
    "Plateau": "config",
    "Schedule": "config",
    "apply_plan_": "swap",
    "compress_": "compression",
    "load_compressed": "export",
    "load_compressed_checkpoint": "checkpoint",
    "merge_": "merge",
    "save_compressed": "export",
    "search_ranks": "search",
}

__all__ = [
    "Budget",
    "Compress",
    "CompressedCheckpointMixin",
    "Distill",
    "FactorisedLayer",
    "LayerPlan",
    "LightningCompressError",
    "Override",
    "Phase",
    "Plan",
    "Plateau",
    "Schedule",
    "apply_plan_",
    "compress_",
    "load_compressed",
    "load_compressed_checkpoint",
    "merge_",
    "save_compressed",
    "search_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

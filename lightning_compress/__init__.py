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
    from lightning_compress.analysis.latency.table import LatencyTable
    from lightning_compress.compress import compress_
    from lightning_compress.core.errors import LightningCompressError
    from lightning_compress.core.fine_tuning import Distill, Phase, Plateau, Schedule
    from lightning_compress.core.plan import LayerPlan, Plan
    from lightning_compress.core.settings import Budget, Override
    from lightning_compress.core.target import Target
    from lightning_compress.export.api import Exported, export_model
    from lightning_compress.export.running import load_exported
    from lightning_compress.layers.adapter import LayerAdapter
    from lightning_compress.layers.adapters import register_layer_adapter
    from lightning_compress.layers.factorised import FactorisedLayer
    from lightning_compress.on_disk.api import compress_checkpoint
    from lightning_compress.search.api import search_ranks
    from lightning_compress.surgery.merge import merge_
    from lightning_compress.surgery.pretrained import load_pretrained
    from lightning_compress.surgery.save import load_compressed, save_compressed
    from lightning_compress.surgery.swap import apply_plan_
    from lightning_compress.training.callback import Compress
    from lightning_compress.training.checkpoint import CompressedCheckpointMixin, load_compressed_checkpoint
    from lightning_compress.training.metrics import CompressionRatio, RelativeError, TeacherAgreement

__version__ = "0.1.0"

_HOMES = {
    "Budget": "core.settings",
    "Compress": "training.callback",
    "CompressedCheckpointMixin": "training.checkpoint",
    "CompressionRatio": "training.metrics",
    "Distill": "core.fine_tuning",
    "Exported": "export.api",
    "FactorisedLayer": "layers.factorised",
    "LatencyTable": "analysis.latency.table",
    "LayerAdapter": "layers.adapter",
    "LayerPlan": "core.plan",
    "LightningCompressError": "core.errors",
    "Override": "core.settings",
    "Phase": "core.fine_tuning",
    "Plan": "core.plan",
    "Plateau": "core.fine_tuning",
    "RelativeError": "training.metrics",
    "Schedule": "core.fine_tuning",
    "Target": "core.target",
    "TeacherAgreement": "training.metrics",
    "apply_plan_": "surgery.swap",
    "compress_": "compress",
    "compress_checkpoint": "on_disk.api",
    "export_model": "export.api",
    "load_compressed": "surgery.save",
    "load_compressed_checkpoint": "training.checkpoint",
    "load_exported": "export.running",
    "load_pretrained": "surgery.pretrained",
    "merge_": "surgery.merge",
    "register_layer_adapter": "layers.adapters",
    "save_compressed": "surgery.save",
    "search_ranks": "search.api",
}

__all__ = [
    "Budget",
    "Compress",
    "CompressedCheckpointMixin",
    "CompressionRatio",
    "Distill",
    "Exported",
    "FactorisedLayer",
    "LatencyTable",
    "LayerAdapter",
    "LayerPlan",
    "LightningCompressError",
    "Override",
    "Phase",
    "Plan",
    "Plateau",
    "RelativeError",
    "Schedule",
    "Target",
    "TeacherAgreement",
    "apply_plan_",
    "compress_",
    "compress_checkpoint",
    "export_model",
    "load_compressed",
    "load_compressed_checkpoint",
    "load_exported",
    "load_pretrained",
    "merge_",
    "register_layer_adapter",
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

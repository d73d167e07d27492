"""Models that do not fit into memory: their checkpoints are compressed layer by layer, on disk."""

from lightning_compress.on_disk.api import compress_checkpoint

__all__ = ["compress_checkpoint"]

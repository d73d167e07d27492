"""What Lightning's finetuning callbacks freeze and thaw: noted in checkpoints, as the callbacks themselves do not."""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.training.compat import callbacks_of, trainer_of


def frozen_by_callbacks(pl_module: LightningModule) -> list[str] | None:
    """Returns the names of the parameters that are not trained, None in a fit that no callback changes that in."""
    trainer = trainer_of(pl_module)
    if trainer is None or not any(isinstance(callback, BaseFinetuning) for callback in callbacks_of(trainer)):
        return None
    return [name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad]


def thaw_(pl_module: LightningModule, frozen: Collection[str]) -> bool:
    """Lets all parameters be trained but some; norm layers that are thawed follow the data again.

    Returns:
        Whether that changed any.
    """
    thawed = {id(p) for name, p in pl_module.named_parameters() if not p.requires_grad and name not in frozen}
    for module in pl_module.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) in thawed]
        for parameter in own:
            parameter.requires_grad_(True)
        if own and isinstance(module, _BatchNorm):
            module.track_running_stats = True
    return bool(thawed)

"""Callbacks that keep an averaged copy of the module, which has to follow when its structure changes."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_compress.training.compat import AVERAGING, callbacks_of


def restart_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Starts the averages again from the module as it is: they pair its parameters with their own by position."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, AVERAGING):
            callback.setup(trainer, pl_module, cast(str, trainer.state.fn))
        if isinstance(callback, StochasticWeightAveraging) and callback.n_averaged is not None:
            callback.n_averaged.zero_()

"""Callbacks that keep an averaged copy of the module, which has to follow when its structure changes."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

try:
    from lightning.pytorch.callbacks import WeightAveraging

    _AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging, WeightAveraging)
except ImportError:  # before Lightning 2.6
    _AVERAGING = (StochasticWeightAveraging,)


def restart_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Starts the averages again from the module as it is; they pair parameters by position."""
    for callback in cast("list[Callback]", trainer.callbacks):  # type: ignore[attr-defined]
        if isinstance(callback, _AVERAGING):
            callback.setup(trainer, pl_module, cast(str, trainer.state.fn))
        if isinstance(callback, StochasticWeightAveraging) and callback.n_averaged is not None:
            callback.n_averaged.zero_()

"""What a fit logged, epoch by epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from typing_extensions import override

OWN = "compress/"
"""Prefix of what this library logs itself."""


@dataclass(frozen=True)
class Epoch:
    """The metrics of one epoch.

    Attributes:
        number: Of the epoch, from 1.
        metrics: What was logged in it: name to value.
    """

    number: int
    metrics: Mapping[str, float]


class History(Callback):
    """Remembers the metrics of every epoch of a fit, without sizes and settings of the compression.

    Attributes:
        epochs: In order.
        loggers: Those of the last fit.
        steps: Optimizer steps of the last fit so far.
        seconds: How long its training took, validation and later rounds included.
    """

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []
        self.loggers: Sequence[Logger] = ()
        self.steps = 0
        self.seconds = self._started = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the fit logs."""
        self.loggers = tuple(trainer.loggers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops it."""
        self.seconds = time.perf_counter() - self._started

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the finite metrics of the epoch; those of its validation are there by then."""
        self.steps = trainer.global_step
        seen = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith(OWN)}
        finite = {name: value for name, value in seen.items() if math.isfinite(value)}
        self.epochs.append(Epoch(trainer.current_epoch + 1, finite))

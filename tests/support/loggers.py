"""A logger that keeps what it is given."""

from __future__ import annotations

from lightning.pytorch.loggers.logger import Logger


class MemoryLogger(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict]] = []
        self.hyperparameters: list[dict] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics, step=None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.hyperparameters.append(dict(params))

"""Trained dense models, kept so that the jobs of a sweep train one of them once.

An entry is written whole or not at all. Jobs that want the same one at the same time wait for the first of them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig
from torch import nn

from lightning_compress.cli.identity import key_of_dense
from lightning_compress.core.store import cache_folder, is_kept
from lightning_compress.core.whole_files import make_room, whole_file

LIMIT = 2**32
"""Bytes of all models together; those that were not used for the longest time go first."""


@dataclass(frozen=True)
class DenseStore:
    """A folder of trained dense models.

    Attributes:
        folder: Where they lie; made when the first is kept.
    """

    folder: Path

    @classmethod
    def of(cls, cfg: DictConfig, sweep: str | Path) -> DenseStore:
        """Returns the store of a sweep: among the caches, or in its own folder without a cache or a seed."""
        lasting = is_kept() and cfg.seed is not None
        return cls((cache_folder() if lasting else Path(sweep)) / "dense")

    def trained(self, cfg: DictConfig, task: nn.Module, train: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Brings the weights of the trained model into a task: those that are kept, else trained now and kept.

        Args:
            cfg: The configuration, which says which model it is.
            task: A task of that configuration, untrained; changed in place.
            train: Trains the task and returns its metrics on the test data.

        Returns:
            The metrics.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key_of_dense(cfg)}.pt"
        with FileLock(path.with_suffix(".lock")):
            found = _read(path)
            if found is not None:
                task.load_state_dict(found["state"])
                return dict(found["metrics"])
            metrics = dict(train())
            with contextlib.suppress(OSError):  # a full disk: the next job trains it again
                self._write(path, {"state": task.state_dict(), "metrics": metrics})
        return metrics

    def has(self, cfg: DictConfig) -> bool:
        """Returns whether the model of a configuration is kept."""
        return (self.folder / f"{key_of_dense(cfg)}.pt").is_file()

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        state = [value for value in content["state"].values() if isinstance(value, torch.Tensor)]
        make_room(self.folder.glob("*.pt"), sum(value.nbytes for value in state), LIMIT)
        with whole_file(path) as part:
            torch.save(dict(content), part)


def _read(path: Path) -> dict[str, Any] | None:
    """Returns an entry; None if there is none or it is damaged."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        os.utime(path)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    return found if {"state", "metrics"} <= set(found) else None

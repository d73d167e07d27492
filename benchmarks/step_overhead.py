"""A training step through the callback against the same factorised model written by hand.

python -m benchmarks.step_overhead

Two Trainers take turns: one with Compress, one whose model holds the same factors as plain
nn.Sequential layers and no callback. Only the ratio means something.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import publish, reference
from lightning_compress import Budget, Compress, FactorisedLayer, Schedule
from lightning_compress.demo.task import ClassificationTask

STEPS = 60
ROUNDS = 9
BATCH = 64


class _StepTimes(Callback):
    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def median(self) -> float:
        """Returns the median seconds from one step's start to the next one's, the first five left out."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.starts[5:]))


def main() -> None:
    """Prints the ratio of each round and the median of all."""
    images, labels = torch.randn(STEPS * BATCH, 1, 28, 28), torch.randint(0, 10, (STEPS * BATCH,))
    loader = DataLoader(TensorDataset(images, labels), BATCH)
    dense = ClassificationTask(reference("resnet20").train(), lr=1e-3)
    dense.example_input_array = torch.zeros(1, 1, 28, 28)
    by_hand = copy.deepcopy(dense)
    _fit(by_hand, loader, [_compress()], steps=1)
    _write_out(by_hand)

    rows: list[dict[str, Any]] = []
    for round_ in range(ROUNDS):
        callbacks: list[Callable[[], list[Callback]]] = [
            lambda: [_compress(schedule=Schedule(warmup_steps=30))],
            list,
        ]
        seconds = [
            _fit(copy.deepcopy(model), loader, make(), steps=STEPS)
            for model, make in zip((dense, by_hand), callbacks, strict=True)
        ]
        rows.append({"round": round_, "callback ms": 1e3 * seconds[0], "by hand ms": 1e3 * seconds[1]})
        rows[-1]["ratio"] = seconds[0] / seconds[1]
    ratio = statistics.median(row["ratio"] for row in rows)
    title = f"Training step of ResNet-20 at params=0.28, batch {BATCH}: median ratio {ratio:.3f}"
    publish("step_overhead", title, rows, ratio=ratio)


def _compress(**settings: Any) -> Compress:
    """Returns the callback without synthetic inputs: what it does before the first step is not timed."""
    return Compress(Budget(params=0.28), objective="weight", heal=False, **settings)


def _fit(task: ClassificationTask, loader: DataLoader[Any], callbacks: list[Callback], steps: int) -> float:
    times = _StepTimes()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, loader)
    return times.median() if steps > 1 else 0.0


def _write_out(model: nn.Module) -> None:
    """Replaces the library's layer class by what a person would write: nn.Sequential."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FactorisedLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Sequential(*module.children()))


if __name__ == "__main__":
    main()

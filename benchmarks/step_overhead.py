"""A training step through the callback against the same factorised model written by hand.

python -m benchmarks.step_overhead

Two Trainers take turns: one with Compress, one whose model holds the same factors as plain
nn.Sequential layers and no callback, every other round in the other order. Only the ratio means something; that of
the faster quarter of all steps is the less noisy one.
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

STEPS = 40
ROUNDS = 14
BATCH = 64


class _StepTimes(Callback):
    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns the seconds from each step's start to the next one's, the first five left out."""
        return [b - a for a, b in itertools.pairwise(self.starts[5:])]


def main() -> None:
    """Prints the ratio of each round and the median of all."""
    images, labels = torch.randn(STEPS * BATCH, 1, 28, 28), torch.randint(0, 10, (STEPS * BATCH,))
    loader = DataLoader(TensorDataset(images, labels), BATCH)
    dense = ClassificationTask(reference("resnet20").train(), lr=1e-3)
    dense.example_input_array = torch.zeros(1, 1, 28, 28)
    by_hand = copy.deepcopy(dense)
    _fit(by_hand, loader, [_compress()], steps=1)
    _write_out(by_hand)

    ways: list[tuple[ClassificationTask, Callable[[], list[Callback]]]] = [
        (dense, lambda: [_compress(schedule=Schedule(warmup_steps=30))]),
        (by_hand, list),
    ]
    rows: list[dict[str, Any]] = []
    every: tuple[list[float], list[float]] = ([], [])
    for round_ in range(ROUNDS):
        medians = [0.0, 0.0]
        for way in (0, 1) if round_ % 2 == 0 else (1, 0):
            model, make = ways[way]
            seconds = _fit(copy.deepcopy(model), loader, make(), steps=STEPS)
            medians[way] = statistics.median(seconds)
            every[way].extend(seconds)
        rows.append({"round": round_, "callback ms": 1e3 * medians[0], "by hand ms": 1e3 * medians[1]})
        rows[-1]["ratio"] = medians[0] / medians[1]
    median = statistics.median(row["ratio"] for row in rows)
    quartiles = [statistics.quantiles(seconds, n=4)[0] for seconds in every]
    ratio = quartiles[0] / quartiles[1]
    title = (
        f"Training step of ResNet-20 at params=0.28, batch {BATCH}: ratio {ratio:.3f}, median of rounds {median:.3f}"
    )
    publish("step_overhead", title, rows, ratio=ratio, median_of_rounds=median)


def _compress(**settings: Any) -> Compress:
    """Returns the callback without synthetic inputs: what it does before the first step is not timed."""
    return Compress(Budget(params=0.28), objective="weight", heal=False, **settings)


def _fit(task: ClassificationTask, loader: DataLoader[Any], callbacks: list[Callback], steps: int) -> list[float]:
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
    return times.seconds()


def _write_out(model: nn.Module) -> None:
    """Replaces the library's layer class by what a person would write: nn.Sequential."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FactorisedLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Sequential(*module.children()))


if __name__ == "__main__":
    main()

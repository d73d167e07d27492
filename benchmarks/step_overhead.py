"""What a training step through the callback costs more than the same factorised model written by hand.

python -m benchmarks.step_overhead

Two parts, for whole fits one after the other differ by more than what is sought: the time inside the callback's own
hooks, as a share of a step of a fit; and forward and backward of the factorised layers against plain nn.Sequential
ones, step by step in turns.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import publish, reference
from lightning_compress import Budget, Compress, FactorisedLayer, Schedule
from lightning_compress.cli.demo.task import ClassificationTask

STEPS = 60
TURNS = 120
BATCH = 64
LEFT_OUT = 5
"""First steps that are not timed."""


class _Timed(Compress):
    """The callback with its hooks timed; the search before the first step is not."""

    spent = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in dir(Callback):
            if name.startswith("on_") and getattr(Compress, name) is not getattr(Callback, name):
                setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - start

        return timed


class _Marks(Callback):
    """The time, and the time spent in the hooks, at the start of every step."""

    def __init__(self, timed: _Timed) -> None:
        self.timed = timed
        self.times: list[float] = []
        self.spent: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())
        self.spent.append(self.timed.spent)


def main() -> None:
    """Prints both parts, and their product as the ratio of a step."""
    images, labels = torch.randn(STEPS * BATCH, 1, 28, 28), torch.randint(0, 10, (STEPS * BATCH,))
    task = ClassificationTask(reference("resnet20").train(), lr=1e-3)
    task.example_input_array = torch.zeros(1, 1, 28, 28)
    schedule = Schedule(warmup_steps=STEPS // 2)
    compress = _Timed(Budget(params=0.28), objective="weight", heal=False, schedule=schedule)
    marks = _Marks(compress)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[compress, marks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(TensorDataset(images, labels), BATCH))
    step, hooks = (_median_difference(values) for values in (marks.times, marks.spent))
    layers = _in_turns(task, images[:BATCH], labels[:BATCH])
    ratio = layers / (1 - hooks / step)
    row = {"step ms": 1e3 * step, "hooks ms": 1e3 * hooks, "hooks / step": hooks / step, "layers / by hand": layers}
    title = f"Training step of ResNet-20 at params=0.28, batch {BATCH}: ratio {ratio:.3f} to one by hand"
    publish("step_overhead", title, [{**row, "step / by hand": ratio}], ratio=ratio)


def _median_difference(values: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(values[LEFT_OUT:]))


def _in_turns(task: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the median ratio of a step of the factorised layers to one of `nn.Sequential`s right beside it."""
    models = [copy.deepcopy(task), copy.deepcopy(task)]
    _write_out(models[1])
    ratios = []
    for turn in range(TURNS):
        seconds = [0.0, 0.0]
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            start = time.perf_counter()
            models[index].zero_grad()
            torch.autograd.backward(F.cross_entropy(models[index](images), labels))
            seconds[index] = time.perf_counter() - start
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[LEFT_OUT:])


def _write_out(model: nn.Module) -> None:
    """Replaces the library's layer class by what a person would write: nn.Sequential."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FactorisedLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Sequential(*module.children()))


if __name__ == "__main__":
    main()

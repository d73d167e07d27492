"""An embedding table of 2^23 entries: tt_embedding against svd at equal parameters.

python -m benchmarks.tensorised [--keep 0.3 0.1 0.03 0.01] [--seed 0]

A network learns for a few minutes to tell the next token of Python source (the standard library's, a tenth of the
files held out) from the one, two and three tokens before it, each a row of one table of 2^17 x 64. The table is
factorised by its weights alone, with its rows in three orders: svd does not see a difference.

An error is ‖W − Ŵ‖² / ‖W‖². "gain" is the accuracy less that of svd at the same share, "noise" two standard errors of
that paired difference. "tuned" is the accuracy after 100 steps of Adam on the whole network, the better of
two learning rates for every kind. "none" is the mean row in the place of every row.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import publish
from lightning_compress import LayerPlan, Plan, apply_plan_
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.kinds.registry import DECOMPOSITIONS

KEEP = (0.3, 0.1, 0.03, 0.01)
ROWS, COLUMNS, TARGETS, ORDERS = 2**17, 64, 1000, 3
TRAINING, BATCH, RATE = 1500, 1024, 2e-3
TUNING, TUNING_BATCH, TUNING_RATES = 100, 128, (1e-3, 1e-4)
COLUMN_NAMES = {"accuracy": ("gain", "noise"), "tuned": ("its gain", "its noise")}
BLANK = dict.fromkeys(name for what, more in COLUMN_NAMES.items() for name in (what, *more))


class NextToken(nn.Module):
    """Predicts a token from the rows of the n-grams before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, COLUMNS)
        nn.init.normal_(self.table.weight, std=0.02)  # as language models do: torch's 1.0 drowns what is learned
        self.head = nn.Sequential(nn.Linear(ORDERS * COLUMNS, 256), nn.ReLU(), nn.Linear(256, TARGETS))

    def forward(self, index: Tensor) -> Tensor:
        """Returns scores (B, TARGETS) of indices (B, ORDERS)."""
        scores: Tensor = self.head(self.table(index).flatten(1))
        return scores


@dataclass
class Task:
    """A network, what it is trained on, and what is held out: indices (n, ORDERS) and targets (n,)."""

    net: NextToken
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def reordered(self, order: Tensor) -> Task:
        """Returns the same network with the rows of its table in another order, and data to match."""
        net, places = copy.deepcopy(self.net), order.argsort()
        net.table.weight.data = net.table.weight.data[order]
        train, test = ((places[index], targets) for index, targets in (self.train, self.test))
        return replace(self, net=net, train=train, test=test)


def source_code() -> tuple[Task, dict[str, Tensor]]:
    """Returns the task, untrained, with the table's rows by frequency, and other orders by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*f.parts}]
    found = [re.findall(r"\w+|[^\w\s]|\n", f.read_text(encoding="utf-8", errors="replace")) for f in files]
    seen = [tokens for number, tokens in enumerate(found) if number % 10]
    targets = {t: i for i, (t, _) in enumerate(Counter(itertools.chain(*seen)).most_common(TARGETS))}
    grams = Counter(gram for tokens in seen for row in _contexts(tokens) for gram in row)
    vocabulary = [("",), *(gram for gram, _ in grams.most_common(ROWS - 1))]
    places = {gram: place for place, gram in enumerate(vocabulary)}
    train, test = (_indices(files, places, targets) for files in (seen, found[::10]))
    alphabetical = torch.tensor(sorted(range(len(vocabulary)), key=vocabulary.__getitem__))
    orders = {"alphabetical": alphabetical, "hashed": torch.randperm(ROWS)}
    return Task(NextToken(), train, test), orders


def _contexts(tokens: list[str]) -> Iterator[list[tuple[str, ...]]]:
    """Yields for every token after the first ones the n-grams before it, the shortest first."""
    for end in range(ORDERS, len(tokens)):
        yield [tuple(tokens[end - n : end]) for n in range(1, ORDERS + 1)]


def _indices(
    files: list[list[str]], places: dict[tuple[str, ...], int], targets: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Returns the rows of the contexts and the targets, of tokens that are one."""
    rows, wanted = [], []
    for tokens in files:
        for row, token in zip(_contexts(tokens), tokens[ORDERS:], strict=False):
            if token in targets:
                rows.append([places.get(gram, 0) for gram in row])
                wanted.append(targets[token])
    return torch.tensor(rows), torch.tensor(wanted)


def fit(net: nn.Module, data: tuple[Tensor, Tensor], batch: int, steps: int, rate: float) -> None:
    """Trains by Adam with a linearly falling rate; every call draws the same batches."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    net.train()
    for _ in range(steps):
        index = torch.randint(len(data[0]), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(data[0][index]), data[1][index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def right(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Returns which answers are right, as 0 and 1."""
    parts = zip(torch.split(data[0], 1000), torch.split(data[1], 1000), strict=True)
    return torch.cat([net(x).argmax(1) == y for x, y in parts]).double()


def compressed(net: NextToken, kind: str, keep: float) -> tuple[nn.Module, dict[str, Any]] | None:
    """Returns the network with its table factorised, and what is known of that; None if no rank is small enough."""
    net, decomposition, shape = copy.deepcopy(net), DECOMPOSITIONS[kind], (COLUMNS, ROWS)
    ranks = np.arange(1, decomposition.max_ranks(shape)[0] + 1)[:, None]
    sizes = decomposition.parameters(shape, ranks)
    if sizes[0] > keep * ROWS * COLUMNS:
        return None
    row = int(np.flatnonzero(sizes <= keep * ROWS * COLUMNS)[-1])
    rank, size, dense, costs = int(ranks[row, 0]), int(sizes[row]), net.table.weight.detach(), measure_costs(net)
    planned = LayerPlan("table", "Embedding", kind, (rank,), (ROWS, COLUMNS), 0.0, dense.numel(), size)
    start = time.perf_counter()
    (new,) = apply_plan_(net, Plan((planned,), costs, costs))
    seconds = time.perf_counter() - start
    lost = float((dense - new.factorised.weight.detach()).square().sum() / dense.square().sum())
    return net, {"rank": rank, "kept": size / dense.numel(), "seconds": seconds, "error": lost}


def tuned(task: Task, net: nn.Module) -> Tensor:
    """Returns which answers are right after fine-tuning."""
    found = []
    for rate in TUNING_RATES:
        own = copy.deepcopy(net)
        fit(own, task.train, TUNING_BATCH, TUNING, rate)
        found.append(right(own, task.test))
    return max(found, key=lambda each: float(each.mean()))


def measured(task: Task, orders: dict[str, Tensor], keeps: list[float]) -> Iterator[dict[str, Any]]:
    """Yields a row per share, kind and order of the rows."""
    tasks = {"frequency": task, **{name: task.reordered(order) for name, order in orders.items()}}
    for keep in keeps:
        against: dict[str, Tensor] = {}
        for kind, order in (("svd", "frequency"), *(("tt_embedding", order) for order in tasks)):
            found = compressed(tasks[order].net, kind, keep)
            if found is None:
                continue
            net, known = found
            answers = {"accuracy": right(net, tasks[order].test)}
            answers["tuned"] = tuned(tasks[order], net)
            against = answers if kind == "svd" else against
            row: dict[str, Any] = {"keep": keep, "kind": kind, "order": "any" if kind == "svd" else order, **known}
            yield {**row, **BLANK, **_compared(answers, {} if kind == "svd" else against)}


def _compared(answers: dict[str, Tensor], against: dict[str, Tensor]) -> dict[str, float]:
    """Returns accuracies, by how much they are above those of svd, and two standard errors of that."""
    found = {what: float(each.mean()) for what, each in answers.items()}
    for what, other in against.items():
        difference, (gain, noise) = answers[what] - other, COLUMN_NAMES[what]
        found[gain] = float(difference.mean())
        found[noise] = 2 * float(difference.std()) / len(difference) ** 0.5
    return found


def main(keeps: list[float], seed: int) -> None:
    """Prints one row per share, kind and order."""
    torch.manual_seed(seed)
    task, orders = source_code()
    start = time.perf_counter()
    fit(task.net, task.train, BATCH, TRAINING, RATE)
    seconds = time.perf_counter() - start
    without = copy.deepcopy(task.net)
    without.table.weight.data[:] = without.table.weight.data.mean(0)
    rows: list[dict[str, Any]] = []
    for kind, net, keep, time_taken in (("dense", task.net, 1.0, seconds), ("none", without, 0.0, 0.0)):
        row = {"keep": keep, "kind": kind, "order": "any", "rank": None, "kept": keep, "seconds": time_taken}
        rows.append({**row, "error": 1 - keep, **BLANK, "accuracy": float(right(net, task.test).mean())})
    for row in measured(task, orders, keeps):
        rows.append(row)
        print(row, flush=True)
    sizes: dict[str, Any] = {"training_tokens": len(task.train[1]), "test_tokens": len(task.test[1])}
    publish("tensorised", "A table of 2^17 x 64 factorised, accuracy on held-out source code", rows, **sizes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.keep, options.seed)

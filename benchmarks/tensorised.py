"""Layers of 2^23 entries and more: kinds of a four-mode tensor against svd and interpolative at equal parameters.

python -m benchmarks.tensorised [--networks text pixels hidden] [--keep 0.3 0.1 0.03 0.01] [--seed 0]

Three networks, each trained by the command for about a minute on one core:
  text    the next token of Python source (the standard library's, a tenth of the files held out) from the one, two
          and three tokens before it, each a row of one table of 2^17 x 64;
  pixels  Fashion-MNIST enlarged to 56x56, 3136 -> 2688 -> 10: the wide layer sees pixels, its modes are their rows
          and columns;
  hidden  Fashion-MNIST, 784 -> 4096 -> 2048 -> 10: the wide layer is the second.
Of Fashion-MNIST's training images 10,000 are held out for accuracy and 5,000 for the moments of the inputs.

One layer is factorised, by the weights alone or in the moments of its inputs (not those of the outputs, which the
kinds of four modes cannot use). An error is ‖W − Ŵ‖² / ‖W‖². Accuracies are given less that of svd at the same share
as well; "noise" is two standard errors of that paired difference. "tuned" is the accuracy after 100 steps of Adam on
the whole network, the better of two learning rates for every kind. A table's rows are tried in three orders: svd
does not see a difference.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import earlier_rows, publish
from lightning_compress import LayerPlan, Plan, apply_plan_, merge_
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.statistics import Statistics, input_moments
from lightning_compress.cli.demo.data import FashionMNISTDataModule
from lightning_compress.kinds.registry import DECOMPOSITIONS, LayerCall, profile_in
from lightning_compress.layers.families import operator_of

KEEP = (0.3, 0.1, 0.03, 0.01)
ROWS, COLUMNS, TARGETS, ORDERS = 2**17, 64, 1000, 3
STEPS, RATES = 100, (1e-3, 1e-4)
TUNED = (0.1, 0.03, 0.01)
"""Shares after which the network is fine-tuned as well."""
BLANK = dict.fromkeys(f"{what}{more}" for what in ("accuracy", "tuned") for more in ("", " - svd", " noise"))
COSTLY = 2.0
"""Times the MACs of the dense layer from which on the answers are those of the factors multiplied out."""
FEATURES = 4608
"""Kinds that solve for more features at once than that are left out."""


@dataclass
class Task:
    """A trained network with one large layer, and held-out data.

    Attributes:
        net: The network.
        layer: Name of the large layer.
        train: Inputs and targets.
        test: Held-out ones.
        kinds: What is compared on it, svd first.
        batch: Of training.
        statistics: Moments of what enters the layer, None for indices.
        orders: Other orders of a table's rows, by name.
    """

    net: nn.Module
    layer: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    kinds: tuple[str, ...]
    batch: int
    statistics: Statistics | None = None
    orders: dict[str, Tensor] = field(default_factory=dict)


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


def text() -> Task:
    """Returns the network of a table."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*f.parts}]
    found = [re.findall(r"\w+|[^\w\s]|\n", f.read_text(encoding="utf-8", errors="replace")) for f in files]
    kept_out = [number % 10 == 0 for number in range(len(found))]
    seen = [tokens for tokens, out in zip(found, kept_out, strict=True) if not out]
    targets = {t: i for i, (t, _) in enumerate(Counter(itertools.chain(*seen)).most_common(TARGETS))}
    grams = Counter(gram for tokens in seen for row in _contexts(tokens) for gram in row)
    vocabulary = [("",), *(gram for gram, _ in grams.most_common(ROWS - 1))]
    ids = {gram: i for i, gram in enumerate(vocabulary)}
    parts: dict[bool, tuple[list[list[int]], list[int]]] = {False: ([], []), True: ([], [])}
    for tokens, out in zip(found, kept_out, strict=True):
        for row, target in zip(_contexts(tokens), tokens[ORDERS:], strict=True):
            if target in targets:
                parts[out][0].append([ids.get(gram, 0) for gram in row])
                parts[out][1].append(targets[target])
    train, test = ((torch.tensor(parts[out][0]), torch.tensor(parts[out][1])) for out in (False, True))
    alphabetical = torch.tensor(sorted(range(len(vocabulary)), key=vocabulary.__getitem__))
    orders = {"text, alphabetical": alphabetical, "text, hashed": torch.randperm(ROWS)}
    print(f"{len(train[1]):,} and {len(test[1]):,} tokens, {len(vocabulary):,} n-grams", flush=True)
    kinds = tuple(kind for kind in ("svd", "tt_embedding") if kind in DECOMPOSITIONS)
    return Task(NextToken(), "table", train, test, kinds, batch=1024, orders=orders)


def _contexts(tokens: list[str]) -> Iterator[list[tuple[str, ...]]]:
    """Yields for every token after the first ones the n-grams before it, the shortest first."""
    for end in range(ORDERS, len(tokens)):
        yield [tuple(tokens[end - n : end]) for n in range(1, ORDERS + 1)]


def images(name: str) -> Task:
    """Returns a network of a wide nn.Linear."""
    data = FashionMNISTDataModule()
    data.setup("fit")
    x, y = data.train_dataloader().dataset.tensors  # type: ignore[attr-defined]
    calibration = data.val_dataloader().dataset.tensors[0]  # type: ignore[attr-defined]
    if name == "pixels":
        x, calibration = (F.interpolate(each, scale_factor=2, mode="bilinear") for each in (x, calibration))
    sizes = {"pixels": (3136, 2688, 10), "hidden": (784, 4096, 2048, 10)}[name]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    net, layer = nn.Sequential(*layers[:-1]), str(len(layers) - 4)
    kinds = ("svd", "interpolative", "tt_linear", "tucker_linear")
    kinds = tuple(kind for kind in kinds if kind in DECOMPOSITIONS)
    held = slice(-10_000, None)
    task = Task(net, layer, (x[: held.start], y[: held.start]), (x[held], y[held]), kinds, batch=256)
    task.statistics = Statistics((((calibration,), {}),), "real", {})  # the moments follow the training
    return task


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


def ranks_at(task: Task, kind: str, size: float, profiles: dict[tuple[str, str], Any], source: str) -> tuple[int, ...]:
    """Returns the ranks of the smallest error with at most so many parameters, () if there are none."""
    layer: Any = task.net.get_submodule(task.layer)
    operator, decomposition = operator_of(layer), DECOMPOSITIONS[kind]
    limits = decomposition.max_ranks(operator.shape)
    ranks, errors = np.arange(1, limits[0] + 1)[:, None], -np.arange(limits[0])
    if len(limits) > 1:
        if (kind, source) not in profiles:
            metric = task.statistics.metric(task.layer) if task.statistics and source == "moments" else None
            profiles[kind, source] = profile_in(kind, layer.weight.detach().double(), metric)
        ranks, errors = profiles[kind, source].ranks, profiles[kind, source].errors
    rows = np.flatnonzero(decomposition.parameters(operator.shape, ranks) <= size)
    return tuple(map(int, ranks[rows[np.argmin(errors[rows])]])) if len(rows) else ()


def compressed(task: Task, kind: str, ranks: tuple[int, ...], source: str) -> tuple[nn.Module, dict[str, float]]:
    """Returns the network with the layer factorised, and what is known of that."""
    net = copy.deepcopy(task.net)
    dense: Any = net.get_submodule(task.layer)
    operator, costs = operator_of(dense), measure_costs(net)
    row, one = np.array([ranks]), LayerCall((), (), 1, lookup=operator_of(dense).lookup)
    size = int(DECOMPOSITIONS[kind].parameters(operator.shape, row)[0])
    macs = int(DECOMPOSITIONS[kind].macs(operator.shape, row, one)[0]) / dense.weight.numel()
    shape = tuple(dense.weight.shape)
    planned = LayerPlan(task.layer, type(dense).__name__, kind, ranks, shape, 0.0, dense.weight.numel(), size)
    plan = Plan((replace(planned, source="real" if source == "moments" else "weight"),), costs, costs)
    started = time.perf_counter()
    (new,) = apply_plan_(net, plan, statistics=task.statistics)
    seconds = time.perf_counter() - started
    lost = dense.weight - new.factorised.weight
    error = float((lost.square().sum() / dense.weight.square().sum()).detach())
    if macs > COSTLY and not operator.lookup:
        merge_(net)
    return net, {"kept": size / dense.weight.numel(), "MACs": macs, "seconds": seconds, "error": error}


def tuned(task: Task, net: nn.Module) -> Tensor:
    """Returns which answers are right after fine-tuning."""
    found = []
    for rate in RATES:
        own = copy.deepcopy(net)
        fit(own, task.train, 128, STEPS, rate)
        found.append(right(own, task.test))
    return max(found, key=lambda each: float(each.mean()))


def measured(name: str, task: Task, keeps: list[float], sources: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a row per source, share, kind and order of the rows."""
    profiles: dict[tuple[str, str], Any] = {}
    for source, keep in itertools.product(sources, keeps):
        against: dict[str, Tensor] = {}
        first: tuple[int, ...] = ()
        shape = operator_of(task.net.get_submodule(task.layer)).shape
        size = keep * float(np.prod(shape))
        if "tucker_linear" in task.kinds:  # its ranks are on a grid: the others get no more than it takes
            ranks = ranks_at(task, "tucker_linear", size, profiles, source)
            size = float(DECOMPOSITIONS["tucker_linear"].parameters(shape, np.array([ranks]))[0])
        for kind in task.kinds:
            ranks = ranks_at(task, kind, size, profiles, source)
            if not ranks or (kind == "interpolative" and ranks == first):  # the same weight
                continue
            if source == "moments" and kind == "tt_linear" and not _solvable(task, ranks[0]):
                continue
            first = ranks if kind == "svd" else first
            others = task.orders if kind == "tt_embedding" else {}
            for order, permutation in [(name, None), *others.items()]:
                own = task if permutation is None else reordered(task, permutation)
                net, known = compressed(own, kind, ranks, source)
                row: dict[str, Any] = {"network": order, "from": source, "keep": keep, "kind": kind}
                row.update({"ranks": "x".join(map(str, ranks)), **known})
                found = {"accuracy": right(net, own.test)}
                if keep in TUNED and source == sources[-1] and (known["MACs"] <= COSTLY or own.orders):
                    found["tuned"] = tuned(own, net)
                row.update(BLANK)
                for what, answers in found.items():
                    row.update(_compared(what, answers, against.get(what)))
                against = found if kind == "svd" else against
                yield row


def _solvable(task: Task, rank: int) -> bool:
    from lightning_compress.kinds.tensorised import modes_of  # noqa: PLC0415

    return rank * modes_of(operator_of(task.net.get_submodule(task.layer)).shape)[2] <= FEATURES


def _compared(what: str, answers: Tensor, svd: Tensor | None) -> dict[str, Any]:
    """Returns accuracy, by how much it is above that of svd, and two standard errors of that."""
    found: dict[str, Any] = {what: float(answers.mean()), f"{what} - svd": None, f"{what} noise": None}
    if svd is not None:
        difference = answers - svd
        found[f"{what} - svd"] = float(difference.mean())
        found[f"{what} noise"] = 2 * float(difference.std()) / len(difference) ** 0.5
    return found


def reordered(task: Task, permutation: Tensor) -> Task:
    """Returns the same network with the rows of its table in another order, and data to match."""
    net, inverse = copy.deepcopy(task.net), permutation.argsort()
    table: Any = net.get_submodule(task.layer)
    table.weight.data = table.weight.data[permutation]
    train, test = ((inverse[index], targets) for index, targets in (task.train, task.test))
    return replace(task, net=net, train=train, test=test)


def emptied(task: Task) -> nn.Module:
    """Returns the network with the mean row in the place of every row of a table, and without another weight."""
    net = copy.deepcopy(task.net)
    layer: Any = net.get_submodule(task.layer)
    layer.weight.data[:] = layer.weight.data.mean(0) if isinstance(layer, nn.Embedding) else 0
    return net


def main(networks: list[str], keeps: list[float], seed: int) -> None:
    """Prints the rows of every network; those that are not measured again are kept."""
    rows = [row for row in earlier_rows("tensorised") if row["network"].partition(",")[0] not in networks]
    for name in networks:
        torch.manual_seed(seed)
        task = text() if name == "text" else images(name)
        start = time.perf_counter()
        fit(task.net, task.train, task.batch, 1500 if name == "text" else 200, 2e-3 if name == "text" else 5e-4)
        seconds, answers = time.perf_counter() - start, right(task.net, task.test)
        print(f"{name}: trained {seconds:.0f} s, accuracy {float(answers.mean()):.4f}", flush=True)
        sources = ["weights"]
        if task.statistics is not None:
            moments = input_moments(task.net, task.statistics.batches, [task.layer], source="real")
            task.statistics, sources = replace(task.statistics, moments=moments), ["weights", "moments"]
        dense = dict.fromkeys(("kept", "MACs"), 1.0) | {"seconds": seconds, "error": 0.0}
        head = {"network": name, "from": "", "keep": 1.0, "kind": "dense", "ranks": ""}
        rows.append({**head, **dense, **BLANK, "accuracy": float(answers.mean())})
        without = right(emptied(task), task.test)
        lost = {"kept": 0.0, "MACs": 0.0, "seconds": 0.0, "error": 1.0}
        rows.append({**head, "keep": 0.0, "kind": "none", **lost, **BLANK, "accuracy": float(without.mean())})
        print(rows[-2:], flush=True)
        for row in measured(name, task, keeps, sources):
            rows.append(row)
            print(row, flush=True)
        publish("tensorised", "One layer of 2^23 entries factorised, held-out accuracy", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["text", "pixels", "hidden"])
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.networks, options.keep, options.seed)

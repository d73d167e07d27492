"""What each part of the default is worth: accuracy right after compression with one part left out, or one added.

python -m benchmarks.ablation [--networks vgg resnet20] [--keep 0.2 0.1] [--seeds 3] [--changes healing] [--chosen]

Fashion-MNIST; no data is used but to judge. Time is left out (target=None), so that plans do not depend on the clock.
Test images judge what is reported; with --chosen 5,000 of the training images do, for choosing defaults, and nothing is
written. Seconds are CPU seconds of search, swap and healing, without the synthetic inputs that all share.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from benchmarks.common import IMAGE, NETWORKS, earlier_rows, fashion_mnist, publish, reference
from benchmarks.zero_shot import accuracy
from lightning_compress import Budget, compress_
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.core.effort import EFFORTS
from lightning_compress.kinds.registry import AUTOMATIC
from lightning_compress.search import choice

KEEP = (0.3, 0.2, 0.1, 0.05)
HELD_OUT = 5000

BALANCED = EFFORTS["balanced"]
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "with the descent": {"objective": "end_to_end"},
    "no measured layers": {},
    "no corrections": {"effort": replace(BALANCED, corrections=0)},
    "no CP kinds": {"kinds": [kind for kind in AUTOMATIC if kind not in {"cp", "cp3"}]},
    "no moments": {"objective": "weight"},
    "no healing": {"heal": False},
}
"""What is changed to the arguments of `compress_`."""
CUT: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no measured layers": (choice, "nearer", lambda problem, *_: problem),
}
"""What no argument leaves out: where it is, its name, what stands in its place."""


@contextmanager
def changed(change: str) -> Iterator[dict[str, Any]]:
    """Changes the default inside, and gives the arguments of `compress_`."""
    with ExitStack() as stack:
        if change in CUT:
            where, name, instead = CUT[change]
            stack.enter_context(mock.patch.object(where, name, instead))
        yield CHANGES[change]


def compressed(net: nn.Module, keep: float, change: str, found: Statistics, judge: DataLoader[Any]) -> dict[str, float]:
    """Returns accuracy and CPU seconds of a network with a change."""
    model = copy.deepcopy(net)
    fresh = replace(found, moments={name: replace(own) for name, own in found.moments.items()})  # nothing is fitted yet
    start = time.process_time()
    with changed(change) as settings:
        compress_(model, Budget(params=keep), example_input=IMAGE, statistics=fresh, target=None, **settings)
    return {"seconds": time.process_time() - start, "accuracy": accuracy(model, judge)}


def main() -> None:
    """Prints one row per network, budget and change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--changes", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--chosen", action="store_true", help="judge on training images, and write nothing")
    options = parser.parse_args()
    test, train = fashion_mnist()
    judge = DataLoader(Subset(train, range(HELD_OUT)), 500) if options.chosen else test
    rows = {} if options.chosen else {(r["network"], r["keep"], r["change"]): r for r in earlier_rows("ablation")}
    for name in options.networks:
        net = reference(name)
        synthetic = [gather_statistics(net, IMAGE, seed=seed) for seed in range(options.seeds)]
        dense = accuracy(net, judge)
        for keep in options.keep:
            for change in options.changes:
                torch.manual_seed(0)
                measured = [compressed(net, keep, change, found, judge) for found in synthetic]
                accuracies = [each["accuracy"] for each in measured]
                rows[name, keep, change] = {
                    "network": name,
                    "keep": keep,
                    "change": change,
                    "accuracy": statistics.mean(accuracies),
                    "spread": max(accuracies) - min(accuracies),
                    "dense": dense,
                    "CPU s": statistics.mean(each["seconds"] for each in measured),
                    "seeds": options.seeds,
                }
                print(rows[name, keep, change], flush=True)
        if not options.chosen:
            publish("ablation", "What a part of the default is worth, Fashion-MNIST", [*rows.values()])


if __name__ == "__main__":
    main()

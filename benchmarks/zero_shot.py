"""Accuracy right after the swap, before a single real image is seen, over methods and budgets.

python -m benchmarks.zero_shot [--seeds 3] [--networks vgg resnet20]

Fashion-MNIST, all 10,000 test images. Methods without random numbers run once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.common import IMAGE, NETWORKS, publish, reference
from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.demo.data import FashionMNISTDataModule
from lightning_compress.heal import heal_
from lightning_compress.moments import Statistics, gather_statistics

KEEP = (0.5, 0.3, 0.2, 0.1, 0.05)
REAL_IMAGES = 1024

Method = Callable[[nn.Module, Budget, "Statistics | None"], None]


def _by_weight(method: str) -> Method:
    def compress(net: nn.Module, budget: Budget, _found: Statistics | None) -> None:
        apply_plan_(net, search_ranks(net, budget, method=method))

    return compress


def _by_moments(net: nn.Module, budget: Budget, found: Statistics | None) -> None:
    apply_plan_(net, search_ranks(net, budget, statistics=found), statistics=found)


def _healed(net: nn.Module, budget: Budget, found: Statistics | None) -> None:
    dense = copy.deepcopy(net)
    replacements = apply_plan_(net, search_ranks(net, budget, statistics=found), statistics=found)
    heal_(dense, net, replacements, found.batches if found is not None else ())


METHODS: dict[str, tuple[Method, str | None]] = {
    "uniform": (_by_weight("uniform"), None),
    "energy": (_by_weight("energy"), None),
    "weight": (_by_weight("continuous"), None),
    "moments": (_by_moments, "synthetic"),
    "moments + healing": (_healed, "synthetic"),
    "moments, 1,024 real images": (_by_moments, "real"),
}
"""Name to method and the statistics it works with."""


def main(networks: list[str], seeds: int) -> None:
    """Prints one row per budget and method for each network: mean and spread (max − min) over the seeds."""
    data = FashionMNISTDataModule()
    data.setup("test")
    test = DataLoader(data.test_dataloader().dataset, 500)
    train = next(iter(DataLoader(data.train_dataloader().dataset, REAL_IMAGES)))[0]
    for name in networks:
        rows: list[dict[str, Any]] = []
        net = reference(name)
        start = time.perf_counter()
        synthetic = [gather_statistics(net, IMAGE, seed=seed) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / seeds
        real = [gather_statistics(net, IMAGE, calibration=torch.split(train, 128))]
        found: dict[str | None, list[Any]] = {None: [None], "synthetic": list(synthetic), "real": list(real)}
        for keep in KEEP:
            for method, (compress, kind) in METHODS.items():
                values, start = [], time.perf_counter()
                for statistic in found[kind]:
                    model = copy.deepcopy(net)
                    compress(model, Budget(params=keep), statistic)
                    values.append(accuracy(model, test))
                rows.append(
                    {
                        "network": name,
                        "keep": keep,
                        "method": method,
                        "accuracy": statistics.mean(values),
                        "spread": max(values) - min(values),
                        "seeds": len(values),
                        "seconds": (time.perf_counter() - start) / len(values),
                        "statistics s": seconds if kind == "synthetic" else 0.0,
                    }
                )
                print(rows[-1], flush=True)
        title = "Zero-shot accuracy on Fashion-MNIST, 10,000 test images"
        publish(f"zero_shot_{name}", title, rows, dense={name: accuracy(net, test)})


@torch.no_grad()
def accuracy(net: nn.Module, loader: DataLoader[Any]) -> float:
    """Returns the share of right answers."""
    metric = MulticlassAccuracy(10, average="micro")
    net.eval()
    for images, labels in loader:
        metric.update(net(images), labels)
    return float(metric.compute())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    main(options.networks, options.seeds)

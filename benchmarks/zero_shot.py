"""Accuracy right after the swap, before a single real image is seen, over methods and budgets.

python -m benchmarks.zero_shot [--seeds 3] [--networks vgg resnet20] [--keep 0.1 0.05] [--methods moments] [--plot]

Fashion-MNIST, all 10,000 test images. "moments + healing" is the default (healing acts only where the outputs are more
than 2 % apart); where that row is missing, "end_to_end + healing" is that of the version that had it as its default.
"1,024 real images" is a ceiling, a search on images of the training set. Seconds are those of search, swap and healing;
synthetic inputs and their moments ("statistics seconds") come before them, once for all. Methods without random numbers
run once. Rows of the results that are not measured again are kept. With --plot nothing is measured: accuracy against
parameters kept is drawn from the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.baselines import inputs_alone
from benchmarks.common import IMAGE, NETWORKS, RESULTS, earlier_rows, fashion_mnist, publish, reference
from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.surgery.repair import heal_

KEEP = (0.5, 0.3, 0.2, 0.1, 0.05)
REAL_IMAGES = 1024

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform", "objective": "weight"},
    "energy": {"method": "energy", "objective": "weight"},
    "alds": {"method": "alds"},
    "paper": {"method": "paper"},
    "weight": {"objective": "weight"},
    "moments": {"objective": "moments"},
    "moments, 1,024 real images": {"objective": "moments"},
    "balf, 1,024 real images": {"method": "balf", "objective": "moments", "target": None},
}
"""Row to the arguments of `search_ranks`."""
HEALED = "moments"
"""The row that has another with healing."""


def main(networks: list[str], seeds: int, keeps: list[float], methods: list[str]) -> None:
    """Prints one row per budget and method for each network: mean and spread (max − min) over the seeds."""
    test, train_images = fashion_mnist()
    train = next(iter(DataLoader(train_images, REAL_IMAGES)))[0]
    for name in networks:
        net = reference(name)
        rows = {(row["keep"], row["method"]): row for row in earlier_rows(f"zero_shot_{name}")}
        synthetic = [gather_statistics(net, IMAGE, seed=seed) for seed in range(seeds)]
        seconds = statistics.mean(sum(found.seconds.values()) for found in synthetic)
        real = gather_statistics(net, calibration=torch.split(train, 128))
        for keep in keeps:
            for method in methods:
                settings = METHODS[method]
                found = _statistics(method, settings, synthetic, real)
                measured = [compressed(net, keep, settings, each, test, healed=method == HEALED) for each in found]
                for suffix in measured[0]:
                    values = [each[suffix] for each in measured]
                    accuracies = [accuracy for accuracy, _ in values]
                    row = {
                        "keep": keep,
                        "method": method + suffix,
                        "accuracy": statistics.mean(accuracies),
                        "spread": max(accuracies) - min(accuracies),
                        "seeds": len(values),
                        "seconds": statistics.mean(each for _, each in values),
                    }
                    rows[keep, method + suffix] = row
                    print(name, row, flush=True)
        title = f"Zero-shot accuracy of {name} on Fashion-MNIST, 10,000 test images"
        more: dict[str, Any] = {"dense": accuracy(net, test), "statistics_seconds": seconds}
        publish(f"zero_shot_{name}", title, list(rows.values()), **more)
        print(more)


def _statistics(
    method: str, settings: dict[str, Any], synthetic: list[Statistics], real: Statistics
) -> list[Statistics | None]:
    if "real" in method:
        return [inputs_alone(real) if settings.get("method") == "balf" else real]
    return list(synthetic) if settings.get("objective") == "moments" else [None]


def compressed(
    net: nn.Module,
    keep: float,
    settings: dict[str, Any],
    found: Statistics | None,
    test: DataLoader[Any],
    *,
    healed: bool,
) -> dict[str, tuple[float, float]]:
    """Returns accuracy and seconds (of search, swap and healing) by suffix of the row."""
    model, start = copy.deepcopy(net), time.perf_counter()
    plan = search_ranks(model, Budget(params=keep), example_input=IMAGE, statistics=found, **settings)
    replacements = apply_plan_(model, plan, statistics=found)
    searched = time.perf_counter() - start
    results = {"": (accuracy(model, test), searched)}
    if healed and found is not None:
        start = time.perf_counter()
        heal_(net, model, replacements, found)
        searched += time.perf_counter() - start
        results[" + healing"] = (accuracy(model, test), searched)
    return results


def plot() -> None:
    """Draws accuracy against the share of parameters kept from the results, one panel per network."""
    figure, axes = plt.subplots(1, len(NETWORKS), figsize=(12.5, 4.5), sharey=True, layout="constrained")
    for axis, name in zip(axes, NETWORKS, strict=True):
        result = json.loads((RESULTS / f"zero_shot_{name}.json").read_text(encoding="utf-8"))
        for method in dict.fromkeys(row["method"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["method"] == method]
            ours = method.startswith(("moments", "end_to_end"))
            style = {"linestyle": ":" if "real" in method else "-" if ours else "--", "linewidth": 2 if ours else 1}
            axis.plot([r["keep"] for r in rows], [r["accuracy"] for r in rows], marker="o", label=method, **style)
        axis.axhline(result["dense"], color="grey", linewidth=1, label="dense")
        axis.set(title=name, xscale="log", xlabel="parameters kept")
        keeps = sorted({row["keep"] for row in result["rows"]})
        axis.set_xticks(keeps, [f"{100 * keep:g} %" for keep in keeps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, 10,000 test images, no fine-tuning")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(RESULTS / "zero_shot.png", dpi=130)
    print(RESULTS / "zero_shot.png")


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
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    plot() if options.plot else main(options.networks, options.seeds, options.keep, options.methods)

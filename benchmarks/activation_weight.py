"""Accuracy and latency over the weight λ of what factorised layers write (`search.problem.ACTIVATION_WEIGHT`).

python -m benchmarks.activation_weight [--networks vgg resnet20] [--keep 0.5 0.2] [--weights 0 0.02 0.1]

Fashion-MNIST, all 10,000 test images, one seed, objective "moments", right after the swap. Latency is that of all
networks of one budget in turns, on one thread, relative to the dense one.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from typing import Any
from unittest import mock

import torch

from benchmarks.common import IMAGE, NETWORKS, fashion_mnist, publish, reference
from benchmarks.zero_shot import accuracy
from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.costs import measure_latency
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.search import problem

BATCHES = (1, 16)


def main(networks: list[str], keeps: list[float], weights: list[float]) -> None:
    """Prints one row per network, budget and weight."""
    torch.set_num_threads(1)
    test, _ = fashion_mnist()
    rows: list[dict[str, Any]] = []
    for name in networks:
        net = reference(name)
        found = gather_statistics(net, IMAGE, seed=0)
        for keep in keeps:
            models, start = [net], len(rows)
            for weight in weights:
                with mock.patch.object(problem, "ACTIVATION_WEIGHT", weight):
                    plan = search_ranks(
                        net, Budget(params=keep), example_input=IMAGE, statistics=found, objective="moments"
                    )
                model = copy.deepcopy(net)
                apply_plan_(model, plan, statistics=found)
                models.append(model.eval())
                kinds = Counter(layer.kind for layer in plan.factorised)
                row = {"network": name, "keep": keep, "weight": weight, "signal loss": plan.signal_loss}
                row |= {"output distance": plan.output_distance, "MACs kept": plan.kept["macs"]}
                row |= {"accuracy": accuracy(model, test), "kinds": ", ".join(f"{n} {k}" for k, n in kinds.items())}
                rows.append(row)
            for batch in BATCHES:
                dense, *times = measure_latency(models, torch.randn(batch, *IMAGE[1:]))
                for row, seconds in zip(rows[start:], times, strict=True):
                    row[f"latency kept, batch {batch}"] = seconds / dense
            print(*rows[start:], sep="\n", flush=True)
    publish("activation_weight", "The weight of what layers write against accuracy and latency", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.2, 0.1])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.01, 0.02, 0.05, 0.1])
    options = parser.parse_args()
    main(options.networks, options.keep, options.weights)

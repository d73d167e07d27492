"""Seconds of every part of a compression: synthetic inputs, moments, search, swap, healing.

python -m benchmarks.compression_time [--networks resnet20 vgg] [--keep 0.1]
"""

from __future__ import annotations

import argparse
import copy
import time

from benchmarks.common import IMAGE, NETWORKS, publish, reference
from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.surgery.repair import heal_


def main(networks: list[str], keep: float) -> None:
    """Prints one row per network."""
    rows = []
    for name in networks:
        net = reference(name)
        found = gather_statistics(net, IMAGE, seed=0)
        start = time.perf_counter()
        plan = search_ranks(net, Budget(params=keep), example_input=IMAGE, statistics=found)
        searched = time.perf_counter()
        model = copy.deepcopy(net)
        replacements = apply_plan_(model, plan, statistics=found)
        swapped = time.perf_counter()
        heal_(net, model, replacements, found)
        healed = time.perf_counter()
        parts = {**found.seconds, "search": searched - start, "swap": swapped - searched}
        without = sum(parts.values())
        healing = healed - swapped
        rows.append(
            {"network": name, "keep": keep, **parts, "without healing": without, "healing": healing}
            | {"with healing": without + healing}
        )
    publish("compression_time", "Seconds of a compression by its parts", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--keep", type=float, default=0.1)
    options = parser.parse_args()
    main(options.networks, options.keep)

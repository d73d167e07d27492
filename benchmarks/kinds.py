"""Accuracy right after the swap with one kind alone, against all of them to choose from.

python -m benchmarks.kinds [--networks vgg resnet20] [--keep 0.1 0.05] [--kinds auto cp3] [--seeds 3] [--heal]

Fashion-MNIST, all 10,000 test images, end-to-end search before or (--heal) after healing, as in
`benchmarks.zero_shot`. "Alone" is for the convolutions: linear layers, where most kinds do not apply, have svd
beside it. Rows of the results that are not measured again are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from typing import Any

from benchmarks.common import IMAGE, NETWORKS, earlier_rows, fashion_mnist, publish, reference
from benchmarks.zero_shot import KEEP, compressed
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import InfeasibleBudgetError

KINDS = ("auto", "cp3", "tucker2", "tt", "spatial_svd", "channel_svd")


def main(networks: list[str], keeps: list[float], kinds: list[str], seeds: int, *, heal: bool) -> None:
    """Prints one row per network, budget and kind: mean and spread (max − min) over the seeds of the accuracy.

    They are None where a kind cannot keep the budget.
    """
    test, _ = fashion_mnist()
    name, title = ("kinds_healed", "after healing") if heal else ("kinds", "no healing")
    rows = {(row["network"], row["keep"], row["kind"]): row for row in earlier_rows(name)}
    for network in networks:
        net = reference(network)
        found = [gather_statistics(net, IMAGE, seed=seed) for seed in range(seeds)]
        for keep in keeps:
            for kind in kinds:
                settings = {"objective": "end_to_end", "kinds": kind if kind == "auto" else ("svd", kind)}
                row: dict[str, Any] = {"network": network, "keep": keep, "kind": kind, "seeds": seeds}
                row.update(accuracy=None, spread=None)
                with contextlib.suppress(InfeasibleBudgetError):
                    measured = [compressed(net, keep, settings, each, test, healed=heal) for each in found]
                    values = [each[" + healing" if heal else ""][0] for each in measured]
                    row.update(accuracy=statistics.mean(values), spread=max(values) - min(values))
                rows[network, keep, kind] = row
                print(row, flush=True)
        publish(name, f"Zero-shot accuracy of single kinds and all, {title}", list(rows.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heal", action="store_true")
    options = parser.parse_args()
    main(options.networks, options.keep, options.kinds, options.seeds, heal=options.heal)

"""Accuracy right after the swap with every kind alone and with all of them to choose from.

python -m benchmarks.kinds [--networks vgg resnet20] [--keep 0.1 0.05]

Fashion-MNIST, all 10,000 test images, end-to-end search of one seed, no healing. "Alone" is for the convolutions:
linear layers, where most kinds do not apply, have svd beside it.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.common import IMAGE, NETWORKS, publish, reference
from benchmarks.zero_shot import KEEP, accuracy, compressed
from lightning_compress.decompositions import AUTOMATIC
from lightning_compress.demo.data import FashionMNISTDataModule
from lightning_compress.errors import InfeasibleBudgetError
from lightning_compress.moments import gather_statistics


def main(networks: list[str], keeps: list[float]) -> None:
    """Prints one row per network and budget: the accuracy with each kind, None where it cannot keep the budget."""
    data = FashionMNISTDataModule()
    data.setup("test")
    test = DataLoader(data.test_dataloader().dataset, 500)
    alone = [kind for kind in AUTOMATIC if kind != "svd"]
    rows = []
    for name in networks:
        net = reference(name)
        found = gather_statistics(net, IMAGE, seed=0)
        for keep in keeps:
            row: dict[str, Any] = {"network": name, "keep": keep}
            for kind in ("auto", *alone):
                kinds = kind if kind == "auto" else ("svd", kind)
                settings = {"objective": "end_to_end", "kinds": kinds}
                try:
                    row[kind] = compressed(net, keep, settings, found, test, healed=False)[""][0]
                except InfeasibleBudgetError:
                    row[kind] = None
            row["auto − best alone"] = row["auto"] - max(row[kind] or 0.0 for kind in alone)
            rows.append(row)
            print(row, flush=True)
        dense = accuracy(net, test)
        print(f"{name}: dense {dense:.4f}")
    publish("kinds", "Zero-shot accuracy of each kind alone, 10,000 test images, no healing", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    options = parser.parse_args()
    main(options.networks, options.keep)

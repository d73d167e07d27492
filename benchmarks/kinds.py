"""Accuracy right after the swap with one kind alone, against all of them to choose from.

python -m benchmarks.kinds [--networks vgg resnet20] [--keep 0.1 0.05] [--kinds cp3 tucker2] [--seeds 3]

Fashion-MNIST, all 10,000 test images, end-to-end search before and after healing, as in `benchmarks.zero_shot`, whose
results "auto" is taken from: run that first. "Alone" is for the convolutions: linear layers, where most kinds do not
apply, have svd beside it. Rows of the results that are not measured again are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.common import IMAGE, NETWORKS, RESULTS, publish, reference
from benchmarks.zero_shot import HEALED, KEEP, compressed
from lightning_compress.demo.data import FashionMNISTDataModule
from lightning_compress.errors import InfeasibleBudgetError
from lightning_compress.moments import gather_statistics

ALONE = ("channel_svd", "spatial_svd", "tucker2", "tt", "cp3")
SUFFIXES = ("", " + healing")


def main(networks: list[str], keeps: list[float], kinds: list[str], seeds: int) -> None:
    """Prints one row per network, budget and kind: its accuracy, None where it cannot keep the budget, and auto's."""
    data = FashionMNISTDataModule()
    data.setup("test")
    test = DataLoader(data.test_dataloader().dataset, 500)
    path = RESULTS / "kinds.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {(row["network"], row["keep"], row["kind"]): row for row in old}
    for name in networks:
        net, auto = reference(name), _auto(name)
        found = [gather_statistics(net, IMAGE, seed=seed) for seed in range(seeds)]
        for keep in keeps:
            for kind in kinds:
                row: dict[str, Any] = {"network": name, "keep": keep, "kind": kind, "seeds": seeds}
                settings = {"objective": "end_to_end", "kinds": ("svd", kind)}
                try:
                    measured = [compressed(net, keep, settings, each, test, healed=True) for each in found]
                except InfeasibleBudgetError:
                    measured = []
                for suffix in SUFFIXES:
                    values = [each[suffix][0] for each in measured]
                    row[f"alone{suffix}"] = statistics.mean(values) if values else None
                    row[f"auto{suffix}"] = auto[keep, suffix]
                rows[name, keep, kind] = row
                print(row, flush=True)
    publish("kinds", "Zero-shot accuracy of single kinds and of auto, 10,000 test images", list(rows.values()))


def _auto(network: str) -> dict[tuple[float, str], float]:
    """Returns the accuracy of all kinds by budget and suffix of the row."""
    results = json.loads((RESULTS / f"zero_shot_{network}.json").read_text(encoding="utf-8"))
    return {
        (row["keep"], suffix): row["accuracy"]
        for row in results["rows"]
        for suffix in SUFFIXES
        if row["method"] == HEALED + suffix
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--kinds", nargs="+", default=list(ALONE), choices=ALONE)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    main(options.networks, options.keep, options.kinds, options.seeds)

"""Networks of other kinds right after compression, before any training: transformers, a GRU, depthwise, a wave.

python -m benchmarks.other_networks [--networks byte_gru ...] [--methods default] [--seeds 3] [--threads 2] [--chosen]

Bits per byte (less is better) or accuracy on the test part of each network's data, see `benchmarks.references`.
"uniform svd" keeps the same share of every layer by an SVD of its weights, "default" is `compress_` without data and
without time (`target=None`), "calibrated" the same with 256 real inputs of the training part. With --chosen the part
for choosing judges and nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.common import earlier_rows, publish
from benchmarks.references import REFERENCES, Part, trained
from lightning_compress import Budget, compress_

KEEP: dict[str, tuple[float, ...]] = {
    "byte_transformer": (0.5, 0.35),
    "byte_gru": (0.5, 0.3),
    "depthwise": (0.8, 0.6),
    "vit": (0.5, 0.35),
    "tones": (0.3, 0.15),
}
CALIBRATION = 256
METHODS: dict[str, dict[str, Any]] = {
    "uniform svd": {"method": "uniform", "objective": "weight", "kinds": ["svd", "channel_svd"], "heal": False},
    "weights": {"objective": "weight"},
    "default": {},
    "default, not healed": {"heal": False},
    "calibrated": {},
}
"""Row to the arguments of `compress_`."""


def compressed(name: str, keep: float, method: str, seed: int, part: Part) -> dict[str, float]:
    """Returns the score of a network that is compressed so, and the CPU seconds that took."""
    reference, model = REFERENCES[name], trained(name)
    settings = dict(METHODS[method])
    if method == "calibrated":
        generator = torch.Generator().manual_seed(seed)
        settings["calibration"] = [reference.draw("train", 64, generator)[0] for _ in range(CALIBRATION // 64)]
    torch.manual_seed(seed)
    start = time.process_time()
    compress_(model, Budget(params=keep), example_input=reference.example, target=None, seed=seed, **settings)
    return {"score": reference.score(model, part), "CPU s": time.process_time() - start}


def main() -> None:
    """Prints one row per network, budget and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(REFERENCES), choices=list(REFERENCES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chosen", action="store_true", help="judge by the part for choosing, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    part: Part = "choose" if options.chosen else "test"
    rows = {(r["network"], r["keep"], r["method"]): r for r in earlier_rows("other_networks")}
    for name in options.networks:
        dense = REFERENCES[name].score(trained(name), part)
        for keep in KEEP[name]:
            for method in options.methods:
                seeds = range(1 if method in {"uniform svd", "weights"} else options.seeds)
                measured = [compressed(name, keep, method, seed, part) for seed in seeds]
                scores = [each["score"] for each in measured]
                rows[name, keep, method] = {
                    "network": name,
                    "keep": keep,
                    "method": method,
                    "measure": REFERENCES[name].measure,
                    "dense": dense,
                    "score": statistics.mean(scores),
                    "spread": max(scores) - min(scores),
                    "seeds": len(scores),
                    "CPU s": statistics.mean(each["CPU s"] for each in measured),
                }
                print(rows[name, keep, method], flush=True)
        if not options.chosen:
            publish("other_networks", "Networks of other kinds right after compression", [*rows.values()])


if __name__ == "__main__":
    main()

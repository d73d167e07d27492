"""Reference networks on Fashion-MNIST: compressed, four epochs of fine-tuning, tested.

python -m benchmarks.fine_tuning [EXPERIMENT ...]     (default: fashion_resnet20)

About 10 minutes an experiment on two cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

from hydra import compose, initialize_config_dir

from benchmarks.common import WEIGHTS, publish
from lightning_compress.cli.app import run
from lightning_compress.cli.config import CONFIG_FOLDER


def main(experiments: list[str]) -> None:
    """Prints one row per experiment."""
    rows: list[dict[str, Any]] = []
    for experiment in experiments:
        network = experiment.removeprefix("fashion_")
        weights = WEIGHTS / f"{network}_fashion_mnist.safetensors"
        overrides = [f"experiment={experiment}", f"model.weights={weights}", "trainer.enable_progress_bar=false"]
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            cfg = compose("config", [*overrides, "logger=none", "plot=false"])
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = run(cfg, folder)
        accuracy = [s.metrics["accuracy"] for s in (report.dense, report.zero_shot, report.fine_tuned)]
        rows.append(
            {
                "network": network,
                "params kept": report.kept["params"],
                "MACs kept": report.kept["macs"],
                "latency kept": report.kept["latency"],
                "dense": accuracy[0],
                "zero-shot": accuracy[1],
                "fine-tuned": accuracy[2],
                "change": accuracy[2] - accuracy[0],
                "minutes": (time.perf_counter() - start) / 60,
            }
        )
    publish("fine_tuning", "Fashion-MNIST, 10,000 test images, 4 epochs of fine-tuning with distillation", rows)


if __name__ == "__main__":
    main(sys.argv[1:] or ["fashion_resnet20"])

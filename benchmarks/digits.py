"""The default command, timed as a whole, over seeds.

python -m benchmarks.digits [SEED ...]

Of 599 test images one is 0.17 points.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import publish


def main(seeds: list[int]) -> None:
    """Prints one row per seed."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "lightning_compress", f"seed={seed}", f"hydra.run.dir={folder}"]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        accuracy = {stage: report[stage]["metrics"]["accuracy"] for stage in ("dense", "zero_shot", "fine_tuned")}
        rows.append(
            {
                "seed": seed,
                "seconds": seconds,
                "smaller": 1 / report["kept"]["params"],
                "MACs kept": report["kept"]["macs"],
                "latency kept": report["kept"]["latency"],
                **accuracy,
                "change": accuracy["fine_tuned"] - accuracy["dense"],
            }
        )
    publish("digits", "lightning-compress (SmallCNN on digits, params=0.2), accuracy on 599 test images", rows)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2, 3, 4])

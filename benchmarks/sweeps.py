"""Sweeps of the main job, on digits: their time beside their fine-tunings, two jobs at once, and jobs that fail.

python -m benchmarks.sweeps [--launchers basic joblib ray submitit_local]

Each sweep begins with empty caches, so that its dense model is trained and its layers are timed. "over fine-tuning" is
the time of the whole command over that of its jobs' fine-tuning. The last rows are ten jobs on each launcher, three
with an impossible budget and one that kills its process: how many finished, and how many of the others `sweep.csv`
gives a reason for. joblib and submitit need the extra `sweeps`, Ray the extra `ray`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, publish

LAUNCHERS = ("basic", "joblib", "ray", "submitit_local")
EIGHT = "compression.budget.params=0.5,0.4,0.3,0.25,0.2,0.15,0.1,0.08"
TEN = "compression.budget.params=0.5,0.45,0.4,0.35,0.3,0.25,0.2,0.0005,0.0004,0.0003"
QUICK = ["task._target_=deadly.Deadly", "dense.epochs=2", "finetune.epochs=1", "plot=false", "compression.effort=fast"]
DEADLY = """
import os, signal

from lightning_compress import Compress
from lightning_compress.cli.demo.task import ClassificationTask


class Deadly(ClassificationTask):
    def on_train_start(self):
        if any(isinstance(each, Compress) and each.budget.params == 0.25 for each in self.trainer.callbacks):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    launchers = parser.parse_args().launchers
    rows = [
        {"jobs": "8 budgets, one at a time", "launcher": "basic", **sweep("basic", [EIGHT], threads=threads)}
        for threads in (1, 2)
    ]
    if "joblib" in launchers:
        at_once = sweep("joblib", [EIGHT, "hydra.launcher.n_jobs=2"], threads=1)
        rows.append({"jobs": "8 budgets, two at once", "launcher": "joblib", **at_once})
    for row in rows:
        row["of one thread's speed"] = rows[0]["seconds"] / row["seconds"]
    publish("sweeps", "Sweeps of the main job", rows)
    for launcher in launchers:
        found = sweep(launcher, [*QUICK, TEN], threads=1)
        rows.append({"jobs": "10 budgets, 3 impossible, 1 killed", "launcher": launcher, **found})
        rows[-1] |= {"over fine-tuning": None, "of one thread's speed": None}
        publish("sweeps", "Sweeps of the main job", rows)


def sweep(launcher: str, overrides: Sequence[str], threads: int) -> dict[str, Any]:
    """Returns what came of one sweep in a process of its own, and how long it took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "sweep", f"{scratch}/cache"
        (Path(scratch) / "deadly.py").write_text(DEADLY)
        command = [sys.executable, "-m", "lightning_compress", "-m", *overrides, f"hydra.sweep.dir={folder}"]
        command += [f"hydra/launcher={launcher}"] if launcher != "basic" else []
        start = time.perf_counter()
        subprocess.run(
            command,
            cwd=scratch,
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parent),
                "LIGHTNING_COMPRESS_CACHE": cache,
                "OMP_NUM_THREADS": str(threads),
            },
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        with (folder / "sweep.csv").open(encoding="utf-8") as file:
            runs = list(csv.DictReader(file))
        reports = [json.loads(path.read_text("utf-8")) for path in folder.glob("*/report.json")]
        tuning = sum(report["seconds"]["fine-tuning"] for report in reports)
        ended = [run["status"] for run in runs]
        return {
            "threads": threads,
            "finished": ended.count("finished"),
            "with a reason": sum(run["status"] != "finished" and bool(run["reason"]) for run in runs),
            "seconds": seconds,
            "fine-tuning": tuning,
            "over fine-tuning": seconds / tuning,
        }


if __name__ == "__main__":
    main()

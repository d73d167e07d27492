"""What a compression itself costs: seconds and memory of `compress_` with default settings, network by network.

python -m benchmarks.scale [--networks resnet20 resnet18 …] [--threads 2] [--before FOLDER] [--limit 900]

Every network is compressed to 20 % of its parameters in a process of its own; `CPU` are the seconds of all its threads,
`memory` is what the process takes at most above what it takes with torch and the model loaded. Times of layers are
measured anew (no cache). With --before the same is run with the version in another folder, such as a git worktree. What
takes longer than the limit is stopped and has no figures.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

KEEP = 0.2


def _reference(name: str) -> nn.Module:
    from benchmarks.common import reference  # noqa: PLC0415

    return reference(name)


def _vision(name: str) -> nn.Module:
    from torchvision.models import get_model  # noqa: PLC0415

    return cast(nn.Module, get_model(name))


def _bert(_: str) -> nn.Module:
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    return cast(nn.Module, BertModel(BertConfig()))


def _gpt2(_: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    return cast(nn.Module, GPT2LMHeadModel(GPT2Config()))


def _conv1d(_: str) -> nn.Module:
    return nn.Sequential(*(part for _ in range(4) for part in (nn.Conv1d(64, 64, 63, padding=31), nn.ReLU())))


def _pitch(_: str) -> nn.Module:
    return nn.Sequential(nn.Conv1d(1024, 1024, 64, padding=32), nn.ReLU(), nn.Conv1d(1024, 64, 64))


COLOUR, TOKENS = (1, 3, 224, 224), torch.zeros(1, 128, dtype=torch.int64)
NETWORKS: dict[str, tuple[Callable[[str], nn.Module], Any]] = {
    "resnet20": (_reference, (1, 1, 28, 28)),
    "vgg": (_reference, (1, 1, 28, 28)),
    "resnet18": (_vision, COLOUR),
    "resnet50": (_vision, COLOUR),
    "vit_b_16": (_vision, COLOUR),
    "bert": (_bert, TOKENS),
    "gpt2": (_gpt2, TOKENS),
    "gru": (lambda _: nn.Sequential(nn.GRU(80, 256, 2, bidirectional=True, batch_first=True)), (1, 300, 80)),
    "lstm": (lambda _: nn.Sequential(nn.LSTM(40, 256, 3, batch_first=True)), (1, 160, 40)),
    "conv1d": (_conv1d, (1, 64, 4000)),
    "pitch": (_pitch, (1, 1024, 200)),
}


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--before", type=Path, help="folder with another version")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per network")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child, options.threads)))
        return
    from benchmarks.common import earlier_rows, publish  # noqa: PLC0415

    rows = {row["network"]: row for row in earlier_rows("scale")}
    for name in options.networks:
        row: dict[str, Any] = {"network": name, "threads": options.threads}
        row.update(run(name, options.threads, options.limit, None))
        if options.before is not None:
            before = run(name, options.threads, options.limit, options.before)
            row.update({f"{key} before": value for key, value in before.items()})
        rows[name] = row
        columns = dict.fromkeys(column for each in rows.values() for column in each)
        filled = [{**columns, **each} for each in rows.values()]
        publish("scale", f"A compression to {100 * KEEP:.0f} % of the parameters with default settings", filled)


def run(name: str, threads: int, limit: float, folder: Path | None) -> dict[str, Any]:
    """Returns the figures of a network in a process of its own, with the version in a folder."""
    folder = folder if folder is not None else Path(__file__).parent.parent
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--threads", str(threads)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "LIGHTNING_COMPRESS_CACHE": cache}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=limit, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            return {"CPU": None, "wall": None, "memory": None, "outcome": f"stopped after {limit:.0f} s"}
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["killed"])[-1][:80]
        return {"CPU": None, "wall": None, "memory": None, "outcome": why}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "outcome": "done"}


def measured(name: str, threads: int) -> dict[str, float]:
    """Returns CPU seconds, wall seconds and GiB of compressing a network in this process."""
    from lightning_compress import Budget, compress_  # noqa: PLC0415

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    model = build(name).eval()
    loaded = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    compress_(model, Budget(params=KEEP), example_input=example)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"CPU": time.process_time() - cpu, "wall": time.perf_counter() - wall, "memory": most - loaded}


def resident() -> float:
    """Returns the memory of this process in GiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**30


if __name__ == "__main__":
    main()

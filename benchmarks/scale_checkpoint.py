"""Time and memory of `compress_checkpoint` by the size of the model, at half of the parameters.

python -m benchmarks.scale_checkpoint [--sizes 10M 100M 1.1B] [--keep 0.5] [--threads 2] [--folder FOLDER]

Checkpoints of the shape of Llama, bfloat16 in shards, are written tensor by tensor: matrices of random numbers with
singular values that fall off slowly. Each is compressed by a process of its own, one layer per thread at a time; its
memory is the most that the kernel has seen it hold. The work per parameter grows with the width of the layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common import earlier_rows, publish
from lightning_compress import Budget, compress_checkpoint

SHARD = 5 * 10**8
"""Bytes of a file of the checkpoint, or one layer if that is larger."""
DECAY = 0.6
"""Singular values fall off as the power −DECAY / 2 of their number, from the tenth on."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model.

    Attributes:
        words: Rows of the table and outputs of the last layer.
        width: Of the stream between layers.
        inner: Width inside the feed-forward parts.
        keys: Width of keys and of values.
        blocks: Their number.
    """

    words: int
    width: int
    inner: int
    keys: int
    blocks: int


SHAPES = {
    "10M": Shape(8000, 320, 880, 320, 4),
    "100M": Shape(32000, 640, 1760, 320, 12),
    "1.1B": Shape(32000, 2048, 5632, 256, 22),
}
"""The last one is TinyLlama's."""


class Block(nn.Module):
    """The layers of a block of Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width)
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.keys, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.keys, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(shape.width)
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)


class Llama(nn.Module):
    """The layers of Llama; nothing is computed with it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.words, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.words, bias=False)


def architecture(name: str) -> nn.Module:
    """Returns a model without weights."""
    with torch.device("meta"):
        return Llama(SHAPES[name]).to(torch.bfloat16)


def main(sizes: list[str], keep: float, threads: int, folder: str | None) -> None:
    """Publishes one row per size; those of other sizes stay as they were."""
    torch.set_num_threads(threads)
    kept = [row for row in earlier_rows("scale_checkpoint") if row["model"] not in sizes]
    rows = kept + [measured(name, keep, threads, folder) for name in sizes]
    rows.sort(key=lambda row: row["parameters"])
    columns = ("model", "threads", "seconds", "CPU seconds", "peak gigabytes", "CPU s / million")
    shown = [{column: row[column] for column in columns} for row in rows]
    publish("scale_checkpoint", f"Llama shapes in bfloat16 at {keep:.0%} of the parameters", rows, shown=shown)


def measured(name: str, keep: float, threads: int, folder: str | None) -> dict[str, Any]:
    """Returns what the compression of a model took."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        written = write(architecture(name), Path(place) / "in")
        options = ["--child", place, "--sizes", name, "--keep", str(keep), "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.scale_checkpoint", *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        after = sum(path.stat().st_size for path in (Path(place) / "out").glob("*.safetensors"))
    million = 1e6 / found["parameters"]
    row = {
        "model": name,
        "threads": threads,
        **found,
        "gigabytes before": written / 1e9,
        "gigabytes after": after / 1e9,
    }
    return row | {"seconds / million": found["seconds"] * million, "CPU s / million": found["CPU seconds"] * million}


def child(name: str, keep: float, threads: int, folder: Path) -> None:
    """Compresses a checkpoint and prints what it took."""
    torch.set_num_threads(threads)
    libraries = gigabytes_held()
    start = time.perf_counter()
    phases: dict[str, float] = {}
    before = time.process_time()

    def report(what: str, _: float) -> None:
        phases.setdefault(what, time.perf_counter() - start)

    plan = compress_checkpoint(
        folder / "in", folder / "out", Budget(params=keep), model=lambda: architecture(name), progress=report
    )
    row = {
        "parameters": plan.dense.params,
        "kept": plan.compressed.params / plan.dense.params,
        "seconds": time.perf_counter() - start,
        "of these tables": phases["exact search"] - phases["decomposing layers"],
        "of these factors": phases["writing the checkpoint"] - phases["factorising layers"],
        "CPU seconds": time.process_time() - before,
        "peak gigabytes": gigabytes_held(),
        "of these libraries": libraries,
    }
    print(json.dumps(row))


def gigabytes_held() -> float:
    """Returns the most memory that this process has held so far; what getrusage says begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def write(model: nn.Module, folder: Path) -> int:
    """Writes a checkpoint of a model that has no weights, shard by shard, and returns its bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(part, str(folder / name))
        where.update(dict.fromkeys(part, name))
        part.clear()

    for name, tensor in model.state_dict().items():
        part[name] = values_like(tensor, generator)
        total += tensor.nbytes
        if sum(value.nbytes for value in part.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def values_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Returns values of a tensor's shape: ones for norms, else a matrix whose singular values fall off."""
    if tensor.ndim == 1:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    rows, columns = tensor.shape
    n = min(rows, columns)
    scale = (torch.arange(n) / 10).clamp_min(1) ** (-DECAY / 2)
    left = torch.randn(rows, n, generator=generator) * scale
    right = torch.randn(n, columns, generator=generator) / n
    return (left @ right).to(tensor.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="for the checkpoints, several gigabytes; a temporary one by default")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.child is None:
        main(own.sizes, own.keep, own.threads, own.folder)
    else:
        child(own.sizes[0], own.keep, own.threads, own.child)

"""What every benchmark shares: the reference networks, the table, the JSON beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_compress
from lightning_compress.analysis.latency.table import processor
from lightning_compress.cli.demo.data import FashionMNISTDataModule
from lightning_compress.cli.demo.models import VGG, ResNet20
from lightning_compress.core import store
from lightning_compress.surgery.save import load_weights_

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
RESULTS = HERE / "results"
IMAGE = (1, 1, 28, 28)
NETWORKS: dict[str, type[nn.Module]] = {"resnet20": ResNet20, "vgg": VGG}

setattr(store, "find", lambda _: None)  # noqa: B010 (seconds are those of a first compression)
setattr(store, "keep", lambda *_: None)  # noqa: B010


def reference(name: str) -> nn.Module:
    """Returns a reference network with its Fashion-MNIST weights, in eval mode."""
    net = NETWORKS[name]()
    load_weights_(net, WEIGHTS / f"{name}_fashion_mnist.safetensors")
    return net.eval()


def fashion_mnist() -> tuple[DataLoader[Any], Dataset[Any]]:
    """Returns the 10,000 test images in batches of 500, and the training set."""
    data = FashionMNISTDataModule()
    data.setup("test")
    return DataLoader(data.test_dataloader().dataset, 500), data.train_dataloader().dataset


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    packages = ("torch", "lightning", "scipy", "tensorly")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def commit_of(folder: Path) -> str | None:
    """Returns the commit a tracked folder is at, marked if its files differ from it; None if git knows none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if not git("ls-files", "."):
            return None
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit} with changes" if git("status", "--porcelain", ".") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = commit_of(Path(lightning_compress.__file__).parent)
"""The package's commit when the benchmark began."""
ORIGIN = ("commit", "processor")
"""What rows kept from an earlier run say for themselves; what others say of a file holds for the rest of its rows."""


def earlier_rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of `results/NAME.json`, each with its commit and processor; none if there is no file."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    origin = {"commit": content.get("commit"), "processor": content["machine"]["processor"]}
    return [{**origin, **row} for row in content["rows"]]


def publish(
    name: str,
    title: str,
    rows: Collection[Mapping[str, Any]],
    *,
    shown: Sequence[Mapping[str, Any]] | None = None,
    **more: Any,
) -> None:
    """Prints the rows as a table and writes `results/NAME.json`.

    Notes on the figures (`"notes"`, a list of sentences written into the file by hand) are those of earlier rows, so
    they are left out.

    Args:
        name: Of the file, without its ending.
        title: Of the table.
        rows: One or more, with the same keys.
        shown: What is printed in the place of the rows.
        **more: What else is written.
    """
    printed = shown or list(rows)
    columns = [column for column in printed[0] if column not in ORIGIN]
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if isinstance(printed[0][column], str) else "right", no_wrap=True)
    for row in printed:
        table.add_row(*(f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console = Console(width=140)
    console.print(table)
    on = ", ".join(f"{key} {value}" for key, value in {**machine(), "commit": COMMIT}.items() if value)
    console.print(on, soft_wrap=True, highlight=False)
    save(name, title, rows, **more)


def save(name: str, title: str, rows: Collection[Mapping[str, Any]], **more: Any) -> None:
    """Writes `results/NAME.json`, for benchmarks that keep what they have before they publish all; see `publish`."""
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "machine": machine(), "commit": COMMIT, **more, "rows": [dict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""What every benchmark shares: the reference networks, the table, the JSON beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress.cli.demo.data import FashionMNISTDataModule
from lightning_compress.cli.demo.models import VGG, ResNet20
from lightning_compress.surgery.save import load_weights_

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
RESULTS = HERE / "results"
IMAGE = (1, 1, 28, 28)
NETWORKS: dict[str, type[nn.Module]] = {"resnet20": ResNet20, "vgg": VGG}


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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def earlier_rows(name: str) -> list[dict[str, Any]]:
    """Returns the rows of `results/NAME.json`, none if there is no such file."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def publish(name: str, title: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Prints the rows as a table and writes `results/NAME.json`."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console(width=140)
    console.print(table)
    on = machine()
    console.print(", ".join(f"{key} {value}" for key, value in on.items() if value), soft_wrap=True, highlight=False)
    RESULTS.mkdir(exist_ok=True)
    content = {"title": title, "machine": on, **more, "rows": [dict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

"""8-bit integers on top of a compression: accuracy and size of exported files.

python -m benchmarks.export [--networks vgg resnet20] [--formats onnx plain] [--calibration 256] [--effort fast]

The reference networks keep a fifth of their parameters (`compress_` without a target, no fine-tuning). Each is
exported in single precision and in 8-bit integers, static where the format takes calibration inputs (training images,
not augmented) and without them, and every file is tested on the 10,000 test images in its own runtime. `smaller` is the
size of the dense network's file of the same format over that of the file, `loss of int8` the accuracy that the integers
cost, and `difference` how far its outputs are from those of torch on some inputs, relative to the largest output. ONNX
files run in ONNX Runtime, those of format `plain` in torch.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import IMAGE, earlier_rows, fashion_mnist, publish, reference
from lightning_compress import compress_
from lightning_compress.export.api import Exported, export_model
from lightning_compress.export.running import load_exported

PARAMS = 0.2
BATCH = 64
SHOWN = ("network", "format", "file", "bytes", "smaller", "accuracy", "loss of int8")
"""Columns of the table in the terminal."""


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=["vgg", "resnet20"], choices=["vgg", "resnet20"])
    parser.add_argument("--formats", nargs="+", default=["onnx", "plain"])
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--effort", default="fast", choices=["fast", "balanced", "thorough"])
    arguments = parser.parse_args()
    rows = {(row["network"], row["format"], row["file"]): row for row in earlier_rows("export")}
    for name in arguments.networks:
        dense = reference(name)
        small = copy.deepcopy(dense)
        compress_(small, {"params": PARAMS}, example_input=IMAGE, target=None, effort=arguments.effort)
        for format in arguments.formats:
            for row in measure(name, dense, small.eval(), format, arguments.calibration):
                rows[name, format, row["file"]] = row
            shown = [{key: row[key] for key in SHOWN} for row in rows.values()]
            publish("export", "8-bit integers on top of a fifth of the parameters", list(rows.values()), shown=shown)


def measure(name: str, dense: nn.Module, small: nn.Module, format: Any, count: int) -> list[dict[str, Any]]:
    """Returns the rows of one network in one format."""
    loader, train = fashion_mnist()
    images: Tensor = train[:count][0]
    batches = list(torch.split(images, BATCH))
    ways: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("dense, float32", dense, {}),
        ("compressed, float32", small, {}),
        ("compressed, int8", small, {"int8": True, "calibration": batches}),
        ("compressed, int8 without inputs", small, {"int8": True}),
    ]
    if format in ("plain", "torchscript"):  # of these the weights alone are quantised
        ways = [*ways[:2], ways[3]]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (what, net, settings) in enumerate(ways):
            path = Path(folder) / f"{index}"
            done = export_model(net, path, format=format, example_input=images[:8].clone(), **settings)
            found = accuracy(done, loader)
            lost = rows[1]["accuracy"] - found if done.int8 else None
            rows.append({"network": name, "format": format, "file": what, "bytes": done.bytes, "accuracy": found})
            rows[-1] |= {"smaller": rows[0]["bytes"] / done.bytes, "loss of int8": lost, "difference": done.difference}
            rows[-1]["quantised"] = done.int8 or "no"
    return rows


def accuracy(done: Exported, loader: Any) -> float:
    """Returns the share of test images whose class a file finds."""
    run, right = load_exported(done.path), 0
    with torch.no_grad():
        for images, labels in loader:
            right += int((run(images).argmax(1) == labels).sum())
    return right / len(loader.dataset)


if __name__ == "__main__":
    main()

"""The command `lightning-compress-export`: a run's model as a file for elsewhere, tested on the run's data."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_compress.cli.run_folder import RunFolder, batch_of, open_run, rows_of, run_command
from lightning_compress.cli.run_log import say
from lightning_compress.core.checks import require_count
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.export.api import FORMATS, Exported, export_model
from lightning_compress.export.running import load_exported, seconds_of
from lightning_compress.export.torch_export import compiler

USAGE = f"""\
lightning-compress-export RUN_FOLDER [format={"|".join(FORMATS)}] [int8=true] [file=PATH]
    [calibration=256] [dynamic_batch=true] [aot=true]

Writes the run's compressed model into RUN_FOLDER/export (or to file=PATH), compares it with torch on test inputs, tests
it, and times it in turns with the dense one. calibration= is how many validation samples int8 is calibrated with, 0 for
none. With format=torch_export AOTInductor's package is made too where a C++ compiler is, unless aot=false."""

SETTINGS: dict[str, Any] = {
    "format": "onnx",
    "int8": False,
    "file": None,
    "calibration": 256,
    "dynamic_batch": True,
    "aot": True,
}
CHECKED = 16
"""Test inputs on which a file is compared with torch."""
SECONDS = 1.0
"""How long the turns of each file take together at least."""


@dataclass(frozen=True)
class Shipped:
    """One column: a file and what was measured of it.

    Attributes:
        name: Of the column.
        exported: The file.
        metrics: On the test data.
        latency: Seconds of one sample, the median of all turns.
        faster: Time of the dense file over that of this one, the median of the ratios inside a turn.
    """

    name: str
    exported: Exported
    metrics: Mapping[str, float] = field(default_factory=dict)
    latency: float = 0.0
    faster: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Returns it as export.json holds it."""
        own = self.exported
        return {
            "file": str(own.path),
            "bytes": own.bytes,
            "difference": own.difference,
            "int8": own.int8,
            "dynamic_batch": own.dynamic_batch,
            "latency_ms": 1e3 * self.latency,
            "faster": self.faster,
            "metrics": dict(self.metrics),
        }


def export_run(folder: str | Path, **settings: Any) -> list[Shipped]:
    """Does what the command does.

    Args:
        folder: Of the run.
        **settings: Those of `SETTINGS`.

    Returns:
        The dense model, the compressed one and, with int8, the quantised one. The dense file is gone by then.

    Raises:
        LightningCompressError: With the cause in its message.
    """
    settings = {**SETTINGS, **settings}
    require_count(f"calibration={settings['calibration']!r}", settings["calibration"], 0)
    run, format = open_run(folder), settings["format"]
    path = Path(settings["file"] or run.path / "export" / f"model_{format}")
    inputs = run.inputs(CHECKED, stage="test")[0]
    given = {"format": format, "example_input": inputs, "dynamic_batch": settings["dynamic_batch"]}
    with tempfile.TemporaryDirectory() as aside:
        dense = export_model(run.task(compressed=False)[1], Path(aside) / "dense", **given)
        net = run.task(compressed=True)[1]
        columns = [Shipped("dense float32", dense, run.report.dense.metrics)]
        columns.append(_tested(run, "compressed float32", export_model(net, path, **given)))
        if settings["int8"]:
            calibration = run.inputs(settings["calibration"], stage="fit") if settings["calibration"] else None
            own = path.with_name(path.name.removesuffix(FORMATS[format].ending) + "_int8")
            quantised = export_model(net, own, **given, int8=True, calibration=calibration)
            columns.append(_tested(run, "compressed int8", quantised))
        columns = _timed(columns, inputs)
    content = {"format": format, "columns": {each.name: each.as_dict() for each in columns}}
    (path.parent / f"export_{format}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return columns


def table_of(columns: Sequence[Shipped]) -> Table:
    """Returns the columns as the terminal shows them."""
    dense = columns[0].exported
    found: list[dict[str, str]] = []
    for each in columns:
        own = each.exported
        values = {"file, bytes": f"{own.bytes:,}", "smaller": f"{dense.bytes / own.bytes:.2f}x"}
        values |= {"latency, batch 1": f"{1e3 * each.latency:.3f} ms", "faster": f"{each.faster:.2f}x"}
        values |= {name: f"{value:.4f}" for name, value in each.metrics.items()}
        values["difference from torch"] = f"{own.difference:.1e}"
        found.append(values)
    table = Table(title=f"{columns[1].exported.format}: the file of each against the dense one", title_justify="left")
    for index, name in enumerate(("", *(each.name for each in columns))):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows_of(found):
        table.add_row(*row)
    return table


def _tested(run: RunFolder, name: str, exported: Exported) -> Shipped:
    return Shipped(name, exported, run.test(load_exported(exported.path)))


def _timed(columns: Sequence[Shipped], inputs: Any) -> list[Shipped]:
    """Returns the columns with their times, measured in turns on one sample."""
    own = columns[1].exported
    one = batch_of(inputs, 1 if own.dynamic_batch or own.format == "executorch" else CHECKED)
    turns = seconds_of([load_exported(each.exported.path) for each in columns], one, SECONDS)
    return [
        replace(
            each,
            latency=statistics.median(times),
            faster=statistics.median(a / b for a, b in zip(turns[0], times, strict=True)),
        )
        for each, times in zip(columns, turns, strict=True)
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command."""
    run_command(words, SETTINGS, USAGE, _command)


def _command(folder: str, settings: dict[str, Any]) -> None:
    columns = export_run(folder, **settings)
    Console().print(table_of(columns))
    for each in columns[1:]:
        how = f", int8 {each.exported.int8}" if each.exported.int8 else ""
        say(f"{each.name}: {escape(str(each.exported.path))}{how}")
    if settings["format"] == "torch_export" and settings["aot"]:
        if compiler() is None:
            say("no AOTInductor package: there is no C++ compiler. Install g++ or clang++, or set CXX.")
            return
        try:
            say("compiling by AOTInductor")
            compiled = export_run(folder, **{**settings, "format": "aot_inductor", "file": None})
        except UnsupportedError as error:
            say(f"no AOTInductor package: {escape(str(error))}")
            return
        Console().print(table_of(compiled))

"""The command `lightning-compress-eval`: tests a run's model, or a file exported from it, on the run's data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress.cli.report import BATCH, Report
from lightning_compress.cli.run_folder import COMPRESSED, batch_of, open_run, run_command
from lightning_compress.export.running import Runner, load_exported, seconds_of, size_of

USAGE = """\
lightning-compress-eval RUN_FOLDER [file=PATH]

Tests the compressed model of a run, or a file that lightning-compress-export wrote, on the run's test data and prints
the run's table with it. A folder of format "plain" is a file here; the code in it is run."""

SETTINGS: dict[str, Any] = {"file": None}


@dataclass(frozen=True)
class Evaluated:
    """What was measured.

    Attributes:
        name: Of what was tested.
        report: That of the run: its zero-shot figures are those the run ended with, its fine-tuned ones those of what
            was tested now; the times are all new, measured in turns.
    """

    name: str
    report: Report

    def table(self) -> Table:
        """Returns the rows of the run's table for the terminal."""
        table = Table(title=f"{self.name} on the test data of the run", title_justify="left")
        for index, name in enumerate(("", "dense", "fine-tuned", "this", "kept / change")):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.report.rows():
            table.add_row(*row)
        return table


def evaluate_run(folder: str | Path, file: str | Path | None = None, *, seconds: float = 1.0) -> Evaluated:
    """Does what the command does.

    Args:
        folder: Of the run.
        file: What to test, None for the model that the run saved.
        seconds: How long the turns of each model take together at least.

    Raises:
        LightningCompressError: With the cause in its message.
    """
    run = open_run(folder)
    dense, net = run.task(compressed=False)[1], run.task(compressed=True)[1]
    runner: Runner = _torch(net) if file is None else load_exported(file)
    metrics = run.test(None if file is None else runner)
    inputs = run.inputs(1, stage="test")[0]
    runners = [_torch(dense), _torch(net), *([] if file is None else [runner])]
    one, many = (_times(runners, batch_of(inputs, size), seconds) for size in (1, BATCH))
    stages = [run.report.dense, run.report.fine_tuned]
    size = run.report.fine_tuned.costs.bytes if file is None else size_of(Path(file))
    stages.append(replace(stages[1], metrics=metrics, costs=replace(stages[1].costs, bytes=size)))
    if file is None:
        one, many = [*one, one[-1]], [*many, many[-1]]
    timed = [
        replace(stage, latency=latency, throughput=None if batch is None else BATCH / batch)
        for stage, latency, batch in zip(stages, one, many, strict=True)
    ]
    report = Report(run.report.plan, timed[0], timed[1], timed[2])
    return Evaluated(COMPRESSED if file is None else Path(file).name, report)


def _torch(net: nn.Module) -> Runner:
    def run(*inputs: Any) -> Any:
        with torch.no_grad():
            return net(*inputs)

    return run


def _times(runners: Sequence[Runner], inputs: tuple[Any, ...], seconds: float) -> list[float | None]:
    """Returns the seconds of each runner on these inputs, None for one that does not take that many samples."""
    able = [_takes(runner, inputs) for runner in runners]
    turns = iter(seconds_of([runner for runner, can in zip(runners, able, strict=True) if can], inputs, seconds))
    return [statistics.median(next(turns)) if can else None for can in able]


def _takes(runner: Runner, inputs: tuple[Any, ...]) -> bool:
    try:
        runner(*inputs)
    except Exception:  # whatever a runtime says of a batch that its file was not made for
        return False
    return True


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command."""
    run_command(words, SETTINGS, USAGE, lambda folder, given: Console().print(evaluate_run(folder, **given).table()))

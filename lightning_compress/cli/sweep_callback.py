"""Sums a multirun up: after each job, at the end, after an interrupt, and again on demand."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback as HydraCallback
from omegaconf import DictConfig
from rich.markup import escape
from typing_extensions import override

from lightning_compress.cli.config import or_exit
from lightning_compress.cli.records import RUNNING
from lightning_compress.cli.run_log import show
from lightning_compress.cli.sweep import Sweep, read_sweep, show_sweep, write_sweep
from lightning_compress.core.errors import LightningCompressError

_running: list[tuple[Path, str | None]] = []
"""The sweep of this process that was not summed up yet."""


class SweepSummary(HydraCallback):
    """A Hydra callback that keeps sweep.csv, sweep.md and pareto.png in the folder of a multirun.

    Args:
        metric: What runs are judged by; None for their main metric.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remembers the folder, for a sweep that is interrupted."""
        _running[:] = [(Path(config.hydra.sweep.dir), self.metric)]

    @override
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Writes the tables anew; runs where the job ran."""
        if str(config.hydra.mode) != "RunMode.MULTIRUN":
            return
        with contextlib.suppress(LightningCompressError):  # said at the end
            write_sweep(read_sweep(config.hydra.sweep.dir, self.metric), plot=False)

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Measures the times that are missing, one run at a time, writes tables and plot, and prints the best."""
        _running.clear()
        or_exit(lambda: sum_up(config.hydra.sweep.dir, self.metric))


@contextlib.contextmanager
def sweep_summed_up() -> Iterator[None]:
    """Sums up a multirun that was started inside and did not come to its end, as after Ctrl-C; it measures no times."""
    _running.clear()
    try:
        yield
    finally:
        if _running:
            folder, metric = _running.pop()
            _wait_for_ends(folder)
            with contextlib.suppress(LightningCompressError):
                sum_up(folder, metric, measure=False)


def _wait_for_ends(folder: Path) -> None:
    """Gives jobs that were interrupted a moment to end."""
    for _ in range(20):
        with contextlib.suppress(LightningCompressError):
            if not any(run.status == RUNNING for run in read_sweep(folder).runs):
                return
        time.sleep(0.25)


def sum_up(folder: str | Path, metric: str | None = None, *, measure: bool = True) -> Sweep:
    """Writes and prints the summary of a folder of runs.

    Args:
        folder: Of a multirun.
        metric: What runs are judged by; None for their main metric.
        measure: Whether latencies that are missing are measured first, one run at a time.

    Raises:
        DataNotFoundError: If there is no run.
        OutputFolderError: If the folder cannot be written.
    """
    sweep = read_sweep(folder, metric)
    if measure and _measure_missing(sweep):
        sweep = read_sweep(folder, metric)
    files = write_sweep(sweep)
    show_sweep(sweep)
    show(f"written to {', '.join(escape(str(file)) for file in files)}")
    return sweep


def _measure_missing(sweep: Sweep) -> bool:
    """Measures runs without a latency; returns whether there were any."""
    missing = [r for r in sweep.finished if r.record is not None and r.report and r.report.fine_tuned.latency is None]
    if not missing:
        return False
    from lightning_compress.cli.app import measure_again  # noqa: PLC0415, the application imports this module

    show(f"measuring the latency of {len(missing)} runs, one at a time")
    for run in missing:
        assert run.record is not None
        try:
            measure_again(sweep.folder / run.name, run.record.config)
        except LightningCompressError as error:
            show(f"run {run.name}: its latency cannot be measured: {escape(str(error))}")
    return True


def main(arguments: list[str] | None = None) -> None:
    """The command `lightning-compress-sweep`: sums a folder of runs up again."""
    parser = argparse.ArgumentParser(prog="lightning-compress-sweep", description=main.__doc__)
    parser.add_argument("folder", help="the folder of a multirun, such as multirun/2025-01-31/12-00-00")
    parser.add_argument("--metric", help="what runs are judged by; their accuracy, if not given")
    parser.add_argument("--no-measure", action="store_true", help="measure no latency that is missing")
    given = parser.parse_args(arguments)
    or_exit(lambda: sum_up(given.folder, given.metric, measure=not given.no_measure))

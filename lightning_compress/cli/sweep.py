"""A folder of runs, summed up: sweep.csv, sweep.md, pareto.png and the best run of each budget."""

from __future__ import annotations

import csv
import io
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_compress.cli.objectives import KEPT, is_smaller_better, main_metric
from lightning_compress.cli.read_report import read_report
from lightning_compress.cli.records import FINISHED, KILLED, RECORD, RUNNING, JobRecord, write_whole
from lightning_compress.cli.report import Report, markdown_table
from lightning_compress.cli.run_log import show
from lightning_compress.core.errors import DataNotFoundError, OutputFolderError, PlanError, UnsupportedError
from lightning_compress.core.plan import percent

UNFINISHED = "unfinished"
_IGNORED = (".earlier", ".submitit", "dense")


@dataclass(frozen=True)
class Run:
    """One run of a sweep, finished or not.

    Attributes:
        name: Its folder, as seen from that of the sweep.
        status: "finished", "failed", "killed", "running", or "unfinished" where its process is gone without a word.
        reason: Why it did not finish.
        overrides: What the sweep set for it.
        report: What it measured.
        record: What it left of itself.
    """

    name: str
    status: str
    reason: str | None
    overrides: tuple[str, ...]
    report: Report | None
    record: JobRecord | None = None

    @property
    def budget(self) -> str:
        """The budget that was asked for."""
        report = self.report
        if report is not None:
            budget = report.asked or report.plan.budget
            return "" if budget is None else str(budget)
        found = [o.rpartition("budget.")[2] for o in self.overrides if "budget." in o]
        return ", ".join(found)


@dataclass(frozen=True)
class Sweep:
    """All runs of a folder.

    Attributes:
        folder: Where they lie.
        runs: By number.
        metric: What they are judged by.
    """

    folder: Path
    runs: tuple[Run, ...]
    metric: str

    @property
    def finished(self) -> list[Run]:
        """Those with a report."""
        return [run for run in self.runs if run.report is not None]

    @property
    def unfinished(self) -> list[Run]:
        """Those without."""
        return [run for run in self.runs if run.report is None]

    def value(self, run: Run) -> float:
        """Returns the metric of a finished run at the end."""
        assert run.report is not None
        return float(run.report.fine_tuned.metrics.get(self.metric, float("nan")))

    def best(self) -> dict[str, Run]:
        """Returns the best run of each budget, largest metric first where larger is better."""
        sign = -1 if is_smaller_better(self.metric) else 1
        best: dict[str, Run] = {}
        for run in self.finished:
            rival = best.get(run.budget)
            if rival is None or sign * self.value(run) > sign * self.value(rival):
                best[run.budget] = run
        return dict(sorted(best.items(), key=lambda item: -_kept(item[1], "params")))

    def timed(self) -> bool:
        """Returns whether all finished runs have a latency."""
        return all(run.report.fine_tuned.latency is not None for run in self.finished if run.report)


def read_sweep(folder: str | Path, metric: str | None = None) -> Sweep:
    """Reads the runs below a folder.

    Args:
        folder: Of a multirun, or of any runs of the application.
        metric: What to judge them by; None for their main metric.

    Raises:
        DataNotFoundError: If there is no run.
    """
    folder = Path(folder)
    found = {path.parent for name in (RECORD, "report.json") for path in folder.rglob(name)}
    found |= {path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")}
    places = [place for place in found if not set(place.relative_to(folder).parts) & set(_IGNORED)]
    if not places:
        msg = f"no run is in {str(folder)!r}: give the folder of a multirun, such as multirun/2025-01-31/12-00-00."
        raise DataNotFoundError(msg)
    runs = tuple(_read(place, folder) for place in sorted(places, key=_number))
    logged = [run.report.fine_tuned.metrics for run in runs if run.report and run.report.fine_tuned.metrics]
    return Sweep(folder, runs, metric or (main_metric(logged[0]) if logged else "accuracy"))


def _number(place: Path) -> list[Any]:
    return [(0, int(text), "") if text.isdigit() else (1, 0, text) for text in re.split(r"(\d+)", str(place))]


def _read(place: Path, folder: Path) -> Run:
    record, report, reason = JobRecord.load(place), None, None
    name = str(place.relative_to(folder)) if place != folder else place.name
    if record is None or record.status == FINISHED:
        try:
            report = read_report(place)
        except PlanError as error:
            reason = str(error)
    overrides = record.overrides if record is not None else _overrides_in(place)
    if report is not None:
        return Run(name, FINISHED, None, overrides, report, record)
    status, reason = _ending(record, reason)
    return Run(name, status, reason, overrides, None, record)


def _ending(record: JobRecord | None, reason: str | None) -> tuple[str, str]:
    """Returns the status of a run without a report, and why it has none."""
    if record is None or record.status == FINISHED:
        return UNFINISHED, "it left no report" if record is None else reason or "its report is gone"
    if record.status == RUNNING:
        if _lives(record.process):
            return RUNNING, f"process {record.process} is at work"
        return UNFINISHED, "its process was stopped before it was done"
    return record.status, record.reason or "no reason is known"


def _lives(process: int | None) -> bool:
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OSError):
        return False
    return True


def _overrides_in(place: Path) -> tuple[str, ...]:
    try:
        lines = (place / ".hydra" / "overrides.yaml").read_text("utf-8").splitlines()
    except OSError:
        return ()
    return tuple(line.removeprefix("- ").strip("'\"") for line in lines if line.startswith("- "))


def varied(runs: Sequence[Run]) -> list[str]:
    """Returns the keys that are not the same in all runs."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for override in run.overrides:
            key, _, value = override.partition("=")
            values.setdefault(key.lstrip("+"), set()).add(value)
    counts = {key: sum(any(o.lstrip("+").startswith(f"{key}=") for o in r.overrides) for r in runs) for key in values}
    return [key for key, own in values.items() if len(own) > 1 or counts[key] < len(runs)]


def setting(run: Run, key: str) -> str:
    """Returns what a run was given for a key."""
    found = [o.partition("=")[2] for o in run.overrides if o.lstrip("+").partition("=")[0] == key]
    return found[-1] if found else ""


def own_settings(sweep: Sweep, run: Run) -> str:
    """Returns what tells a run from the others of its sweep."""
    keys = varied(sweep.runs)
    return " ".join(o for o in run.overrides if o.lstrip("+").partition("=")[0] in keys)


def _kept(run: Run, name: str) -> float:
    value = run.report.kept[name] if run.report is not None else None
    return float("nan") if value is None else value


def dense_latency(sweep: Sweep) -> float | None:
    """Returns the seconds of the dense model: the median of what the runs measured."""
    found = [run.report.dense.latency for run in sweep.finished if run.report and run.report.dense.latency is not None]
    return statistics.median(found) if found else None


# --- files -------------------------------------------------------------------------------------


def to_csv(sweep: Sweep) -> str:
    """Returns one line for each run, numbers in full."""
    keys = varied(sweep.runs)
    reports = [run.report for run in sweep.finished if run.report]
    metrics = list(dict.fromkeys(name for report in reports for name in report.fine_tuned.metrics))
    head = ["run", "status", "reason", *keys, "budget", "params", "macs", "bytes", "latency_ms", "throughput"]
    head += [f"kept_{name}" for name in KEPT]
    head += [f"{stage}_{name}" for name in metrics for stage in ("dense", "zero_shot", "fine_tuned")]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*head, "search_timed_beside_others", "seconds", "overrides"], lineterminator="\n")
    writer.writeheader()
    for run in sweep.runs:
        writer.writerow({**{key: setting(run, key) for key in keys}, **_cells(run, metrics)})
    return file.getvalue()


def _cells(run: Run, metrics: Sequence[str]) -> dict[str, Any]:
    cells: dict[str, Any] = {"run": run.name, "status": run.status, "reason": run.reason or "", "budget": run.budget}
    cells["overrides"] = " ".join(run.overrides)
    if run.record is not None:
        cells |= {"search_timed_beside_others": run.record.disturbed, "seconds": run.record.seconds}
    report = run.report
    if report is None:
        return cells
    end = report.fine_tuned.as_dict()
    cells |= {name: end[name] for name in ("params", "macs", "bytes", "latency_ms", "throughput")}
    cells |= {f"kept_{name}": report.kept[name] for name in KEPT}
    for stage in ("dense", "zero_shot", "fine_tuned"):
        cells |= {f"{stage}_{name}": getattr(report, stage).metrics.get(name) for name in metrics}
    return cells


def to_markdown(sweep: Sweep) -> str:
    """Returns the best run of each budget, all runs, and those that did not finish with the reasons."""
    lines = [f"# Sweep of {len(sweep.runs)} runs", "", headline(sweep), ""]
    head, rows = table_of(sweep, list(sweep.best().values()))
    if rows:
        lines += [f"## Best {sweep.metric} of each budget", "", *markdown_table(head, rows), ""]
        head, rows = table_of(sweep, sweep.finished)
        lines += ["## Finished", "", *markdown_table(head, rows), ""]
    if sweep.unfinished:
        rows = [(run.name, run.status, own_settings(sweep, run), run.reason or "") for run in sweep.unfinished]
        lines += ["## Not finished", "", *markdown_table(("run", "status", "settings", "reason"), rows), ""]
    lines += [f"{note}\n" for note in notes(sweep)]
    return "\n".join(lines).rstrip() + "\n"


def notes(sweep: Sweep) -> list[str]:
    """Returns what one should know about the times."""
    found = []
    if not sweep.timed():
        found.append(
            "A latency of ? was not measured, as other jobs ran at the same time; `lightning-compress-sweep FOLDER` "
            "measures what is missing, one run at a time."
        )
    if any(run.record is not None and run.record.disturbed for run in sweep.finished):
        found.append(
            "Latencies were measured after all jobs, one at a time. The searches themselves timed layers while other "
            "jobs ran (compression.target=null leaves that out)."
        )
    return found


def headline(sweep: Sweep) -> str:
    """Returns how many runs finished, and the dense model."""
    text = f"{len(sweep.finished)} of {len(sweep.runs)} finished"
    counts = {status: sum(run.status == status for run in sweep.unfinished) for status in ("failed", KILLED)}
    others = len(sweep.unfinished) - sum(counts.values())
    text += "".join(f", {count} {status}" for status, count in {**counts, UNFINISHED: others}.items() if count)
    if not sweep.finished:
        return f"{text}."
    report = sweep.finished[0].report
    assert report is not None
    latency = dense_latency(sweep)
    time = "" if latency is None else f", {1e3 * latency:.3f} ms"
    value = report.dense.metrics.get(sweep.metric, float("nan"))
    return f"{text}. Dense: {sweep.metric} {value:.4f}, {report.dense.costs.params:,} parameters{time}."


def table_of(sweep: Sweep, runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns head and rows for people."""
    keys = [key for key in varied(sweep.runs) if "budget." not in key]
    head = ("run", "budget", *(key.rpartition(".")[2] for key in keys), "params", "MACs", "latency")
    head += (f"zero-shot {sweep.metric}", sweep.metric, "change")
    rows = []
    for run in runs:
        report = run.report
        assert report is not None
        end, start = sweep.value(run), report.dense.metrics.get(sweep.metric, float("nan"))
        zero_shot = report.zero_shot.metrics.get(sweep.metric, float("nan"))
        kept = [percent(report.kept[name]) for name in ("params", "macs", "latency")]
        settings = [setting(run, key) for key in keys]
        rows.append((run.name, run.budget, *settings, *kept, f"{zero_shot:.4f}", f"{end:.4f}", f"{end - start:+.4f}"))
    return head, rows


def write_sweep(sweep: Sweep, *, plot: bool = True) -> list[Path]:
    """Writes sweep.csv, sweep.md and, where matplotlib is installed, pareto.png.

    Returns:
        The files.

    Raises:
        OutputFolderError: If the folder cannot be written.
    """
    files: Mapping[str, str] = {"sweep.csv": to_csv(sweep), "sweep.md": to_markdown(sweep)}
    try:
        for name, text in files.items():
            write_whole(sweep.folder / name, text)
    except OSError as error:
        msg = f"cannot write the summary to {str(sweep.folder)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error
    written = [sweep.folder / name for name in files]
    if plot and sweep.finished:
        from lightning_compress.cli.sweep_plot import plot_sweep  # noqa: PLC0415

        try:
            written.append(plot_sweep(sweep, sweep.folder / "pareto.png"))
        except UnsupportedError as error:
            show(f"no plot: {escape(str(error))}")
    return written


def show_sweep(sweep: Sweep) -> None:
    """Prints the best run of each budget and what did not finish, reasons in short."""
    head, rows = table_of(sweep, list(sweep.best().values()))
    show(f"[bold]{escape(headline(sweep))}[/]")
    if rows:
        table = Table(title=f"Best {sweep.metric} of each budget", title_justify="left")
        shown = [index for index, name in enumerate(head) if not name.startswith("zero-shot")]
        for index in shown:
            table.add_column(head[index], justify="right" if index else "left", no_wrap=head[index] == "budget")
        for row in rows:
            table.add_row(*(escape(row[index]) for index in shown))
        Console().print(table)
    for run in sweep.unfinished:
        reason = (run.reason or "").split(". ")[0]
        show(f"run {run.name} [bold]{run.status}[/] ({escape(own_settings(sweep, run))}): {escape(reason)}")
    for note in notes(sweep):
        show(escape(note))

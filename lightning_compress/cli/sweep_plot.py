"""The trade-off of a sweep: its metric against parameters, MACs and latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_compress.cli.objectives import is_smaller_better
from lightning_compress.cli.sweep import Run, Sweep, dense_latency, setting, varied
from lightning_compress.core.errors import OutputFolderError, UnsupportedError

_COLOURS = ("#1b6ca8", "#d1495b", "#3c8d5a", "#e0a030", "#7b5ea7", "#4aa3a2")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PANELS = (("params", "parameters"), ("macs", "MACs"), ("latency", "latency, ms, batch 1"))
_LABELS_AT_MOST = 14


@dataclass(frozen=True)
class _Point:
    """A run in one panel."""

    cost: float
    value: float
    run: Run


def plot_sweep(sweep: Sweep, path: str | Path) -> Path:
    """Draws the finished runs of a sweep, the dense model, and the front of runs that no other beats.

    Args:
        sweep: With at least one finished run.
        path: Image file; the ending chooses the format.

    Raises:
        UnsupportedError: If matplotlib is not installed.
        OutputFolderError: If the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        msg = "plots need matplotlib: pip install 'lightning_compress[plots]'."
        raise UnsupportedError(msg) from error
    figure = Figure(figsize=(14, 4.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    groups = _groups(sweep)
    for axes, (name, label) in zip(panels, _PANELS, strict=True):
        _draw(axes, sweep, groups, name)
        axes.set_xlabel(label)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{sweep.metric} after fine-tuning")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    left = len(sweep.unfinished)
    missing = f"; {left} did not finish (see sweep.md)" if left else ""
    figure.suptitle(f"{len(sweep.finished)} of {len(sweep.runs)} runs{missing}", fontsize=11)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        msg = f"cannot write the plot {str(path)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error
    return Path(path)


def _groups(sweep: Sweep) -> dict[str, list[Run]]:
    """Returns the runs by what the sweep varied beside the budget."""
    keys = [key for key in varied(sweep.runs) if "budget." not in key and key != "compression"][:2]
    groups: dict[str, list[Run]] = {}
    for run in sweep.finished:
        name = ", ".join(f"{key.rpartition('.')[2]} {setting(run, key)}" for key in keys) or "compressed"
        groups.setdefault(name, []).append(run)
    if len(groups) > len(_COLOURS):  # numbers, such as a learning rate: colours would say nothing
        return {"compressed": sweep.finished}
    return groups


def _draw(axes: Any, sweep: Sweep, groups: dict[str, list[Run]], name: str) -> None:
    points = [_point(sweep, run, name) for runs in groups.values() for run in runs]
    known = [point for point in points if not (math.isnan(point.cost) or math.isnan(point.value))]
    axes.set_xlim(left=0)
    if not known:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.5")
        return
    sign = -1 if is_smaller_better(sweep.metric) else 1
    front = _front(known, sign)
    for index, (label, runs) in enumerate(groups.items()):
        own = [point for point in known if any(point.run is run for run in runs)]
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        for best, alpha in ((True, 1.0), (False, 0.4)):
            chosen = [point for point in own if (point in front) is best]
            axes.scatter([p.cost for p in chosen], [p.value for p in chosen], s=46, alpha=alpha, zorder=3, **style)
        axes.scatter([], [], s=46, label=label, **style)
    dense = _dense(sweep, name)
    if dense is not None:
        axes.scatter(*dense, marker="*", s=190, color="0.15", zorder=4)
        axes.annotate("dense", dense, (0, -15), textcoords="offset points", ha="center", fontsize=8, color="0.15")
        axes.axhline(dense[1], color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    axes.scatter([], [], marker="*", s=120, color="0.15", label="dense")
    line = sorted(front, key=lambda point: point.cost)
    axes.plot([p.cost for p in line], [p.value for p in line], color="0.35", linewidth=1, zorder=2, label="front")
    axes.margins(x=0.08, y=0.14)
    axes.set_xlim(0, 1.1 * max([p.cost for p in known] + ([dense[0]] if dense else [])))
    axes.ticklabel_format(axis="x", style="plain")
    axes.xaxis.set_major_formatter(_compact if name != "latency" else (lambda value, _: f"{value:g}"))
    _label(axes, line, known)


def _label(axes: Any, front: Sequence[_Point], known: Sequence[_Point]) -> None:
    """Writes the budget beside each point of the front, above and below in turns, and beside the others if few."""
    labelled = list(front) + ([p for p in known if p not in front] if len(known) <= _LABELS_AT_MOST else [])
    taken: set[str] = set()
    for index, point in enumerate(labelled):
        text = _short(point.run.budget)
        if text in taken and point not in front:
            continue
        taken.add(text)
        above = index % 2 == 0
        axes.annotate(
            text, (point.cost, point.value), (5, 6 if above else -6), textcoords="offset points", fontsize=8,
            va="bottom" if above else "top", color="0.25" if point in front else "0.5", zorder=5,
        )  # fmt: skip


def _short(budget: str) -> str:
    """Returns a budget as a label: alone, a fraction of the parameters needs no name."""
    parts = budget.split(", ")
    return budget.removeprefix("params <= ") if len(parts) == 1 else "\n".join(parts)


def _compact(value: float, _: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _point(sweep: Sweep, run: Run, name: str) -> _Point:
    report = run.report
    assert report is not None
    if name == "latency":  # times are compared within one run only: its ratio, of the dense model of the whole sweep
        dense, kept = dense_latency(sweep), report.kept["latency"]
        cost = float("nan") if dense is None or kept is None else 1e3 * dense * kept
    else:
        found = getattr(report.fine_tuned.costs, name)
        cost = float("nan") if found is None else float(found)
    return _Point(cost, sweep.value(run), run)


def _dense(sweep: Sweep, name: str) -> tuple[float, float] | None:
    """Returns cost and metric of the dense model, if all runs had the same."""
    reports = [run.report for run in sweep.finished if run.report is not None]
    if len({report.dense.costs.params for report in reports}) > 1:
        return None
    if name == "latency":
        latency = dense_latency(sweep)
        cost = None if latency is None else 1e3 * latency
    else:
        cost = getattr(reports[0].dense.costs, name)
    value = reports[0].dense.metrics.get(sweep.metric)
    return None if cost is None or value is None else (float(cost), float(value))


def _front(points: Sequence[_Point], sign: int) -> list[_Point]:
    """Returns the points that no other one beats in both."""
    return [
        p
        for p in points
        if not any(
            other.cost <= p.cost
            and sign * other.value >= sign * p.value
            and (other.cost < p.cost or sign * other.value > sign * p.value)
            for other in points
        )
    ]

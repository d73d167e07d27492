"""Before and after: JSON, Markdown, a table for the terminal, and numbers for loggers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_compress.cli.figures import plot_plan
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import CompressionWarning, OutputFolderError
from lightning_compress.core.plan import Plan, change_text, compact, milliseconds, percent
from lightning_compress.core.settings import Budget

__all__ = ["BATCH", "STAGES", "Figures", "Report", "Round", "log_numbers", "plot_plan"]

SCHEMA = 1
BATCH = 32
"""Inputs per forward pass at which the throughput is measured."""
STAGES = ("dense", "zero_shot", "fine_tuned")


@dataclass(frozen=True)
class Figures:
    """What was measured of one model.

    Attributes:
        costs: Parameters, MACs, bytes.
        latency: Seconds of one forward pass at batch 1 on one thread, measured in turns with the other stages; of the
            dense model in its faster memory format. None where it was not measured, as beside other jobs of a sweep.
        throughput: Inputs per second at batch 32, likewise.
        metrics: Metric name to value.
    """

    costs: Costs
    latency: float | None
    throughput: float | None
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as report.json holds them, latency in milliseconds."""
        costs = {name: getattr(self.costs, name) for name in ("params", "macs", "bytes")}
        latency = None if self.latency is None else 1e3 * self.latency
        times = {"latency_ms": latency, "throughput": self.throughput}
        return {**costs, **times, "metrics": dict(self.metrics)}

    def flat(self) -> dict[str, float]:
        """Returns the known ones of them on one level."""
        figures = self.as_dict()
        figures |= figures.pop("metrics")
        return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class Round:
    """One round of a compression with several, as it was right after its swap.

    Attributes:
        budget: Its own.
        epochs: Epochs of the fit that were done by then.
        figures: What was measured.
    """

    budget: Budget | None
    epochs: int
    figures: Figures


@dataclass(frozen=True)
class Report:
    """One compression, measured before, right after the swap, and after fine-tuning.

    Attributes:
        plan: The plan that was applied.
        dense: The dense model.
        zero_shot: After the swap, before any step on real data.
        fine_tuned: At the end.
        seconds: How long each part of the compression took.
        asked: The budget that was asked for; the plan's is another one where the fit ended before the last round.
        rounds: Where there were several, each of them, the first one too: its figures are those of `zero_shot`.
    """

    plan: Plan
    dense: Figures
    zero_shot: Figures
    fine_tuned: Figures
    seconds: Mapping[str, float] = field(default_factory=dict)
    asked: Budget | None = None
    rounds: Sequence[Round] = ()

    @property
    def stages(self) -> dict[str, Figures]:
        """What was measured, by the names of report.json and of loggers: "dense", "zero_shot", "round_2", … ."""
        later = {f"round_{number}": each.figures for number, each in enumerate(self.rounds[1:], 2)}
        return {"dense": self.dense, "zero_shot": self.zero_shot, **later, "fine_tuned": self.fine_tuned}

    @property
    def header(self) -> tuple[str, ...]:
        """Heads of the columns of `rows`; a round has its budget there."""
        rounds = [f"round {n}, {r.budget or 'given plan'}" for n, r in enumerate(self.rounds, 1)] or ["zero-shot"]
        return ("", "dense", *rounds, "fine-tuned", "kept / change")

    @property
    def kept(self) -> dict[str, float | None]:
        """Fraction of the dense model that is kept at the end, by resource."""
        kept = self.fine_tuned.costs.kept_of(self.dense.costs)
        return {**kept, "latency": _over(self.fine_tuned.latency, self.dense.latency)}

    @property
    def faster(self) -> float | None:
        """Throughput at the end over that of the dense model."""
        return _over(self.fine_tuned.throughput, self.dense.throughput)

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of report.json."""
        plan, missed = self.plan, self._missed
        return {
            "schema": SCHEMA,
            "data_free": plan.data_free,
            "budget": plan.budget.as_dict() if plan.budget is not None else {},
            **({"budget_asked": missed.as_dict()} if missed is not None else {}),
            **{stage: getattr(self, stage).as_dict() for stage in STAGES},
            **({"rounds": [_round_dict(each) for each in self.rounds]} if self.rounds else {}),
            "kept": self.kept,
            "search": {
                "method": plan.method,
                "objective": plan.objective,
                "source": plan.source,
                "seconds": plan.seconds,
                "optimality_gap": plan.optimality_gap,
                "output_distance": plan.output_distance,
                "target": dict(plan.target) if plan.target is not None else None,
                "memory_format": plan.memory_format,
                "predicted_latency_ms": 1e3 * plan.predicted_latency if plan.predicted_latency is not None else None,
            },
            "seconds": dict(self.seconds),
            "layers": [
                {
                    "name": layer.name,
                    "type": layer.type,
                    "kind": layer.kind,
                    "ranks": list(layer.ranks),
                    "error": layer.error,
                    "source": layer.source,
                    "params_before": layer.params_before,
                    "params_after": layer.params_after,
                    "macs_before": layer.macs_before,
                    "macs_after": layer.macs_after,
                    "latency_before": layer.latency_before,
                    "latency_after": layer.latency_after,
                    "reason": layer.reason,
                }
                for layer in plan.layers
            ],
        }

    def numbers(self) -> dict[str, float]:
        """Returns what loggers get: `compress/STAGE/FIGURE`, of `stages` and of the keys of `Figures.as_dict`."""
        return {
            f"compress/{stage}/{name}": float(value)
            for stage, figures in self.stages.items()
            for name, value in figures.flat().items()
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the rows people read: name, dense, zero-shot or each round, fine-tuned, kept or change."""
        stages = list(self.stages.values())
        rows = [
            _row("parameters", [f"{s.costs.params:,}" for s in stages], _kept(self.kept["params"])),
            _row(
                "MACs", ["?" if s.costs.macs is None else f"{s.costs.macs:,}" for s in stages], _kept(self.kept["macs"])
            ),
            _row("bytes", [f"{s.costs.bytes:,}" for s in stages], _kept(self.kept["bytes"])),
            _row("latency, batch 1", [_latency(s) for s in stages], _kept(self.kept["latency"])),
            _row(
                f"throughput, batch {BATCH}",
                ["?" if s.throughput is None else f"{s.throughput:,.0f} /s" for s in stages],
                "?" if self.faster is None else f"{self.faster:.2f}x",
            ),
        ]
        for name in self.dense.metrics:
            values = [s.metrics[name] for s in stages]
            rows.append(_row(name, [f"{value:.4f}" for value in values], f"{values[-1] - values[0]:+.4f}"))
        return rows

    def table(self) -> Table:
        """Returns the rows for the terminal."""
        several = bool(self.rounds)
        table = Table(title=self.headline, title_justify="left", padding=(0, 0 if several else 1))
        widths = [max(map(len, cells)) for cells in zip(*self.rows(), strict=True)]
        for index, (name, width) in enumerate(zip(self.header, widths, strict=True)):
            ends = several and index in {0, len(self.header) - 1}  # these have spaces to fold at
            table.add_column(
                name, justify="right" if index else "left", min_width=None if ends else width, no_wrap=not several
            )
        for row in self.rows():
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Returns the same rows and the layers as Markdown."""
        lines = ["# Compression report", "", self.headline, "", *markdown_table(self.header, self.rows()), ""]
        layers = [
            (
                f"`{p.name}`",
                p.type,
                p.kind,
                ", ".join(map(str, p.ranks)),
                "" if p.is_dense else f"{p.error:.4f}",
                p.source or "",
                f"{p.params_before:,}",
                f"{p.params_after:,}",
                change_text(p, p.macs_before, p.macs_after, compact),
                change_text(p, p.latency_before, p.latency_after, milliseconds),
                p.reason or "",
            )
            for p in self.plan.layers
        ]
        header = (
            "layer",
            "type",
            "kind",
            "ranks",
            "error",
            "measured on",
            "parameters",
            "afterwards",
            "MACs",
            "ms",
            "reason",
        )
        for line in self.plan.time_lines():
            lines += [line, ""]
        if self.seconds:
            parts = [(name, f"{seconds:.1f} s") for name, seconds in self.seconds.items()]
            lines += ["## Time", "", *markdown_table(("part", "took"), parts), ""]
        return "\n".join([*lines, "## Layers", "", *markdown_table(header, layers), ""])

    def save(self, folder: str | Path) -> None:
        """Writes report.json, report.md and plan.json.

        Raises:
            OutputFolderError: If the folder cannot be written.
        """
        folder = Path(folder)
        files = {
            "report.json": json.dumps(self.as_dict(), indent=2),
            "report.md": self.to_markdown(),
            "plan.json": self.plan.to_json(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            msg = f"cannot write the report to {str(folder)!r}: {error}. Choose a folder you can write."
            raise OutputFolderError(msg) from error

    @property
    def _missed(self) -> Budget | None:
        """The budget that was asked for and not reached."""
        return self.asked if self.plan.budget not in (None, self.asked) else None

    @property
    def headline(self) -> str:
        """Budget, search and number of factorised layers in one line."""
        plan = self.plan
        source = "data-free" if plan.data_free else "not data-free"
        search = f"{source} {plan.method} search" if plan.method is not None else "a given plan"
        seconds = "" if plan.seconds is None else f" in {plan.seconds:.2f} s"
        gap = "" if plan.optimality_gap is None else f", at most {100 * plan.optimality_gap:.2f} % above the optimum"
        missed = f" (asked for {self._missed}: the fit ended before its last round)" if self._missed is not None else ""
        budget = "" if plan.budget is None else f"budget {plan.budget}{missed}; "
        return f"{budget}{search}{seconds}{gap}; {len(plan.factorised)} layers factorised"


def log_numbers(report: Report, loggers: Sequence[Any], step: int) -> None:
    """Sends `Report.numbers` to loggers of Lightning; one that fails gives a warning, as the report is saved already.

    Args:
        report: Of the run.
        loggers: Of the fit.
        step: Optimizer steps done.
    """
    for logger in loggers:
        _log(logger, report.numbers(), step)


def _log(logger: Any, numbers: Mapping[str, float], step: int) -> None:
    try:
        logger.log_metrics(numbers, step=step)
        logger.save()
        logger.finalize("success")
    except Exception as error:
        msg = f"{type(logger).__name__} did not take the figures of the report: {type(error).__name__}: {error}"
        warnings.warn(msg, CompressionWarning, stacklevel=3)


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


def _latency(figures: Figures) -> str:
    return "?" if figures.latency is None else f"{1e3 * figures.latency:.3f} ms"


def _round_dict(each: Round) -> dict[str, Any]:
    budget = each.budget.as_dict() if each.budget is not None else {}
    return {"budget": budget, "epochs": each.epochs, **each.figures.as_dict()}


def _row(name: str, values: list[str], last: str) -> tuple[str, ...]:
    return name, *values, last


def _kept(fraction: float | None) -> str:
    return "?" if fraction is None else f"{percent(fraction)} ({1 / fraction:.2f}x)"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, ("---",) * len(header), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]

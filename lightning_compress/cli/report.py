"""Before and after: JSON, Markdown, a table for the terminal, and numbers for loggers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_compress.cli.figures import plot_plan
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import OutputFolderError
from lightning_compress.core.plan import Plan, change_text, compact, milliseconds, percent
from lightning_compress.core.settings import Budget

__all__ = ["BATCH", "STAGES", "Figures", "Report", "plot_plan"]

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
            dense model in its faster memory format.
        throughput: Inputs per second at batch 32, likewise.
        metrics: Metric name to value.
    """

    costs: Costs
    latency: float
    throughput: float
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as report.json holds them, latency in milliseconds."""
        costs = {name: getattr(self.costs, name) for name in ("params", "macs", "bytes")}
        times = {"latency_ms": 1e3 * self.latency, "throughput": self.throughput}
        return {**costs, **times, "metrics": dict(self.metrics)}


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
    """

    plan: Plan
    dense: Figures
    zero_shot: Figures
    fine_tuned: Figures
    seconds: Mapping[str, float] = field(default_factory=dict)
    asked: Budget | None = None

    @property
    def kept(self) -> dict[str, float | None]:
        """Fraction of the dense model that is kept at the end, by resource."""
        kept = self.fine_tuned.costs.kept_of(self.dense.costs)
        return {**kept, "latency": self.fine_tuned.latency / self.dense.latency}

    @property
    def faster(self) -> float:
        """Throughput at the end over that of the dense model."""
        return self.fine_tuned.throughput / self.dense.throughput

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of report.json."""
        plan, missed = self.plan, self._missed
        return {
            "schema": SCHEMA,
            "data_free": plan.data_free,
            "budget": plan.budget.as_dict() if plan.budget is not None else {},
            **({"budget_asked": missed.as_dict()} if missed is not None else {}),
            **{stage: getattr(self, stage).as_dict() for stage in STAGES},
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

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Returns the rows people read: name, dense, zero-shot, fine-tuned, kept or change."""
        stages = [getattr(self, stage) for stage in STAGES]
        rows = [
            _row("parameters", [f"{s.costs.params:,}" for s in stages], _kept(self.kept["params"])),
            _row(
                "MACs", ["?" if s.costs.macs is None else f"{s.costs.macs:,}" for s in stages], _kept(self.kept["macs"])
            ),
            _row("bytes", [f"{s.costs.bytes:,}" for s in stages], _kept(self.kept["bytes"])),
            _row("latency, batch 1", [f"{1e3 * s.latency:.3f} ms" for s in stages], _kept(self.kept["latency"])),
            _row(f"throughput, batch {BATCH}", [f"{s.throughput:,.0f} /s" for s in stages], f"{self.faster:.2f}x"),
        ]
        for name in self.dense.metrics:
            values = [s.metrics[name] for s in stages]
            rows.append(_row(name, [f"{value:.4f}" for value in values], f"{values[-1] - values[0]:+.4f}"))
        return rows

    def table(self) -> Table:
        """Returns the rows for the terminal."""
        table = Table(title=self._headline(), title_justify="left")
        for index, name in enumerate(_HEADER):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows():
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Returns the same rows and the layers as Markdown."""
        lines = ["# Compression report", "", self._headline(), "", *_markdown(_HEADER, self.rows()), ""]
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
            lines += ["## Time", "", *_markdown(("part", "took"), parts), ""]
        return "\n".join([*lines, "## Layers", "", *_markdown(header, layers), ""])

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

    def _headline(self) -> str:
        plan = self.plan
        source = "data-free" if plan.data_free else "not data-free"
        search = f"{source} {plan.method} search" if plan.method is not None else "a given plan"
        seconds = "" if plan.seconds is None else f" in {plan.seconds:.2f} s"
        gap = "" if plan.optimality_gap is None else f", at most {100 * plan.optimality_gap:.2f} % above the optimum"
        missed = f" (asked for {self._missed}: the fit ended before its last round)" if self._missed is not None else ""
        budget = "" if plan.budget is None else f"budget {plan.budget}{missed}; "
        return f"{budget}{search}{seconds}{gap}; {len(plan.factorised)} layers factorised"


_HEADER = ("", "dense", "zero-shot", "fine-tuned", "kept / change")


def _row(name: str, values: list[str], last: str) -> tuple[str, str, str, str, str]:
    return name, values[0], values[1], values[2], last


def _kept(fraction: float | None) -> str:
    return "?" if fraction is None else f"{percent(fraction)} ({1 / fraction:.2f}x)"


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]

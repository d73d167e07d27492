"""A plan for people: the table of its layers, and the lines below it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lightning_compress.core.plan import LayerPlan, Plan

WIDTH, WIDTH_WITH_TIMES = 160, 200
"""Characters of a plan's lines as text."""
NOTICEABLE = 0.03
"""By which a model's measured time must exceed that of dense to be called slower."""
MOST_NAMED = 5
"""Layers in a line of the summary."""


def plan_text(plan: Plan) -> str:
    """Returns a table: layers, kinds, ranks, errors, sizes, reasons; and the summary."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=WIDTH_WITH_TIMES if _is_timed(plan) else WIDTH, color_system=None, legacy_windows=False
    )
    console.print(plan_table(plan))
    console.print(plan_summary(plan), soft_wrap=True, highlight=False, markup=False)
    return buffer.getvalue().rstrip()


def plan_table(plan: Plan) -> Table:
    """Returns the layers as a rich table."""
    traced = any(layer.macs_before is not None for layer in plan.layers)
    timed = _is_timed(plan)
    table = Table(title="Plan", title_justify="left")
    table.add_column("layer", overflow="fold", min_width=12)
    columns = ["type", "kind", "ranks", "error", "measured on", "params", *(["MACs"] if traced else [])]
    for name in [*columns, *(["ms"] if timed else [])]:
        left = name in {"type", "kind", "measured on"}
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    table.add_column("reason", overflow="fold", min_width=20)
    for layer in plan.layers:
        table.add_row(
            _plain(layer.name or "(model)"),
            _plain(layer.type),
            _plain(layer.kind + (", merged" if layer.merged else "")),
            ", ".join(map(str, layer.ranks)),
            "" if layer.is_dense else _error_text(layer),
            "" if layer.is_dense else _plain(_source_text(layer)),
            _params_text(layer),
            *([change_text(layer, layer.macs_before, layer.macs_after, compact)] if traced else []),
            *([change_text(layer, layer.latency_before, layer.latency_after, milliseconds)] if timed else []),
            _plain(layer.reason or (f"shares its first factor: {layer.joint_with}" if layer.joint_with else "")),
        )
    return table


def _is_timed(plan: Plan) -> bool:
    return any(layer.latency_before is not None for layer in plan.layers)


def plan_time_lines(plan: Plan) -> list[str]:
    """Returns what there is to say about time: before and after, and which layers are slower than dense."""
    if plan.dense.latency is None or plan.compressed.latency is None or plan.target is None:
        return []
    before, after = 1e3 * plan.dense.latency, 1e3 * plan.compressed.latency
    predicted = f", predicted {1e3 * plan.predicted_latency:.3g} ms" if plan.predicted_latency else ""
    where = printable(f"{plan.target.get('backend', 'target')}, batch {plan.target.get('batch', 1)}")
    form = f", {plan.memory_format}" if plan.memory_format else ""
    where = f"{_times(before, after)}{where}{form}{predicted}"
    lines = [f"latency {before:.3g} → {after:.3g} ms ({where})"]
    if plan.slower:
        named = [
            f"{printable(layer.name)} {milliseconds(layer.latency_before or 0)} → "
            f"{milliseconds(layer.latency_after or 0)} ms"
            for layer in plan.slower[:MOST_NAMED]
        ]
        more = f", and {len(plan.slower) - MOST_NAMED} more" if len(plan.slower) > MOST_NAMED else ""
        lines.append(f"slower than dense: {', '.join(named)}{more}")
    if after > (1 + NOTICEABLE) * before and plan.budget is not None and not plan.budget.bounds_latency:
        lines.append("to keep the dense model's time at a higher loss, or learn that it cannot be kept: latency=1.0")
    if merged := sum(layer.merged for layer in plan.layers):
        lines.append(f"merged: {merged} layers run as dense ones in eval, as their factors would take longer")
    return lines


def plan_summary(plan: Plan) -> str:
    """Returns sizes, budget and optimality in one or two lines."""
    parts = [f"params {plan.dense.params:,} → {plan.compressed.params:,} ({percent(plan.kept['params'])} kept)"]
    if plan.compressed.macs is not None and plan.dense.macs is not None:
        parts.append(f"MACs {plan.dense.macs:,} → {plan.compressed.macs:,} ({percent(plan.kept['macs'])} kept)")
    parts.append(f"bytes {plan.dense.bytes:,} → {plan.compressed.bytes:,} ({percent(plan.kept['bytes'])} kept)")
    lines = ["; ".join(parts), *plan.time_lines()]
    found = [f"budget {plan.budget}"] if plan.budget is not None else []
    found += [f"method {printable(plan.method)}"] if plan.method is not None else []
    gap = "" if plan.optimality_gap is None else f", at most {100 * plan.optimality_gap:.2f} % above the optimum"
    found += [f"output distance {plan.output_distance:.4f}"] if plan.output_distance is not None else []
    found.append(f"signal loss {plan.signal_loss:.4f}{gap}")
    found += [f"{plan.seconds:.2f} s"] if plan.seconds is not None else []
    lines.append("; ".join(found))
    if plan.cut:
        cut = ", ".join(f"{printable(part)} ({printable(how)})" for part, how in plan.cut.items())
        lines.append(f"cut short to keep the time limit: {cut}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Returns a text on one line: line ends and control characters as Python writes them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _plain(text: str) -> Text:
    """Returns a cell that shows a text as it is, brackets too."""
    return Text(printable(text))


def _share(after: float, before: float) -> float | None:
    return after / before if before else None


def _times(before: float, after: float) -> str:
    return f"{before / after:.2f}x; " if after else ""


def _error_text(layer: LayerPlan) -> str:
    return f"{layer.error:.4f}" + (f" ± {layer.error_spread:.4f}" if layer.error_spread is not None else "")


def _params_text(layer: LayerPlan) -> str:
    if layer.is_dense:
        return f"{layer.params_before:,}"
    return (
        f"{layer.params_before:,} → {layer.params_after:,} ({percent(_share(layer.params_after, layer.params_before))})"
    )


def change_text(layer: LayerPlan, before: float | None, after: float | None, text: Callable[[float], str]) -> str:
    """Returns what a layer costs before and after for people, the one number of a dense one, "" if unknown."""
    if before is None or after is None:
        return ""
    return text(before) if layer.is_dense else f"{text(before)} → {text(after)}"


def compact(count: float) -> str:
    """Returns a number with three digits, such as 7.37M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds with three digits."""
    return f"{1e3 * seconds:.3g}"


def _source_text(layer: LayerPlan) -> str:
    return (f"{layer.samples:,} " if layer.samples is not None else "") + (layer.source or "")


def percent(fraction: float | None) -> str:
    """Returns a kept fraction for people, "?" if unknown."""
    return "?" if fraction is None else f"{100 * fraction:.1f} %"

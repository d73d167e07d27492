"""A plan for notebooks and pages: the table that a terminal shows, as HTML without style or script."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lightning_compress.core.plan_text import plan_summary, plan_table

if TYPE_CHECKING:
    from lightning_compress.core.plan import Plan


def plan_html(plan: Plan) -> str:
    """Returns the headline and the layers of a plan as HTML; the same plan gives the same text."""
    first, *others = plan_summary(plan).splitlines()
    headline = "<br>\n".join([f"<strong>Plan</strong>: {escape(first)}", *map(escape, others)])
    return f"<div>\n<p>{headline}</p>\n{table_html(plan_table(plan))}\n</div>"


def table_html(table: Table) -> str:
    """Returns the cells of a rich table of texts as an HTML table, escaped; what is right-justified stays so."""
    columns = table.columns
    sides = ["right" if column.justify == "right" else "left" for column in columns]
    rows = zip(*(column.cells for column in columns), strict=True)
    header = _row("th", (column.header for column in columns), sides)
    body = "\n".join(_row("td", row, sides) for row in rows)
    return f"<table>\n<thead>\n{header}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _row(tag: str, cells: Iterable[RenderableType], sides: Iterable[str]) -> str:
    shown = (
        f'<{tag} style="text-align: {side}">{escape(_plain(cell))}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(shown)}</tr>"


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)

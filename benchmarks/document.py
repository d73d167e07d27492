"""Writes docs/benchmarks.md from the figures in benchmarks/results.

python -m benchmarks.document
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, ORIGIN, RESULTS

PAGE = HERE.parent / "docs" / "benchmarks.md"
Row = Mapping[str, Any]

HEADINGS = {
    "pretrained": "A network with ImageNet weights",
    "digits": "The default command",
    "fine_tuning": "After fine-tuning",
    "zero_shot": "Before any fine-tuning",
    "other_networks": "Networks of other kinds",
    "ablation": "What each part is worth",
    "kinds": "Kinds alone and together",
    "latency": "Smaller and faster",
    "search": "The search on the weights alone",
    "export": "In 8-bit integers",
    "compression_time": "Seconds of a compression",
    "scale": "What a compression costs",
    "scale_checkpoint": "Models beyond the memory",
    "cp_fit": "CP of large kernels",
    "architectures": "Architectures",
    "step_overhead": "A training step",
    "kill_resume": "Killed and resumed",
    "lightning_suite": "Tests of Lightning itself",
    "tensorised": "Large linear layers and tables",
    "sweeps": "Sweeps",
}
"""Benchmark to its heading, in the order of the page; others follow under their own names."""

INTRODUCTION = """\
# Benchmarks

Every figure on this page comes from a command of this repository, which writes it into a file in
`benchmarks/results/`; `python -m benchmarks.document` makes the page from those files.

Under each table stand the machine it was measured on and the commit of the package that was measured. "Published in" is
said of older figures, whose files did not tell: it is the commit that brought them. Rows kept from earlier runs are
counted by commit. Spreads are the largest value less the smallest. Compare times inside one table only."""

POINTS = "points"
FORMATS = {
    **dict.fromkeys(("keep", "latency kept", "latency kept, batch 1", "latency kept, batch 16"), ".0%"),
    **dict.fromkeys(("MACs kept", "params kept", "hooks / step"), ".1%"),
    "gap": ".2%",
    **dict.fromkeys(("accuracy", "score", "dense", "zero_shot", "zero-shot", "fine_tuned", "fine-tuned"), ".4f"),
    **dict.fromkeys(("predicted", "error", "best of ten", "worst of ten", "error / best"), ".4f"),
    **dict.fromkeys(("agreement", "spread", "layers / by hand", "step / by hand", "ratio"), ".3f"),
    **dict.fromkeys(("change", "auto − best alone"), POINTS),
    "largest difference at full rank": ".0e",
    **dict.fromkeys(("smaller", "faster"), ".2fx"),
    "weight": "g",
}
"""Column to how its numbers are written, "x" behind a format for a factor; others are written by their size."""
NAMES = {
    **dict.fromkeys(("keep", "params kept"), "parameters kept"),
    "weights": "weights alone",
    "zero_shot": "zero-shot",
    "fine_tuned": "fine-tuned",
    "statistics_seconds": "statistics seconds",
}
"""Column to what it is called on the page, if that is something else."""
NUMBER = r"–$|[-+]?\d[\d,.]*(e-\d+)?( %|x| points| of [\d,]+)?$"
"""What stands to the right in a table."""


@dataclass(frozen=True)
class Pivot:
    """A table of one value: a row for each combination of `index`, a column for each value of `column`."""

    index: tuple[str, ...]
    column: str
    value: str
    more: Callable[[Mapping[str, Row]], Row] = lambda _: {}
    """Further cells of a row, from its rows in the file by `column`."""


def _against_best_alone(by_kind: Mapping[str, Row]) -> Row:
    alone = [row["accuracy"] for kind, row in by_kind.items() if kind != "auto" and row["accuracy"] is not None]
    auto = by_kind["auto"]["accuracy"] if "auto" in by_kind else None
    return {"auto − best alone": auto - max(alone) if alone and auto is not None else None}


def _of(column: str, *names: str) -> Callable[[Mapping[str, Row]], Row]:
    return lambda by: {name: by[column][name] if column in by else None for name in names}


PIVOTS = {
    "pretrained": Pivot(("keep",), "method", "agreement", _of("default", "spread")),
    "zero_shot": Pivot(("keep",), "method", "accuracy"),
    "kinds": Pivot(("network", "keep"), "kind", "accuracy", _against_best_alone),
    "search": Pivot(("network", "keep"), "method", "signal loss", _of("continuous", "gap", "seconds")),
}


def page(results: Path = RESULTS) -> str:
    """Returns the page, made from all files of a folder."""
    files: dict[str, list[Path]] = {name: [] for name in HEADINGS}
    for path in sorted(results.glob("*.json")):
        files.setdefault(benchmark_of(path), []).append(path)
    sections = {HEADINGS.get(name, name): section(name, paths) for name, paths in files.items() if paths}
    contents = "\n".join(f"- [{heading}](#{heading.lower().replace(' ', '-')})" for heading in sections)
    texts = [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join([INTRODUCTION, contents, *texts]) + "\n"


def benchmark_of(path: Path) -> str:
    """Returns the benchmark that wrote a file: the one with the longest name that the file's begins with.

    Raises:
        ValueError: If there is none.
    """
    names = [module.stem for module in HERE.glob("*.py") if f"{path.stem}_".startswith(f"{module.stem}_")]
    if not names:
        msg = f"{path} is of no benchmark: its name has to begin with that of a module in {HERE.name}/."
        raise ValueError(msg)
    return max(names, key=len)


def section(name: str, paths: Sequence[Path]) -> str:
    """Returns what is said of a benchmark: its docstring, what is in its files, its plot."""
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or ""
    parts = [f"```\n{p}\n```" if p.startswith("python -m") else p for p in docstring.split("\n\n")]
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"**{content['title']}** ([{path.name}](../benchmarks/results/{path.name}))"]
        parts += [*tables(name, content), *content.get("notes", []), footer(content)]
    plot = paths[0].parent / f"{name}.png"
    if plot.exists():
        parts.append(f"![{HEADINGS.get(name, name)}](../benchmarks/results/{plot.name})")
    return "\n\n".join(parts)


def tables(name: str, content: Mapping[str, Any]) -> list[str]:
    """Returns the tables of a file: the pivot and what its columns are from, a summary, or all its rows."""
    rows: list[Row] = content["rows"]
    if name == "architectures":
        return [table(by_library(content))]
    if name not in PIVOTS:
        return [table([{key: value for key, value in row.items() if key not in ORIGIN} for row in rows])]
    pivot = PIVOTS[name]
    seeded = "seeds" in rows[0]
    return [table(pivoted(pivot, rows)), *([table(by_column(pivot, content))] if seeded else [])]


def pivoted(pivot: Pivot, rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of a pivot table, the largest share of parameters first."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in pivot.index), {})[row[pivot.column]] = row
    columns = list(dict.fromkeys(row[pivot.column] for row in rows))
    found: list[Row] = []
    for index in sorted(groups, key=lambda values: [-v if isinstance(v, float) else v for v in values]):
        own = groups[index]
        cells = {c: cell(pivot.value, own[c][pivot.value] if c in own else None) for c in columns}
        found.append({**dict(zip(pivot.index, index, strict=True)), **cells, **pivot.more(own)})
    return found


def by_column(pivot: Pivot, content: Mapping[str, Any]) -> list[Row]:
    """Returns over how many seeds each column is the mean, and what else its rows have in common."""
    found: list[Row] = []
    for column in dict.fromkeys(row[pivot.column] for row in content["rows"]):
        rows = [row for row in content["rows"] if row[pivot.column] == column]
        seeds, spreads = {row["seeds"] for row in rows}, [row["spread"] for row in rows if row["spread"] is not None]
        entry = {pivot.column: NAMES.get(column, column), "seeds": " or ".join(map(str, sorted(seeds)))}
        entry["largest spread"] = cell("spread", max(spreads)) if spreads and seeds != {1} else "–"
        measured = [key for key in ("seconds", "gigabytes") if key in rows[0]]
        entry |= {f"mean {key}": cell(key, statistics.mean(row[key] for row in rows)) for key in measured}
        found.append({**entry, "commit": origin(rows, content)})
    return found


def by_library(content: Mapping[str, Any]) -> list[Row]:
    """Returns counts of the models of each library."""
    found: list[Row] = []
    asked = min(row["budget"] for row in content["rows"])  # models that cannot keep it have the smallest they can
    for library in dict.fromkeys(row["library"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["library"] == library]
        done = [row for row in rows if row["status"] == "ok"]
        factorised, left = (sum(row[key] for row in rows) for key in ("factorised", "left"))
        differences = [row["difference"] for row in done if not math.isnan(row["difference"])]
        entry: dict[str, Any] = {"library": library, "models": len(rows), "families": len({r["family"] for r in rows})}
        entry |= {"failures": len(rows) - len(done), "at their floor": sum(row["budget"] > asked for row in done)}
        entry |= {"layers factorised": f"{factorised:,} of {factorised + left:,}"}
        entry |= {"largest difference at full rank": max(differences, default=None)}
        entry |= {"median CPU seconds": statistics.median(row["CPU s"] for row in rows)}
        found.append({**entry, "commit": origin(rows, content)})
    return found


def origin(rows: Sequence[Row], content: Mapping[str, Any]) -> str:
    """Returns the commits rows are of, the file's first, with their counts if there are several."""
    counts: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: "commit" in row):
        commit, processor = row.get("commit", content["commit"]), row.get("processor", content["machine"]["processor"])
        elsewhere = f" on {processor}" * (processor != content["machine"]["processor"])
        counts[f"{commit or 'not in git'}{elsewhere}"] += 1
    texts = [f"{commit} (rows: {count})" if len(counts) > 1 else commit for commit, count in counts.items()]
    return re.sub(r"\b([0-9a-f]{7,40})\b", r"`\1`", ", ".join(texts))


def footer(content: Mapping[str, Any]) -> str:
    """Returns the line under a table: other figures of the file, machine, commit."""
    machine = content["machine"]
    threads = machine["torch_threads"]
    parts = [f"{machine['processor']}, {machine['cores']} cores, {threads} torch thread{'s' * (threads > 1)}"]
    parts += [machine["cuda"] or "no GPU"]
    versions = [f"{name} {value}" for name, value in machine.items() if isinstance(value, str) and value[0].isdigit()]
    known = ("title", "machine", "commit", "notes", "rows")
    others = [f"{_heading(key)} {cell(key, value)}" for key, value in content.items() if key not in known]
    texts = [", ".join(others), ", ".join([*parts, *versions]), origin(content["rows"], content)]
    return f"{'; '.join(text for text in texts if text)}."


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table, numbers to the right."""
    columns = list(rows[0])
    cells = [[_heading(c) for c in columns], *([cell(c, row.get(c)) for c in columns] for row in rows)]
    right = [all(re.match(NUMBER, line[i]) for line in cells[1:]) for i in range(len(columns))]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    rule = ["-" * (width - at_right) + ":" * at_right for width, at_right in zip(widths, right, strict=True)]
    lines = [
        " | ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right, strict=True))
        for line in cells
    ]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(rule), *lines[1:]])


def cell(column: str, value: Any) -> str:
    """Returns a value as it is written in a column."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    style = FORMATS.get(column, _by_size(value))
    if style == POINTS:
        return f"{round(100 * value, 2) + 0.0:+.2f} points"
    number = format(value, style.removesuffix("x")) + "x" * style.endswith("x")
    return number.replace("%", " %")


def _by_size(value: float) -> str:
    """Returns the format with three digits, or all before the point."""
    return next((style for least, style in ((100, ",.0f"), (10, ".1f"), (1, ".2f")) if abs(value) >= least), ".3g")


def _heading(column: str) -> str:
    return NAMES.get(column, column)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)

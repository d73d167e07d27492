"""The report as one page, report.html, that opens offline, on a phone too.

Figures are matplotlib's SVG, written into the page: some ten kilobytes each, drawn by any browser without a script, and
printed as sharp as on the screen. Plotly's offline bundle would be four megabytes in every run of a sweep, for figures
in which there is nothing to turn or to zoom. Without matplotlib the page has everything else.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import nn

from lightning_compress.analysis.latency.table import processor
from lightning_compress.cli.figures import (
    RESOURCES,
    bars_svg,
    colour_of,
    history_svg,
    require_matplotlib,
    spectrum_svg,
    spectrum_text,
)
from lightning_compress.cli.history import Epoch
from lightning_compress.cli.html_style import STYLE
from lightning_compress.cli.report import BATCH, Report
from lightning_compress.cli.spectrum import spectra_of
from lightning_compress.core.errors import OutputFolderError, UnsupportedError
from lightning_compress.core.plan_text import printable

NAME = "report.html"
MOST_METRICS = 6
"""Metrics that are drawn over the epochs, those of the validation first."""
_PACKAGES = ("lightning_compress", "torch", "lightning", "hydra-core", "numpy", "matplotlib", "onnxruntime")


@dataclass(frozen=True)
class Extras:
    """What a page shows beside the report itself.

    Attributes:
        dense: The model before it was compressed, for the spectra; None to leave them out.
        epochs: Of the fine-tuning.
        config: Text of the configuration.
    """

    dense: nn.Module | None = None
    epochs: Sequence[Epoch] = ()
    config: str | None = None


def write_page(report: Report, folder: str | Path, extras: Extras | None = None) -> Path:
    """Writes report.html.

    Args:
        report: Of the run.
        folder: Of the run; its log files go into the page.
        extras: What else to show.

    Returns:
        The file.

    Raises:
        OutputFolderError: If it cannot be written.
    """
    path = Path(folder) / NAME
    try:
        logs = {file.name: file.read_text("utf-8", errors="replace") for file in sorted(Path(folder).glob("*.log"))}
        path.write_text(page(report, extras or Extras(), logs), encoding="utf-8")
    except OSError as error:
        msg = f"cannot write the report {str(path)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error
    return path


def renew_page(report: Report, folder: str | Path) -> None:
    """Puts figures that were measured later into the page of a run, if there is one; all else in it stays.

    Raises:
        OutputFolderError: If it cannot be written.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return
    try:
        before, found, rest = path.read_text("utf-8").partition(_BEGIN)
        after = rest.partition(_END)[2]
        if found:
            path.write_text(before + _measured(report) + after, encoding="utf-8")
    except OSError as error:
        msg = f"cannot write the report {str(path)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error


def page(report: Report, extras: Extras, logs: Mapping[str, str] | None = None) -> str:
    """Returns the page.

    Args:
        report: Of the run.
        extras: What else to show.
        logs: Name to text of the log files.
    """
    sections = [
        _measured(report),
        *_figures(report, extras),
        _section("Plan", f'<div class="wide">{report.plan._repr_html_()}</div>'),
        _seconds(report),
        _section("Environment", _table((), list(environment().items()))),
        *([_folded("Configuration", extras.config)] if extras.config else []),
        *(_folded(f"Log: {name}", text) for name, text in (logs or {}).items() if text.strip()),
    ]
    return _DOCUMENT.format(style=STYLE, headline=escape(report.headline), body="\n".join(filter(None, sections)))


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Compression report</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<main>
<h1>Compression report</h1>
<p>{headline}</p>
{body}
</main>
</body>
</html>
"""


_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"
"""Around what `renew_page` replaces."""


def environment() -> dict[str, str]:
    """Returns what ran here: versions, processor, threads, accelerator."""
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "Python": platform.python_version(),
        **{package: version for package in _PACKAGES if (version := _version(package)) is not None},
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": processor(),
        "cores": str(os.cpu_count() or "?"),
        "threads of torch": str(torch.get_num_threads()),
        "accelerator": ", ".join(devices) or "none",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- what was measured ---------------------------------------------------------------------------


def _measured(report: Report) -> str:
    table = _section("Before and after", _table(report.header, report.rows()))
    return f"{_BEGIN}\n{_cards(report)}\n{table}\n{_END}"


def _cards(report: Report) -> str:
    dense, last = report.dense, report.fine_tuned
    cards = [
        _card(
            _factor(dense.costs.params, last.costs.params, "smaller", "larger"),
            f"{dense.costs.params:,} → {last.costs.params:,} parameters",
            f"{_size(dense.costs.bytes)} → {_size(last.costs.bytes)}",
        )
    ]
    if dense.costs.macs and last.costs.macs:
        macs = f"{dense.costs.macs:,} → {last.costs.macs:,}"
        cards.append(_card(_factor(dense.costs.macs, last.costs.macs, "fewer MACs", "more MACs"), macs))
    if dense.latency is not None and last.latency is not None:
        times = f"{1e3 * dense.latency:.3f} → {1e3 * last.latency:.3f} ms at batch 1"
        many = [] if report.faster is None else [f"{report.faster:.2f}x the throughput at batch {BATCH}"]
        cards.append(_card(_factor(dense.latency, last.latency, "faster", "slower"), times, *many))
    for name in list(dense.metrics)[:1]:
        values = [figures.metrics[name] for figures in report.stages.values()]
        steps = " → ".join(f"{value:.4f}" for value in values)
        names = " → ".join(stage.replace("_", " ") for stage in report.stages)
        cards.append(_card(f"{name} {values[-1]:.4f}", f"{steps} ({values[-1] - values[0]:+.4f})", names))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(large: str, *lines: str) -> str:
    below = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="card"><p class="large">{escape(large)}</p>{below}</div>'


def _factor(before: float, after: float, better: str, worse: str) -> str:
    if before <= 0 or after <= 0:
        return "?"
    return f"{before / after:.2f}x {better}" if after <= before else f"{after / before:.2f}x {worse}"


def _size(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


# --- figures -------------------------------------------------------------------------------------


def _figures(report: Report, extras: Extras) -> Iterable[str]:
    try:
        require_matplotlib()
    except UnsupportedError as error:
        return [f"<p>No figures: {escape(str(error))}</p>"]
    return [_bars(report), _spectra(report, extras), _history(report, extras)]


def _bars(report: Report) -> str:
    plan = report.plan
    figures = {name: svg for name in RESOURCES if (svg := bars_svg(plan, name)) is not None}
    kinds = dict.fromkeys(layer.kind for layer in plan.layers)
    legend = _chip("before", None) + "".join(_chip(kind, colour_of(kind)) for kind in kinds)
    note = "Times of layers are predictions for the target of the search; the table above is measured."
    note = f"<p>{note}</p>" if "time" in figures else ""
    grid = "".join(
        f"<figure><figcaption>{escape(name[0].upper() + name[1:])}</figcaption>{svg}</figure>"
        for name, svg in figures.items()
    )
    body = f'<p class="legend">{legend}</p>{note}<div class="grid">{grid}</div>'
    return _section("Where they go", body)


def _chip(text: str, colour: str | None) -> str:
    style = f' style="background: {colour}"' if colour is not None else ""
    return f'<span class="chip"{style}></span>{escape(printable(text))} '


def _spectra(report: Report, extras: Extras) -> str:
    if extras.dense is None:
        return ""
    shown, left = spectra_of(report.plan, extras.dense)
    if not shown:
        return ""
    figures = "".join(
        f"<figure>{spectrum_svg(layer)}<figcaption>{escape(printable(spectrum_text(layer)))}</figcaption></figure>"
        for layer in shown
    )
    more = " Later rounds searched on fine-tuned weights, these are the first ones." if report.rounds else ""
    more += f" {left} smaller or very large layers are left out." if left else ""
    note = (
        "Singular values of the dense weights, over the largest one. The shaded part is what the chosen rank could "
        f"hold; the search itself looks at what errors do to the outputs.{more}"
    )
    return _section("Spectra and ranks", f'<p>{note}</p><div class="grid small">{figures}</div>')


def _history(report: Report, extras: Extras) -> str:
    names = dict.fromkeys(name for epoch in extras.epochs for name in epoch.metrics)
    ordered = sorted(names, key=lambda name: not name.startswith("val"))
    figures = []
    for name in ordered[:MOST_METRICS]:
        values = [(float(e.number), e.metrics[name]) for e in extras.epochs if name in e.metrics]
        rounds = [(float(r.epochs), str(r.budget)) for r in report.rounds[1:]]
        figures.append(f"<figure>{history_svg(name, values, _levels(report, name), rounds)}</figure>")
    if not figures:
        return ""
    more = f"<p>{len(names) - MOST_METRICS} more metrics are with the logger.</p>" if len(names) > MOST_METRICS else ""
    return _section("Fine-tuning", f'<div class="grid">{"".join(figures)}</div>{more}')


def _levels(report: Report, name: str) -> dict[str, float]:
    """Returns what the test showed of a metric of the validation: "val_accuracy" is "accuracy" there."""
    own = name.removeprefix("val_").removeprefix("val/")
    if own == name or own not in report.dense.metrics:
        return {}
    stages = {"dense, test": report.dense, "zero-shot, test": report.zero_shot, "fine-tuned, test": report.fine_tuned}
    return {label: figures.metrics[own] for label, figures in stages.items() if own in figures.metrics}


# --- parts ---------------------------------------------------------------------------------------


def _seconds(report: Report) -> str:
    if not report.seconds:
        return ""
    rows = [(part, f"{seconds:.1f} s") for part, seconds in report.seconds.items()]
    return _section("Time of the compression", _table(("part", "took"), rows))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of numbers; without a header, of text."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    top = f"<thead><tr>{cells}</tr></thead>" if header else ""
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table class="figures{"" if header else " plain"}">{top}<tbody>{body}</tbody></table></div>'
    )

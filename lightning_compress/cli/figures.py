"""Figures of the report, drawn with matplotlib: bars of the layers, spectra, metrics over the epochs.

Axes are linear, so that lengths compare as the numbers do, and a kind has one colour in every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lightning_compress.cli.spectrum import LayerSpectra
from lightning_compress.core.errors import OutputFolderError, UnsupportedError
from lightning_compress.core.plan import DENSE, LayerPlan, Plan, percent

_BeforeAfter: TypeAlias = "tuple[float | None, float | None]"

RESOURCES: Mapping[str, Callable[[LayerPlan], _BeforeAfter]] = {
    "parameters": lambda layer: (layer.params_before, layer.params_after),
    "MACs": lambda layer: (layer.macs_before, layer.macs_after),
    "time": lambda layer: (layer.latency_before, layer.latency_after),
}
"""What the layers are compared by: name to the numbers of a layer before and after, None if unknown."""
MOST_ROWS = 24
"""Layers in a figure; the others are one row."""

_GREY, _PALE = "#8c8c8c", "#e3e3e3"
_COLOURS = {  # "muted" of Paul Tol's schemes, which people with any kind of sight tell apart
    DENSE: _GREY,
    "svd": "#332288",
    "interpolative": "#88ccee",
    "channel_svd": "#44aa99",
    "spatial_svd": "#117733",
    "tucker2": "#cc6677",
    "tt": "#aa4499",
    "cp3": "#ddcc77",
    "cp": "#999933",
    "tt_embedding": "#882255",
}
_OTHERS = ("#1f77b4", "#ff7f0e", "#d62728", "#8c564b", "#17becf", "#000000")
_WIDTH, _NAME = 4.4, 22
"""Inches of a figure of the page, and characters of a layer's name in it."""
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and found by a browser's search
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}


def colour_of(kind: str) -> str:
    """Returns the colour of a kind, the same in every run; kinds of one's own take theirs from their names."""
    number = int.from_bytes(hashlib.sha256(kind.encode()).digest()[:4], "big")
    return _COLOURS.get(kind, _OTHERS[number % len(_OTHERS)])


def require_matplotlib() -> Any:
    """Returns the module.

    Raises:
        UnsupportedError: If it is not installed.
    """
    try:
        import matplotlib  # noqa: PLC0415
        import matplotlib.figure  # noqa: PLC0415
    except ImportError as error:
        msg = "plots need matplotlib: pip install 'lightning_compress[plots]'."
        raise UnsupportedError(msg) from error
    return matplotlib


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Draws parameters before and after with the ranks, and the error, of every factorisable layer.

    Args:
        plan: What to draw.
        path: Image file; the ending chooses the format.

    Raises:
        UnsupportedError: If matplotlib is not installed.
        OutputFolderError: If the file cannot be written.
    """
    matplotlib = require_matplotlib()
    layers = [layer for layer in plan.layers if layer.weight_shape]
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    figure = matplotlib.figure.Figure(figsize=(11, 1.8 + 0.32 * len(layers)), layout="constrained")
    sizes, errors = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    total = max(1, plan.dense.params)
    rows = [
        _Bar(p.name, 100 * p.params_before / total, 100 * p.params_after / total, p.kind, _rank_text(p)) for p in layers
    ]
    _draw_bars(sizes, rows)
    sizes.set(title="Parameters before and after, ranks", xlabel="% of the dense model's parameters")
    errors.barh(range(len(layers)), [p.error for p in layers], height=0.5, color=[colour_of(p.kind) for p in layers])
    for place, layer in enumerate(layers):
        text = "" if layer.is_dense else f"{layer.error:.3f}"
        errors.annotate(text, (layer.error, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    errors.set(
        xlim=(0, 1.2 * max((p.error for p in layers), default=0) or 1),
        xlabel=r"$\Vert G^{1/2} (W - \hat{W}) S^{1/2} \Vert^2$ / $\Vert G^{1/2} W S^{1/2} \Vert^2$",
        title="Relative error",
    )
    figure.legend(
        handles=[matplotlib.patches.Patch(color=_PALE, label="before")]
        + [matplotlib.patches.Patch(color=colour_of(kind), label=kind) for kind in kinds],
        loc="outside lower center",
        ncols=len(kinds) + 1,
        frameon=False,
    )
    kept = percent(plan.kept["params"])
    figure.suptitle(f"{kept} of {plan.dense.params:,} parameters kept ({plan.method or 'given'} plan)")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        msg = f"cannot write the plot {str(path)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error


@dataclass(frozen=True)
class _Bar:
    """One row of a bar figure: a layer's share of the dense model before and after, in per cent."""

    name: str
    before: float
    after: float
    kind: str
    text: str


def bars_svg(plan: Plan, resource: str) -> str | None:
    """Returns the layers' shares of the dense model before and after.

    Args:
        plan: What to draw.
        resource: A key of `RESOURCES`.

    Returns:
        SVG, None where the plan does not know the resource.
    """
    rows = _rows(plan, resource)
    if not rows:
        return None
    with _styled() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(_WIDTH, 0.8 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        _draw_bars(axes, rows)
        axes.set(xlabel=f"% of the dense model's {resource}")
        after, before = sum(row.after for row in rows), sum(row.before for row in rows)
        label = f"{resource} of the layers before and after: {before:.1f} % and {after:.1f} % of the dense model"
        return _svg(figure, label)


def _rows(plan: Plan, resource: str) -> list[_Bar]:
    """Returns the largest layers in the order of the model, and the others as one row."""
    numbers = [(layer, *RESOURCES[resource](layer)) for layer in plan.layers]
    known = [(layer, before, after) for layer, before, after in numbers if before is not None and after is not None]
    total = sum(before for _, before, _ in known)
    if total <= 0:
        return []
    sizes = sorted((max(before, after) for layer, before, after in known if layer.weight_shape), reverse=True)
    least = sizes[MOST_ROWS - 1] if len(sizes) > MOST_ROWS else 0
    rows: list[_Bar] = []
    others = [0.0, 0.0, 0]
    for layer, before, after in known:
        if layer.weight_shape and max(before, after) >= least and len(rows) < MOST_ROWS:
            rows.append(_Bar(layer.name, 100 * before / total, 100 * after / total, layer.kind, _rank_text(layer)))
        else:
            others = [others[0] + before, others[1] + after, others[2] + 1]
    if others[0] or others[1]:
        rows.append(_Bar(f"{others[2]} others", 100 * others[0] / total, 100 * others[1] / total, DENSE, ""))
    return rows


def _rank_text(layer: LayerPlan) -> str:
    text = "" if layer.is_dense else "rank " + " x ".join(map(str, layer.ranks))
    return text + (", merged" if layer.merged else "")


def _draw_bars(axes: Any, rows: Sequence[_Bar]) -> None:
    """Draws before as a wide pale bar and after as a narrow coloured one, from the top down."""
    places = range(len(rows))
    axes.barh(places, [row.before for row in rows], height=0.8, color=_PALE)
    axes.barh(places, [row.after for row in rows], height=0.45, color=[colour_of(row.kind) for row in rows])
    longest = max((max(row.before, row.after) for row in rows), default=1.0)
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            row.text,
            (max(row.before, row.after), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, 1.3 * longest or 1)
    axes.set_yticks(places, [_short(row.name) for row in rows], fontsize=9)
    axes.invert_yaxis()


def _short(name: str) -> str:
    """Returns the end of a long name, which tells layers apart."""
    name = name.replace("$", r"\$") or "(model)"
    return name if len(name) <= _NAME else "…" + name[-_NAME + 1 :]


def spectrum_svg(layer: LayerSpectra) -> str:
    """Returns the singular values of a layer with the chosen ranks, as SVG."""
    colour = colour_of(layer.layer.kind)
    with _styled() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(3.4, 2.3))
        axes = figure.subplots(gridspec_kw={"left": 0.2, "right": 0.98, "bottom": 0.21, "top": 0.89})
        for number, spectrum in enumerate(layer.spectra):
            steps = range(1, len(spectrum.values) + 1)
            style = ("-", "--")[number % 2]
            axes.plot(steps, spectrum.values, style, color=colour, lw=1.5, label=spectrum.unfolding)
            if spectrum.rank is not None:
                axes.axvline(spectrum.rank, color=colour, ls=style, lw=1)
                axes.axvspan(0, spectrum.rank, color=colour, alpha=0.1, lw=0)
        axes.set(ylim=(0, 1.05), xlim=(0, max(len(s.values) for s in layer.spectra) + 0.5))
        axes.set(title=_short(layer.layer.name), xlabel="singular value", ylabel="over the largest")
        if len(layer.spectra) > 1:
            axes.legend(frameon=False, fontsize=9)
        return _svg(figure, f"singular values of {layer.layer.name}: {spectrum_text(layer)}")


def spectrum_text(layer: LayerSpectra) -> str:
    """Returns what a spectrum shows, in words."""
    if layer.layer.is_dense:
        return "stays dense"
    parts = [
        f"rank {s.rank} of {len(s.values)} ({s.unfolding}) holds {percent(s.energy)} of the energy"
        for s in layer.spectra
        if s.rank is not None
    ]
    return f"{layer.layer.kind}, " + ("; ".join(parts) or f"{_rank_text(layer.layer)}, which is none of this matrix")


def history_svg(
    name: str, values: Sequence[tuple[float, float]], levels: Mapping[str, float], rounds: Sequence[tuple[float, str]]
) -> str:
    """Returns a metric over the epochs of the fine-tuning, as SVG.

    Args:
        name: Of the metric.
        values: Epoch, from 1, and value.
        levels: Values to compare with, drawn as lines across: name to value.
        rounds: Where rounds of compression begin: epochs done by then, and budget.
    """
    with _styled() as matplotlib:
        figure = matplotlib.figure.Figure(figsize=(_WIDTH, 2.6))
        axes = figure.subplots(gridspec_kw={"left": 0.11, "right": 0.98, "bottom": 0.19, "top": 0.9})
        epochs = [epoch for epoch, _ in values]
        axes.plot(epochs, [value for _, value in values], "o-", color=_COLOURS["svd"], ms=3, label=name)
        for (level, value), style in zip(levels.items(), (":", "--", "-."), strict=False):
            axes.axhline(value, color=_GREY, ls=style, lw=1, label=level)
        for done, budget in rounds:
            axes.axvline(done + 0.5, color=_COLOURS["tucker2"], lw=1)
            axes.annotate(
                budget, (done + 0.5, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, va="top", fontsize=7,
            )  # fmt: skip
        axes.set(title=name.replace("$", r"\$"), xlabel="epoch", xlim=(0.5, max(epochs) + 0.5))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        if levels:
            axes.legend(edgecolor="none", fontsize=9)
        first, last = values[0][1], values[-1][1]
        return _svg(figure, f"{name} over {len(values)} epochs, from {first:.4g} to {last:.4g}")


@contextlib.contextmanager
def _styled() -> Iterator[Any]:
    """Draws in the style of the page; gives matplotlib."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(dict(_STYLE)):
        yield matplotlib


def _svg(figure: Any, label: str) -> str:
    """Returns a figure as an element of a page: no header, no identifier that another figure has too."""
    matplotlib = require_matplotlib()
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)

"""A plan as HTML, for notebooks and for the report."""

from __future__ import annotations

import dataclasses
import html.parser

import pytest

from lightning_compress.core.costs import Costs
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.core.settings import Budget

LAYERS = (
    LayerPlan("conv", "Conv2d", "tucker2", (3, 5), (16, 8, 3, 3), 0.125, 8_000, 500, 180_000, 9_000, source="noise"),
    LayerPlan(
        "head", "Linear", "dense", (), (10, 196), 0.0, 1_968, 1_968, 1_960, 1_960, "too <small> & [odd]", "noise"
    ),
)
PLAN = Plan(LAYERS, Costs(10_000, 200_000, 40_000), Costs(2_500, 20_000, 10_400), Budget(params=0.25), "exact")


class Cells(html.parser.HTMLParser):
    """Reads what a browser would show: rows of cells, paragraphs, and every tag there is."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.text = [], [], ""
        self._open = []
        self.feed(text)
        assert not self._open, "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "br":
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data
        self.text += data


def test_html_has_the_cells_and_the_lines_of_the_text():
    page = Cells(PLAN._repr_html_())
    header, conv, head = page.rows
    assert header == ["layer", "type", "kind", "ranks", "error", "measured on", "params", "MACs", "reason"]
    assert conv == ["conv", "Conv2d", "tucker2", "3, 5", "0.1250", "noise", "8,000 → 500 (6.2 %)", "180k → 9k", ""]
    assert head == ["head", "Linear", "dense", "", "", "", "1,968", "1.96k", "too <small> & [odd]"]
    assert all(cell in str(PLAN) for row in page.rows for cell in row)
    for line in PLAN.summary().splitlines():
        assert line in page.text
        assert line in str(PLAN)


@pytest.mark.parametrize("field", ["name", "type", "reason", "source"])
def test_what_comes_from_a_model_is_escaped(field):
    evil = "<script>alert('1')</script>&amp;"
    changed = dataclasses.replace(LAYERS[0 if field == "source" else 1], **{field: evil})
    page = dataclasses.replace(PLAN, layers=(changed,))._repr_html_()
    assert "<script" not in page
    assert any(evil in cell for row in Cells(page).rows for cell in row)
    assert set(Cells(page).tags) <= {"div", "p", "strong", "br", "table", "thead", "tbody", "tr", "th", "td"}


def test_html_is_the_same_each_time():
    assert PLAN._repr_html_() == Plan.from_json(PLAN.to_json())._repr_html_()


def test_timed_layers_have_a_column_of_times():
    timed = dataclasses.replace(LAYERS[0], latency_before=0.001, latency_after=0.0005)
    page = Cells(dataclasses.replace(PLAN, layers=(timed,))._repr_html_())
    assert dict(zip(*page.rows, strict=True))["ms"] == "1 → 0.5"


def test_a_notebook_shows_it():
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(PLAN)
    assert shown["text/html"] == PLAN._repr_html_()

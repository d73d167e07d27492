"""The page of a run: complete, offline, escaped, and shown by a real browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import platform
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

from lightning_compress.cli.figures import bars_svg, colour_of, history_svg
from lightning_compress.cli.history import Epoch
from lightning_compress.cli.html_report import Extras, environment, page, renew_page, write_page
from lightning_compress.cli.report import Round
from lightning_compress.core.errors import OutputFolderError
from lightning_compress.core.settings import Budget
from lightning_compress.kinds.registry import DECOMPOSITIONS
from tests.cli.test_report import LAYERS, PLAN, make
from tests.support.interruptions import block_imports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>"
EPOCHS = [Epoch(1, {"train_loss": 0.9, "val_accuracy": 0.7}), Epoch(2, {"train_loss": 0.5, "val_accuracy": 0.9})]
ROUNDS = tuple(Round(Budget(params=p), epochs, make().zero_shot) for p, epochs in ((0.5, 0), (0.25, 1)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(8, 16, 3), nn.Linear(196, 10)


def extras(**changes):
    return Extras(**{"dense": Net(), "epochs": EPOCHS, "config": f"seed: 0 # {EVIL}", **changes})


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def test_page_has_everything_in_one_file():
    pytest.importorskip("matplotlib")
    report = make(rounds=ROUNDS)
    found = Elements(page(report, extras(), {"app.log": "1/4 training"}))
    for cell in (*report.header, *(cell for row in report.rows() for cell in row)):
        assert cell in found.text
    cards = (
        "4.00x smaller",
        "10.00x fewer MACs",
        "2.50x faster",
        "accuracy 0.9375",
        "0.9500 → 0.5000 → 0.5000 → 0.9375",
    )
    titles = ("Where they go", "Spectra and ranks", "Fine-tuning", "Plan", "Time of the compression", "Environment")
    for text in (*cards, *titles, "Configuration", "Log: app.log", "1/4 training", report.headline, torch.__version__):
        assert text in found.text, text
    assert PLAN._repr_html_() in page(report, extras())
    assert found.tags.count("svg") == 2 + 2 + 2  # parameters and MACs, as no time is known; two layers; two metrics
    assert ("meta", "name", "viewport") in found.attributes


def test_page_needs_nothing_from_elsewhere():
    pytest.importorskip("matplotlib")
    text = page(make(), extras())
    found = Elements(text)
    assert not {"script", "img", "iframe", "object", "embed"} & set(found.tags)
    links = [value for _, name, value in found.attributes if name in {"src", "href", "xlink:href", "data", "action"}]
    assert all(link == "data:," or link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = {value for _, name, value in found.attributes if name == "id"}
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= ids


def test_page_is_the_same_each_time():
    pytest.importorskip("matplotlib")
    assert page(make(), extras()) == page(make(), extras())


@pytest.mark.parametrize("field", ["name", "type", "reason"])
def test_what_comes_from_elsewhere_is_escaped(field):
    pytest.importorskip("matplotlib")
    head = dataclasses.replace(LAYERS[2], **{field: EVIL})
    plan = dataclasses.replace(PLAN, layers=(LAYERS[0], head))
    metrics = {EVIL: 0.5}
    report = make(
        plan,
        **{n: dataclasses.replace(getattr(make(), n), metrics=metrics) for n in ("dense", "zero_shot", "fine_tuned")},
    )
    found = Elements(page(report, extras(epochs=[Epoch(1, {EVIL: 0.1})]), {f"{EVIL}.log": EVIL}))
    assert "script" not in found.tags
    assert EVIL in found.text


def test_without_matplotlib_the_page_has_no_figures_but_all_else(monkeypatch):
    block_imports(monkeypatch, "matplotlib")
    found = Elements(page(make(), extras()))
    assert "svg" not in found.tags
    assert "No figures: plots need matplotlib: pip install 'lightning_compress[plots]'." in found.text
    assert all(cell in found.text for row in make().rows() for cell in row)
    assert "Plan" in found.text


def test_unknown_times_have_no_card_and_worse_is_called_worse():
    report = make()
    slower = dataclasses.replace(report.fine_tuned, latency=0.004)
    found = Elements(page(dataclasses.replace(report, fine_tuned=slower), Extras())).text
    assert "2.00x slower" in found
    assert "faster" not in found
    untimed = {
        n: dataclasses.replace(getattr(report, n), latency=None, throughput=None) for n in ("dense", "fine_tuned")
    }
    found = Elements(page(dataclasses.replace(report, **untimed), Extras())).text
    assert not {"faster", "slower"} & set(found.split())


def test_file_takes_the_logs_beside_it_and_figures_measured_later(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "app.log").write_text("said & done")
    (tmp_path / "empty.log").touch()
    path = write_page(make(), tmp_path, extras())
    before = path.read_text("utf-8")
    assert "said &amp; done" in before
    assert "empty.log" not in before
    later = make(fine_tuned=dataclasses.replace(make().fine_tuned, latency=0.0001))
    renew_page(later, tmp_path)
    assert path.read_text("utf-8") == page(later, extras(), {"app.log": "said & done"}) != before
    renew_page(later, tmp_path / "elsewhere")  # no page, nothing to do
    assert not (tmp_path / "elsewhere").exists()


def test_impossible_folder_is_refused(tmp_path):
    with pytest.raises(OutputFolderError, match="Choose a folder you can write") as caught:
        write_page(make(), tmp_path / "missing")
    assert repr(str(tmp_path / "missing" / "report.html")) in str(caught.value)


def test_environment_says_what_ran():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads of torch"] == str(torch.get_num_threads())
    assert found["Python"] == platform.python_version()
    assert found["processor"]


# --- figures -----------------------------------------------------------------------------------


def bars_in(svg):
    """Widths of the filled bars by colour."""
    namespace = "{http://www.w3.org/2000/svg}"
    widths = {}
    for node in ET.fromstring(svg).iter(f"{namespace}path"):
        colour = re.search(r"fill: (#\w+)", node.get("style", ""))
        if colour and "clip-path" in node.attrib:
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", node.get("d"))]
            widths.setdefault(colour.group(1), []).append(max(xs) - min(xs))
    return widths


def test_lengths_of_bars_compare_as_the_numbers_do():
    pytest.importorskip("matplotlib")
    widths = bars_in(bars_svg(PLAN, "parameters"))
    (tucker,) = widths[colour_of("tucker2")]
    conv, head, others = widths["#e3e3e3"]
    assert tucker / conv == pytest.approx(500 / 8_000, rel=1e-3)
    assert head / conv == pytest.approx(1_968 / 8_000, rel=1e-3)
    assert others / conv == pytest.approx(32 / 8_000, rel=1e-2)
    assert bars_svg(PLAN, "time") is None  # nothing is known of it


def test_many_layers_are_the_largest_and_the_others():
    pytest.importorskip("matplotlib")
    layers = tuple(dataclasses.replace(LAYERS[0], name=f"layer{i}", params_before=8_000 + i) for i in range(60))
    svg = bars_svg(dataclasses.replace(PLAN, layers=layers), "parameters")
    assert ">layer59<" in svg
    assert ">layer36<" in svg
    assert ">layer35<" not in svg
    assert ">36 others<" in svg


def test_every_kind_has_one_colour_of_its_own():
    own = [kind for kind, each in DECOMPOSITIONS.items() if type(each).__module__.startswith("lightning_compress.")]
    colours = {kind: colour_of(kind) for kind in ("dense", *own)}
    assert len(set(colours.values())) == len(colours) >= 10
    assert colour_of("my own kind") == colour_of("my own kind") not in colours.values()


def test_rounds_and_levels_are_named_in_the_history():
    pytest.importorskip("matplotlib")
    svg = history_svg("val_accuracy", [(1.0, 0.5), (2.0, 0.75)], {"dense, test": 0.9}, [(1.0, "params <= 40 %")])
    assert "params &lt;= 40 %" in svg
    assert "dense, test" in svg
    assert "val_accuracy over 2 epochs, from 0.5 to 0.75" in svg


# --- a real browser ----------------------------------------------------------------------------


def browse(tmp_path, width, *arguments):
    settings = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    )
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    return subprocess.run(
        [CHROMIUM, *settings, offline, f"--window-size={width},2000", *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_the_page_without_cutting_it_off(tmp_path, width):
    pytest.importorskip("matplotlib")
    path = write_page(make(rounds=ROUNDS), tmp_path, extras())
    asked = """<script>
    const root = document.documentElement, figures = [...document.querySelectorAll("svg")];
    const sizes = figures.map(figure => figure.getBoundingClientRect());
    document.title = JSON.stringify({
        window: innerWidth, page: root.scrollWidth, figures: sizes.map(size => [size.left, size.right, size.height]),
        columns: new Set(sizes.map(size => Math.round(size.left))).size,
    });
    </script></body>"""
    (tmp_path / "asked.html").write_text(path.read_text("utf-8").replace("</body>", asked), encoding="utf-8")
    dom = browse(tmp_path, width, "--dump-dom", (tmp_path / "asked.html").as_uri()).stdout
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom).group(1)))
    assert found["page"] <= found["window"]  # nothing to scroll to the side
    assert len(found["figures"]) == 6
    assert all(0 <= left < right <= found["window"] and height > 80 for left, right, height in found["figures"])
    assert (found["columns"] == 1) == (width == 390)
    browse(tmp_path, width, f"--screenshot={tmp_path / 'page.png'}", path.as_uri())
    content = (tmp_path / "page.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (width, 2000)
    assert len(content) > 20_000  # an empty page takes less

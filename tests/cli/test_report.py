from __future__ import annotations

import dataclasses
import json
import re
import struct
import xml.etree.ElementTree as ET
from csv import DictReader

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from lightning_compress.cli.figures import colour_of
from lightning_compress.cli.report import Figures, Report, Round, log_numbers, plot_plan
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import CompressionWarning, OutputFolderError, UnsupportedError
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.core.settings import Budget
from tests.support.interruptions import block_imports

DENSE, COMPRESSED = Costs(10_000, 200_000, 40_000), Costs(2_500, 20_000, 10_400)
LAYERS = (
    LayerPlan(
        "conv", "Conv2d", "tucker2", (3, 5), (16, 8, 3, 3), 0.12345, 8_000, 500, 180_000, 9_000, source="batch norm"
    ),
    LayerPlan("norm", "BatchNorm2d", "dense", (), (), 0.0, 32, 32, reason="a norm layer"),
    LayerPlan("head", "Linear", "dense", (), (10, 196), 0.0, 1_968, 1_968, 1_960, 1_960, "too small", "batch norm"),
)
PLAN = Plan(
    layers=LAYERS,
    dense=DENSE,
    compressed=COMPRESSED,
    budget=Budget(params=0.25, bytes=0.3),
    method="exact",
    objective="moments",
    source="batch norm",
    optimality_gap=0.0125,
    output_distance=0.125,
    seconds=1.5,
    seed=0,
)


def make(plan=PLAN, **changes):
    stages = {
        "dense": Figures(DENSE, 0.002, 1_000.0, {"accuracy": 0.95, "loss": 0.2}),
        "zero_shot": Figures(COMPRESSED, 0.001, 2_000.0, {"accuracy": 0.5, "loss": 1.25}),
        "fine_tuned": Figures(COMPRESSED, 0.0008, 2_500.0, {"accuracy": 0.9375, "loss": 0.25}),
    }
    return Report(plan, **{**stages, "seconds": {"search": 1.25, "swap": 0.06}, **changes})


def stage(costs, latency_ms, throughput, accuracy, loss):
    sizes = {name: getattr(costs, name) for name in ("params", "macs", "bytes")}
    times = {"latency_ms": pytest.approx(latency_ms, rel=1e-12), "throughput": throughput}
    return {**sizes, **times, "metrics": {"accuracy": accuracy, "loss": loss}}


def layer(name, type_, kind="dense", ranks=(), error=0.0, source=None, *, params, macs=(None, None), reason=None):
    found = {"name": name, "type": type_, "kind": kind, "ranks": list(ranks), "error": error, "source": source}
    costs = {"params": params, "macs": macs, "latency": (None, None)}
    found |= {f"{name}_{when}": cost[i] for name, cost in costs.items() for i, when in enumerate(("before", "after"))}
    return {**found, "reason": reason}


def test_json_holds_exactly_what_was_measured():
    search = {"method": "exact", "objective": "moments", "source": "batch norm"}
    search |= {"seconds": 1.5, "optimality_gap": 0.0125, "output_distance": 0.125}
    untimed = {"target": None, "memory_format": None, "predicted_latency_ms": None}
    tucker = ("conv", "Conv2d", "tucker2", (3, 5), 0.12345, "batch norm")
    expected = {
        "schema": 1,
        "data_free": True,
        "budget": {"params": 0.25, "bytes": 0.3},
        "dense": stage(DENSE, 2.0, 1_000.0, 0.95, 0.2),
        "zero_shot": stage(COMPRESSED, 1.0, 2_000.0, 0.5, 1.25),
        "fine_tuned": stage(COMPRESSED, 0.8, 2_500.0, 0.9375, 0.25),
        "kept": {"params": 0.25, "macs": 0.1, "bytes": 0.26, "latency": pytest.approx(0.4, rel=1e-12)},
        "search": {**search, **untimed},
        "seconds": {"search": 1.25, "swap": 0.06},
        "layers": [
            layer(*tucker, params=(8_000, 500), macs=(180_000, 9_000)),
            layer("norm", "BatchNorm2d", params=(32, 32), reason="a norm layer"),
            layer("head", "Linear", source="batch norm", params=(1_968,) * 2, macs=(1_960,) * 2, reason="too small"),
        ],
    }
    report = make().as_dict()
    assert report == expected
    for found, wanted in ((report, expected), *zip(report["layers"], expected["layers"], strict=True)):
        assert list(found) == list(wanted)  # in this order


def test_rows_are_the_figures_for_people():
    assert make().rows() == [
        ("parameters", "10,000", "2,500", "2,500", "25.0 % (4.00x)"),
        ("MACs", "200,000", "20,000", "20,000", "10.0 % (10.00x)"),
        ("bytes", "40,000", "10,400", "10,400", "26.0 % (3.85x)"),
        ("latency, batch 1", "2.000 ms", "1.000 ms", "0.800 ms", "40.0 % (2.50x)"),
        ("throughput, batch 32", "1,000 /s", "2,000 /s", "2,500 /s", "2.50x"),
        ("accuracy", "0.9500", "0.5000", "0.9375", "-0.0125"),
        ("loss", "0.2000", "1.2500", "0.2500", "+0.0500"),
    ]


def test_a_budget_that_a_fit_did_not_come_to_is_said_beside_the_one_reached():
    missed, reached = make(asked=Budget(params=0.1)), make(asked=PLAN.budget)
    assert missed.as_dict()["budget_asked"] == {"params": 0.1}
    said = "budget params <= 25 %, bytes <= 30 % (asked for params <= 10 %: the fit ended before its last round); "
    assert said in missed.to_markdown()
    assert reached.as_dict() == make().as_dict()
    assert reached.to_markdown() == make().to_markdown()


def test_markdown_is_the_headline_the_rows_and_the_layers():
    assert make().to_markdown() == "\n".join(
        [
            "# Compression report",
            "",
            "budget params <= 25 %, bytes <= 30 %; data-free exact search in 1.50 s, at most 1.25 % above the optimum; "
            "1 layers factorised",
            "",
            "|  | dense | zero-shot | fine-tuned | kept / change |",
            "| --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in make().rows()),
            "",
            "## Time",
            "",
            "| part | took |",
            "| --- | --- |",
            "| search | 1.2 s |",
            "| swap | 0.1 s |",
            "",
            "## Layers",
            "",
            "| layer | type | kind | ranks | error | measured on | parameters | afterwards | MACs | ms | reason |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            "| `conv` | Conv2d | tucker2 | 3, 5 | 0.1235 | batch norm | 8,000 | 500 | 180k → 9k |  |  |",
            "| `norm` | BatchNorm2d | dense |  |  |  | 32 | 32 |  |  | a norm layer |",
            "| `head` | Linear | dense |  |  | batch norm | 1,968 | 1,968 | 1.96k |  | too small |",
            "",
        ]
    )


def test_time_of_the_plan_is_in_json_and_markdown():
    slow = dataclasses.replace(LAYERS[0], latency_before=0.001, latency_after=0.0015)
    plan = dataclasses.replace(
        PLAN, layers=(slow, *LAYERS[1:]), dense=dataclasses.replace(DENSE, latency=0.004), predicted_latency=0.0021,
        compressed=dataclasses.replace(COMPRESSED, latency=0.002), target={"backend": "torch", "batch": 1},
        memory_format="channels_last",
    )  # fmt: skip
    report = make(plan)
    search = {key: report.as_dict()["search"][key] for key in ("target", "memory_format", "predicted_latency_ms")}
    assert list(search.values()) == [{"backend": "torch", "batch": 1}, "channels_last", pytest.approx(2.1)]
    assert report.as_dict()["layers"][0]["latency_after"] == 0.0015
    text = report.to_markdown()
    assert "latency 4 → 2 ms (2.00x; torch, batch 1, channels_last, predicted 2.1 ms)" in text
    assert "slower than dense: conv 1 → 1.5 ms" in text
    assert "| 180k → 9k | 1 → 1.5 |  |" in text


def test_table_shows_every_cell():
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(make().table())
    text = capture.get()
    for row in make().rows():
        assert all(cell in text for cell in row)
    assert make().to_markdown().splitlines()[2] in " ".join(text.split())  # the headline, wrapped


def rounds_of(report):
    second = dataclasses.replace(
        report.zero_shot, costs=Costs(4_000, 50_000, 16_000), metrics={"accuracy": 0.75, "loss": 0.5}
    )
    return (Round(Budget(params=0.5), 0, report.zero_shot), Round(Budget(params=0.4), 3, second))


def test_each_round_has_a_column_with_its_budget():
    report = make(rounds=rounds_of(make()))
    assert report.header == (
        "",
        "dense",
        "round 1, params <= 50 %",
        "round 2, params <= 40 %",
        "fine-tuned",
        "kept / change",
    )
    assert report.rows()[0] == ("parameters", "10,000", "2,500", "4,000", "2,500", "25.0 % (4.00x)")
    assert report.rows()[5] == ("accuracy", "0.9500", "0.5000", "0.7500", "0.9375", "-0.0125")
    header = "|  | dense | round 1, params <= 50 % | round 2, params <= 40 % | fine-tuned | kept / change |"
    assert header in report.to_markdown()
    first, second = report.as_dict()["rounds"]
    assert first == {"budget": {"params": 0.5}, "epochs": 0, **report.as_dict()["zero_shot"]}
    assert (second["budget"], second["epochs"], second["params"]) == ({"params": 0.4}, 3, 4_000)
    assert make().header == ("", "dense", "zero-shot", "fine-tuned", "kept / change")
    assert "rounds" not in make().as_dict()


def test_table_of_rounds_fits_into_a_terminal():
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(make(rounds=rounds_of(make())).table())
    assert "…" not in capture.get()
    assert all(len(line) <= 80 for line in capture.get().splitlines())
    assert all(cell in capture.get() for row in make().rows() for cell in row[1:-1])


class Logger:
    def __init__(self, error=None):
        self.got, self.closed, self._error = [], False, error

    def log_metrics(self, metrics, step):
        if self._error is not None:
            raise self._error
        self.got.append((step, metrics))

    def save(self):
        assert self.got

    def finalize(self, status):
        self.closed = status == "success"


def test_loggers_get_every_figure_of_every_stage_under_the_names_of_the_json():
    report, logger = make(rounds=rounds_of(make())), Logger()
    log_numbers(report, [logger], 7)
    ((step, numbers),) = logger.got
    assert (step, logger.closed) == (7, True)
    stages = {**{stage: report.as_dict()[stage] for stage in ("dense", "zero_shot", "fine_tuned")}}
    stages["round_2"] = {k: v for k, v in report.as_dict()["rounds"][1].items() if k not in {"budget", "epochs"}}
    expected = {}
    for stage, figures in stages.items():
        for name, value in ({**figures, **figures["metrics"]}).items():
            if name != "metrics":
                expected[f"compress/{stage}/{name}"] = value
    assert numbers == expected
    assert numbers["compress/round_2/accuracy"] == 0.75
    assert len(numbers) == 4 * 7


def test_what_is_unknown_is_not_logged():
    unknown = Figures(Costs(10_000, None, 40_000), None, None, {})
    numbers = make(dense=unknown).numbers()
    assert {name for name in numbers if "/dense/" in name} == {"compress/dense/params", "compress/dense/bytes"}


def test_a_logger_that_fails_gives_a_warning_and_the_next_one_its_figures():
    good = Logger()
    with pytest.warns(CompressionWarning, match="Logger did not take the figures of the report: OSError: disk full"):
        log_numbers(make(), [Logger(OSError("disk full")), good], 0)
    assert good.got


@pytest.mark.slow
def test_figures_reach_the_file_of_lightnings_own_loggers(tmp_path):
    csv = CSVLogger(tmp_path, name="logs", version="a")
    csv.log_metrics({"train_loss": 1.0}, step=3)
    csv.save()
    csv.finalize("success")
    log_numbers(make(), [csv], 4)
    first, last = DictReader((tmp_path / "logs" / "a" / "metrics.csv").read_text("utf-8").splitlines())
    assert (first["train_loss"], last["train_loss"]) == ("1.0", "")
    assert {k: float(v) for k, v in last.items() if k.startswith("compress/")} == make().numbers()


@pytest.mark.slow
def test_figures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoardLogger(tmp_path, name="logs", version="a")
    board.log_metrics({"train_loss": 1.0}, step=3)
    board.finalize("success")
    log_numbers(make(), [board], 4)
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "a"))
    events.Reload()
    for name, value in make().numbers().items():
        ((step, found),) = [(e.step, e.value) for e in events.Scalars(name)]
        assert (step, found) == (4, pytest.approx(value))


def test_unknown_macs_are_a_question_mark_and_null():
    unknown = Costs(10_000, None, 40_000)
    report = make(dense=Figures(unknown, 0.002, 1.0, {}), fine_tuned=Figures(COMPRESSED, 0.001, 1.0, {}))
    assert report.rows()[1] == ("MACs", "?", "20,000", "20,000", "?")
    assert json.loads(json.dumps(report.as_dict()))["kept"]["macs"] is None


def test_real_data_is_said_so():
    report = make(dataclasses.replace(PLAN, data_free=False))
    assert report.as_dict()["data_free"] is False
    assert "; not data-free exact search" in report.to_markdown()


def test_plan_without_a_known_gap_claims_none():
    # a plan read off a model was not searched: nothing is known about the optimum
    read_off = dataclasses.replace(PLAN, budget=None, method=None, objective=None, optimality_gap=None, seconds=None)
    read_off = dataclasses.replace(read_off, source=None, output_distance=None)
    report = make(read_off, seconds={})
    assert report.as_dict()["budget"] == {}
    assert set(report.as_dict()["search"].values()) == {None}
    assert report.as_dict()["seconds"] == {}
    assert "## Time" not in report.to_markdown()
    assert "above the optimum" not in report.to_markdown()
    assert "None" not in report.to_markdown()


def test_save_writes_json_markdown_and_plan(tmp_path):
    report, folder = make(), tmp_path / "new" / "folder"
    for _ in range(2):
        report.save(str(folder))
        assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text("utf-8")) == json.loads(json.dumps(report.as_dict()))
    assert (folder / "report.md").read_text("utf-8") == report.to_markdown()
    assert Plan.from_json((folder / "plan.json").read_text("utf-8")) == PLAN


@pytest.mark.parametrize(
    ("write", "below"),
    [
        *((make().save, below) for below in ("file", "file/below")),
        *(((lambda path: plot_plan(PLAN, path)), below) for below in ("missing/plan.png", "file/plan.png")),
    ],
)
def test_impossible_folder_is_refused_and_a_file_in_its_place_left_alone(tmp_path, write, below):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputFolderError, match="Choose a folder you can write") as caught:
        write(tmp_path / below)
    assert repr(str(tmp_path / below)) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("count", [1, 30])
def test_plot_is_a_png_that_grows_with_the_layers_and_leaves_pyplot_alone(tmp_path, count):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    layers = [dataclasses.replace(LAYERS[i % 2 * 2], name=f"layer{i}") for i in range(count)]
    plot_plan(dataclasses.replace(PLAN, layers=(*layers, LAYERS[1])), tmp_path / "plan.png")
    content = (tmp_path / "plan.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    assert struct.unpack(">II", content[16:24]) == (11 * 120, pytest.approx(120 * (1.8 + 0.32 * count), abs=1))
    assert pyplot.get_fignums() == before


def test_plot_shows_names_ranks_and_kinds(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot_plan(PLAN, tmp_path / "plan.svg")
    root = ET.parse(tmp_path / "plan.svg").getroot()
    texts = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"conv", "head", "rank 3 x 5", "tucker2", "dense", "before"} <= texts
    assert "25.0 % of 10,000 parameters kept (exact plan)" in texts
    assert "norm" not in texts


def test_plot_has_a_linear_axis_of_shares(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_plan(PLAN, tmp_path / "plan.svg")
    root = ET.parse(tmp_path / "plan.svg").getroot()
    widths = {}
    for node in root.iter("{http://www.w3.org/2000/svg}path"):
        colour = re.search(r"fill: (#\w+)", node.get("style", ""))
        if colour and "clip-path" in node.attrib:
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", node.get("d"))]
            widths.setdefault(colour.group(1), []).append(max(xs) - min(xs))
    before, after = widths["#e3e3e3"][0], widths[colour_of("tucker2")][0]
    assert after / before == pytest.approx(500 / 8_000, rel=1e-3)


def test_plot_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    block_imports(monkeypatch, "matplotlib")
    with pytest.raises(UnsupportedError, match=r"pip install 'lightning_compress\[plots\]'"):
        plot_plan(PLAN, tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []

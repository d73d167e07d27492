"""Whole jobs of the application, looked at from all sides."""

from __future__ import annotations

import copy
import csv
import dataclasses
import html
import json

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from lightning_compress.cli.app import run
from lightning_compress.cli.demo.data import DigitsDataModule
from lightning_compress.cli.demo.models import SmallCNN
from lightning_compress.cli.demo.task import ClassificationTask
from lightning_compress.compress import compress_
from lightning_compress.core.plan import Plan
from lightning_compress.core.plan_names import plan_below
from lightning_compress.surgery.save import load_compressed
from lightning_compress.surgery.swap import apply_plan_
from tests.support.cli import QUICK, TINY_CNN, TINY_MLP, compose, files_in, make, measure_quickly, outside_logs
from tests.support.interruptions import block_imports

STAGES = ("dense", "zero_shot", "fine_tuned")
WRITTEN = [
    "compressed/model.safetensors",
    "compressed/plan.json",
    "plan.json",
    "report.html",
    "report.json",
    "report.md",
]


@pytest.fixture(autouse=True)
def _measure_quickly(monkeypatch):
    measure_quickly(monkeypatch)


def figures_of(net, limit=160):
    """Accuracy and cross-entropy on the test images, in plain torch."""
    module = DigitsDataModule(limit=limit)
    module.setup("test")
    images, labels = module.test_dataloader().dataset.tensors
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(images)
    return {
        "accuracy": pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-6),
        "loss": pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5),
    }


def size_of(net):
    return sum(p.numel() for p in net.parameters()), sum(
        t.numel() * t.element_size() for t in net.state_dict().values()
    )


# --- one whole job, looked at from all sides ---------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job from known dense weights: configuration, folder, dense net, report."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("job")
    dense = SmallCNN(width=8)
    for norm in (m for m in dense.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    safetensors.torch.save_file(dense.state_dict(), folder / "dense.safetensors")
    cfg = compose(*TINY_CNN, f"model.weights={folder / 'dense.safetensors'}", "compression.budget.params=0.4")
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        report = run(cfg, str(folder / "out"))
    return cfg, folder / "out", dense, report


def test_report_json_says_what_the_job_did(job):
    _, folder, _, report = job
    content = json.loads((folder / "report.json").read_text("utf-8"))
    assert content == json.loads(json.dumps(report.as_dict()))
    assert (content["data_free"], content["budget"]) == (True, {"params": 0.4})
    for stage in STAGES:
        assert set(content[stage]["metrics"]) == {"accuracy", "loss"}
        assert content[stage]["latency_ms"] > 0
        assert content[stage]["throughput"] > 0
    parts = ["synthetic inputs", "moments", "search", "swap", "regression", "distillation", "fine-tuning"]
    assert list(content["seconds"]) == parts
    assert all(seconds > 0 for seconds in content["seconds"].values())
    found = {key: content["search"][key] for key in ("method", "objective", "source")}
    assert found == {"method": "exact", "objective": "moments", "source": "batch norm"}
    assert content["search"]["seconds"] > 0
    assert 0 < content["search"]["output_distance"] < 1
    assert 0 <= content["search"]["optimality_gap"] < 2.1e-3  # the certificate's own gap, and the solver's


def test_report_figures_agree_with_each_other(job):
    _, folder, _, _ = job
    content = json.loads((folder / "report.json").read_text("utf-8"))
    dense, zero_shot, fine_tuned = (content[stage] for stage in STAGES)
    for key in ("params", "macs", "bytes"):
        assert zero_shot[key] == fine_tuned[key] < dense[key]
        assert content["kept"][key] == fine_tuned[key] / dense[key]
    assert content["kept"]["latency"] == pytest.approx(fine_tuned["latency_ms"] / dense["latency_ms"], rel=1e-9)
    assert content["kept"]["params"] <= 0.4
    assert sum(layer["params_before"] for layer in content["layers"]) == dense["params"]
    assert sum(layer["params_after"] for layer in content["layers"]) == fine_tuned["params"]
    for layer in content["layers"]:
        dense_layer = layer["kind"] == "dense"
        assert (layer["reason"] is not None) is dense_layer
        assert (layer["ranks"] == []) is dense_layer
        assert (layer["params_before"] == layer["params_after"]) is dense_layer
        assert (layer["error"] == 0) is dense_layer
        assert 0 <= layer["error"] < 1


def test_report_agrees_with_the_plan(job):
    _, folder, _, report = job
    content = json.loads((folder / "report.json").read_text("utf-8"))
    plan = Plan.from_json((folder / "plan.json").read_text("utf-8"))
    assert plan == report.plan
    assert content["budget"] == plan.budget.limits()
    predicted = {"predicted_latency_ms": 1e3 * plan.predicted_latency}
    shared = {key: getattr(plan, key) for key in content["search"] if key not in predicted}
    assert content["search"] == {**shared, **predicted}
    assert content["search"]["target"]["backend"] == "torch"
    assert plan.timings.items() <= content["seconds"].items()
    for stage, costs in (("dense", plan.dense), ("zero_shot", plan.compressed), ("fine_tuned", plan.compressed)):
        sizes = ("params", "macs", "bytes")
        assert [content[stage][key] for key in sizes] == [getattr(costs, key) for key in sizes]
    keys = ("name", "kind", "error", "source", "macs_before", "macs_after", "latency_before", "latency_after")
    assert [(*(layer[key] for key in keys), tuple(layer["ranks"])) for layer in content["layers"]] == [
        (*(getattr(layer, key) for key in keys), layer.ranks) for layer in plan.layers
    ]


def test_dense_figures_are_those_of_the_loaded_net(job):
    _, _, dense, report = job
    assert report.dense.metrics == figures_of(dense)
    assert (report.dense.costs.params, report.dense.costs.bytes) == size_of(dense)


@pytest.mark.slow
def test_zero_shot_figures_are_those_of_the_healed_net(job):
    _, folder, dense, report = job
    task = ClassificationTask(copy.deepcopy(dense))
    plan = compress_(task, {"params": 0.4}, example_input=(1, 1, 8, 8), method="exact")
    assert plan_below(plan, "net").layers == Plan.from_json((folder / "plan.json").read_text("utf-8")).layers
    plain = ClassificationTask(copy.deepcopy(dense))
    apply_plan_(plain, plan)
    assert report.zero_shot.metrics != figures_of(plain.net)
    assert report.zero_shot.metrics == figures_of(task.net)
    assert (report.zero_shot.costs.params, report.zero_shot.costs.bytes) == size_of(task.net)


def test_saved_model_is_the_fine_tuned_one(job):
    cfg, folder, dense, report = job
    net, zero_shot = make(cfg.model.net), ClassificationTask(copy.deepcopy(dense))
    plan = load_compressed(net, folder / "compressed")
    assert report.fine_tuned.metrics == figures_of(net)
    assert (report.fine_tuned.costs.params, report.fine_tuned.costs.bytes) == size_of(net)
    assert [layer.name for layer in plan.layers] == [layer.name for layer in report.plan.layers]  # one set of names
    assert [(layer.name, layer.kind, layer.ranks) for layer in plan.factorised] == [
        (layer.name, layer.kind, layer.ranks) for layer in report.plan.factorised
    ]
    apply_plan_(zero_shot.net, report.plan)
    assert not torch.equal(net.head.bias, zero_shot.net.head.bias)
    assert report.fine_tuned.metrics != report.zero_shot.metrics  # an epoch on few images need not help


def test_job_writes_these_files_only_and_does_not_train_given_weights(job):
    _, folder, _, report = job
    assert outside_logs(folder) == sorted([*WRITTEN, "plan.png"])
    assert (folder / "report.md").read_text("utf-8") == report.to_markdown()
    assert (folder / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["version_0"]  # of fine-tuning


def test_page_shows_what_the_job_did(job):
    pytest.importorskip("matplotlib")
    _, folder, _, report = job
    page = (folder / "report.html").read_text("utf-8")
    assert report.plan._repr_html_() in page
    assert all(html.escape(cell) in page for row in report.rows() for cell in row)
    for section in ("Where they go", "Spectra and ranks", "Fine-tuning", "Configuration"):
        assert section in page
    assert 'aria-label="val_accuracy over ' in page


def test_loggers_have_the_figures_of_every_stage(job):
    _, folder, _, report = job
    rows = list(csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").read_text("utf-8").splitlines()))
    names = report.numbers()
    (found,) = [{name: float(row[name]) for name in names} for row in rows if row["compress/dense/params"]]
    assert found == pytest.approx(names)


@pytest.mark.slow
def test_each_round_is_tested_right_after_its_swap(tmp_path):
    phases = "[{budget: {params: 0.6}, epochs: 1}, {budget: {params: 0.4}}]"
    cfg = compose(*TINY_CNN, "compression.budget.params=0.4", f"compression.schedule={{phases: {phases}}}")
    report = run(cfg, tmp_path)
    first, second = report.rounds
    assert [(str(r.budget), r.epochs) for r in report.rounds] == [("params <= 60 %", 0), ("params <= 40 %", 1)]
    assert first.figures == report.zero_shot
    dense = report.dense.costs.params
    assert 0.4 * dense < first.figures.costs.params <= 0.6 * dense
    assert second.figures.costs.params == report.fine_tuned.costs.params <= 0.4 * dense
    content = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [each["budget"] for each in content["rounds"]] == [{"params": 0.6}, {"params": 0.4}]
    assert "round 2, params &lt;= 40 %" in (tmp_path / "report.html").read_text("utf-8")


# --- variants ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_job_repeats_under_its_seed_and_trains_the_dense_net_first(tmp_path, capsys):
    settings = (*TINY_MLP, "seed=3", "plot=false", "compression.method=continuous")
    first = run(compose(*settings), tmp_path / "a")
    out = capsys.readouterr().out
    second = run(compose(*settings), tmp_path / "b")
    assert (first.plan.method, first.plan.objective) == ("continuous", "moments")
    for stage in STAGES:
        assert getattr(first, stage).metrics == getattr(second, stage).metrics
    assert first.plan.layers == second.plan.layers
    assert sorted(path.name for path in (tmp_path / "a" / "logs").iterdir()) == ["version_0", "version_1"]
    assert not (tmp_path / "a" / "plan.png").exists()
    order = [out.index(word) for word in ("1/4", "training the dense MLP", "2/4", "zero-shot:", "3/4", "4/4")]
    assert order == sorted(order)


def test_logger_none_logs_nothing_and_brackets_in_the_folder_are_printed_as_they_are(tmp_path, capsys):
    folder = tmp_path / "run [v1]"
    run(compose(*TINY_MLP, "logger=none", "plot=false"), folder)
    assert files_in(folder) == WRITTEN
    assert f"written to {folder}\n" in capsys.readouterr().out


def test_epochs_of_the_trainer_bound_both_trainings_and_no_seed_is_a_setting_like_others(tmp_path, capsys):
    settings = (*TINY_MLP, "trainer.max_epochs=1", "seed=null", "plot=false", "+trainer.enable_checkpointing=true")
    own_keys = ("data.side=32", "model.net.hidden=[${data.side},${data.side}]")
    report = run(compose(*settings, *(f"+{key}" if "side=" in key else key for key in own_keys)), tmp_path)
    assert report.plan.seed == 0
    assert "fine-tuning, 1 epochs" in capsys.readouterr().out
    (steps,) = {path.name.rpartition("step=")[2] for path in tmp_path.rglob("epoch=*.ckpt")}
    assert steps == "2.ckpt"  # of limit_train_batches


def test_dense_net_keeps_its_figures_when_the_budget_is_everything(tmp_path):
    report = run(compose(*TINY_MLP, "compression.budget.params=1.0", "plot=false"), tmp_path)
    assert report.plan.factorised == ()
    times = {name: getattr(report.zero_shot, name) for name in ("latency", "throughput")}
    assert report.zero_shot == dataclasses.replace(report.dense, **times)


@pytest.mark.slow
def test_zero_epochs_of_the_dense_net_leave_it_as_it_was_made(tmp_path):
    cfg = compose(*TINY_MLP, "dense.epochs=0", "plot=false", "seed=4")
    report = run(cfg, tmp_path)
    torch.manual_seed(4)
    assert report.dense.metrics == figures_of(make(cfg.model.net))


def test_objective_healing_and_fine_tuning_can_be_switched_off(tmp_path):
    settings = ("compression.objective=weight", "compression.heal=false", "finetune.epochs=0", "plot=false")
    cfg = compose(*TINY_MLP, *settings, f"model.weights={tmp_path / 'w.pt'}")
    net = make(cfg.model.net)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    report = run(cfg, tmp_path / "out")
    assert (report.plan.objective, report.plan.source, report.plan.output_distance) == ("weight", "weight", None)
    assert set(report.seconds) == {"search", "swap", "fine-tuning"}
    task = ClassificationTask(net)
    apply_plan_(task.net, report.plan)
    assert report.fine_tuned.metrics == report.zero_shot.metrics == figures_of(task.net)


@pytest.mark.slow
def test_fewer_images_than_a_batch_make_one_smaller_batch(tmp_path):
    report = run(compose(*TINY_MLP, "data.module.limit=5"), tmp_path / "out")
    assert report.plan.factorised
    assert report.dense.metrics["loss"] != report.fine_tuned.metrics["loss"]


def test_without_matplotlib_there_is_no_plot_but_everything_else(tmp_path, monkeypatch, capsys):
    block_imports(monkeypatch, "matplotlib")
    run(compose(*TINY_MLP), tmp_path)
    assert outside_logs(tmp_path) == WRITTEN
    assert "no plot: plots need matplotlib: pip install 'lightning_compress[plots]'." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("less_work")
@pytest.mark.parametrize(
    ("model", "compression"),
    [
        *((model, "params_50") for model in ("mlp", "vgg", "resnet20", "small_cnn")),
        *((model, "edge") for model in ("mlp", "vgg")),
        *(pytest.param(model, "edge", marks=pytest.mark.sweep) for model in ("resnet20", "small_cnn")),
    ],
)
def test_every_model_goes_through(tmp_path, model, compression):
    budget = {"params_50": {"params": 0.5}, "edge": {"params": 0.25, "macs": 0.3, "bytes": 0.3}}[compression]
    overrides = [o for o in QUICK if not o.startswith(("compression.method", "dense", "finetune"))]
    cfg = compose(*overrides, "dense.epochs=1", "finetune.epochs=1", f"model={model}", f"compression={compression}")
    report = run(cfg, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert content["budget"] == budget
    assert content["search"]["method"] == "continuous"
    assert all(content["kept"][key] <= limit for key, limit in budget.items())
    assert all(rank % cfg.compression.rank_multiple == 0 for layer in content["layers"] for rank in layer["ranks"])
    net = make(cfg.model.net)
    load_compressed(net, tmp_path / "compressed")
    assert report.fine_tuned.metrics == figures_of(net)
    assert size_of(net) == (content["fine_tuned"]["params"], content["fine_tuned"]["bytes"])

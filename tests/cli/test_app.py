from __future__ import annotations

import copy
import dataclasses
import functools
import json
import struct
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import safetensors.torch
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch.nn import functional as F

from lightning_compress.cli import app
from lightning_compress.cli.app import run
from lightning_compress.cli.config import CONFIG_FOLDER, FAILED, or_exit, require_writable
from lightning_compress.cli.demo import data as demo_data
from lightning_compress.cli.demo.data import DigitsDataModule
from lightning_compress.cli.demo.models import SmallCNN
from lightning_compress.cli.demo.task import ClassificationTask
from lightning_compress.compress import compress_
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    DataNotFoundError,
    InfeasibleBudgetError,
    OutputFolderError,
    WeightsError,
)
from lightning_compress.core.plan import Plan
from lightning_compress.surgery.save import load_compressed, save_compressed
from lightning_compress.surgery.swap import apply_plan_
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.interruptions import block_imports

QUICK = (
    "trainer=debug",
    "trainer.limit_test_batches=1.0",
    "data.module.limit=160",
    "dense.epochs=2",
    "finetune.epochs=2",
    "compression.method=exact",
)
TINY_CNN = (*QUICK, "model.net.width=8")
TINY_MLP = (*QUICK, "model=mlp", "model.net.hidden=[32,32]")
STAGES = ("dense", "zero_shot", "fine_tuned")


QUICK_LATENCY = functools.partial(app.measure_latency, rounds=1, seconds=0.002)


@pytest.fixture(autouse=True)
def _clear_hydra_and_measure_quickly(monkeypatch):
    monkeypatch.setattr(app, "measure_latency", QUICK_LATENCY)
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def compose(*overrides):
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        cfg = hydra.compose("config", list(overrides))
    GlobalHydra.instance().clear()
    return cfg


def make_net(cfg):
    return instantiate(cfg.model.net, _convert_="all")


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


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


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
        patch.setattr(app, "measure_latency", QUICK_LATENCY)
        report = run(cfg, str(folder / "out"))
    return cfg, folder / "out", dense, report


def test_report_json_has_exactly_the_schema(job):
    _, folder, _, report = job
    content = json.loads((folder / "report.json").read_text("utf-8"))
    assert content == json.loads(json.dumps(report.as_dict()))
    assert list(content) == ["schema", "data_free", "budget", *STAGES, "kept", "search", "seconds", "layers"]
    for stage in STAGES:
        assert list(content[stage]) == ["params", "macs", "bytes", "latency_ms", "metrics"]
        assert [type(content[stage][key]) for key in ("params", "macs", "bytes", "latency_ms")] == [
            int,
            int,
            int,
            float,
        ]
        assert set(content[stage]["metrics"]) == {"accuracy", "loss"}
        assert content[stage]["latency_ms"] > 0
    assert list(content["kept"]) == ["params", "macs", "bytes", "latency"]
    search_keys = ["method", "objective", "source", "seconds", "optimality_gap", "output_distance"]
    assert list(content["search"]) == search_keys
    parts = ["synthetic inputs", "moments", "search", "swap", "regression", "distillation"]
    assert list(content["seconds"]) == parts
    assert all(seconds > 0 for seconds in content["seconds"].values())
    layer_keys = ["name", "type", "kind", "ranks", "error", "source", "params_before", "params_after", "reason"]
    assert content["layers"]
    assert all(list(layer) == layer_keys for layer in content["layers"])
    assert content["schema"] == 1
    assert content["data_free"] is True
    assert content["budget"] == {"params": 0.4}
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
    assert content["search"] == {key: getattr(plan, key) for key in content["search"]}
    assert plan.timings.items() <= content["seconds"].items()
    for stage, costs in (("dense", plan.dense), ("zero_shot", plan.compressed), ("fine_tuned", plan.compressed)):
        assert {key: content[stage][key] for key in ("params", "macs", "bytes")} == vars(costs)
    keys = ("name", "kind", "error", "source")
    assert [(*(layer[key] for key in keys), tuple(layer["ranks"])) for layer in content["layers"]] == [
        (*(getattr(layer, key) for key in keys), layer.ranks) for layer in plan.layers
    ]


def test_dense_figures_are_those_of_the_loaded_net(job):
    _, _, dense, report = job
    assert report.dense.metrics == figures_of(dense)
    assert (report.dense.costs.params, report.dense.costs.bytes) == size_of(dense)


def test_given_weights_are_not_trained(job):
    _, folder, _, _ = job
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["version_0"]  # of fine-tuning


@pytest.mark.slow
def test_zero_shot_figures_are_those_of_the_healed_net(job):
    _, folder, dense, report = job
    task = ClassificationTask(copy.deepcopy(dense))
    plan = compress_(task, {"params": 0.4}, example_input=(1, 1, 8, 8), method="exact")
    assert plan.layers == Plan.from_json((folder / "plan.json").read_text("utf-8")).layers
    plain = ClassificationTask(copy.deepcopy(dense))
    apply_plan_(plain, plan)
    assert report.zero_shot.metrics != figures_of(plain.net)
    assert report.zero_shot.metrics == figures_of(task.net)
    assert (report.zero_shot.costs.params, report.zero_shot.costs.bytes) == size_of(task.net)


def test_saved_model_is_the_fine_tuned_one(job):
    cfg, folder, _, report = job
    net = make_net(cfg)
    plan = load_compressed(net, folder / "compressed")
    assert report.fine_tuned.metrics == figures_of(net)
    assert (report.fine_tuned.costs.params, report.fine_tuned.costs.bytes) == size_of(net)
    assert [(f"net.{layer.name}", layer.kind, layer.ranks) for layer in plan.factorised] == [
        (layer.name, layer.kind, layer.ranks) for layer in report.plan.factorised
    ]


def test_fine_tuning_changed_the_weights(job):
    cfg, folder, dense, report = job
    net, zero_shot = make_net(cfg), ClassificationTask(copy.deepcopy(dense))
    load_compressed(net, folder / "compressed")
    apply_plan_(zero_shot, report.plan)
    assert not torch.equal(net.head.bias, zero_shot.net.head.bias)
    assert report.fine_tuned.metrics != report.zero_shot.metrics  # an epoch on few images need not help


def test_job_writes_these_files_only(job):
    _, folder, _, _ = job
    assert [name for name in files_in(folder) if not name.startswith("logs/")] == [
        *("compressed/model.safetensors", "compressed/plan.json", "plan.json", "plan.png", "report.json", "report.md")
    ]


def test_markdown_of_the_job_is_the_reports(job):
    _, folder, _, report = job
    text = (folder / "report.md").read_text("utf-8")
    assert text == report.to_markdown()
    assert all(f"| {' | '.join(row)} |" in text for row in report.rows())


def test_plot_is_a_png_of_sensible_size(job):
    _, folder, _, report = job
    content = (folder / "plan.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    layers = sum(1 for layer in report.plan.layers if layer.weight_shape)
    assert struct.unpack(">II", content[16:24]) == (1320, pytest.approx(120 * (1.8 + 0.32 * layers), abs=1))


# --- variants ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_job_repeats_under_its_seed_and_trains_the_dense_net_first(tmp_path, capsys):
    settings = (*TINY_MLP, "seed=3", "plot=false", "compression.method=continuous")
    first = run(compose(*settings), tmp_path / "a")
    out = capsys.readouterr().out
    second = run(compose(*settings), tmp_path / "b")
    assert (first.plan.method, first.plan.objective) == ("continuous", "end_to_end")
    for stage in STAGES:
        assert getattr(first, stage).metrics == getattr(second, stage).metrics
    assert first.plan.layers == second.plan.layers
    assert sorted(path.name for path in (tmp_path / "a" / "logs").iterdir()) == ["version_0", "version_1"]
    assert not (tmp_path / "a" / "plan.png").exists()
    order = [out.index(word) for word in ("1/4", "training the dense MLP", "2/4", "zero-shot:", "3/4", "4/4")]
    assert order == sorted(order)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_of_either_format_are_loaded(tmp_path, ending):
    cfg = compose(*TINY_MLP, f"model.weights={tmp_path / 'w'}.{ending}", "plot=false")
    net = make_net(cfg)
    if ending == "pt":
        torch.save(net.state_dict(), f"{tmp_path / 'w'}.pt")
    else:
        safetensors.torch.save_file(net.state_dict(), f"{tmp_path / 'w'}.safetensors")
    # so small a step leaves the zero-shot figures as they are
    cfg.finetune.lr = 1e-12
    cfg.finetune.epochs = 1
    report = run(cfg, tmp_path / "out")
    assert report.dense.metrics == figures_of(net)
    assert report.fine_tuned.metrics == pytest.approx(report.zero_shot.metrics, abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "out" / "logs").iterdir()) == ["version_0"]


def test_logger_none_logs_nothing(tmp_path):
    run(compose(*TINY_MLP, "logger=none", "plot=false"), tmp_path)
    assert files_in(tmp_path) == [
        *("compressed/model.safetensors", "compressed/plan.json", "plan.json", "report.json", "report.md")
    ]


def test_dense_net_keeps_its_figures_when_the_budget_is_everything(tmp_path):
    cfg = compose(*TINY_MLP, "compression.budget.params=1.0", "plot=false")
    report = run(cfg, tmp_path)
    assert report.plan.factorised == ()
    assert report.zero_shot == dataclasses.replace(report.dense, latency=report.zero_shot.latency)


@pytest.mark.slow
def test_zero_epochs_of_the_dense_net_leave_it_as_it_was_made(tmp_path):
    cfg = compose(*TINY_MLP, "dense.epochs=0", "plot=false", "seed=4")
    report = run(cfg, tmp_path)
    torch.manual_seed(4)
    assert report.dense.metrics == figures_of(make_net(cfg))


def test_objective_and_healing_can_be_switched_off(tmp_path):
    settings = ("compression.objective=weight", "compression.heal=false", "model.weights=" + str(tmp_path / "w.pt"))
    cfg = compose(*TINY_MLP, "plot=false", *settings)
    net = make_net(cfg)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    report = run(cfg, tmp_path / "out")
    assert (report.plan.objective, report.plan.source, report.plan.output_distance) == ("weight", "weight", None)
    assert set(report.seconds) == {"search", "swap"}
    task = ClassificationTask(net)
    apply_plan_(task, report.plan)
    assert report.zero_shot.metrics == figures_of(task.net)


def test_zero_epochs_of_fine_tuning_end_with_the_zero_shot_net(tmp_path):
    report = run(compose(*TINY_MLP, "finetune.epochs=0", "plot=false"), tmp_path)
    assert report.fine_tuned.metrics == report.zero_shot.metrics


@pytest.mark.slow
def test_fewer_images_than_a_batch_make_one_smaller_batch(tmp_path):
    report = run(compose(*TINY_MLP, "data.module.limit=5"), tmp_path / "out")
    assert report.plan.factorised
    assert report.dense.metrics["loss"] != report.fine_tuned.metrics["loss"]


def test_without_matplotlib_there_is_no_plot_but_everything_else(tmp_path, monkeypatch, capsys):
    block_imports(monkeypatch, "matplotlib")
    run(compose(*TINY_MLP), tmp_path)
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "compressed" / "model.safetensors").is_file()
    assert not (tmp_path / "plan.png").exists()
    assert "no plot: plots need matplotlib: pip install 'lightning_compress[plots]'." in capsys.readouterr().out


def test_brackets_in_the_folder_are_printed_as_they_are(tmp_path, capsys):
    folder = tmp_path / "run [v1]"
    run(compose(*TINY_MLP, "plot=false"), folder)
    assert f"written to {folder}\n" in capsys.readouterr().out


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
    net = make_net(cfg)
    load_compressed(net, tmp_path / "compressed")
    assert report.fine_tuned.metrics == figures_of(net)
    assert size_of(net) == (content["fine_tuned"]["params"], content["fine_tuned"]["bytes"])


# --- what is refused ---------------------------------------------------------------------------


def edited(overrides, key, value):
    from omegaconf import OmegaConf, open_dict

    cfg = compose(*overrides)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("compresion", {"x": 1}, ConfigurationError, ["unknown key 'compresion'", "Did you mean 'compression'?"]),
        ("compression.foo", 1, ConfigurationError, ["unknown key 'foo' in compression", "Known: ", "budget"]),
        ("compression.metod", "exact", ConfigurationError, ["unknown key 'metod'", "Did you mean 'method'?"]),
        ("dense.foo", 1, ConfigurationError, ["unknown key 'foo' in dense", "Known: epochs, lr"]),
        ("finetune.epoch", 1, ConfigurationError, ["unknown key 'epoch' in finetune", "Did you mean 'epochs'?"]),
        ("task.momentun", 1, ConfigurationError, ["unknown key 'momentun' in task", "Did you mean 'momentum'?"]),
        ("dense.epochs", -1, ConfigurationError, ["dense.epochs=-1", "whole number of at least 0"]),
        ("dense.epochs", 1.5, ConfigurationError, ["dense.epochs=1.5", "whole number of at least 0"]),
        ("finetune.epochs", True, ConfigurationError, ["finetune.epochs=True", "whole number of at least 0"]),
        ("finetune.lr", 0, ConfigurationError, ["finetune.lr=0", "a number above 0"]),
        ("dense.lr", "fast", ConfigurationError, ["dense.lr='fast'", "a number above 0"]),
        ("dense.lr", float("nan"), ConfigurationError, ["dense.lr=nan", "a number above 0"]),
        ("dense.lr", float("inf"), ConfigurationError, ["dense.lr=inf", "a number above 0"]),
        ("dense", None, ConfigurationError, ["dense"]),
        ("compression", None, ConfigurationError, ["compression=None", "compression=params_20"]),
        ("compression", "params_20", ConfigurationError, ["compression='params_20'", "compression=params_20"]),
        ("compression._target_", "lightning_compress.Budget", ConfigurationError, ["compression cannot be made"]),
        ("compression._target_", "builtins.dict", ConfigurationError, ["makes a dict", "lightning_compress.Compress"]),
        ("compression.budget.params", 1.5, BudgetError, ["Budget(params=1.5)", "(0, 1]"]),
        ("compression.budget.params", 0, BudgetError, ["Budget(params=0)", "(0, 1]"]),
        ("compression.budget.parms", 0.1, ConfigurationError, ["unknown key 'parms'", "Did you mean 'params'?"]),
        ("compression.method", "exakt", ConfigurationError, ["'exakt'", "Did you mean 'exact'?"]),
        ("compression.schedule.warmup_steps", -5, ConfigurationError, ["warmup_steps=-5", "at least 0"]),
        ("compression.distill.weight", 2, ConfigurationError, ["Distill(weight=2)", "(0, 1]"]),
        ("data.module.limit", 0, ConfigurationError, ["DigitsDataModule(limit=0)", "at least 1"]),
        ("data.module.foo", 0, ConfigurationError, ["data.module cannot be made", "foo"]),
        ("model.net.foo", 0, ConfigurationError, ["model.net cannot be made", "foo"]),
        ("model.net._target_", "no.such.Net", ConfigurationError, ["model.net cannot be made", "no.such.Net"]),
        ("trainer.foo", 0, ConfigurationError, ["trainer cannot be made", "foo"]),
        ("logger.foo", 0, ConfigurationError, ["logger cannot be made", "foo"]),
        ("logger._target_", "builtins.dict", ConfigurationError, ["logger makes a dict", "lightning.Logger"]),
        ("callbacks", {"bad": {"_target_": "no.such.Thing"}}, ConfigurationError, ["callbacks.bad", "no.such.Thing"]),
        ("model.weights", "/no/such/file.safetensors", WeightsError, ["'/no/such/file.safetensors'", "state dict"]),
        ("model.weights", "/no/such/file.pt", WeightsError, ["'/no/such/file.pt'", "state dict"]),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_trained(tmp_path, key, value, error, words):
    with pytest.raises(error) as caught:
        run(edited(TINY_MLP, key, value), tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == []


def test_incomplete_configuration_says_what_is_missing(tmp_path):
    from omegaconf import OmegaConf

    with pytest.raises(ConfigurationError, match=r"lacks model, .*: start from conf/config\.yaml"):
        run(OmegaConf.create({"data": {}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_net_are_refused(tmp_path):
    safetensors.torch.save_file(SmallCNN(width=4).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors' do not fit the model \(SmallCNN\): of another shape"):
        run(compose(*TINY_CNN, f"model.weights={tmp_path / 'w.safetensors'}"), tmp_path / "out")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_damaged_weights_are_refused(tmp_path, ending):
    path = tmp_path / f"w.{ending}"
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError) as caught:
        run(compose(*TINY_CNN, f"model.weights={path}"), tmp_path / "out")
    assert repr(str(path)) in str(caught.value)
    assert "state dict" in str(caught.value)
    assert files_in(tmp_path / "out") == []


def test_unreachable_budget_states_the_smallest_one(tmp_path):
    with pytest.raises(InfeasibleBudgetError, match=r"params <= 0\.1 %"):
        run(compose(*TINY_MLP, "compression.budget.params=0.001"), tmp_path / "out")
    assert [name for name in files_in(tmp_path / "out") if not name.startswith("logs/")] == []


def test_missing_fashion_mnist_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "_DEBIAN", tmp_path / "debian")
    (tmp_path / "empty").mkdir()
    cfg = compose(
        *QUICK, "data=fashion_mnist", f"data.module.folder={tmp_path / 'empty'}", "data.module.download=false"
    )
    with pytest.raises(DataNotFoundError) as caught:
        run(cfg, tmp_path / "out")
    assert repr(str(tmp_path / "empty")) in str(caught.value)
    assert "data.module.folder=PATH" in str(caught.value)
    assert [name for name in files_in(tmp_path / "out") if not name.startswith("logs/")] == []


def test_folder_under_a_file_is_refused_and_the_file_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for action in (require_writable, lambda path: run(compose(*TINY_MLP), path)):
            with pytest.raises(OutputFolderError) as caught:
                action(folder)
            assert repr(str(folder)) in str(caught.value)
            assert "hydra.run.dir=PATH" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_require_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    require_writable(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    "message",
    [
        "pip install 'lightning_compress[demo]'.",
        "cannot read '/data/[old]/w.pt'",
        "cannot read '/data/[/x]/w.pt'",
        "layer [bold]conv[/bold] :smile: " + "long " * 60,
    ],
)
def test_errors_are_printed_word_for_word_on_stderr(capsys, message):
    def fails():
        raise WeightsError(message)

    with pytest.raises(SystemExit) as caught:
        or_exit(fails)
    assert caught.value.code == FAILED == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"WeightsError: {message}\n"


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        or_exit(lambda: 1 / 0)
    assert or_exit(lambda: 5) == 5


@pytest.mark.slow
def test_saved_model_loads_beside_the_one_of_compress_(tmp_path):
    net = SmallCNN(width=8)
    plan = compress_(net, {"params": 0.5}, **WEIGHTS_ALONE)
    save_compressed(net, tmp_path)
    fresh = SmallCNN(width=8)
    loaded = load_compressed(fresh, tmp_path)
    assert size_of(fresh) == size_of(net)
    assert [(layer.name, layer.ranks) for layer in loaded.factorised] == [
        (layer.name, layer.ranks) for layer in plan.factorised
    ]
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), net.eval()(x))


# --- the command -------------------------------------------------------------------------------


def command(*overrides, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lightning_compress", *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_command_runs_and_writes_where_it_is_told(tmp_path):
    out = tmp_path / "out"
    done = command(*TINY_MLP, "callbacks=checkpoint", f"hydra.run.dir={out}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "report.json").read_text("utf-8"))
    assert content["budget"] == {"params": 0.2}
    assert f"{content['fine_tuned']['metrics']['accuracy']:.4f}" in done.stdout
    assert done.stdout.rstrip().endswith(" s in all")
    assert str(out) in done.stdout
    assert (out / "checkpoints" / "last.ckpt").is_file()
    assert (out / ".hydra" / "overrides.yaml").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_multirun_over_budgets_writes_a_folder_each(tmp_path):
    sweep = ("compression.budget.params=0.5,0.3", f"hydra.sweep.dir={tmp_path / 'out'}")
    done = command("-m", *TINY_MLP, "plot=false", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number, limit in (("0", 0.5), ("1", 0.3)):
        content = json.loads((tmp_path / "out" / number / "report.json").read_text("utf-8"))
        assert content["budget"] == {"params": limit}
        assert content["kept"]["params"] <= limit
        assert (tmp_path / "out" / number / "compressed" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compresion.x=1", ["compresion"]),
        ("+compression.foo=1", ["ConfigurationError", "unknown key 'foo' in compression"]),
        ("+dense.foo=1", ["ConfigurationError", "unknown key 'foo' in dense"]),
        ("model=nope", ["model/nope", "resnet20"]),
        ("compression.budget.params=1.5", ["BudgetError", "Budget(params=1.5)"]),
        ("model.weights=/no/such/w.pt", ["WeightsError", "'/no/such/w.pt'"]),
        ("data.module.limit=0", ["ConfigurationError", "limit=0"]),
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(tmp_path, override, words):
    done = command(*TINY_MLP, override, f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    left = files_in(tmp_path)
    assert all(name.startswith("out/.hydra/") or name == "out/lightning-compress.log" for name in left), left


@pytest.mark.slow
@pytest.mark.parametrize("multirun", [False, True])
def test_unwritable_folder_ends_with_a_message_and_no_traceback(tmp_path, multirun):
    (tmp_path / "file").write_text("mine")
    where = tmp_path / "file" / "below"
    flags = ["-m", f"hydra.sweep.dir={where}"] if multirun else [f"hydra.run.dir={where}"]
    done = command(*flags, *TINY_MLP, cwd=tmp_path)
    assert done.returncode == FAILED
    assert "OutputFolderError" in done.stderr
    assert str(where) in done.stderr
    assert "Traceback" not in done.stderr
    assert files_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"

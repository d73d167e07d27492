"""Tasks, networks and data of the user's own."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.cli import config
from lightning_compress.cli.app import run
from lightning_compress.cli.data import ImageFolderDataModule, TableDataModule, classes_in
from lightning_compress.cli.engines import require_engines, require_named_engines, set_optuna_
from lightning_compress.cli.identity import key_of_dense, key_of_job
from lightning_compress.cli.parts import below_task, example_of, make_data, make_task, set_learning_rate
from lightning_compress.cli.tasks import SupervisedTask, metric_of
from lightning_compress.core.errors import ConfigurationError, DataNotFoundError, UnsupportedError
from tests.support.cli import QUICK, TINY_MLP, compose, measure_quickly

OWN = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.regression import MeanSquaredError

class Lit(L.LightningModule):
    def __init__(self, width: int = 32, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.head, self.mse = nn.Linear(6, width), nn.Linear(width, 1), MeanSquaredError()
    def forward(self, x):
        return self.head(torch.relu(self.net(x)))
    def training_step(self, batch, i):
        return nn.functional.mse_loss(self(batch[0]), batch[1])
    def test_step(self, batch, i):
        self.mse(self(batch[0]), batch[1])
        self.log("test/mse", self.mse, on_epoch=True)
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

class Data(L.LightningDataModule):
    def __init__(self, rows: int = 64):
        super().__init__()
        self.rows = rows
    def setup(self, stage):
        x = torch.randn(self.rows, 6, generator=torch.Generator().manual_seed(0))
        self.set = TensorDataset(x, x.sum(1, keepdim=True))
    def train_dataloader(self):
        return DataLoader(self.set, 16)
    def test_dataloader(self):
        return DataLoader(self.set, 64)
"""
OF_OWN = ("task._target_=own_parts.Lit", "data.module._target_=own_parts.Data")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working folder with a module of one's own, which no path names."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_parts", None)


@pytest.mark.usefixtures("own")
def test_module_and_data_of_ones_own_in_the_working_folder_go_through(tmp_path, monkeypatch, capsys):
    measure_quickly(monkeypatch)
    settings = ("trainer=debug", "dense.epochs=1", "finetune.epochs=1", "plot=false", "compression.target=null")
    report = run(compose(*settings, *OF_OWN, "+task.width=40", "compression.budget.params=0.6"), tmp_path / "out")
    assert report.dense.costs.params == 6 * 40 + 40 + 40 + 1
    assert set(report.fine_tuned.metrics) == {"test/mse"}
    assert report.fine_tuned.costs.params <= 0.6 * report.dense.costs.params
    assert "no distillation: Lit.forward returns a tensor of shape (1, 1)" in capsys.readouterr().out


@pytest.mark.usefixtures("own")
def test_own_task_without_a_network_argument_is_compressed_whole_with_an_example_of_its_data():
    cfg = compose(*OF_OWN)
    task, net = make_task(cfg)
    assert net is task
    assert (task.hparams.width, task.hparams.lr) == (32, 0.01)  # of the class, not of this library's groups
    assert example_of(cfg, task, make_data(cfg)).shape == (1, 6)
    set_learning_rate(task, 0.5, "dense")
    assert task.hparams.lr == 0.5


@pytest.mark.usefixtures("own")
def test_unknown_keys_of_ones_own_classes_are_refused():
    with pytest.raises(ConfigurationError, match=r"unknown key 'widht' in task\. Did you mean 'width'"):
        make_task(compose(*OF_OWN, "+task.widht=3"))
    with pytest.raises(ConfigurationError, match=r"unknown key 'lines' in data\.module"):
        make_data(compose(*OF_OWN, "+data.module.lines=3"))
    with pytest.raises(ConfigurationError, match=r"task\._target_='own_parts.Nothing' is not found"):
        make_task(compose("task._target_=own_parts.Nothing"))


@pytest.mark.usefixtures("own")
def test_key_of_the_dense_model_follows_what_decides_it_and_nothing_else(tmp_path):
    cfg = compose(*OF_OWN)
    key = key_of_dense(cfg)
    assert key_of_dense(compose(*OF_OWN, "compression.budget.params=0.5", "finetune.epochs=1")) == key
    for change in ("seed=1", "dense.epochs=3", "trainer.precision=bf16-true", "+task.width=8"):
        more = change if change.startswith(("+", "seed", "dense")) else f"+{change}"
        assert key_of_dense(compose(*OF_OWN, more)) != key
    (tmp_path / "own_parts.py").write_text(OWN + "\n# another version")
    assert key_of_dense(cfg) != key


def test_key_of_the_dense_model_follows_the_weights_that_come_with_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "_WEIGHTS", tmp_path)
    (tmp_path / "ours.safetensors").write_bytes(b"one")
    keys = [key_of_dense(compose(*TINY_MLP, "model.weights=ours")) for _ in range(2)]
    (tmp_path / "ours.safetensors").write_bytes(b"another")
    assert keys[0] == keys[1] != key_of_dense(compose(*TINY_MLP, "model.weights=ours"))


def test_key_of_a_job_is_that_of_its_settings_wherever_it_writes(tmp_path):
    keys = [
        key_of_job(compose(*TINY_MLP, "callbacks=checkpoint", f"callbacks.checkpoint.dirpath={folder}/c"), folder)
        for folder in (tmp_path / "0", tmp_path / "17")
    ]
    assert keys[0] == keys[1] != key_of_job(compose(*TINY_MLP, "plot=false"), tmp_path)


@pytest.mark.parametrize(
    ("problem", "net", "batch", "shape"),
    [
        ("classification", nn.Linear(4, 3), (torch.randn(5, 4), torch.arange(5) % 3), (5, 3)),
        ("regression", nn.Linear(4, 1), (torch.randn(5, 4), torch.randn(5)), (5,)),
        ("regression", nn.Linear(4, 2), (torch.randn(5, 4), torch.randn(5, 2)), (5, 2)),
        ("classification", nn.Linear(4, 3), {"input": torch.randn(5, 4), "labels": torch.arange(5) % 3}, (5, 3)),
    ],
)
def test_supervised_task_takes_tuples_and_dicts(problem, net, batch, shape):
    task = SupervisedTask(net, problem, num_classes=3)
    loss, outputs, targets = task._step(batch)
    assert outputs.shape == shape
    expected = nn.functional.mse_loss if problem == "regression" else nn.functional.cross_entropy
    assert loss == expected(outputs, targets)
    assert task.distillable is (problem == "classification")


def test_metrics_are_those_of_torchmetrics_by_name():
    logits, labels = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])
    assert float(metric_of("accuracy", 3)(logits, labels)) == 0.75
    assert float(metric_of("F1Score", 3, average="macro")(logits, labels)) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert float(metric_of("mean_squared_error", None)(torch.ones(2), torch.zeros(2))) == 1
    with pytest.raises(ConfigurationError, match=r"'acuracy'.*Did you mean 'accuracy'"):
        metric_of("acuracy", 3)
    with pytest.raises(ConfigurationError, match="'accuracy' cannot be made"):
        metric_of("accuracy", 3, nothing=1)


@pytest.mark.parametrize("classes", [False, True])
def test_table_is_split_and_standardised_by_its_training_rows(tmp_path, classes):
    values = np.random.default_rng(0).normal(3, 2, (50, 3))
    values[:, 1] = np.arange(50) % 4
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "y", "b"], *values.tolist()])
    data = TableDataModule(tmp_path / "t.csv", "y", classes=classes)
    data.setup("fit")
    parts = [loader().dataset.tensors for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    assert [len(x) for x, _ in parts] == [40, 5, 5]
    assert torch.allclose(parts[0][0].mean(0), torch.zeros(2), atol=1e-6)
    assert parts[0][1].dtype == (torch.long if classes else torch.float)
    with pytest.raises(DataNotFoundError, match=r"'z' .* in .*t\.csv"):
        TableDataModule(tmp_path / "t.csv", "z").setup("fit")


@pytest.mark.parametrize("tree", ["one", "three"])
def test_images_in_folders_are_split_or_taken_as_they_are(tmp_path, tree):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test") if tree == "three" else (".",):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(10):
                image.new("RGB", (12, 10), (number, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    assert classes_in(str(tmp_path)) == 2
    data = ImageFolderDataModule(tmp_path, 8, batch_size=4)
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader.dataset) for loader in loaders] == ([20, 20, 20] if tree == "three" else [16, 2, 2])
    images, labels = next(iter(loaders[0]))
    assert (images.shape, labels.shape) == ((4, 3, 8, 8), (4,))
    with pytest.raises(DataNotFoundError, match=r"data\.root=FOLDER"):
        classes_in(str(tmp_path / "nothing"))


def test_missing_folder_of_images_is_our_own_error(tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(DataNotFoundError, match=r"'nope'.*data\.root=FOLDER"):
        run(compose(*QUICK[:1], "data=image_folder", "data.root=nope", "model=timm"), tmp_path / "out")


def test_networks_of_timm_and_transformers_are_made_for_the_classes_of_the_data():
    pytest.importorskip("timm")
    task, net = make_task(compose("model=timm", "model.name=resnet18"))
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    pytest.importorskip("transformers")
    task, net = make_task(compose("model=hugging_face", "task=text", "data.classes=4"))
    ids = torch.ones(2, 6, dtype=torch.long)
    assert task(input_ids=ids, attention_mask=ids).shape == (2, 4)
    assert net is task.net
    with pytest.raises(ConfigurationError, match=r"model\.auto_class='AutoModelForNothing'"):
        make_task(compose("model=hugging_face", "task=text", "model.auto_class=AutoModelForNothing"))


# --- engines -----------------------------------------------------------------------------------


def test_engines_that_are_not_installed_are_refused_with_their_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for word, extra in (("hydra/launcher=joblib", "joblib"), ("hydra/launcher=submitit_local", "submitit"),
                        ("hydra/launcher=ray", "ray"), ("hydra/sweeper=optuna", "optuna")):  # fmt: skip
        with pytest.raises(UnsupportedError, match=rf"pip install 'lightning_compress\[{extra}\]'"):
            require_named_engines(["seed=1", word])
    require_named_engines(["hydra/launcher=basic", "model=mlp"])


@pytest.mark.filterwarnings("ignore:(?s).*is validated against ConfigStore schema with the same name")
@pytest.mark.parametrize("name", ["joblib", "ray", "submitit_local"])
def test_launchers_compose_and_refuse_latency_as_an_objective(name):
    pytest.importorskip("ray" if name == "ray" else f"hydra_plugins.hydra_{name.partition('_')[0]}_launcher")
    config = compose(f"hydra/launcher={name}", return_hydra_config=True)
    require_engines(config)
    config = compose(f"hydra/launcher={name}", "optimized_metric=[accuracy,latency]", return_hydra_config=True)
    with pytest.raises(ConfigurationError, match=r"hydra/launcher=basic, or optimise macs"):
        require_engines(config)


def test_optuna_is_told_which_way_is_better_unless_the_command_line_says_so():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ("hydra/sweeper=optuna", "optimized_metric=[accuracy,params,loss]")
    config = compose(*words, return_hydra_config=True)
    set_optuna_(config)
    assert list(config.hydra.sweeper.direction) == ["maximize", "minimize", "minimize"]
    assert (config.hydra.sweeper.n_jobs, config.hydra.sweeper.max_failure_rate) == (1, 1.0)
    config = compose(words[0], "hydra.sweeper.direction=[minimize]", "hydra.sweeper.n_jobs=4", return_hydra_config=True)
    set_optuna_(config)
    assert (list(config.hydra.sweeper.direction), config.hydra.sweeper.n_jobs) == (["minimize"], 4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"exclude": "layers.1"}, {"exclude": "net.layers.1"}),
        ({"exclude": ["net.layers.1", "layers.*", "Linear", "nothing"]}, None),
        ({"include": ["layers.3"], "exclude": None}, {"include": ["net.layers.3"]}),
        ({"overrides": {"layers.1": "dense", "*.3": {"max_rank": 2}}}, None),
        ({"kinds": "svd"}, {}),
    ],
)
def test_layers_are_named_as_in_the_network_or_as_in_the_task(given, expected):
    task, net = make_task(compose(*TINY_MLP))
    expected = {
        "exclude": {"exclude": ["net.layers.1", "net.layers.*", "Linear", "nothing"]},
        "overrides": {"overrides": {"net.layers.1": "dense", "*.3": {"max_rank": 2}}},
    }[next(iter(given))] if expected is None else expected  # fmt: skip
    assert below_task(given, task, net) == expected
    assert below_task(given, net, net) == {key: value for key, value in given.items() if key != "kinds" and value}


def test_excluded_layers_of_the_report_stay_dense(tmp_path):
    names = ["compression.exclude=[layers.1]", "compression.overrides={layers.3:{kinds:[svd]}}"]
    report = run(compose(*QUICK, *TINY_MLP, "compression.budget.params=0.8", *names), tmp_path)
    kinds = {layer.name: (layer.kind, layer.reason) for layer in report.plan.layers}
    assert kinds["layers.1"] == ("dense", "matched by exclude")
    assert kinds["layers.3"][0] in {"svd", "dense"}

from __future__ import annotations

import shlex
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from hydra.errors import MissingConfigException

from lightning_compress.cli.app import run
from lightning_compress.cli.config import CONFIG_FOLDER, weights_file
from lightning_compress.cli.demo.data import DigitsDataModule, FashionMNISTDataModule
from lightning_compress.cli.demo.models import MLP, VGG, ResNet20, SmallCNN
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.fine_tuning import Distill, Plateau, Schedule
from lightning_compress.core.settings import Budget
from lightning_compress.surgery.save import load_weights_
from lightning_compress.training.callback import Compress
from tests.support.cli import compose, make

GROUPS = {
    path.name: sorted(file.stem for file in path.glob("*.yaml"))
    for path in sorted(CONFIG_FOLDER.iterdir())
    if path.is_dir()
}
FILES = sorted(CONFIG_FOLDER.rglob("*.yaml"))
# not options of their own: base is what the other compressions inherit, hydra/default is always there
NOT_CHOSEN = {Path("compression/base.yaml"), Path("hydra/default.yaml")}


def relative(path):
    return path.relative_to(CONFIG_FOLDER)


def test_no_option_is_left_out_of_these_tests_and_each_begins_with_a_comment():
    assert all(path.read_text("utf-8").startswith("# ") for path in FILES)
    assert GROUPS == {
        "callbacks": ["checkpoint", "lr_monitor", "none"],
        "compression": ["base", "edge", "latency_50", "macs_30", "params_20", "params_28", "params_50", "ratio_5x"],
        "data": ["digits", "fashion_mnist", "image_folder", "table"],
        "experiment": ["budget_sweep", "fashion_resnet20", "fashion_vgg", "rounds"],
        "hydra": ["default"],
        "logger": ["csv", "none", "tensorboard"],
        "model": ["hugging_face", "mlp", "resnet20", "small_cnn", "timm", "vgg"],
        "task": ["classification", "image", "regression", "tabular", "text"],
        "trainer": ["cpu", "debug", "default"],
    }


@pytest.mark.parametrize("path", [f for f in FILES if relative(f) not in NOT_CHOSEN], ids=lambda f: str(relative(f)))
def test_first_comment_is_a_command_that_chooses_the_file_and_composes(path):
    comments = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("# @package")]
    assert comments[0].startswith("# lightning-compress")
    words = shlex.split(comments[0].removeprefix("# ").split("(")[0])
    assert words[0] == "lightning-compress"
    if relative(path) != Path("config.yaml"):
        assert words[1] == f"{path.parent.name}={path.stem}"
    cfg = compose(*words[1:], return_hydra_config=True)
    if relative(path) != Path("config.yaml"):
        assert cfg.hydra.runtime.choices[path.parent.name] == path.stem


def test_default_job_is_a_small_cnn_on_digits_five_times_smaller():
    cfg = compose(return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    expected = {
        "model": "small_cnn",
        "data": "digits",
        "task": "classification",
        "compression": "params_20",
        "trainer": "default",
        "callbacks": "none",
        "logger": "csv",
        "experiment": None,
    }
    assert {key: choices[key] for key in expected} == expected
    assert set(cfg) - {"hydra"} == {
        *("model", "data", "task", "dense", "compression", "finetune", "trainer", "callbacks", "logger", "seed"),
        *("plot", "optimized_metric"),
    }
    assert cfg.hydra.job.chdir is False
    assert "outputs/" in cfg.hydra.run.dir


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
@pytest.mark.parametrize(
    ("model", "expected"), [("mlp", MLP), ("resnet20", ResNet20), ("small_cnn", SmallCNN), ("vgg", VGG)]
)
def test_models_run_on_the_shape_of_every_data_set(model, expected, data):
    cfg = compose(f"model={model}", f"data={data}")
    net = make(cfg.model.net).eval()
    assert type(net) is expected
    assert cfg.model.weights is None
    logits = net(torch.zeros(2, cfg.data.channels, cfg.data.size, cfg.data.size))
    assert logits.shape == (2, cfg.data.classes)


@pytest.mark.parametrize(
    ("data", "expected", "shape"),
    [("digits", DigitsDataModule, (1, 8, 8)), ("fashion_mnist", FashionMNISTDataModule, (1, 28, 28))],
)
def test_data_modules_have_the_shape_the_configuration_says(data, expected, shape):
    cfg = compose(f"data={data}")
    module = make(cfg.data.module)
    assert type(module) is expected
    assert (module.batch_size, module.augment, module.limit) == (cfg.data.module.batch_size, True, None)
    assert (cfg.data.channels, cfg.data.size, cfg.data.size) == shape
    assert cfg.data.features == cfg.data.channels * cfg.data.size**2
    assert cfg.task.num_classes == cfg.data.classes == 10
    if data == "digits":  # the images of the other may not be on this machine
        module.setup("fit")
        images, labels = module.test_dataloader().dataset.tensors
        assert images.shape[1:] == shape
        assert sorted(labels.unique().tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("option", "limits"),
    [
        *(("edge", {"params": 0.25, "macs": 0.3, "bytes": 0.3}), ("macs_30", {"macs": 0.3})),
        ("latency_50", {"latency": 0.5}),
        *(("params_20", {"params": 0.2}), ("params_28", {"params": 0.28}), ("params_50", {"params": 0.5})),
        ("ratio_5x", {"params": 0.2}),
    ],
)
def test_compression_is_a_callback_with_the_budget_that_its_name_says(option, limits):
    callback = make(compose(f"compression={option}", "seed=7").compression)
    chosen = callback.settings
    assert type(callback) is Compress
    assert callback.budget.limits() == limits
    assert chosen.rank_multiple == (4 if option == "edge" else 1)
    assert (chosen.method, chosen.objective, chosen.kinds, chosen.seed) == ("continuous", "auto", "auto", 7)
    assert (callback.heal, callback.calibration) == (True, None)
    assert (chosen.include, chosen.exclude, chosen.overrides) == (None, None, None)
    assert callback.schedule == Schedule(warmup_steps=20)
    assert callback.distill == Distill(weight=0.9, temperature=2.0)


def test_base_alone_lacks_a_budget_and_says_what_to_choose(tmp_path):
    with pytest.raises(ConfigurationError, match=r"has no budget, only _target_, kinds.*: try compression=params_20"):
        run(compose("compression=base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the last is about a GPU of this machine, or its absence
@pytest.mark.filterwarnings("ignore:.*GPU available but not used.*")
@pytest.mark.parametrize(
    ("option", "batches", "bar"), [("default", 1.0, True), ("cpu", 1.0, True), ("debug", 2, False)]
)
def test_trainers_are_made(option, batches, bar):
    trainer = make(compose(f"trainer={option}").trainer, logger=False, max_epochs=3)
    assert type(trainer) is L.Trainer
    assert (trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches) == (batches,) * 3
    assert (trainer.progress_bar_callback is not None) is bar
    assert trainer.num_devices == 1
    assert trainer.num_sanity_val_steps == 0
    assert trainer.log_every_n_steps == 10
    if option != "default":
        assert isinstance(trainer.accelerator, L.pytorch.accelerators.CPUAccelerator)


@pytest.mark.parametrize(("option", "name"), [("csv", "CSVLogger"), ("tensorboard", "TensorBoardLogger")])
def test_logger_writes_where_it_is_told(tmp_path, option, name):
    if option == "tensorboard":
        pytest.importorskip("tensorboard")
    logger = make(compose(f"logger={option}").logger, save_dir=str(tmp_path))
    assert type(logger) is getattr(L.pytorch.loggers, name)
    assert Path(logger.root_dir) == tmp_path / "logs"


def test_callbacks_and_logger_none_make_nothing():
    assert not compose("logger=none").logger
    assert dict(compose("callbacks=none").callbacks) == {"checkpoint": None}


def test_callbacks_lr_monitor():
    (settings,) = compose("callbacks=lr_monitor").callbacks.values()
    callback = make(settings)
    assert type(callback) is L.pytorch.callbacks.LearningRateMonitor
    assert callback.logging_interval == "step"


def test_callbacks_checkpoint_watches_a_metric_the_task_logs_in_the_output_folder(tmp_path):
    cfg = compose("callbacks=checkpoint", f"callbacks.checkpoint.dirpath={tmp_path}")
    callback = make(cfg.callbacks.checkpoint)
    assert type(callback) is L.pytorch.callbacks.ModelCheckpoint
    assert (callback.monitor, callback.mode, callback.save_last) == ("val_accuracy", "max", True)
    assert callback.dirpath == str(tmp_path)
    raw = yaml.safe_load((CONFIG_FOLDER / "callbacks" / "checkpoint.yaml").read_text("utf-8"))
    assert raw["checkpoint"]["dirpath"] == "${hydra:runtime.output_dir}/checkpoints"


@pytest.mark.parametrize(
    ("experiment", "net", "params", "limit"),
    [("fashion_vgg", VGG, 420_778, 0.2), ("fashion_resnet20", ResNet20, 272_186, 0.28)],
)
def test_fashion_experiments_and_the_weights_in_their_commands(experiment, net, params, limit):
    text = (CONFIG_FOLDER / "experiment" / f"{experiment}.yaml").read_text("utf-8")
    command = shlex.split(text.splitlines()[1].removeprefix("# "))
    cfg = compose(*command[1:])
    made, compress = make(cfg.model.net), make(cfg.compression)
    assert type(made) is net
    assert sum(p.numel() for p in made.parameters()) == params
    assert type(make(cfg.data.module)) is FashionMNISTDataModule
    assert compress.budget == Budget(params=limit)
    assert compress.distill is not None
    assert (cfg.dense.epochs, cfg.finetune.epochs, cfg.finetune.lr) == (15, 4, 0.05)
    load_weights_(made, weights_file(cfg.model.weights))
    assert float(next(iter(made.buffers())).abs().sum()) > 0  # running statistics of a trained net
    assert weights_file("no/such.pt") == "no/such.pt"


def test_budget_sweep_is_a_multirun_over_budgets():
    cfg = compose("experiment=budget_sweep", return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert dict(cfg.hydra.sweeper.params) == {"compression.budget.params": "0.5,0.3,0.2,0.1"}


def test_rounds_end_at_the_budget_of_the_compression():
    callback = make(compose("experiment=rounds").compression)
    assert [budget.params for budget in callback.schedule.budgets] == [0.6, 0.4, 0.2]
    assert callback.schedule.budgets[-1] == callback.budget
    assert callback.schedule.phases[1].until_plateau == Plateau("val_accuracy", mode="max", patience=3)


def test_experiment_overrides_the_settings_of_the_main_job():
    assert compose("experiment=fashion_vgg").dense.epochs != compose().dense.epochs
    assert compose("experiment=fashion_vgg", "dense.epochs=3").dense.epochs == 3


@pytest.mark.parametrize("group", ["model", "data", "compression", "trainer", "experiment", "callbacks", "logger"])
def test_unknown_option_lists_the_known_ones(group):
    with pytest.raises(MissingConfigException) as caught:
        compose(f"{group}=nope")
    assert f"{group}/nope" in str(caught.value)
    assert all(option in str(caught.value) for option in GROUPS[group])

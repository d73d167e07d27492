"""What the application refuses before anything is trained or written."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf, open_dict
from safetensors.torch import save_file

from lightning_compress.cli.app import run
from lightning_compress.cli.config import FAILED, or_exit, require_writable
from lightning_compress.cli.demo import data as demo_data
from lightning_compress.cli.demo.models import SmallCNN
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    DataNotFoundError,
    InfeasibleBudgetError,
    OutputFolderError,
    WeightsError,
)
from tests.support.cli import QUICK, TINY_CNN, TINY_MLP, compose, files_in, outside_logs


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("compresion", {"x": 1}, ConfigurationError, ["unknown key 'compresion'", "Did you mean 'compression'?"]),
        ("compression.foo", 1, ConfigurationError, ["unknown key 'foo' in compression", "Known: ", "budget"]),
        ("dense.foo", 1, ConfigurationError, ["unknown key 'foo' in dense", "Known: epochs, lr"]),
        ("task.momentun", 1, ConfigurationError, ["unknown key 'momentun' in task", "Did you mean 'momentum'?"]),
        ("dense.epochs", -1, ConfigurationError, ["dense.epochs=-1", "whole number of at least 0"]),
        ("finetune.epochs", True, ConfigurationError, ["finetune.epochs=True", "whole number of at least 0"]),
        ("finetune.lr", 0, ConfigurationError, ["finetune.lr=0", "a number above 0"]),
        ("dense.lr", "fast", ConfigurationError, ["dense.lr='fast'", "a number above 0"]),
        ("dense.lr", float("nan"), ConfigurationError, ["dense.lr=nan", "a number above 0"]),
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
        ("data.module.foo", 0, ConfigurationError, ["unknown key 'foo' in data.module", "batch_size"]),
        ("model.net.foo", 0, ConfigurationError, ["model.net cannot be made", "foo"]),
        ("model.net._target_", "no.such.Net", ConfigurationError, ["model.net cannot be made", "no.such.Net"]),
        ("model._target_", "my.Net", ConfigurationError, ["unknown key '_target_' in model", "Known: weights, net"]),
        ("data.foo", 1, ConfigurationError, ["unknown key 'foo' in data", "module"]),
        ("trainer.logger", True, ConfigurationError, ["trainer.logger=True", "logger=csv"]),
        ("trainer.callbacks", [], ConfigurationError, ["trainer.callbacks=[]", "+callbacks.NAME._target_"]),
        ("trainer.max_epochs", "many", ConfigurationError, ["trainer.max_epochs='many'", "whole number"]),
        ("trainer.foo", 0, ConfigurationError, ["trainer cannot be made", "foo"]),
        ("logger.foo", 0, ConfigurationError, ["logger cannot be made", "foo"]),
        ("logger._target_", "builtins.dict", ConfigurationError, ["logger makes a dict", "lightning.Logger"]),
        ("callbacks", {"bad": {"_target_": "no.such.Thing"}}, ConfigurationError, ["callbacks.bad", "no.such.Thing"]),
        ("model.weights", "/no/such/file.safetensors", WeightsError, ["'/no/such/file.safetensors'", "state dict"]),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_trained(tmp_path, key, value, error, words):
    cfg = compose(*TINY_MLP)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(error) as caught:
        run(cfg, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == []


def test_incomplete_configuration_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigurationError, match=r"lacks model, .*: start from conf/config\.yaml"):
        run(OmegaConf.create({"data": {}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.safetensors", lambda path: save_file(SmallCNN(width=4).state_dict(), path), r"do not fit .* another shape"),
        ("w.safetensors", lambda path: path.write_bytes(b"not weights"), "state dict"),
        ("w.pt", lambda path: path.write_bytes(b"not weights"), "state dict"),
    ],
)
def test_weights_of_another_net_and_damaged_ones_are_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=message) as caught:
        run(compose(*TINY_CNN, f"model.weights={tmp_path / name}"), tmp_path / "out")
    assert repr(str(tmp_path / name)) in str(caught.value)
    assert files_in(tmp_path / "out") == []


def test_unreachable_budget_states_the_smallest_one(tmp_path):
    with pytest.raises(InfeasibleBudgetError, match=r"params <= 0\.1 %"):
        run(compose(*TINY_MLP, "compression.budget.params=0.001"), tmp_path / "out")
    assert outside_logs(tmp_path / "out") == []


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
    assert outside_logs(tmp_path / "out") == []


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

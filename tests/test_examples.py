"""Each numbered example runs as its first lines say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_here():
    tested = {"01_callback", "02_without_trainer", "03_fashion_mnist_macs", "04_own_hydra_app", "05_sharded"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested | {"06_own_device"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*`Trainer.fit` stopped.*")
def test_callback_example_keeps_the_accuracy(capsys):
    dense, compressed = load("01_callback").main()
    assert dense > 0.96
    assert compressed > dense - 0.01
    kept = re.search(r"params [^(]*\((\S+) % kept\)", capsys.readouterr().out)
    assert kept is not None
    assert 19 < float(kept[1]) <= 20


@pytest.mark.slow
@pytest.mark.usefixtures("less_work")
def test_example_without_trainer_loads_what_it_saved(capsys):
    net = load("02_without_trainer").main()
    assert "loaded model gives the same output: True" in capsys.readouterr().out
    assert sum(p.numel() for p in net.parameters()) <= 0.3 * 420_778


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.usefixtures("less_work")
def test_fashion_mnist_example_halves_the_macs(capsys):
    dense, compressed = load("03_fashion_mnist_macs").main(["--epochs", "1", "--limit", "2000"])
    assert dense > 0.9
    assert compressed > 0.8
    assert "MACs 31,021,952 →" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("override", "budget"), [((), "params <= 20 %"), (("compression=macs_30",), "macs <= 30 %")])
def test_own_application_uses_the_compression_groups(tmp_path, override, budget):
    command = [sys.executable, str(EXAMPLES / "04_own_hydra_app.py"), f"hydra.run.dir={tmp_path}", *override]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"budget {budget}; method continuous" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_sharded_example_trains_and_resumes_on_factorised_shards(tmp_path, devices):
    command = [sys.executable, str(EXAMPLES / "05_sharded.py"), "--devices", str(devices), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=600)
    assert "resumed equals uninterrupted: True" in done.stdout
    kept = int(done.stdout.split("parameters of the fit: ")[1].split()[0])
    dense = 32 * 128 + 128 + 128 * 128 + 128 + 128 * 4 + 4
    assert 0.2 * dense < kept <= 0.3 * dense


@pytest.mark.slow
def test_own_device_example_keeps_the_bound_and_finds_the_plan_again_without_the_device(
    stand_in, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    load("06_own_device").main()
    out = capsys.readouterr().out
    assert "budget latency <= 40 %" in out
    assert "my phone, July build" in out
    assert "the same plan from the table: True" in out
    assert stand_in.asked == []
    assert [path.name for path in tmp_path.glob("phone*")] == ["phone.json"]

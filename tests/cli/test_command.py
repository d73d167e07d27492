"""The command in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lightning_compress.cli.config import FAILED
from tests.support.cli import TINY_MLP, files_in

pytestmark = pytest.mark.slow


def command(*overrides, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lightning_compress", *overrides],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


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


def test_multirun_trains_the_dense_model_once_and_goes_on_past_jobs_that_fail_or_are_killed(tmp_path):
    deadly = [
        "import os, signal",
        "from lightning_compress.cli.demo.task import ClassificationTask",
        "class Deadly(ClassificationTask):",
        "    def on_train_start(self):",
        "        if self.trainer.max_epochs == 3:",
        "            os.kill(os.getpid(), signal.SIGKILL)",
    ]
    (tmp_path / "deadly.py").write_text("\n".join(deadly))
    sweep = ("compression.budget.params=0.5,0.0005", "finetune.epochs=1,3", f"hydra.sweep.dir={tmp_path / 'out'}")
    quick = [word for word in TINY_MLP if not word.startswith("finetune")]
    words = ("-m", *quick, "plot=false", "compression.target=null", "task._target_=deadly.Deadly", *sweep)
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ends = {n: json.loads((tmp_path / "out" / n / "job.json").read_text("utf-8")) for n in ("0", "1", "2", "3")}
    assert [ends[n]["status"] for n in "0123"] == ["finished", "killed", "failed", "failed"]
    assert "SIGKILL" in ends["1"]["reason"]
    assert "InfeasibleBudgetError" in ends["2"]["reason"]
    assert done.stdout.count("training the dense MLP") == 1
    assert done.stdout.count("was trained before") == 3
    assert "1 of 4 finished, 2 failed, 1 killed" in done.stdout
    assert {"sweep.csv", "sweep.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    written = (tmp_path / "out" / "0" / "report.json").stat().st_mtime_ns
    again = command(*words, cwd=tmp_path)
    assert "job 0 was finished before" in again.stdout
    assert (tmp_path / "out" / "0" / "report.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compresion.x=1", ["compresion"]),
        ("+compression.foo=1", ["ConfigurationError", "unknown key 'foo' in compression"]),
        ("model=nope", ["model/nope", "resnet20"]),
        ("model.weights=/no/such/w.pt", ["WeightsError", "'/no/such/w.pt'"]),
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(tmp_path, override, words):
    done = command(*TINY_MLP, override, f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    left = files_in(tmp_path)
    assert all(name.startswith("out/.hydra/") or name == "out/lightning-compress.log" for name in left), left


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

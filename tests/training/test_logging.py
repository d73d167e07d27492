"""What a fit with Compress sends to the loggers and shows."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from packaging.version import Version

from tests.support.compressing import compress
from tests.support.fitting import QUIET, require_same_state
from tests.support.loggers import MemoryLogger
from tests.support.nets import DENSE_BYTES, DENSE_PARAMETERS, TinyTask, dense_macs

pytestmark = QUIET


def expected_metrics(plan) -> dict[str, float]:
    return {
        "compress/params": float(plan.compressed.params),
        "compress/params_dense": float(DENSE_PARAMETERS),
        "compress/params_kept": plan.compressed.params / DENSE_PARAMETERS,
        "compress/macs": float(plan.compressed.macs),
        "compress/macs_dense": float(dense_macs(8)),
        "compress/macs_kept": plan.compressed.macs / dense_macs(8),
        "compress/bytes": float(plan.compressed.bytes),
        "compress/bytes_dense": float(DENSE_BYTES),
        "compress/bytes_kept": plan.compressed.bytes / DENSE_BYTES,
        "compress/latency": plan.compressed.latency,
        "compress/latency_dense": plan.dense.latency,
        "compress/latency_kept": plan.compressed.latency / plan.dense.latency,
        "compress/round": 1.0,
        "compress/seconds/search": plan.timings["search"],
        "compress/search_seconds": plan.seconds,
        "compress/optimality_gap": plan.optimality_gap,
    }


def expected_hyperparameters(plan) -> dict:
    layers = {p.name: p.kind if p.kind == "dense" else f"{p.kind} {p.ranks}, error {p.error:.4f}" for p in plan.layers}
    return {"budget": "params <= 40 %", "method": "exact", "layers": layers}


def test_sizes_and_plan_go_to_every_logger_once(make_trainer, loader, tmp_path):
    callback, loggers, to_csv = compress(), [MemoryLogger(), MemoryLogger()], CSVLogger(tmp_path, name="run")
    make_trainer(callback, logger=[*loggers, to_csv], log_every_n_steps=1).fit(TinyTask(), loader)
    metrics, hyperparameters = expected_metrics(callback.plan), expected_hyperparameters(callback.plan)
    for logger in loggers:
        ((step, sizes),) = ((step, logged) for step, logged in logger.metrics if "compress/params" in logged)
        assert step == 0
        assert 0 < sizes.pop("compress/seconds/swap") < 60
        assert sizes == metrics
        assert [h["compress"] for h in logger.hyperparameters if "compress" in h] == [hyperparameters]
    rows = list(csv.DictReader((Path(to_csv.log_dir) / "metrics.csv").read_text().splitlines()))
    # The sizes belong to step 0; the logger merges what else is logged there into the same row.
    (row,) = (row for row in rows if row["compress/params"])
    assert row["step"] == "0"
    assert {name: float(row[name]) for name in metrics} == metrics
    assert yaml.safe_load((Path(to_csv.log_dir) / "hparams.yaml").read_text())["compress"] == hyperparameters


OLD = Version(L.__version__) < Version("2.5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "bar", ["tqdm", pytest.param("rich", marks=pytest.mark.skipif(OLD, reason="it fails without Compress too"))]
)
def test_a_progress_bar_changes_nothing(make_trainer, loader, bar, capsys):
    task = TinyTask()
    tasks = [task, copy.deepcopy(task)]
    callbacks = [compress(method="continuous"), compress(method="continuous")]
    bars = [RichProgressBar()] if bar == "rich" else []
    make_trainer(callbacks[0]).fit(tasks[0], loader)
    assert "Compress" not in capsys.readouterr().out
    make_trainer(callbacks[1], *bars, enable_progress_bar=True).fit(tasks[1], loader)
    assert callbacks[0].plan.layers == callbacks[1].plan.layers
    require_same_state(*tasks)

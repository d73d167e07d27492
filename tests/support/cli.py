"""Jobs of the application that are quick enough for tests."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.utils import instantiate

from lightning_compress.cli import app
from lightning_compress.cli.config import CONFIG_FOLDER

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


def compose(*overrides, folder=CONFIG_FOLDER, name="config", **settings):
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(name, list(overrides), **settings)


def make(cfg, **settings):
    return instantiate(cfg, _convert_="all", **settings)


def measure_quickly(monkeypatch) -> None:
    """Few calls are timed, as nobody looks at the latency."""
    monkeypatch.setattr(app, "TIMED", 0.002)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def outside_logs(folder):
    return [name for name in files_in(folder) if not name.startswith("logs/")]

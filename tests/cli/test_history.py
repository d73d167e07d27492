"""The metrics of every epoch of a fit."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer

from lightning_compress.cli.demo.data import DigitsDataModule
from lightning_compress.cli.demo.models import MLP
from lightning_compress.cli.demo.task import ClassificationTask
from lightning_compress.cli.history import History
from tests.support.loggers import MemoryLogger


class Task(ClassificationTask):
    def on_train_epoch_start(self):
        self.log("compress/own", 1.0)
        self.log("broken", float("nan"))


@pytest.fixture
def fitted():
    history, logger = History(), MemoryLogger()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, callbacks=[history], logger=logger, accelerator="cpu", **quiet)
    trainer.fit(Task(MLP(64, 10, [8])), datamodule=DigitsDataModule(limit=160))
    return trainer, history, logger


def test_each_epoch_has_its_finite_metrics_of_training_and_validation(fitted):
    trainer, history, logger = fitted
    assert [epoch.number for epoch in history.epochs] == [1, 2]
    assert all(set(epoch.metrics) == {"train_loss", "val_accuracy"} for epoch in history.epochs)
    logged = [metrics["val_accuracy"] for _, metrics in logger.metrics if "val_accuracy" in metrics]
    assert [epoch.metrics["val_accuracy"] for epoch in history.epochs] == pytest.approx(logged)
    assert history.loggers == (logger,)
    assert history.steps == trainer.global_step > 0

"""The command `lightning-compress`: a Hydra application over `conf/`.

Trains (or loads) a dense model, tests it, compresses it, tests it zero-shot, fine-tunes it,
tests it again, and writes a report, a plan, a plot and the compressed model.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from torch import nn
from typing_extensions import override

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.latency.compare import measure_latency
from lightning_compress.cli.config import CONFIG_FOLDER, check_config, make, or_exit, require_writable, settings_of
from lightning_compress.cli.demo.task import ClassificationTask
from lightning_compress.cli.report import BATCH, Figures, Report, plot_plan
from lightning_compress.core.errors import TrainingError, UnsupportedError
from lightning_compress.core.target import Target
from lightning_compress.surgery.save import load_weights_, save_compressed
from lightning_compress.training.callback import Compress


def run(cfg: DictConfig, folder: str | Path) -> Report:
    """Does the whole job of one configuration.

    Args:
        cfg: A composed configuration of `conf/config.yaml`.
        folder: Where everything is written; made if needed.

    Returns:
        The report, which is also written to the folder.

    Raises:
        LightningCompressError: With the cause in its message. Nothing is trained before the
            configuration, the folder, the weights file and the budget have been checked.
    """
    job = _prepare(cfg, Path(folder))
    dense = _dense(job)
    _say(f"[bold]2/4[/] compressing to {job.compress.budget} and testing zero-shot")
    zero_shot = _compress(job)
    fine_tuned = _Tested(job.task.net, _test(cfg, job.task, job.data))
    _say("[bold]4/4[/] measuring and writing the report")
    return _report(job, (dense, zero_shot, fine_tuned))


@dataclass(frozen=True)
class _Job:
    """Everything a run needs, made and checked."""

    cfg: DictConfig
    folder: Path
    data: LightningDataModule
    task: ClassificationTask
    compress: Compress
    callbacks: Sequence[Callback]
    example_input: torch.Tensor


@dataclass(frozen=True)
class _Tested:
    """A network and its metrics on the test data."""

    net: nn.Module
    metrics: Mapping[str, float]


def _prepare(cfg: DictConfig, folder: Path) -> _Job:
    check_config(cfg)
    require_writable(folder)
    if cfg.seed is not None:
        seed_everything(cfg.seed, verbose=False)
    compress = make(cfg.compression, "compression", Compress)
    data = make(cfg.data.module, "data.module", LightningDataModule)
    task = ClassificationTask(make(cfg.model.net, "model.net", nn.Module), **settings_of(cfg.task))
    example_input = torch.zeros(1, cfg.data.channels, cfg.data.size, cfg.data.size)
    task.example_input_array = example_input
    callbacks = [
        make(settings, f"callbacks.{name}", Callback) for name, settings in (cfg.callbacks or {}).items() if settings
    ]
    _logger(cfg, folder)
    if cfg.model.weights is not None:
        load_weights_(task.net, cfg.model.weights)
    # An impossible budget shows before the training; what the weights are does not matter for that.
    if compress.budget.max_error is None:
        compress.plan_for(task, example_input, method="uniform", objective="weight")
    return _Job(cfg, folder, data, task, compress, callbacks, example_input)


def _dense(job: _Job) -> _Tested:
    cfg, task = job.cfg, job.task
    what = f"{type(task.net).__name__}, {sum(p.numel() for p in task.net.parameters()):,} parameters"
    if cfg.model.weights is not None:
        _say(f"[bold]1/4[/] testing the dense {what}, weights from {escape(str(cfg.model.weights))}")
    else:
        _say(f"[bold]1/4[/] training the dense {what}, {cfg.dense.epochs} epochs")
        task.lr = cfg.dense.lr
        trainer = _trainer(cfg, max_epochs=cfg.dense.epochs, logger=_logger(cfg, job.folder))
        trainer.fit(task, datamodule=job.data)
    return _Tested(copy.deepcopy(task.net), _test(cfg, task, job.data))


def _compress(job: _Job) -> _Tested:
    """Compresses and fine-tunes the task's network; returns it as it was between the two."""
    cfg = job.cfg
    zero_shot = _ZeroShot(job)
    job.task.lr = cfg.finetune.lr
    trainer = _trainer(
        cfg,
        max_epochs=cfg.finetune.epochs,
        callbacks=[job.compress, zero_shot, *job.callbacks],
        logger=_logger(cfg, job.folder),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in job.callbacks),
    )
    trainer.fit(job.task, datamodule=job.data)
    if zero_shot.tested is None:
        msg = "the fit ended before it was compressed: the trainer did not reach on_fit_start."
        raise TrainingError(msg)
    return zero_shot.tested


class _ZeroShot(Callback):
    """Tests a copy of the module right after the swap, before any step on real data."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self.tested: _Tested | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cfg, data = self._job.cfg, self._job.data
        net = copy.deepcopy(self._job.task.net)
        task = ClassificationTask(net, **settings_of(cfg.task))
        with torch.random.fork_rng():
            data.setup("test")
            metrics = _results(_trainer(cfg).test(task, data.test_dataloader(), verbose=False))
        self.tested = _Tested(net, metrics)
        _say(f"      zero-shot: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
        _say(f"[bold]3/4[/] fine-tuning, {trainer.max_epochs} epochs")


def _report(job: _Job, stages: tuple[_Tested, _Tested, _Tested]) -> Report:
    if job.compress.plan is None:
        msg = "the fit ended without a plan."
        raise TrainingError(msg)
    nets = [stage.net for stage in stages]
    latencies, batches = (
        measure_latency(nets, job.example_input, target=Target(batch=batch, threads=1)) for batch in (1, BATCH)
    )
    dense, zero_shot, fine_tuned = (
        Figures(measure_costs(stage.net, job.example_input), latency, BATCH / seconds, stage.metrics)
        for stage, latency, seconds in zip(stages, latencies, batches, strict=True)
    )
    report = Report(job.compress.plan, dense, zero_shot, fine_tuned, job.compress.seconds, job.compress.budget)
    report.save(job.folder)
    save_compressed(job.task.net, job.folder / "compressed")
    if job.cfg.plot:
        _plot(report, job.folder)
    Console().print(report.table())
    for line in report.plan.time_lines():
        _say(f"search: {line}" if line.startswith("latency") else line)
    _say(f"written to {escape(str(job.folder))}")
    return report


def _plot(report: Report, folder: Path) -> None:
    try:
        plot_plan(report.plan, folder / "plan.png")
    except UnsupportedError as error:
        _say(f"no plot: {escape(str(error))}")


def _say(message: str) -> None:
    Console().print(message, soft_wrap=True, highlight=False, emoji=False)


def _trainer(cfg: DictConfig, **settings: Any) -> Trainer:
    """Returns a trainer of the configuration; its `max_epochs` is what a stage may take at most."""
    settings = {"logger": False, "enable_checkpointing": False, **settings}
    most = cfg.trainer.get("max_epochs")
    if most is not None and most >= 0:
        settings["max_epochs"] = min(most, settings.get("max_epochs", most))
    settings["enable_checkpointing"] |= bool(cfg.trainer.get("enable_checkpointing"))
    return make(cfg.trainer, "trainer", Trainer, **settings)


def _logger(cfg: DictConfig, folder: Path) -> Logger | bool:
    return make(cfg.logger, "logger", Logger, save_dir=str(folder)) if cfg.logger else False  # type: ignore[type-abstract]


def _test(cfg: DictConfig, task: ClassificationTask, data: LightningDataModule) -> dict[str, float]:
    return _results(_trainer(cfg).test(task, datamodule=data, verbose=False))


def _results(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(value) for result in results for name, value in result.items()}


def _quieten() -> None:
    """Leaves the terminal to the stages and the table; warnings still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*`Trainer.fit` stopped.*")


@hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="config")
def main(cfg: DictConfig) -> float:
    """Runs one job; returns the fine-tuned accuracy, which sweepers may maximise."""
    _quieten()
    start = time.perf_counter()
    report = or_exit(lambda: run(cfg, HydraConfig.get().runtime.output_dir))
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return report.fine_tuned.metrics["accuracy"]

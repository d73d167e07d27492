"""The command `lightning-compress`: a Hydra application over `conf/`.

Trains (or loads) a dense model, tests it, compresses it, tests it zero-shot, fine-tunes it,
tests it again, and writes a report, a plan, a plot and the compressed model.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from torch import nn
from typing_extensions import override

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.latency.compare import measure_latency
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.cli.config import (
    CONFIG_FOLDER,
    INTERRUPTED,
    check_config,
    make,
    or_exit,
    require_writable,
    settings_of,
    weights_file,
)
from lightning_compress.cli.dense_cache import DenseStore
from lightning_compress.cli.engines import require_named_engines
from lightning_compress.cli.history import History
from lightning_compress.cli.html_report import Extras, renew_page, write_page
from lightning_compress.cli.jobs import run_job
from lightning_compress.cli.objectives import objectives_of
from lightning_compress.cli.parts import (
    below_task,
    copy_of,
    example_of,
    find_own_modules,
    learning_rate_of,
    make_data,
    make_task,
    name_in,
    set_learning_rate,
    tested,
    without_distillation,
)
from lightning_compress.cli.read_report import read_report
from lightning_compress.cli.report import BATCH, Figures, Report, Round, log_numbers, plot_plan
from lightning_compress.cli.run_log import keep_log, log, say
from lightning_compress.cli.sweep_callback import sweep_summed_up
from lightning_compress.core.copies import detached_copy
from lightning_compress.core.errors import TrainingError, UnsupportedError
from lightning_compress.core.plan import Plan
from lightning_compress.core.plan_names import plan_below
from lightning_compress.core.settings import Budget
from lightning_compress.core.target import Target
from lightning_compress.surgery.save import load_compressed, load_weights_, save_compressed
from lightning_compress.training.callback import Compress

TIMED = 0.1
"""Seconds that each network is timed for, for each batch size, if the ratios are not certain before."""


def run(cfg: DictConfig, folder: str | Path, *, dense: DenseStore | None = None, timed: bool = True) -> Report:
    """Does the whole job of one configuration.

    Args:
        cfg: A composed configuration of `conf/config.yaml`.
        folder: Where everything is written; made if needed.
        dense: Where trained dense models are kept and found again; None to train one here.
        timed: Whether latency and throughput are measured.

    Returns:
        The report, which is also written to the folder.

    Raises:
        LightningCompressError: With the cause in its message. Nothing is trained before the
            configuration, the folder, the weights file and the budget have been checked.
    """
    job = _prepare(cfg, Path(folder), known=dense is not None and dense.has(cfg))
    before = _dense(job, dense)
    if cfg.seed is not None:
        seed_everything(cfg.seed, verbose=False)  # whether the dense model was trained here makes no difference
    say(f"[bold]2/4[/] compressing to {job.compress.budget} and testing zero-shot")
    rounds = _compress(job)
    fine_tuned = _Tested(job.net, _test(cfg, job.task, job.data))
    say(f"[bold]4/4[/] {'measuring and ' if timed else ''}writing the report")
    return _report(job, (before, *rounds, fine_tuned), timed=timed)


@dataclass(frozen=True)
class _Job:
    """Everything a run needs, made and checked."""

    cfg: DictConfig
    folder: Path
    data: LightningDataModule
    task: LightningModule
    net: nn.Module
    compress: Compress
    callbacks: Sequence[Callback]
    example_input: ExampleInput
    lr: float | None
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class _Tested:
    """A network and its metrics on the test data; of a round of compression also its budget and when it began."""

    net: nn.Module
    metrics: Mapping[str, float]
    budget: Budget | None = None
    epochs: int = 0


def _prepare(cfg: DictConfig, folder: Path, *, known: bool) -> _Job:
    """Makes and checks everything; an impossible budget only where the dense model is not trained yet."""
    check_config(cfg)
    require_writable(folder)
    if cfg.seed is not None:
        seed_everything(cfg.seed, verbose=False)
    make(cfg.compression, "compression", Compress)  # what is wrong with it shows before data is looked for
    data = make_data(cfg)
    task, net = make_task(cfg)
    asked = settings_of(cfg.compression)
    settings = OmegaConf.create({**asked, **below_task(asked, task, net)})
    compress = make(settings, "compression", Compress)
    example_input = example_of(cfg, task, data)
    task.example_input_array = cast(Any, example_input)
    if compress.distill is not None and (reason := without_distillation(task, example_input)) is not None:
        say(f"no distillation: {escape(reason)}")
        compress = make(OmegaConf.merge(settings, {"distill": None}), "compression", Compress)
    callbacks = [make(own, f"callbacks.{name}", Callback) for name, own in (cfg.callbacks or {}).items() if own]
    _logger(cfg, folder)
    if cfg.model.weights is not None:
        load_weights_(net, weights_file(cfg.model.weights))
    # An impossible budget shows before the training; what the weights are does not matter for that.
    if compress.budget.max_error is None and not known:
        compress.plan_for(task, example_input, method="uniform", objective="weight")
    return _Job(cfg, folder, data, task, net, compress, callbacks, example_input, learning_rate_of(task))


def _dense(job: _Job, store: DenseStore | None) -> _Tested:
    cfg = job.cfg
    what = f"{type(job.net).__name__}, {sum(p.numel() for p in job.net.parameters()):,} parameters"
    if cfg.model.weights is not None:
        say(f"[bold]1/4[/] testing the dense {what}, weights from {escape(str(cfg.model.weights))}")
        return _Tested(detached_copy(job.net), _test(cfg, job.task, job.data))
    if store is None:
        return _Tested(detached_copy(job.net), _trained(job, what))
    if store.has(cfg):
        say(f"[bold]1/4[/] the dense {what} was trained before")
    metrics = store.trained(cfg, job.task, lambda: _trained(job, what))
    return _Tested(detached_copy(job.net), metrics)


def _trained(job: _Job, what: str) -> dict[str, float]:
    """Trains the dense model; returns its metrics."""
    cfg = job.cfg
    say(f"[bold]1/4[/] training the dense {what}, {cfg.dense.epochs} epochs")
    set_learning_rate(job.task, cfg.dense.lr, "dense")
    _trainer(cfg, max_epochs=cfg.dense.epochs, logger=_logger(cfg, job.folder)).fit(job.task, datamodule=job.data)
    return _test(cfg, job.task, job.data)


def _compress(job: _Job) -> list[_Tested]:
    """Compresses and fine-tunes the task's network; returns it as it was after the swap of each round."""
    cfg = job.cfg
    zero_shot = _ZeroShot(job)
    set_learning_rate(job.task, cfg.finetune.lr if cfg.finetune.lr is not None else job.lr, "finetune")
    trainer = _trainer(
        cfg,
        max_epochs=cfg.finetune.epochs,
        callbacks=[job.compress, zero_shot, *job.callbacks, job.history],
        logger=_logger(cfg, job.folder),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in job.callbacks),
    )
    trainer.fit(job.task, datamodule=job.data)
    if not zero_shot.tested:
        msg = "the fit ended before it was compressed: the trainer did not reach on_fit_start."
        raise TrainingError(msg)
    return zero_shot.tested


class _ZeroShot(Callback):
    """Tests a copy of the module right after the swap of each round, before any step on real data."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._plan: Plan | None = None
        self.tested: list[_Tested] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)
        say(f"[bold]3/4[/] fine-tuning, {trainer.max_epochs} epochs")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Tests the network if it was compressed since the last look."""
        plan = self._job.compress.plan
        if plan is None or plan is self._plan:
            return
        self._plan = plan
        cfg, data = self._job.cfg, self._job.data
        net, task = copy_of(self._job.net, self._job.task)
        own = copy.copy(data)  # a trainer attaches itself to the data it tests on
        task._metric_attributes = None  # what Lightning knows of the original's metrics
        bars = {"enable_progress_bar": False} if self.tested else {}  # that of the fit is there already
        with torch.random.fork_rng():
            metrics = _test(cfg, task, own, **bars)
        self.tested.append(_Tested(net, metrics, plan.budget, trainer.current_epoch))
        name = "zero-shot" if len(self.tested) == 1 else f"round {len(self.tested)}, {plan.budget}"
        say(f"      {name}: {', '.join(f'{metric} {value:.4f}' for metric, value in metrics.items())}")


def _report(job: _Job, stages: Sequence[_Tested], *, timed: bool) -> Report:
    if job.compress.plan is None:
        msg = "the fit ended without a plan."
        raise TrainingError(msg)
    times = _times([stage.net for stage in stages], job.example_input) if timed else [(None, None)] * len(stages)
    dense, *rounds, fine_tuned = (
        Figures(measure_costs(stage.net, job.example_input), latency, throughput, stage.metrics)
        for stage, (latency, throughput) in zip(stages, times, strict=True)
    )
    several = [Round(s.budget, s.epochs, each) for s, each in zip(stages[1:-1], rounds, strict=True)]
    report = Report(
        plan_below(job.compress.plan, name_in(job.task, job.net)),  # with the names of what is saved
        *(dense, rounds[0], fine_tuned, {**job.compress.seconds, "fine-tuning": job.history.seconds}),
        asked=job.compress.budget,
        rounds=several if len(several) > 1 else (),
    )
    report.save(job.folder)
    save_compressed(job.net, job.folder / "compressed")
    if job.cfg.plot:
        _plot(report, job.folder)
    Console().print(report.table())
    log(report.to_markdown())
    for line in report.plan.time_lines():
        say(f"search: {line}" if line.startswith("latency") else line)
    say(f"written to {escape(str(job.folder))}")
    log_numbers(report, job.history.loggers, job.history.steps)
    write_page(report, job.folder, Extras(stages[0].net, job.history.epochs, OmegaConf.to_yaml(job.cfg)))
    return report


def _times(nets: Sequence[nn.Module], example: ExampleInput) -> list[tuple[float | None, float | None]]:
    """Returns seconds of a forward pass at batch 1, and inputs per second at batch 32, of each network.

    Networks of the same layers, as after the swap and after the fine-tuning, are one network.
    """
    several = {_structure(net): net for net in nets}
    batches = [Target(batch=batch, threads=1) for batch in (1, BATCH)]
    one, many = (measure_latency([*several.values()], example, target=on, seconds=TIMED) for on in batches)
    found = dict(zip(several, zip(one, many, strict=True), strict=True))
    return [(found[_structure(net)][0], BATCH / found[_structure(net)][1]) for net in nets]


def _structure(net: nn.Module) -> tuple[Any, ...]:
    """Returns what decides how long a network takes, whatever its numbers are."""
    modules = [(name, type(m), getattr(m, "merged", None)) for name, m in net.named_modules()]
    return *modules, *((name, value.shape, value.stride()) for name, value in net.state_dict().items())


def measure_again(folder: str | Path, config: Mapping[str, Any]) -> Report:
    """Measures what a job that ran beside others left out: latency and throughput; its report is written again.

    Args:
        folder: Of the job.
        config: Its configuration, resolved.

    Returns:
        The report with the times of the dense and of the fine-tuned model; zero-shot is built as the latter, but where
        there were several rounds.

    Raises:
        LightningCompressError: If the folder holds no whole job.
    """
    folder, cfg = Path(folder), OmegaConf.create(dict(config))
    report = read_report(folder)
    (_, dense), (task, net) = make_task(cfg), make_task(cfg)
    example = example_of(cfg, task, make_data(cfg))
    load_compressed(net, folder / "compressed")
    before, after = _times([dense, net], example)
    times = {"dense": before, "fine_tuned": after, **({} if report.rounds else {"zero_shot": after})}
    measured = {
        stage: replace(getattr(report, stage), latency=latency, throughput=throughput)
        for stage, (latency, throughput) in times.items()
    }
    report = replace(report, **measured)
    report.save(folder)
    renew_page(report, folder)
    return report


def _plot(report: Report, folder: Path) -> None:
    try:
        plot_plan(report.plan, folder / "plan.png")
    except UnsupportedError as error:
        say(f"no plot: {escape(str(error))}")


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


def _test(cfg: DictConfig, task: LightningModule, data: LightningDataModule, **settings: Any) -> dict[str, float]:
    return tested(_trainer(cfg, **settings), task, data)


def _quieten() -> None:
    """Leaves the terminal to the stages and the table; warnings still come through."""
    keep_log()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*`Trainer.fit` stopped.*")


@hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="config")
def _application(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Runs one job; returns what sweepers may optimise."""
    _quieten()
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(cfg, sweep_job)
    start = time.perf_counter()
    report = or_exit(lambda: run(cfg, HydraConfig.get().runtime.output_dir))
    say(f"{time.perf_counter() - start:.0f} s in all")
    values = objectives_of(report, cfg.optimized_metric)
    return values[0] if len(values) == 1 else values or None


def sweep_job(cfg: DictConfig, folder: Path, alone: bool) -> tuple[float, ...]:
    """Does one job of a sweep, in a process of its own; returns what a sweeper gets.

    Args:
        cfg: Its configuration.
        folder: Where it writes.
        alone: Whether no other job of the sweep runs at the same time; else its latency is measured at the end of all.
    """
    _quieten()
    report = run(cfg, folder, dense=DenseStore.of(cfg, HydraConfig.get().sweep.dir), timed=alone)
    return objectives_of(report, cfg.optimized_metric)


def main() -> None:
    """The command: one job, or a sweep with -m, which is summed up however it ends."""
    find_own_modules()
    or_exit(require_named_engines)
    try:
        with sweep_summed_up():
            _application()
    except KeyboardInterrupt:
        say("[bold]interrupted[/]")
        sys.exit(INTERRUPTED)

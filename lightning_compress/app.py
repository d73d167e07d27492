"""The command `lightning-compress`: a Hydra application over `conf/`.

Trains (or loads) a dense model, tests it, compresses it, tests it zero-shot, fine-tunes it,
tests it again, and writes a report, a plan, a plot and the compressed model.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from typing_extensions import override

from lightning_compress.callback import Compress
from lightning_compress.costs import measure_costs, measure_latency
from lightning_compress.demo.task import ClassificationTask
from lightning_compress.errors import (
    ConfigurationError,
    LightningCompressError,
    OutputFolderError,
    TrainingError,
    UnsupportedError,
)
from lightning_compress.export import load_weights_, save_compressed
from lightning_compress.report import Figures, Report, plot_plan

_PACKAGE = Path(__file__).resolve().parent
CONFIG_FOLDER = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""In a wheel the configuration lies inside the package, in a checkout beside it."""

FAILED = 2
"""Exit status after an error of our own tree."""

_KEYS = ("model", "data", "task", "dense", "compression", "finetune", "trainer", "callbacks", "logger", "seed", "plot")


def run(cfg: DictConfig, folder: str | Path) -> Report:
    """Does the whole job of one configuration.

    Args:
        cfg: A composed configuration of `conf/config.yaml`.
        folder: Where everything is written; made if needed.

    Returns:
        The report, which is also written to the folder.

    Raises:
        LightningCompressError: With the cause in its message; nothing is trained before the
            configuration, the folder and the weights file have been checked.
    """
    console, folder = Console(), Path(folder)
    _check_config(cfg)
    require_writable(folder)
    compress = _make(cfg.compression, "compression")
    if not isinstance(compress, Compress):
        msg = f"compression makes a {type(compress).__name__}: expected _target_: lightning_compress.Compress."
        raise ConfigurationError(msg)
    seed_everything(cfg.seed, verbose=False)
    data = cast(LightningDataModule, _make(cfg.data.module, "data.module"))
    task = ClassificationTask(_make(cfg.model.net, "model.net"), **_settings(cfg.task))
    task.example_input_array = torch.zeros(1, cfg.data.channels, cfg.data.size, cfg.data.size)

    name, size = type(task.net).__name__, sum(p.numel() for p in task.net.parameters())
    if cfg.model.weights is not None:
        load_weights_(task.net, cfg.model.weights)
        console.print(f"[bold]1/4[/] dense {name}, {size:,} parameters, weights from {cfg.model.weights}")
    else:
        console.print(f"[bold]1/4[/] training the dense {name}, {size:,} parameters, {cfg.dense.epochs} epochs")
        task.lr = cfg.dense.lr
        _trainer(cfg, max_epochs=cfg.dense.epochs, logger=_logger(cfg, folder)).fit(task, datamodule=data)
    dense = copy.deepcopy(task.net)
    dense_metrics = _test(cfg, task, data)

    console.print(f"[bold]2/4[/] compressing to {compress.budget} and testing zero-shot")
    zero_shot = _ZeroShot(cfg, data, console)
    task.lr = cfg.finetune.lr
    callbacks = [compress, zero_shot, *_callbacks(cfg)]
    trainer = _trainer(
        cfg,
        max_epochs=cfg.finetune.epochs,
        callbacks=callbacks,
        logger=_logger(cfg, folder),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    trainer.fit(task, datamodule=data)
    fine_tuned_metrics = _test(cfg, task, data)
    if compress.plan is None or zero_shot.net is None:
        msg = "the fit ended without a plan: the trainer did not reach on_fit_start."
        raise TrainingError(msg)

    console.print("[bold]4/4[/] measuring and writing the report")
    nets = [dense, zero_shot.net, task.net]
    latencies = measure_latency(nets, task.example_input_array)
    metrics = [dense_metrics, zero_shot.metrics, fine_tuned_metrics]
    figures = [
        Figures(measure_costs(net, task.example_input_array), seconds, values)
        for net, seconds, values in zip(nets, latencies, metrics, strict=True)
    ]
    report = Report(compress.plan, *figures)
    report.save(folder)
    save_compressed(task.net, folder / "compressed")
    _plot(cfg, report, folder, console)
    console.print(report.table())
    console.print(f"written to {folder}", soft_wrap=True, highlight=False)
    return report


class _ZeroShot(Callback):
    """Tests a copy of the module right after the swap, before any step on real data."""

    def __init__(self, cfg: DictConfig, data: LightningDataModule, console: Console) -> None:
        self._cfg, self._data, self._console = cfg, data, console
        self.net: torch.nn.Module | None = None
        self.metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.net = copy.deepcopy(cast(torch.nn.Module, pl_module.net))
        task = ClassificationTask(self.net, **_settings(self._cfg.task))
        with torch.random.fork_rng():
            self._data.setup("test")
            self.metrics = _results(_trainer(self._cfg).test(task, self._data.test_dataloader(), verbose=False))
        accuracy = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        self._console.print(f"      zero-shot: {accuracy}")
        self._console.print(f"[bold]3/4[/] fine-tuning, {trainer.max_epochs} epochs")


def _trainer(cfg: DictConfig, **settings: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, **settings}
    return cast(Trainer, _make(cfg.trainer, "trainer", **settings))


def _logger(cfg: DictConfig, folder: Path) -> Logger | bool:
    if not cfg.logger:
        return False
    logger = _make(cfg.logger, "logger", save_dir=str(folder))
    if not isinstance(logger, Logger):
        msg = f"logger makes a {type(logger).__name__}: expected a Lightning logger."
        raise ConfigurationError(msg)
    return logger


def _test(cfg: DictConfig, task: ClassificationTask, data: LightningDataModule) -> dict[str, float]:
    return _results(_trainer(cfg).test(task, datamodule=data, verbose=False))


def _settings(node: DictConfig) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))


def _results(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(value) for result in results for name, value in result.items()}


def _callbacks(cfg: DictConfig) -> list[Callback]:
    made = [_make(settings, f"callbacks.{name}") for name, settings in (cfg.callbacks or {}).items() if settings]
    return cast("list[Callback]", made)


def _plot(cfg: DictConfig, report: Report, folder: Path, console: Console) -> None:
    if not cfg.plot:
        return
    try:
        plot_plan(report.plan, folder / "plan.png")
    except UnsupportedError as error:
        console.print(f"no plot: {error}", highlight=False)


def _make(settings: Any, where: str, **more: Any) -> Any:
    """Instantiates a configuration node; our own errors pass, all others name the node."""
    try:
        return instantiate(settings, _convert_="all", **more)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, LightningCompressError):
                raise cause from None
            cause = cause.__cause__
        msg = f"{where} cannot be made: {' '.join(str(error).split())}. Check its keys and values."
        raise ConfigurationError(msg) from error


def _check_config(cfg: DictConfig) -> None:
    _require_known(cfg, _KEYS, "the configuration")
    missing = [key for key in _KEYS if key not in cfg]
    if missing:
        msg = f"the configuration lacks {', '.join(missing)}: start from conf/config.yaml."
        raise ConfigurationError(msg)
    if not OmegaConf.is_dict(cfg.compression) or "budget" not in cfg.compression:
        msg = f"compression={cfg.compression!r}: expected a group such as compression=params_20, with a budget."
        raise ConfigurationError(msg)
    _require_known(cfg.compression, ["_target_", *inspect.signature(Compress).parameters], "compression")
    _require_known(cfg.task, list(inspect.signature(ClassificationTask).parameters)[1:], "task")
    for stage in ("dense", "finetune"):
        _require_known(cfg[stage], ("epochs", "lr"), stage)
        epochs, lr = cfg[stage].epochs, cfg[stage].lr
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
            msg = f"{stage}.epochs={epochs!r}: expected a whole number of at least 0."
            raise ConfigurationError(msg)
        if not isinstance(lr, (int, float)) or isinstance(lr, bool) or lr <= 0:
            msg = f"{stage}.lr={lr!r}: expected a number above 0."
            raise ConfigurationError(msg)


def _require_known(node: Any, known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in node:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            msg = f"unknown key {key!r} in {where}.{hint} Known: {', '.join(known)}."
            raise ConfigurationError(msg)


def require_writable(folder: str | Path) -> None:
    """Checks that files can be made in a folder, making the folder if needed.

    Raises:
        OutputFolderError: If not.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = (
            f"cannot write to the output folder {str(folder)!r}: {error}. "
            "Choose another with hydra.run.dir=PATH (hydra.sweep.dir=PATH for a multirun)."
        )
        raise OutputFolderError(msg) from error


class CheckOutputFolder(HydraCallback):
    """Checks the output folder before Hydra makes it, so that the message is ours."""

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the folder of a single run."""
        _or_exit(lambda: require_writable(config.hydra.run.dir))

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the folder of a sweep."""
        _or_exit(lambda: require_writable(config.hydra.sweep.dir))


def _or_exit(action: Any) -> Any:
    try:
        return action()
    except LightningCompressError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(FAILED)


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
    report = cast(Report, _or_exit(lambda: run(cfg, HydraConfig.get().runtime.output_dir)))
    Console().print(f"{time.perf_counter() - start:.0f} s in all", highlight=False)
    return report.fine_tuned.metrics["accuracy"]

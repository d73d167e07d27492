"""Checks of the composed configuration and of the output folder, and the making of its nodes."""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from rich.markup import escape
from typing_extensions import override

from lightning_compress.cli.run_log import say
from lightning_compress.core.checks import did_you_mean, is_number, require_count
from lightning_compress.core.errors import (
    ConfigurationError,
    LightningCompressError,
    OutputFolderError,
)
from lightning_compress.training.callback import Compress

_PACKAGE = Path(__file__).resolve().parent.parent
CONFIG_FOLDER = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""In a wheel the configuration lies inside the package, in a checkout beside it."""

_WEIGHTS = _PACKAGE / "weights" if (_PACKAGE / "weights").is_dir() else _PACKAGE.parent / "benchmarks" / "weights"

warnings.filterwarnings("ignore", message=r"(?s).*is validated against ConfigStore schema with the same name")
# the files of cli/conf set the defaults of engines, whose plugins describe the same groups; workers read them, too

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

FAILED = 2
"""Exit status after an error of our own tree."""

_KEYS = (
    *("model", "data", "task", "dense", "compression", "finetune", "trainer", "callbacks", "logger", "seed", "plot"),
    "optimized_metric",
)

_GROUPS = {
    "model": "model=small_cnn",
    "data": "data=digits",
    "task": "task=classification",
    "dense": "the one in conf/config.yaml",
    "compression": "compression=params_20",
    "finetune": "the one in conf/config.yaml",
    "trainer": "trainer=default",
}

_PARTS = {
    "model": ("weights", "net"),
    "data": ("module", "channels", "size", "features", "classes"),
}
"""What is read of these groups; other keys may be there for what refers to them."""

_INSTEAD = {
    "logger": "logger=csv and the other files of conf/logger, or logger=null",
    "callbacks": "+callbacks.NAME._target_=…",
}
"""Arguments of the trainer that have a group of their own."""

_T = TypeVar("_T")


def weights_file(name: object) -> str:
    """Returns the file of `model.weights`: a path, or the name of one that this library comes with."""
    own = _WEIGHTS / f"{name}.safetensors"
    return str(own) if own.is_file() and not Path(str(name)).exists() else str(name)


def make(settings: Any, where: str, kind: type[_T], **more: Any) -> _T:
    """Instantiates a configuration node.

    Args:
        settings: A node with a `_target_`.
        where: Its place in the configuration, for messages.
        kind: What it must make.
        **more: Further arguments of the target.

    Raises:
        ConfigurationError: If it cannot be made, or makes something else. An error of our own
            tree that the target raises passes as it is.
    """
    try:
        made = instantiate(settings, _convert_="all", **more)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, LightningCompressError):
                raise cause from None
            cause = cause.__cause__
        msg = f"{where} cannot be made: {' '.join(str(error).split())}. Check its keys and values."
        raise ConfigurationError(msg) from error
    if not isinstance(made, kind):
        package = kind.__module__.partition(".")[0]
        msg = f"{where} makes a {type(made).__name__}, expected a {package}.{kind.__name__}: check its _target_."
        raise ConfigurationError(msg)
    return made


def settings_of(node: DictConfig) -> dict[str, Any]:
    """Returns a node as a plain dict, interpolations resolved.

    Raises:
        ConfigurationError: If one cannot be resolved. An error of our own tree in it passes as it is.
    """
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))
    except InterpolationResolutionError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, LightningCompressError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        msg = f"a value cannot be resolved: {' '.join(str(error).split())}."
        raise ConfigurationError(msg) from error


def check_config(cfg: DictConfig) -> None:
    """Checks keys and plain values, before anything is made or trained.

    Raises:
        ConfigurationError: If a key is unknown or missing, or a value is out of range.
    """
    _require_known(cfg, _KEYS, "the configuration")
    missing = [key for key in _KEYS if key not in cfg]
    if missing:
        msg = f"the configuration lacks {', '.join(missing)}: start from conf/config.yaml."
        raise ConfigurationError(msg)
    for name, usual in _GROUPS.items():
        if not OmegaConf.is_dict(cfg[name]):
            msg = f"{name}={cfg[name]!r}: expected a group of settings, such as {usual}."
            raise ConfigurationError(msg)
    if "budget" not in cfg.compression:
        msg = f"compression has no budget, only {', '.join(map(str, cfg.compression))}: try compression=params_20."
        raise ConfigurationError(msg)
    _require_known(cfg.compression, ["_target_", *Compress.arguments()], "compression")
    for name, parts in _PARTS.items():
        _require_known(cfg[name], (*parts, *_referred_to(cfg, name)), name)
    _check_trainer(cfg.trainer)
    for stage in ("dense", "finetune"):
        _check_stage(cfg[stage], stage)
    _check_metric(cfg.optimized_metric)
    if cfg.seed is not None:
        require_count(f"seed={cfg.seed!r}", cfg.seed, 0)


def _check_metric(names: Any) -> None:
    several = OmegaConf.is_list(names) and len(names) > 0 and all(isinstance(name, str) for name in names)
    if not (names is None or isinstance(names, str) or several):
        msg = (
            f"optimized_metric={names!r}: expected the name of a metric, params, macs, bytes or latency, or a list of "
            "them, such as [accuracy,params]."
        )
        raise ConfigurationError(msg)


def _check_trainer(node: DictConfig) -> None:
    for key, instead in _INSTEAD.items():
        if key in node:
            msg = f"trainer.{key}={node[key]!r}: the application sets this itself; use {instead}."
            raise ConfigurationError(msg)
    if node.get("max_epochs") is not None:
        require_count(f"trainer.max_epochs={node.max_epochs!r}", node.max_epochs, -1)


def _check_stage(node: DictConfig, stage: str) -> None:
    _require_known(node, ("epochs", "lr"), stage)
    epochs, lr = node.epochs, node.lr
    require_count(f"{stage}.epochs={epochs!r}", epochs, 0)
    if lr is not None and (not is_number(lr) or lr <= 0):
        msg = f"{stage}.lr={lr!r}: expected a number above 0, or null for the task's own."
        raise ConfigurationError(msg)


def _require_known(node: DictConfig, known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in node:
        if key not in known:
            msg = f"unknown key {key!r} in {where}.{did_you_mean(key, known)}"
            raise ConfigurationError(msg)


def _referred_to(cfg: DictConfig, group: str) -> list[str]:
    """Returns the keys of a group that interpolations anywhere in the configuration refer to."""
    return re.findall(rf"\$\{{{group}\.(\w+)", OmegaConf.to_yaml(cfg))


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
        or_exit(lambda: require_writable(config.hydra.run.dir))

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the folder of a sweep."""
        or_exit(lambda: require_writable(config.hydra.sweep.dir))


def or_exit(action: Callable[[], _T]) -> _T:
    """Returns what the action returns; prints and logs an error of our own tree and exits with `FAILED`."""
    try:
        return action()
    except LightningCompressError as error:
        say(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", error=True)
        sys.exit(FAILED)

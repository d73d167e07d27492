"""Launchers and sweepers of a multirun: whether they are installed, and how they are set for compression."""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any

from hydra.experimental.callback import Callback as HydraCallback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from typing_extensions import override

from lightning_compress.cli.config import or_exit
from lightning_compress.cli.objectives import is_smaller_better, names_of
from lightning_compress.core.errors import ConfigurationError, UnsupportedError

_MODULES = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "ray": "ray",
    "submitit": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}
"""What an engine needs; its name is that of the extra."""
_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class SetEngines(HydraCallback):
    """A Hydra callback that checks and sets the engines of a multirun before they are made."""

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses what is not installed or cannot work; tells Optuna which way is better."""
        or_exit(lambda: require_engines(config))
        if "optuna" in str(config.hydra.sweeper.get("_target_")):
            set_optuna_(config)


def is_alone(hydra_config: Any) -> bool:
    """Returns whether a launcher runs one job at a time, so that times can be measured while it runs."""
    return str(hydra_config.launcher.get("_target_")) == _BASIC


def require_named_engines(words: list[str] | None = None) -> None:
    """Checks the engines that a command line names, before Hydra looks for their configuration.

    Raises:
        UnsupportedError: If one is not installed.
    """
    for word in sys.argv[1:] if words is None else words:
        found = re.fullmatch(r"hydra/(launcher|sweeper)=([a-z]+).*", word)
        if found is not None and found[2] in _MODULES:
            _require(found[1], found[2])


def require_engines(config: DictConfig) -> None:
    """Checks launcher and sweeper of a multirun.

    Args:
        config: The whole configuration, with Hydra's part.

    Raises:
        UnsupportedError: If one is not installed.
        ConfigurationError: If latency is to be optimised while jobs run beside each other.
    """
    for what in ("launcher", "sweeper"):
        target = str(config.hydra[what].get("_target_"))
        for name in _MODULES:
            if name in target.lower():
                _require(what, name)
    names = names_of(config.get("optimized_metric"))
    if "latency" in names and not is_alone(config.hydra):
        msg = (
            f"optimized_metric={config.optimized_metric!r}: beside other jobs latency is not measured until all are "
            "done. Take hydra/launcher=basic, or optimise macs."
        )
        raise ConfigurationError(msg)


def _require(what: str, name: str) -> None:
    try:
        installed = importlib.util.find_spec(_MODULES[name]) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        msg = f"hydra/{what}={name} needs more packages: pip install 'lightning_compress[{name}]'."
        raise UnsupportedError(msg)


def set_optuna_(config: DictConfig) -> None:
    """Sets what the command line leaves open: which way is better, one trial at a time, and no end for failed trials.

    Args:
        config: The whole configuration, with Hydra's part; changed in place.
    """
    given = {str(override).lstrip("+").partition("=")[0] for override in config.hydra.overrides.hydra}
    names = names_of(config.get("optimized_metric")) or [""]
    ways = ["minimize" if is_smaller_better(name) else "maximize" for name in names]
    settings: dict[str, Any] = {"direction": ways[0] if len(ways) == 1 else ways, "max_failure_rate": 1.0}
    if is_alone(config.hydra):
        settings["n_jobs"] = 1
    stock = {"direction": "minimize", "max_failure_rate": 0.0, "n_jobs": 2}
    with read_write(config), open_dict(config):
        for key, value in settings.items():
            now = config.hydra.sweeper.get(key)
            untouched = str(getattr(now, "name", now)) == str(stock[key])
            if f"hydra.sweeper.{key}" not in given and untouched:
                OmegaConf.update(config, f"hydra.sweeper.{key}", value, merge=False)

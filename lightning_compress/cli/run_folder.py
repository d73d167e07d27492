"""A run's folder, opened again: its configuration, report, networks and data."""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.cli.config import make, or_exit
from lightning_compress.cli.parts import example_of, find_own_modules, make_data, make_task, tested
from lightning_compress.cli.read_report import read_report
from lightning_compress.cli.report import Report
from lightning_compress.core.checks import did_you_mean, path_of
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.export.running import Runner
from lightning_compress.export.subject import Inputs, as_inputs, tensors_in, with_batch
from lightning_compress.surgery.save import load_compressed

COMPRESSED = "compressed"
"""Where a run saves its model."""


@dataclass(frozen=True)
class RunFolder:
    """What a run left.

    Attributes:
        path: Of the folder.
        cfg: Its configuration.
        report: What it measured.
        data: Its data module, set up for testing.
    """

    path: Path
    cfg: DictConfig
    report: Report
    data: LightningDataModule

    def task(self, *, compressed: bool) -> tuple[LightningModule, nn.Module]:
        """Returns the task and its network on the CPU: compressed, or dense with the weights that it is made with.

        Raises:
            WeightsError: If the compressed model is missing or damaged.
        """
        task, net = make_task(self.cfg)
        if compressed:
            load_compressed(net, self.path / COMPRESSED)
        task.eval()
        return task, net

    def example(self) -> ExampleInput:
        """Returns an example input of the network."""
        return example_of(self.cfg, make_task(self.cfg)[0], self.data)

    def inputs(self, count: int, *, stage: str) -> list[Any]:
        """Returns what the network is given of so many samples: of the test data, or of those that validate.

        Args:
            count: Samples in all.
            stage: "test", or "fit" for validation data (training data where there are none).
        """
        self.data.setup(stage)
        loader: Any = self.data.test_dataloader() if stage == "test" else self.data.val_dataloader()
        if stage == "fit" and not loader:
            loader = self.data.train_dataloader()
        found, left = [], count
        for batch in cast("Iterable[Any]", loader):
            own = _first(_inputs_of(batch), left)
            size = len(tensors_in(own)[0])
            found.append(own)
            left -= size
            if left <= 0:
                break
        return found

    def test(self, runner: Runner | None = None) -> dict[str, float]:
        """Returns the metrics of the compressed network on the test data, or of a file in its place.

        Args:
            runner: Called in the place of the network.
        """
        task, net = self.task(compressed=runner is None)
        if runner is not None:
            net.__dict__["forward"] = self._by_position(runner)
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = make(self.cfg.trainer, "trainer", Trainer, **settings, devices=1)
        return tested(trainer, task, self.data)

    def _by_position(self, runner: Runner) -> Callable[..., Any]:
        """Returns a file as a function that takes arguments by name too, in the order in which it was exported."""
        inputs = self.inputs(1, stage="test")[0]
        names = tuple(inputs) if isinstance(inputs, Mapping) else ()

        def run(*args: Any, **kwargs: Any) -> Any:
            ordered = [kwargs[name] for name in names if name in kwargs]
            others = [value for name, value in kwargs.items() if name not in names]
            return runner(*args, *ordered, *others)

        return run


def open_run(folder: str | Path) -> RunFolder:
    """Returns what a run of `lightning-compress` left in its folder.

    Raises:
        ConfigurationError: If it is no such folder.
        PlanFormatError: If its report is missing or damaged.
    """
    path = path_of("RUN_FOLDER", folder)
    config = path / ".hydra" / "config.yaml"
    if not config.is_file() or not (path / COMPRESSED).is_dir():
        msg = (
            f"RUN_FOLDER={str(folder)!r}: expected the folder of a finished run of lightning-compress, such as "
            f"outputs/DATE/TIME or one of a multirun's folders, with .hydra/config.yaml and {COMPRESSED}/ in it."
        )
        raise ConfigurationError(msg)
    find_own_modules()
    cfg = cast(DictConfig, OmegaConf.load(config))
    data = make_data(cfg)
    data.prepare_data()
    data.setup("test")
    return RunFolder(path, cfg, read_report(path), data)


def arguments_of(words: Sequence[str], known: Mapping[str, Any], usage: str) -> tuple[str, dict[str, Any]]:
    """Returns the folder and the settings of a command line: `FOLDER name=value …`.

    Args:
        words: Of the command line.
        known: Settings with what they are if not given.
        usage: What the command says of itself.

    Raises:
        ConfigurationError: If there is not one folder, or a setting is unknown or of another type.
    """
    folders = [word for word in words if "=" not in word]
    if len(folders) != 1:
        msg = f"expected one folder of a run, got {len(folders)}: {' '.join(folders) or 'nothing'}.\n{usage}"
        raise ConfigurationError(msg)
    given = OmegaConf.to_container(OmegaConf.from_dotlist([word for word in words if "=" in word]))
    settings = dict(known)
    for name, value in cast("dict[str, Any]", given).items():
        if name not in known:
            msg = f"unknown setting {name!r}.{did_you_mean(name, known)}"
            raise ConfigurationError(msg)
        expected = type(known[name])
        if known[name] is not None and type(value) is not expected:
            msg = f"{name}={value!r}: expected {_SAID[expected]}."
            raise ConfigurationError(msg)
        settings[name] = value
    return folders[0], settings


_SAID: dict[type, str] = {bool: "true or false", int: "a whole number", str: "a word"}


def _inputs_of(batch: Any) -> Any:
    """Returns what of a batch the network is given: the first of a pair, all but the labels of a dict."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in ("label", "labels")}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _first(inputs: Any, count: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:count].clone()
    return {name: value[:count].clone() for name, value in inputs.items()}


def run_command(
    words: Sequence[str] | None,
    known: Mapping[str, Any],
    usage: str,
    work: Callable[[str, dict[str, Any]], None],
) -> None:
    """Runs a command on the folder of a run; one that asks for help gets the usage.

    Args:
        words: Of the command line; None for those of this process.
        known: See `arguments_of`.
        usage: Likewise.
        work: What the command does with the folder and its settings.
    """
    words = sys.argv[1:] if words is None else words
    if any(word in ("-h", "--help") for word in words):
        print(usage)
        return
    quieten()
    or_exit(lambda: work(*arguments_of(words, known, usage)))


def batch_of(inputs: Any, size: int) -> Inputs:
    """Returns what a network is given, as `RunFolder.inputs` has it, by position and with so many samples."""
    given = tuple(inputs.values()) if isinstance(inputs, Mapping) else (inputs,)
    return with_batch(as_inputs(given, (), len(given)), size)


def rows_of(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Returns columns as rows, each with its name first; "" where a column has none."""
    names = dict.fromkeys(itertools.chain.from_iterable(columns))
    return [(name, *(column.get(name, "") for column in columns)) for name in names]


def quieten() -> None:
    """Leaves the terminal to the table: Lightning says nothing below a warning."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")

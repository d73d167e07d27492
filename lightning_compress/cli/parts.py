"""The parts of a job: data, network, task and example input, of this library's demonstration or of the user."""

from __future__ import annotations

import fnmatch
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from hydra.utils import get_object
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from torch import nn

import lightning_compress.cli.data  # noqa: F401, its resolvers
from lightning_compress.analysis.trace import ExampleInput, as_arguments, inference, run, trace
from lightning_compress.cli.config import make, settings_of
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.copies import detached_copy
from lightning_compress.core.errors import ConfigurationError, ExampleInputError
from lightning_compress.training.first_batch import guesses, shapes_of_first_batch

_NETWORK = ("net", "model")
"""Arguments of a task that take the network of the model group."""
_DEFAULTS = {
    "data.module": ("batch_size", "augment", "limit", "seed", "folder", "download"),
    "task": ("num_classes",),
}
"""What the groups of this library set and a class of the user need not know."""
_LEARNING_RATES = ("lr", "learning_rate")
_OWN = "lightning_compress."


def find_own_modules() -> None:
    """Lets modules in the working folder be imported, after all others of the same name."""
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.append(os.getcwd())  # noqa: PTH109


def name_in(task: nn.Module, net: nn.Module) -> str:
    """Returns the name of a network in its task, "" for the task itself."""
    return next(str(name) for name, module in task.named_modules() if module is net)


def below_task(selection: Mapping[str, Any], task: nn.Module, net: nn.Module) -> dict[str, Any]:
    """Returns what a configuration selects layers by with the names that they have in the task.

    What is saved and reported is the network with its own names; both work.

    Args:
        selection: Settings of the compression; `include`, `exclude` and `overrides` are looked at.
        task: The task.
        net: Its network, or the task itself.
    """
    prefix = name_in(task, net)
    own, whole = ([name for name, _ in each.named_modules()] for each in (net, task))

    def named(pattern: Any) -> Any:
        if not prefix or not isinstance(pattern, str) or fnmatch.filter(whole, pattern):
            return pattern
        return f"{prefix}.{pattern}" if fnmatch.filter(own, pattern) else pattern

    found: dict[str, Any] = {}
    for key in ("include", "exclude"):
        given = selection.get(key)
        if given is not None:
            found[key] = named(given) if isinstance(given, str) else [named(pattern) for pattern in given]
    if isinstance(overrides := selection.get("overrides"), Mapping):
        found["overrides"] = {named(pattern): value for pattern, value in overrides.items()}
    return found


def make_data(cfg: DictConfig) -> LightningDataModule:
    """Makes the data module of a configuration.

    Raises:
        ConfigurationError: If it cannot be made, or is no LightningDataModule.
    """
    return make(_known(cfg.data.module, "data.module"), "data.module", LightningDataModule)


def make_task(cfg: DictConfig) -> tuple[LightningModule, nn.Module]:
    """Makes the task of a configuration, untrained.

    Returns:
        The task, and what is compressed and saved of it: the network of the model group where all parameters are in
        it, else the task itself.

    Raises:
        ConfigurationError: If a part cannot be made, or is of another kind.
    """
    settings = _known(cfg.task, "task")
    accepted = _parameters(str(settings["_target_"]), "task")
    name = next((name for name in _NETWORK if name in accepted and name not in settings), None)
    if name is None:
        task: LightningModule = make(settings, "task", LightningModule)
        return task, task
    net = make(cfg.model.net, "model.net", nn.Module)
    task = make(settings, "task", LightningModule, **{name: net})
    inside = {id(p) for p in net.parameters()}
    whole = any(module is net for module in task.modules()) and all(id(p) in inside for p in task.parameters())
    return task, net if whole else task


def _refusal(task: LightningModule, example: ExampleInput) -> str | None:
    """Returns why a task does not take an example input."""
    try:
        trace(task, example)
    except ExampleInputError as error:
        return str(error)
    return None


def copy_of(net: nn.Module, task: LightningModule) -> tuple[nn.Module, LightningModule]:
    """Returns a copy of a task that no trainer holds, and the copy of its network in it."""
    name = next(name for name, module in task.named_modules() if module is net)
    copied = cast(LightningModule, detached_copy(task))
    return copied.get_submodule(name), copied


def example_of(cfg: DictConfig, task: LightningModule, data: LightningDataModule) -> ExampleInput:
    """Returns an example input: the task's own, else of the configured shape, else of the first batch's shapes.

    Raises:
        ExampleInputError: If there is none that the task takes.
    """
    own: Any = task.example_input_array
    if own is not None:
        return own  # type: ignore[no-any-return]
    shape = (cfg.data.get("channels"), cfg.data.get("size"), cfg.data.get("size"))
    if None not in shape and str(cfg.data.module.get("_target_")).startswith(_OWN):
        return torch.zeros(1, *shape)
    data.prepare_data()
    data.setup("fit")
    reasons = []
    with isolate_rng():
        batch = shapes_of_first_batch(data.train_dataloader())
        for what, guess in guesses(batch, task.forward):
            reason = _refusal(task, guess)
            if reason is None:
                return guess  # type: ignore[no-any-return]
            reasons.append(f"with {what}, {reason}".rstrip("."))
    msg = (
        f"no example input could be made of the first batch: {'; '.join(reasons) or 'it holds no tensors'}. Set "
        f"self.example_input_array in the __init__ of {type(task).__name__}."
    )
    raise ExampleInputError(msg)


def without_distillation(task: LightningModule, example: ExampleInput) -> str | None:
    """Returns why the logits of a task cannot be distilled, None if they can."""
    if not getattr(task, "distillable", True):
        return f"a {type(task).__name__} of this kind has no logits"
    with inference(task):
        output = run(task, as_arguments(task, example), "the example input")
    if isinstance(output, torch.Tensor) and output.ndim > 1 and output.shape[1] > 1:
        return None
    shape = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
    return f"{type(task).__name__}.forward returns {shape}, no logits (batch, classes, …)"


def tested(trainer: Trainer, task: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Returns the metrics of a task on the test data, or the validation data if it has no test; none without both."""
    if is_overridden("test_step", task):
        results = trainer.test(task, datamodule=data, verbose=False)
    elif is_overridden("validation_step", task):
        results = trainer.validate(task, datamodule=data, verbose=False)
    else:
        return {}
    return {name: float(value) for result in results for name, value in result.items()}


def set_learning_rate(task: LightningModule, lr: float | None, stage: str) -> None:
    """Sets the learning rate of a task; None leaves it.

    Raises:
        ConfigurationError: If the task has none that could be set.
    """
    if lr is None:
        return
    name = next((name for name in _LEARNING_RATES if lightning_hasattr(task, name)), None)
    if name is None:
        msg = (
            f"{stage}.lr={lr!r}: {type(task).__name__} has no attribute or hyper-parameter named lr or learning_rate "
            f"to set it in. Leave {stage}.lr out, or have configure_optimizers read self.lr."
        )
        raise ConfigurationError(msg)
    lightning_setattr(task, name, lr)


def learning_rate_of(task: LightningModule) -> float | None:
    """Returns the learning rate that a task was made with, None if it names none."""
    for name in _LEARNING_RATES:
        found = getattr(task, name, None)
        found = task.hparams.get(name) if found is None else found
        if isinstance(found, (int, float)):
            return float(found)
    return None


def _known(node: DictConfig, where: str) -> dict[str, Any]:
    """Returns the settings of a target without those that are null, or that groups set and the target does not know."""
    settings = settings_of(node)
    target = settings.get("_target_")
    if not isinstance(target, str):
        msg = f"{where}._target_={target!r}: expected the name of a class, such as my.module.LitNet."
        raise ConfigurationError(msg)
    accepted = _parameters(target, where)
    foreign = not target.startswith(_OWN)
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        soft = (*_DEFAULTS[where], *(key for key, value in settings.items() if value is None))
        for key in set(settings) - set(accepted) - {"_target_", "_recursive_", "_convert_", "_partial_"}:
            if not (key in soft and foreign):
                msg = f"unknown key {key!r} in {where}.{did_you_mean(key, [n for n in accepted if n != 'net'])}"
                raise ConfigurationError(msg)
    dropped = {
        key
        for key, value in settings.items()
        if (value is None and where == "task") or (foreign and key in _DEFAULTS[where] and key not in accepted)
    }
    return {key: value for key, value in settings.items() if key not in dropped}


def _parameters(target: str, where: str) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a target by name."""
    find_own_modules()
    try:
        found = get_object(target)
    except Exception as error:
        msg = f"{where} cannot be made: {where}._target_={target!r} is not found: {' '.join(str(error).split())}."
        raise ConfigurationError(msg) from error
    return inspect.signature(found).parameters

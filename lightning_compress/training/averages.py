"""Callbacks that keep an averaged copy of the module, which has to follow when its structure changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.core.errors import UnsupportedError
from lightning_compress.training.compat import AVERAGING, callbacks_of

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGING_WORDS = ("ema", "swa", "averag", "polyak", "shadow")


def restart_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Starts the averages again from the module as it is: they pair its parameters with their own by position."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, AVERAGING):
            callback.setup(trainer, pl_module, cast(str, trainer.state.fn))
        if isinstance(callback, StochasticWeightAveraging) and callback.n_averaged is not None:
            callback.n_averaged.zero_()


def require_no_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses to change the structure of a module of which an average exists that could not follow.

    Those of Lightning can be started again. Callbacks of others are looked through for a copy of the module or of a
    part of it under a name that speaks of averages.

    Raises:
        UnsupportedError: If there is one.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, AVERAGING):
            continue
        name = _average_in(callback, pl_module)
        if name is not None:
            kind = type(callback).__name__
            msg = (
                f"the callback {kind} keeps an average in its attribute {name!r}, of the module as it is before this "
                f"compression, and pairs its parameters with those of then. List {kind} after Compress, and let it "
                "make its copy in on_fit_start rather than in setup (again after every round of a schedule); or use "
                "WeightAveraging or StochasticWeightAveraging of lightning.pytorch.callbacks, which Compress starts "
                "again by itself."
            )
            raise UnsupportedError(msg)


def _average_in(callback: Callback, pl_module: LightningModule) -> str | None:
    """Returns the attribute in which a callback keeps an average of a module or of a part of it, None without one."""
    by_class = any(_speaks_of_averages(cls.__name__) for cls in type(callback).__mro__)
    parts = {_shapes_of(part) for part in pl_module.modules()} - {()}
    for name, value in vars(callback).items():
        for held in _tensors_in(value, pl_module):
            named = by_class or isinstance(value, AveragedModel) or _speaks_of_averages(name)
            if named and held in parts:
                return name
    return None


def _tensors_in(value: Any, pl_module: LightningModule) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yields the shapes of the parameters in a copy of a module, or of tensors by name or in a list."""
    if isinstance(value, nn.Module):
        if not any(value is part for part in pl_module.modules()):
            yield _shapes_of(value)
        return
    content = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(content, Sequence) and content and all(isinstance(entry, Tensor) for entry in content):
        yield tuple(tuple(entry.shape) for entry in content)
    elif isinstance(getattr(value, "module", None), nn.Module):  # an object of its own that keeps the copy
        yield from _tensors_in(value.module, pl_module)


def _shapes_of(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(parameter.shape) for parameter in module.parameters())


def _speaks_of_averages(name: str) -> bool:
    return any(word.lower().startswith(_AVERAGING_WORDS) for word in _WORD.findall(name))

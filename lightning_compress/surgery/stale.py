"""A warning where an optimizer that was made before a compression goes on training what the model no longer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from warnings import warn
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from lightning_compress.core.errors import CompressionWarning
from lightning_compress.layers.folding import weight_parameters

_replaced: Any = WeakIdKeyDictionary()
"""Weights that trained layers had, and the layers' names."""
_checked: WeakSet[Optimizer] = WeakSet()
_MOST_NAMED = 3


def note_replaced(dense: Mapping[str, nn.Module]) -> None:
    """Notes the weights of dense layers that a model has lost, by the layers' names: no optimizer should step them."""
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_look_at))
    _checked.clear()
    for name, module in dense.items():
        for _, weight in weight_parameters(module):
            if weight.requires_grad:
                _replaced[weight] = name


def note_restored(dense: Iterable[nn.Module]) -> None:
    """Forgets the weights of dense layers that a model has again."""
    for module in dense:
        for _, weight in weight_parameters(module):
            _replaced.pop(weight, None)


_hooked: list[Any] = []


def _look_at(optimizer: Optimizer, *_: Any) -> None:
    """Warns at the first step of an optimizer after a compression if it holds weights that were replaced."""
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if names := [_replaced[parameter] for parameter in held if parameter in _replaced]:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        msg = (
            f"this {type(optimizer).__name__} was made before the compression: it steps the weights that "
            f"{', '.join(names[:_MOST_NAMED])}{more} had, and the factors are in no optimizer. Make the optimizer "
            "after compress_, from the model's parameters as they are now."
        )
        warn(msg, CompressionWarning, stacklevel=4)

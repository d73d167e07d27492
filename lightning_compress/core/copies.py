"""A deep copy of a module for its own sake, and a digest of tensors by which copies are told apart."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.core.compat import TRAINER_ATTRIBUTE


def detached_copy(module: nn.Module) -> nn.Module:
    """Deep-copies a module; of a LightningModule, without the trainer it is attached to.

    What cannot be copied, such as a lock, an open file or a logger's client, is shared with the original; activations
    that the module keeps, which belong to a graph, are copied without it.
    """
    attached = {
        m: m.__dict__[TRAINER_ATTRIBUTE] for m in module.modules() if m.__dict__.get(TRAINER_ATTRIBUTE) is not None
    }
    try:
        for m in attached:
            m.__dict__[TRAINER_ATTRIBUTE] = None
        try:
            return copy.deepcopy(module)
        except Exception:  # whatever the classes of the attributes raise
            return cast(nn.Module, _copied(module, _Memo()))
    finally:
        for m, trainer in attached.items():
            m.__dict__[TRAINER_ATTRIBUTE] = trainer


class _Memo(dict[int, Any]):
    """What `copy.deepcopy` has copied already, with a log by which a copy that failed midway is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.alive: list[Any] = []

    def __setitem__(self, key: int, value: Any) -> None:
        self.log.append(key)
        super().__setitem__(key, value)


def _copied(value: Any, memo: _Memo) -> Any:
    """Returns a copy as deep as possible."""
    if id(value) in memo:
        return memo[id(value)]
    start = len(memo.log)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        for key in memo.log[start:]:
            memo.pop(key, None)
        del memo.log[start:]
    found: Any
    memo.alive.append(value)  # so that no other object gets its identity
    if isinstance(value, nn.Module):
        return _copied_module(value, memo)
    if type(value) is list:
        memo[id(value)] = found = []
        found.extend(_copied(item, memo) for item in value)
    elif type(value) in (dict, OrderedDict):
        memo[id(value)] = found = type(value)()
        found.update((key, _copied(item, memo)) for key, item in value.items())
    elif type(value) in (set, tuple):
        memo[id(value)] = found = type(value)(_copied(item, memo) for item in value)
    else:
        memo[id(value)] = found = value.detach().clone() if isinstance(value, Tensor) else value
    return found


def _copied_module(module: nn.Module, memo: _Memo) -> nn.Module:
    """Returns a copy of a module, made as pickle would make it, that shares what cannot be copied."""
    make, arguments, *state = cast("tuple[Any, ...]", module.__reduce_ex__(4))
    memo[id(module)] = new = make(*(_copied(argument, memo) for argument in arguments))
    if state and state[0]:
        new.__setstate__({name: _copied(value, memo) for name, value in state[0].items()})
    return cast(nn.Module, new)


def digest_of(named: Iterable[tuple[str, Any]]) -> str:
    """Returns a SHA-256 over names and the values of those that are tensors."""
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

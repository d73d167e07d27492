"""Compression under Lightning's strategies: which ones are supported, and one result on all ranks of DDP."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from lightning_compress.compress import Compression
from lightning_compress.core.compat import tree_map
from lightning_compress.core.copies import digest_of
from lightning_compress.core.errors import CompressionWarning, DivergedRanksError, UnsupportedError
from lightning_compress.core.parallel import Processes, sharing_work
from lightning_compress.training.checkpoint import RestoringCallback
from lightning_compress.training.compat import (
    AVERAGING,
    OTHER_PACKAGE,
    callbacks_of,
    is_of_other_package,
    launches_copies,
    wrap_again,
)

_OTHER_WAY = (
    "Factorise inside configure_model instead, before the strategy shards the layers: apply_plan_(self, plan) with a "
    "plan of search_ranks made beforehand (examples/05_sharded.py)."
)

_KNOWN_CALLBACKS = {cls.__name__ for cls in (*AVERAGING, BaseFinetuning, ModelPruning)}
"""Callbacks that are treated in a way of their own."""


def require_supported(trainer: Trainer) -> None:
    """Refuses strategies and callbacks with which the compression would go wrong, mostly silently.

    Raises:
        UnsupportedError: If there is one; the message names a way that works.
    """
    _require_own_package(trainer)
    strategy = trainer.strategy
    name = type(strategy).__name__
    if launches_copies(strategy):
        msg = (
            f"Compress does not support {name} with spawned or forked processes: they train a copy of the module, and "
            "yours would stay dense. Use strategy='ddp' in a script, or one device (devices=1) in a notebook."
        )
        raise UnsupportedError(msg)
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        msg = f"Compress does not support {name}: it shards the layers before they could be factorised. {_OTHER_WAY}"
        raise UnsupportedError(msg)
    callbacks = callbacks_of(trainer)
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        msg = (
            "Compress does not support ModelPruning in the same fit: it holds on to the dense layers. Use it in a "
            "later fit."
        )
        raise UnsupportedError(msg)
    if sum(isinstance(callback, RestoringCallback) for callback in callbacks) > 1:
        msg = "the trainer has more than one Compress callback: use one, its budget may bound several resources."
        raise UnsupportedError(msg)


def _require_own_package(trainer: Trainer) -> None:
    """Refuses what comes from Lightning's other package, whose classes are none of those that are asked for here."""
    if is_of_other_package(trainer):
        msg = (
            f"the trainer is of the package {OTHER_PACKAGE}, Compress of lightning.pytorch, and the two do not know "
            "each other's classes: import the Trainer, LightningModule and all callbacks from lightning.pytorch "
            "(import lightning.pytorch as pl)."
        )
        raise UnsupportedError(msg)
    foreign = [callback for callback in callbacks_of(trainer) if is_of_other_package(callback)]
    for callback in foreign:
        if {cls.__name__ for cls in type(callback).__mro__} & _KNOWN_CALLBACKS:
            msg = (
                f"the callback {type(callback).__name__} is of the package {OTHER_PACKAGE}, Compress of "
                f"lightning.pytorch, which has to know it: import {type(callback).__name__} from lightning.pytorch."
            )
            raise UnsupportedError(msg)


def shared_compression(
    strategy: Strategy, pl_module: LightningModule, function: Callable[[], Compression]
) -> Compression:
    """Runs a compression so that all ranks end with one plan and the first rank's weights.

    Synthetic inputs and decompositions are shared out over the ranks; the first one searches and
    repairs. DDP's wrapper is put aside: call `rewrap` afterwards.

    Args:
        strategy: A supported one.
        pl_module: What is compressed, the same on all ranks.
        function: Compresses it in place, by `compress_model_`.

    Raises:
        Exception: What the function raises on any rank, on all; the module is then dense on all.
        DivergedRanksError: If the ranks do different things.
    """
    if not isinstance(strategy, DDPStrategy) or strategy.world_size == 1:
        return function()
    strategy.model = pl_module
    ranks, done = _Ranks(strategy), None
    try:
        with sharing_work(ranks), _own_norm_statistics(pl_module), warnings.catch_warnings():
            if ranks.rank:  # the first one warns for all
                warnings.simplefilter("ignore", CompressionWarning)
            done = function()
        ranks.exchange("the end", None)
    except Exception as error:
        if done is not None:
            done.undo_(pl_module)
        ranks.report(error)
        raise
    _broadcast(pl_module)
    return done


def rewrap(strategy: Strategy, pl_module: LightningModule) -> None:
    """Wraps the module with DDP again, whose gradient buckets are those of the parameters it was made with.

    Raises:
        DivergedRanksError: If the ranks hold different parameters.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    if strategy.world_size > 1:
        sums = _Ranks(strategy).exchange("the parameters", digest_of(pl_module.named_parameters()))
        different = [rank for rank, value in enumerate(sums) if value != sums[0]]
        if different:
            msg = f"the parameters of ranks {different} differ from those of rank 0: make the same module on all ranks."
            raise DivergedRanksError(msg)
    wrap_again(strategy, pl_module)


@dataclass(frozen=True)
class _Failure:
    """What a rank sends in place of all it would still have exchanged."""

    error: Exception


@dataclass(frozen=True)
class _Away:
    """A tensor on its way from one device to the same kind of device of another rank."""

    value: Tensor


class _Ranks(Processes):
    """The ranks of a strategy.

    Every exchange is one collective of the same kind, so a rank that failed can tell the others, whatever
    they wait for.
    """

    def __init__(self, strategy: DDPStrategy) -> None:
        self.rank, self.size = strategy.global_rank, strategy.world_size
        self._device = strategy.root_device
        self._over = False

    def exchange(self, what: str, own: Any) -> list[Any]:
        sent = (what, tree_map(_packed, own))
        received: list[tuple[str, Any]] = [sent] * self.size
        dist.all_gather_object(received, sent)
        for _, other in received:
            if isinstance(other, _Failure):
                self._over = True
                raise other.error
        if len({label for label, _ in received}) > 1:
            self._over = True
            steps = ", ".join(f"rank {rank} is at {label}" for rank, (label, _) in enumerate(received))
            msg = f"the ranks do different things: {steps}. Give all of them the same module, data and settings."
            raise DivergedRanksError(msg)
        return [tree_map(self._unpacked, other) for _, other in received]

    def report(self, error: Exception) -> None:
        """Tells the other ranks, unless they know."""
        if not self._over:
            self._over = True
            with contextlib.suppress(Exception):
                self.exchange("a failure", _Failure(_picklable(error)))

    def _unpacked(self, leaf: Any) -> Any:
        return leaf.value.to(self._device) if isinstance(leaf, _Away) else leaf


def _packed(leaf: Any) -> Any:
    if isinstance(leaf, Exception):
        return _picklable(leaf)
    return _Away(leaf.cpu()) if isinstance(leaf, Tensor) and leaf.device.type != "cpu" else leaf


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the class of the error does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _own_norm_statistics(module: nn.Module) -> Iterator[None]:
    """Keeps synchronised batch norms from waiting for ranks that do something else."""
    norms = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
    before = [norm.process_group for norm in norms]
    alone = dist.new_subgroups(group_size=1)[0] if norms else None
    try:
        for norm in norms:
            norm.process_group = alone
        yield
    finally:
        for norm, group in zip(norms, before, strict=True):
            norm.process_group = group


@torch.no_grad()
def _broadcast(module: nn.Module) -> None:
    """Gives all ranks the parameters and buffers of the first one."""
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.contiguous()  # collectives want it so
        dist.broadcast(value, src=0)
        tensor.copy_(value)

"""Names of Lightning without a promise of stability, and what differs between its versions, in one place.

Everything here works from Lightning 2.4, the oldest that is supported, to 2.6. Names of torch are in `core/compat.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource, _request_dataloader
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.core.compat import TRAINER_ATTRIBUTE

try:
    from lightning.pytorch.callbacks import WeightAveraging

    AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging, WeightAveraging)
    """Callbacks that keep an averaged copy of the module."""
except ImportError:  # before Lightning 2.6
    AVERAGING = (StochasticWeightAveraging,)


OTHER_PACKAGE = "pytorch_lightning"
"""The name under which Lightning is released a second time, with classes of its own."""


def is_of_other_package(thing: object) -> bool:
    """Returns whether a class of something is of Lightning's other package."""
    return any(cls.__module__.partition(".")[0] == OTHER_PACKAGE for cls in type(thing).__mro__)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks of a trainer: Lightning sets the attribute where no type checker sees it."""
    return cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]


def trainer_of(pl_module: LightningModule) -> Trainer | None:
    """Returns the trainer of a module, None without one, where its property `trainer` raises."""
    return cast("Trainer | None", getattr(pl_module, TRAINER_ATTRIBUTE))


def rename_groups(callback: BaseFinetuning, pl_module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Brings up to date what a finetuning callback keeps of param groups, by the names of their parameters.

    It makes the groups of a resumed fit of that, and itself notes only groups that are new. Lightning 2.4 to 2.6.
    """
    names = {parameter: name for name, parameter in pl_module.named_parameters()}
    kept = callback._internal_optimizer_metadata
    for index, optimizer in enumerate(optimizers):
        if index in kept:
            groups = optimizer.param_groups[: len(kept[index])]
            kept[index] = callback._apply_mapping_to_param_groups(groups, names)


def launches_copies(strategy: Strategy) -> bool:
    """Returns whether a strategy's processes are spawned or forked: public is only which strategies may do so."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def wrap_again(strategy: DDPStrategy, pl_module: LightningModule) -> None:
    """Wraps a module with DDP anew.

    Since Lightning 2.6 the strategy notes that it has made up for a static graph's first step, which the new wrapper
    needs again; before, the attribute does nothing.
    """
    strategy.model = pl_module
    strategy._pl_static_graph_delay_done = False
    strategy.configure_ddp()


def training_data(trainer: Trainer) -> Any:
    """Returns what a trainer takes as its training data, None without any; its hook is called once, by it or by us.

    In `on_fit_start` the loaders are not set up yet, and `trainer.train_dataloader` is None.
    """
    if trainer.train_dataloader is not None:  # set up already: the fit is running
        return trainer.train_dataloader
    fit_loop: Any = trainer.fit_loop
    source = fit_loop._data_source
    if trainer.limit_train_batches == 0 or source.instance is None or not source.is_defined():
        return None
    if not source.is_module():
        return source.instance
    loader = _request_dataloader(source)
    fit_loop._data_source = _AskedAlready(source, loader)
    return loader


class _AskedAlready(_DataLoaderSource):
    """Gives what a hook has returned, once, and asks it again the next time.

    Args:
        source: Where the data come from.
        loader: What its hook returned.
    """

    def __init__(self, source: _DataLoaderSource, loader: Any) -> None:
        super().__init__(source.instance, source.name)
        self._given = [(source.instance, loader)]

    @override
    def dataloader(self) -> Any:
        """Returns the training data."""
        asked, loader = self._given.pop() if self._given else (None, None)
        return loader if asked is not None and asked is self.instance else super().dataloader()


def is_compiled_by_lightning(module: nn.Module) -> bool:
    """Returns whether a LightningModule was given to fit as `torch.compile(module)`, which Lightning unwraps."""
    return getattr(module, "_compiler_ctx", None) is not None


def weights_only_keyword(cls: type[LightningModule]) -> dict[str, bool]:
    """Returns what makes `load_from_checkpoint` unpickle primitives and tensors only; before Lightning 2.6 nothing."""
    return {"weights_only": True} if "weights_only" in inspect.signature(cls.load_from_checkpoint).parameters else {}

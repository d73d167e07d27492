"""The load of a checkpoint into a structure that was rebuilt for it: whole, or the module is as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_compress.core.errors import LightningCompressError, ResumeError
from lightning_compress.training.rounds import Rebuilt
from lightning_compress.training.unloaded import Shells

_LOAD = "load_state_dict"
_FOREIGN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


class Restoration:
    """Undoes what was changed on a module for the sake of a checkpoint.

    Args:
        module: The module, before anything is changed.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self._state = {id(held.tensor): held.tensor for held in _tensors_of(module)}
        self._undo = contextlib.ExitStack()
        self._shells = Shells(())
        self._begun = False

    def add_undo(self, function: Callable[..., object], *arguments: Any, **named: Any) -> None:
        """Adds something that is done if the restoration fails, before all that was added earlier."""
        self._undo.callback(function, *arguments, **named)

    def rebuilt(self, rebuilt: Rebuilt) -> None:
        """Notes a structure that was rebuilt, and the values that the weights are about to be loaded over."""
        self._begun = True
        self._undo.callback(rebuilt.undo_, self.module)
        kept = [
            (held, held.tensor.detach().clone()) for held in _tensors_of(self.module) if id(held.tensor) in self._state
        ]
        self._undo.callback(_put_back, kept)
        self._shells = Shells(rebuilt.replacements)

    def undo(self) -> None:
        """Makes the module what it was."""
        self._undo.close()

    def forget(self) -> None:
        """Keeps the module as it is now."""
        self._undo.pop_all()  # dropped without being called
        self._state, self._shells = {}, Shells(())

    @property
    def begun(self) -> bool:
        """Whether a structure was rebuilt."""
        return self._begun

    def await_weights(self, *, keep: bool = False) -> None:
        """Watches the next `load_state_dict` of the module.

        If it fails, the module is made what it was. Factors that it does not load are fitted to the dense weights.

        Args:
            keep: Whether the restoration can still be undone when the weights are loaded.
        """
        own = self.module.__dict__.get(_LOAD)
        setattr(self.module, _LOAD, functools.partial(_load, self, own, keep))
        self._undo.callback(_unwatch, self.module, own)

    def load(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Loads the weights.

        Raises:
            ResumeError: If they do not fit.
        """
        with self.undoing():
            try:
                result = function(*args, **kwargs)
                self._shells.fit_unloaded_()
            except LightningCompressError:
                raise
            except _FOREIGN as error:
                msg = (
                    f"the weights of the checkpoint do not fit {type(self.module).__name__}, which is left as it was: "
                    f"{error}"
                )
                raise ResumeError(msg) from error
        return result

    @contextlib.contextmanager
    def undoing(self) -> Iterator[Restoration]:
        """Undoes all if the block fails."""
        try:
            yield self
        except BaseException:
            self.undo()
            raise


def _load(restoration: Restoration, own: Callable[..., Any] | None, keep: bool, *args: Any, **kwargs: Any) -> Any:
    module = restoration.module
    _unwatch(module, own)
    result = restoration.load(module.load_state_dict, *args, **kwargs)
    if not keep:
        restoration.forget()
    return result


def _unwatch(module: LightningModule, own: Callable[..., Any] | None) -> None:
    """Puts back what `await_weights` hid."""
    if own is not None:
        setattr(module, _LOAD, own)
    else:
        module.__dict__.pop(_LOAD, None)


class _Held(NamedTuple):
    """A live tensor of a module.

    Attributes:
        tensor: The parameter or buffer.
        buffers: The dictionary that a buffer is in, where a conversion puts another one; None for parameters.
        name: Its name there.
    """

    tensor: Tensor
    buffers: dict[str, Tensor | None] | None = None
    name: str = ""


def _tensors_of(module: LightningModule) -> list[_Held]:
    """Returns the live tensors that a state dict is loaded into, whatever the module's own state_dict leaves out."""
    buffers = [
        _Held(buffer, m._buffers, name)
        for m in module.modules()
        for name, buffer in m._buffers.items()
        if buffer is not None and name not in m._non_persistent_buffers_set
    ]
    return [*map(_Held, module.parameters()), *buffers]


@torch.no_grad()
def _put_back(kept: list[tuple[_Held, Tensor]]) -> None:
    for (tensor, buffers, name), value in kept:
        if buffers is not None:
            buffers[name] = tensor
        if (tensor.dtype, tensor.device) != (value.dtype, value.device):  # the trainer has converted it
            tensor.data = value
        elif not torch.equal(tensor, value):
            tensor.copy_(value)

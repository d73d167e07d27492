"""What a Lightning checkpoint of a compressed module holds, and how it gets there and back.

Two checkpoint hooks are shadowed on the module's instance rather than on the callback, because
weights-only checkpoints leave callback states out and callback states load after the weights.
"""

from __future__ import annotations

import functools
import pickle
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_compress.core.checks import readable
from lightning_compress.core.compiled_names import renaming_for, state_as_named
from lightning_compress.core.errors import ResumeError, WeightsError
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.swap import Replacement, install, uninstall
from lightning_compress.training.averages import require_no_averages, restart_averages
from lightning_compress.training.compat import callbacks_of, trainer_of, weights_only_keyword
from lightning_compress.training.finetuning import frozen_by_callbacks
from lightning_compress.training.hint import add_hint, forget_hints
from lightning_compress.training.optimizers import optimizer_layout
from lightning_compress.training.payload import CHECKPOINT_KEY, CHECKPOINT_VERSION, Payload, payload_of
from lightning_compress.training.restoring import Restoration
from lightning_compress.training.rounds import has_factors, make_dense_, reconcile_

_Module = TypeVar("_Module", bound=LightningModule)


class RestoringCallback(Callback):
    """A callback that takes part when checkpoints of its module are loaded and saved.

    Attributes:
        optimizers_before: The trainer's optimizers at `setup`. A checkpoint that is loaded once there are
            others is a tuner's own and fits the module as it is.
    """

    optimizers_before: Any = None

    @abstractmethod
    def restore(self, pl_module: LightningModule, payload: Payload, restoration: Restoration) -> None:
        """Rebuilds the factorised structure before the weights are loaded; in a fit it ends the restoration."""

    @abstractmethod
    def restore_dense(self, pl_module: LightningModule, checkpoint: dict[str, Any], restoration: Restoration) -> None:
        """Prepares a fit that goes on from the checkpoint of a dense run, before its weights are loaded."""

    @abstractmethod
    def extend_payload(self, payload: dict[str, Any]) -> None:
        """Adds the callback's own part, primitives only, to what a checkpoint holds under `CHECKPOINT_KEY`."""


def install_shadows(pl_module: LightningModule) -> None:
    """Wraps the two hooks on the instance; partials of module-level functions survive copy and pickle."""
    for name, function in (("on_load_checkpoint", _on_load), ("on_save_checkpoint", _on_save)):
        if not _is_shadowed(pl_module, name, function):
            own = pl_module.__dict__.get(name)
            setattr(pl_module, name, functools.partial(function, pl_module, own))


def _is_shadowed(pl_module: LightningModule, name: str, function: Callable[..., None]) -> bool:
    own = pl_module.__dict__.get(name)
    return isinstance(own, functools.partial) and own.func is function


def configure_as_dense(
    pl_module: LightningModule, configure: Callable[[], Any], replacements: Sequence[Replacement]
) -> Any:
    """Builds the optimizers with the dense layers in place, as in the first run, so that they are patched alike."""
    uninstall(pl_module, replacements)
    try:
        return configure()
    finally:
        install(pl_module, replacements)


def require_same_layout(saved: Sequence[Any], now: Sequence[Any]) -> None:
    """Checks that every parameter has the place in the optimizers that its stored state has.

    Raises:
        ResumeError: If not; the message names the first difference.
    """
    if saved != now:
        msg = (
            "the checkpoint's optimizers differ from those that configure_optimizers now returns, in class, parameters "
            f"or their order: {_first_difference(saved, now)}. Resume with the same optimizers."
        )
        raise ResumeError(msg)


class CompressedCheckpointMixin:
    """Lets a LightningModule's own class load checkpoints of its compressed self, without the callback.

        class Net(CompressedCheckpointMixin, L.LightningModule): ...

        Net.load_from_checkpoint("compressed.ckpt")

    It comes before LightningModule among the bases, and a class with checkpoint hooks of its own calls
    `super()` in them. Checkpoints of dense runs load as before.
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuilds the factorised structure.

        Raises:
            ResumeError: If what the checkpoint holds of it is damaged or of another version.
            PlanError: If its plan cannot be read or does not fit.
        """
        module, payload = cast(LightningModule, self), _payload_as_named(cast(LightningModule, self), checkpoint)
        forget_hints(checkpoint)
        if payload is None or _is_shadowed(module, "on_load_checkpoint", _on_load):
            cast(Any, super()).on_load_checkpoint(checkpoint)
            return
        with Restoration(module).undoing() as restoration:
            restoration.rebuilt(reconcile_(module, payload.plan))
            cast(Any, super()).on_load_checkpoint(checkpoint)
            restoration.await_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the plan, also in a trainer without the callback."""
        _add_payload(cast(LightningModule, self), checkpoint)
        cast(Any, super()).on_save_checkpoint(checkpoint)


def load_compressed_checkpoint(cls: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Returns a module of any LightningModule class with structure and weights of a compressed checkpoint.

    Only primitives and tensors are unpickled. Checkpoints saved from the module later hold the plan too.

    Args:
        cls: The class that was trained; it need not know about compression.
        path: A checkpoint of a fit with `Compress`, weights-only ones too. One of a dense run loads as it is.
        **kwargs: Of `cls.load_from_checkpoint`: arguments of the class, `map_location`, `strict`, `weights_only` and so
            on. With `strict=False`, factors that the checkpoint lacks are decomposed from the dense weights that the
            class is built with.

    Raises:
        WeightsError: If a pipe or a device is in the place of the file, or it cannot be unpickled as is.
        ResumeError: If the checkpoint is of another version.
        PlanError: If its plan cannot be read or does not fit the class.
    """
    _require_file(path)
    mixed: Any = cls
    if not issubclass(cls, CompressedCheckpointMixin):
        mixed = type(cls.__name__, (CompressedCheckpointMixin, cls), {"__module__": cls.__module__})
    try:
        module = mixed.load_from_checkpoint(path, **{**weights_only_keyword(cls), **kwargs})
    except pickle.UnpicklingError as error:
        msg = (
            f"cannot read the checkpoint {str(path)!r} with weights_only=True: it is damaged or holds objects of other "
            "classes than torch's, such as hyper-parameters. If you trust who wrote it, pass weights_only=False."
        )
        raise WeightsError(msg) from error
    module.__class__ = cls
    install_shadows(module)
    return cast(_Module, module)


def _require_file(path: object) -> None:
    """Checks that reading a path comes to an end; addresses and open files are left to Lightning."""
    try:
        if isinstance(path, (str, Path)):
            readable(Path(path))
    except OSError as error:
        msg = f"cannot read the checkpoint {str(path)!r}: {error}."
        raise WeightsError(msg) from error


def _callback_of(pl_module: LightningModule) -> RestoringCallback | None:
    trainer = trainer_of(pl_module)
    callbacks = callbacks_of(trainer) if trainer is not None else []
    return next((callback for callback in callbacks if isinstance(callback, RestoringCallback)), None)


def _on_load(pl_module: LightningModule, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    callback, trainer = _callback_of(pl_module), trainer_of(pl_module)
    fitting = callback is not None and pl_module.trainer.state.fn == TrainerFn.FITTING
    if callback is not None and pl_module.trainer.optimizers is not callback.optimizers_before:
        _call_own(pl_module, own, "on_load_checkpoint", checkpoint)
        return
    payload = _payload_as_named(pl_module, checkpoint)
    forget_hints(checkpoint)
    if payload is not None and fitting:
        require_no_averages(pl_module.trainer, pl_module)
    with Restoration(pl_module).undoing() as restoration:
        if payload is not None and callback is not None:
            callback.restore(pl_module, payload, restoration)
        elif payload is not None:
            restoration.rebuilt(reconcile_(pl_module, payload.plan))
        elif callback is not None and fitting and _is_dense(pl_module, checkpoint):
            callback.restore_dense(pl_module, checkpoint, restoration)
        elif not fitting and trainer is not None and has_factors(pl_module) and _is_dense(pl_module, checkpoint):
            restoration.rebuilt(make_dense_(pl_module))  # what is tested is the checkpoint's model
        if payload is not None and trainer is not None:
            restart_averages(trainer, pl_module)
        _call_own(pl_module, own, "on_load_checkpoint", checkpoint)
        if restoration.begun:
            restoration.await_weights(keep=fitting)


def _payload_as_named(pl_module: LightningModule, checkpoint: dict[str, Any]) -> Payload | None:
    """Returns what a checkpoint holds of its compression, its names and those of the weights as in this module."""
    payload = payload_of(checkpoint)
    if payload is None:
        return None
    rename = renaming_for(pl_module)
    checkpoint["state_dict"] = state_as_named(checkpoint["state_dict"], rename)
    return payload.renamed(rename)


def _on_save(pl_module: LightningModule, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    _add_payload(pl_module, checkpoint)
    _call_own(pl_module, own, "on_save_checkpoint", checkpoint)


def _add_payload(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    if CHECKPOINT_KEY in checkpoint or not has_factors(pl_module):
        return
    payload: dict[str, Any] = {"version": CHECKPOINT_VERSION}
    callback = _callback_of(pl_module)
    if callback is not None:
        callback.extend_payload(payload)
    payload.setdefault("plan", embodied_plan(pl_module).to_json())
    frozen = frozen_by_callbacks(pl_module)
    if frozen is not None:
        payload["frozen"] = frozen
    if "optimizer_states" in checkpoint:
        payload["optimizers"] = optimizer_layout(pl_module.trainer.optimizers, pl_module)
    checkpoint[CHECKPOINT_KEY] = payload
    add_hint(pl_module, checkpoint)


def _is_dense(pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint without a plan lacks the factors that the module has."""
    factors = [
        f"{name}.{child}."
        for name, module in pl_module.named_modules()
        if isinstance(module, FactorisedLayer)
        for child, _ in module.named_children()
    ]
    names = list(checkpoint.get("state_dict", ()))
    return not factors or not all(any(name.startswith(factor) for name in names) for factor in factors)


def _call_own(
    pl_module: LightningModule, own: Callable[[Any], None] | None, name: str, checkpoint: dict[str, Any]
) -> None:
    """Calls the user's hook: the one set on the instance, else the class's."""
    if own is not None:
        own(checkpoint)
    else:
        getattr(type(pl_module), name)(pl_module, checkpoint)


def _first_difference(saved: Any, now: Any) -> str:
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return next(_first_difference(a, b) for a, b in zip(saved, now, strict=True) if a != b)
    if isinstance(saved, dict) and isinstance(now, dict) and saved.keys() == now.keys():
        return next(_first_difference(saved[key], now[key]) for key in saved if saved[key] != now[key])
    return f"{str(saved)[:120]} in the checkpoint, {str(now)[:120]} now"

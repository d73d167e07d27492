"""What a Lightning checkpoint of a compressed module holds, and how it gets there and back.

Two checkpoint hooks are shadowed on the module's instance rather than on the callback, because
weights-only checkpoints leave callback states out and callback states load after the weights.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_compress.averages import restart_averages
from lightning_compress.decompositions import FactorisedLayer
from lightning_compress.errors import ResumeError, UnsupportedError
from lightning_compress.finetune.optimizers import optimizer_layout
from lightning_compress.plan import Plan
from lightning_compress.swap import Replacement, apply_shells_, install, plan_of, uninstall

CHECKPOINT_KEY = "lightning_compress"
CHECKPOINT_VERSION = 1


class RestoringCallback(Callback):
    """A callback that rebuilds what a checkpoint says, and adds to what the next one says.

    Attributes:
        optimizers_before: The trainer's optimizers in `setup`. A checkpoint that is loaded when there are
            others is a tuner's own, of the module as it is.
    """

    optimizers_before: Any = None

    @abstractmethod
    def restore(self, pl_module: LightningModule, payload: Mapping[str, Any]) -> None:
        """Rebuilds the factorised structure before the weights are loaded."""

    @abstractmethod
    def extend_payload(self, payload: dict[str, Any]) -> None:
        """Adds the callback's own part: primitives only."""


def install_shadows(pl_module: LightningModule) -> None:
    """Wraps the two hooks on the instance; partials of module-level functions survive copy and pickle."""
    for name, function in (("on_load_checkpoint", _on_load), ("on_save_checkpoint", _on_save)):
        own = pl_module.__dict__.get(name)
        if not (isinstance(own, functools.partial) and own.func is function):
            setattr(pl_module, name, functools.partial(function, pl_module, own))


def plan_in(payload: Mapping[str, Any]) -> Plan:
    """Returns the plan of a checkpoint's payload.

    Raises:
        ResumeError: If the payload is of another version.
        PlanFormatError: If the plan cannot be read.
    """
    version = payload.get("version")
    if version != CHECKPOINT_VERSION:
        msg = f"the checkpoint's compression has version {version!r}, this library reads {CHECKPOINT_VERSION}: update."
        raise ResumeError(msg)
    return Plan.from_json(payload["plan"])


def configure_as_dense(
    pl_module: LightningModule, configure: Callable[[], Any], replacements: Sequence[Replacement]
) -> Any:
    """Builds the optimizers against the dense layers, as in the first run, so that they are patched alike."""
    uninstall(pl_module, replacements)
    try:
        return configure()
    finally:
        install(pl_module, replacements)


def require_same_layout(saved: Sequence[Any], now: Sequence[Any]) -> None:
    """Checks that every parameter is in the place where its optimizer state was stored.

    Raises:
        ResumeError: If not; the message names the first difference.
    """
    if saved != now:
        msg = (
            "the checkpoint's optimizers are others, or hold other parameters or in another order, than those "
            f"configure_optimizers now gives: {_first_difference(saved, now)}. Resume with the same optimizers."
        )
        raise ResumeError(msg)


def _callback_of(pl_module: LightningModule) -> RestoringCallback | None:
    trainer = pl_module._trainer
    callbacks = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, RestoringCallback)), None)


def _on_load(pl_module: LightningModule, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    payload = checkpoint.get(CHECKPOINT_KEY)
    callback = _callback_of(pl_module)
    if callback is not None and pl_module.trainer.optimizers is not callback.optimizers_before:
        _call_own(pl_module, own, "on_load_checkpoint", checkpoint)
        return
    if payload is not None and callback is not None:
        callback.restore(pl_module, payload)
    elif payload is not None:
        apply_shells_(pl_module, plan_in(payload))
    elif callback is not None and pl_module.trainer.state.fn == TrainerFn.FITTING:
        msg = (
            "the checkpoint is of a dense run: its optimizer states do not fit the factors. Load its weights into "
            "the module first, then call fit without ckpt_path."
        )
        raise UnsupportedError(msg)
    if payload is not None and pl_module._trainer is not None:
        restart_averages(pl_module._trainer, pl_module)
    _call_own(pl_module, own, "on_load_checkpoint", checkpoint)


def _on_save(pl_module: LightningModule, own: Callable[[Any], None] | None, checkpoint: dict[str, Any]) -> None:
    if any(isinstance(module, FactorisedLayer) for module in pl_module.modules()):
        payload: dict[str, Any] = {"version": CHECKPOINT_VERSION}
        callback = _callback_of(pl_module)
        if callback is not None:
            callback.extend_payload(payload)
        payload.setdefault("plan", plan_of(pl_module).to_json())
        if "optimizer_states" in checkpoint:
            payload["optimizers"] = optimizer_layout(pl_module.trainer.optimizers, pl_module)
        checkpoint[CHECKPOINT_KEY] = payload
    _call_own(pl_module, own, "on_save_checkpoint", checkpoint)


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

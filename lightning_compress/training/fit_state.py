"""What a fit was left by a checkpoint, what it leaves to the next one, and what it changed on its module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.errors import ResumeError
from lightning_compress.core.fine_tuning import Distill
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.surgery.swap import Replacement
from lightning_compress.training.distill import Teacher
from lightning_compress.training.optimizers import Exchange, carried_states
from lightning_compress.training.payload import Payload
from lightning_compress.training.schedule import PhaseTracker


@dataclass(frozen=True)
class FromCheckpoint:
    """What the checkpoint of a compressed run left for `on_fit_start`: the module has its structure already.

    Attributes:
        replacements: The layers that became shells for the checkpoint's factors.
        exchanges: What that means for the optimizers.
        layout: That of the optimizers whose states the checkpoint holds; None if it holds none.
        teacher: The dense module as it was when the first run began; None without distillation.
        frozen: The parameters that were not trained, beside a callback that changes that; None without one.
    """

    replacements: tuple[Replacement, ...]
    exchanges: tuple[Exchange, ...]
    layout: Sequence[Any] | None
    teacher: Teacher | None
    frozen: Sequence[str] | None


@dataclass(frozen=True)
class FromDenseCheckpoint:
    """What the checkpoint of a dense run left for `on_fit_start`: the module is dense.

    Attributes:
        checkpoint: Its content, of which Lightning loads the optimizer states after `on_fit_start`.
        exchanges: Dense weights in the place of factors, if the module was factorised before.
    """

    checkpoint: dict[str, Any]
    exchanges: tuple[Exchange, ...]

    def carry_states_(
        self, before: Sequence[Sequence[Sequence[nn.Parameter]]], optimizers: Sequence[Optimizer]
    ) -> None:
        """Rewrites the optimizer states, which Lightning is about to load, for the optimizers after an exchange.

        Args:
            before: The Parameters by optimizer and group before it.
            optimizers: The optimizers now.

        Raises:
            ResumeError: If the states are of other optimizers.
        """
        if self.checkpoint.get("optimizer_states"):  # none of weights alone, and empty ones of no fit
            self.checkpoint["optimizer_states"] = carried_states(
                self.checkpoint["optimizer_states"], before, optimizers
            )


@dataclass
class FitState:
    """What the checkpoints of a fit hold beside the plan; it stays after the fit, for `trainer.save_checkpoint`.

    Attributes:
        phases: Where the fit stands in its schedule.
        teacher: The teacher's fingerprint; None without distillation.
    """

    phases: PhaseTracker
    teacher: str | None = None

    def load(self, payload: Payload, teacher: Teacher | None) -> None:
        """Goes on from a checkpoint of a compressed run.

        Args:
            payload: What it holds.
            teacher: The one rebuilt for it.

        Raises:
            ResumeError: If the checkpoint stands in a phase that the schedule does not have.
        """
        if payload.schedule is not None:
            self.phases.load(payload.schedule)
        else:  # of a fit that had none to follow: it counts as begun with that fit
            self.phases.begin(0, 0)
        self.teacher = teacher.fingerprint if teacher is not None else None

    def payload(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: primitives only."""
        held: dict[str, Any] = {"schedule": self.phases.state()} if self.phases.begun else {}
        return held if self.teacher is None else {**held, "teacher": self.teacher}


class Shadows:
    """Attributes that hide those of a module on its instance for the time of a fit."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[LightningModule, Any]] = {}

    def put(self, pl_module: LightningModule, name: str, value: Any) -> None:
        """Sets an attribute on the instance."""
        self._before.setdefault(name, (pl_module, pl_module.__dict__.get(name)))
        setattr(pl_module, name, value)

    def remove(self) -> None:
        """Puts back what there was before."""
        for name, (pl_module, before) in self._before.items():
            if before is None:
                pl_module.__dict__.pop(name, None)
            else:
                setattr(pl_module, name, before)
        self._before.clear()


def rebuilt_teacher(pl_module: LightningModule, settings: Distill, payload: Payload) -> Teacher:
    """Returns the teacher of the run that a checkpoint is of, made from a module that is still dense.

    Args:
        pl_module: The module with the weights it had when that run began.
        settings: What to distil and how.
        payload: What the checkpoint holds.

    Raises:
        ResumeError: If the module is factorised, or has other weights.
    """
    advice = "Give fit the dense module with the weights it had when the compression began."
    if factor_layers(pl_module):
        msg = f"the module is already factorised, so the dense teacher cannot be rebuilt from it. {advice}"
        raise ResumeError(msg)
    convert = pl_module.trainer.precision_plugin.convert_module  # the first run's teacher was converted too
    teacher = Teacher(pl_module, settings, convert=convert)
    if teacher.fingerprint != payload.teacher:
        msg = f"the module's weights are not those of the teacher the checkpoint was distilled from. {advice}"
        raise ResumeError(msg)
    return teacher


def factor_layers(module: nn.Module) -> list[FactorisedLayer]:
    """Returns the factorised layers of a module."""
    return [m for m in module.modules() if isinstance(m, FactorisedLayer)]

"""The phases of a fit: where it stands, how its learning rates are scaled, and what is frozen."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.errors import ConfigurationError, ResumeError
from lightning_compress.core.fine_tuning import Phase, Schedule
from lightning_compress.core.settings import Budget

_AFTERWARDS = Phase()


class PhaseTracker:
    """Keeps track of the phase that a fit is in, in a few numbers that are stored in checkpoints.

    They alone decide whether a phase is over, so that a resumed run goes on as the uninterrupted one.

    Args:
        schedule: The phases.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._phases = schedule.phases
        self._warmup_steps = schedule.warmup_steps
        self._state: dict[str, Any] = {}

    @property
    def begun(self) -> bool:
        """Whether the first phase has begun."""
        return bool(self._state)

    @property
    def phase(self) -> Phase:
        """The phase the fit is in; after the last one everything trains."""
        number = self._state.get("phase", 0)
        return self._phases[number] if number < len(self._phases) else _AFTERWARDS

    @property
    def round(self) -> int:
        """Number of the round of compression the fit is in, from 1: of the phases so far that have a budget."""
        return sum(phase.budget is not None for phase in self._phases[: self._state["phase"] + 1])

    @property
    def budgets(self) -> tuple[tuple[Budget, ...], tuple[Budget, ...]]:
        """Budgets of the rounds that have begun, and of those that are still to come."""
        now = self._state.get("phase", 0) + 1
        return budgets_in(self._phases[:now]), budgets_in(self._phases[now:])

    def epochs_to_last_round(self, epoch: int, steps_per_epoch: float) -> float:
        """Returns the fewest epochs until the last round of compression begins, 0 if it has.

        Args:
            epoch: Index of the epoch that is about to begin.
            steps_per_epoch: Optimizer steps in an epoch at most, infinite if unknown.
        """
        now = self._state.get("phase", 0)
        last = max((n for n, phase in enumerate(self._phases) if phase.budget is not None), default=0)
        lengths = [_fewest_epochs(phase, steps_per_epoch) for phase in self._phases[now:last]]
        return max(0.0, sum(lengths) - (epoch - int(self._state.get("epoch", epoch))))

    @property
    def scales(self) -> bool:
        """Whether some learning rate is ever scaled."""
        return bool(self._warmup_steps) or any(p.warmup_steps or p.lr_scale != 1 for p in self._phases)

    def begin(self, epoch: int, step: int) -> None:
        """Enters the first phase.

        Args:
            epoch: Index of the epoch the fit is in.
            step: Optimizer steps done so far.
        """
        self._state = {"phase": 0, "first_step": step, "epoch": epoch, "step": step, "best": None, "waited": 0}

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Looks at the metrics of an epoch at its end, if the phase waits for one of them.

        Raises:
            ConfigurationError: If that one is missing.
        """
        plateau = self.phase.until_plateau
        if plateau is None:
            return
        if plateau.monitor not in metrics:
            msg = (
                f"until_plateau waits for {plateau.monitor!r}, which was not logged in this epoch: log it in "
                "training_step or validation_step (the module's own on_train_epoch_end comes later)."
                f"{did_you_mean(plateau.monitor, metrics)}"
            )
            raise ConfigurationError(msg)
        value = float(metrics[plateau.monitor])
        if plateau.improves(value, self._state["best"]):
            self._state.update(best=value, waited=0)
        else:
            self._state["waited"] += 1

    def over(self, epoch: int, step: int, *, boundary: bool) -> bool:
        """Returns whether the phase has ended.

        Args:
            epoch: Index of the epoch that begins or runs.
            step: Optimizer steps done so far.
            boundary: Whether an epoch is about to begin.
        """
        phase = self.phase
        if phase.steps is not None:
            return step - int(self._state["step"]) >= phase.steps
        if not boundary:
            return False
        if phase.until_plateau is not None:
            return int(self._state["waited"]) >= phase.until_plateau.patience
        return phase.epochs is not None and epoch - int(self._state["epoch"]) >= phase.epochs

    def advance(self, epoch: int, step: int) -> Phase:
        """Enters the next phase and returns it."""
        self._state.update(phase=self._state["phase"] + 1, epoch=epoch, step=step, best=None, waited=0)
        return self.phase

    def scale(self, step: int) -> float:
        """Returns the factor on the learning rate of the factors in the step to come."""
        ramps = ((self._warmup_steps, "first_step"), (self.phase.warmup_steps, "step"))
        risen = [min(1.0, (step - self._state.get(since, 0) + 1) / steps) for steps, since in ramps if steps]
        return self.phase.lr_scale * min(risen, default=1.0)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: primitives only."""
        return dict(self._state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes to where the fit stood when a checkpoint was saved.

        Raises:
            ResumeError: If that is in a phase that the schedule does not have.
        """
        if state and state["phase"] > len(self._phases):
            msg = (
                f"the checkpoint stands in phase {state['phase']} of its schedule, counted from 0, and that of the "
                f"callback has {len(self._phases)} phases: give Compress the schedule of the fit that saved it."
            )
            raise ResumeError(msg)
        self._state = dict(state)


def budgets_in(phases: Iterable[Phase]) -> tuple[Budget, ...]:
    """Returns those of some phases, in order."""
    return tuple(phase.budget for phase in phases if phase.budget is not None)


def _fewest_epochs(phase: Phase, steps_per_epoch: float) -> float:
    """Returns how long a phase takes at least."""
    if phase.until_plateau is not None:
        return 1 + phase.until_plateau.patience
    return phase.epochs if phase.epochs is not None else (phase.steps or 0) / steps_per_epoch


class ScaledSteps:
    """Scales the learning rates only while a step runs.

    The scaling is undone right after the step, so schedulers and checkpoints never see it and
    a resumed run continues it exactly.

    Args:
        optimizers: Already patched optimizers.
        factors: Returns the factors' Parameters, on whose groups `scale` acts.
        scale: Returns the factor on the rate of their groups in the next step.
        rest: Does the same for all other groups.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        factors: Callable[[], Iterable[nn.Parameter]],
        scale: Callable[[], float],
        rest: Callable[[], float],
    ) -> None:
        self._optimizers = optimizers
        self._factors = factors
        self._scales = scale, rest
        self._ids: set[int] = set()
        self._saved: dict[int, list[tuple[dict[str, Any], Any]]] = {}  # by optimizer
        self._handles: list[RemovableHandle] = []
        self.refresh()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def refresh(self) -> None:
        """Looks up the factors again, after they were exchanged."""
        self._ids = {id(factor) for factor in self._factors()}

    @property
    def scale(self) -> float:
        """Factor on the learning rate of the factors in the next step."""
        return self._scales[0]()

    def detach(self) -> None:
        """Removes the hooks and undoes a scaling that an exception left behind."""
        for key in list(self._saved):
            self._undo(key)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) in self._saved:  # an optimizer may call its base class's step
            return
        scale, rest = (of() for of in self._scales)
        scaled = [
            (group, scale if any(id(p) in self._ids for p in group["params"]) else rest)
            for group in optimizer.param_groups
        ]
        changed = [(group, factor) for group, factor in scaled if factor != 1.0]
        if changed:
            self._saved[id(optimizer)] = [(group, group["lr"]) for group, _ in changed]
        for group, factor in changed:
            group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        self._undo(id(optimizer))

    def _undo(self, key: int) -> None:
        for group, lr in self._saved.pop(key, []):
            group["lr"] = lr


def trained_in(phase: Phase, model: nn.Module, factors: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Returns the Parameters that are updated in a phase that does not train all.

    Raises:
        ConfigurationError: If its globs match none.
    """
    if phase.train == "factors":
        return list(factors)
    named = model.named_parameters(remove_duplicate=False)
    found = [p for name, p in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in phase.train)]
    if not found:
        msg = f"train={list(phase.train)} of a phase matches no parameter of {type(model).__name__}."
        raise ConfigurationError(msg)
    return found


def drop_gradients(parameters: Iterable[nn.Parameter], keep: Iterable[nn.Parameter]) -> None:
    """Freezes all parameters but some for the coming step: no gradient, no update, no decay.

    `requires_grad` stays as it is, so nothing that was built on it (gradient buckets, compiled
    graphs) is invalidated, and unfreezing needs no action.
    """
    kept = {id(p) for p in keep}
    for parameter in parameters:
        if id(parameter) not in kept:
            parameter.grad = None

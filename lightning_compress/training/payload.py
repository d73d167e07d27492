"""What a Lightning checkpoint of a compressed module holds beside its weights: read and checked before it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lightning_compress.core.checks import is_count, shown
from lightning_compress.core.compiled_names import plan_as_named
from lightning_compress.core.errors import ResumeError
from lightning_compress.core.plan import Plan

CHECKPOINT_KEY = "lightning_compress"
CHECKPOINT_VERSION = 1
_PARTS = ("plan", "schedule", "optimizers", "teacher", "frozen")
_SCHEDULE = {"phase", "first_step", "epoch", "step", "best", "waited"}


@dataclass(frozen=True)
class Payload:
    """What stands under `CHECKPOINT_KEY`.

    Attributes:
        plan: The plan of the module.
        schedule: Where the fit stood in its schedule, as `PhaseTracker.state` says it; None for a fit without one.
        optimizers: Classes and parameter names of the optimizers, as `optimizer_layout` returns them; None for none.
        teacher: Fingerprint of the teacher; None without distillation.
        frozen: Names of the parameters that were not trained, beside a callback that changes that; None without one.
    """

    plan: Plan
    schedule: Mapping[str, Any] | None = None
    optimizers: list[Any] | None = None
    teacher: str | None = None
    frozen: list[str] | None = None

    @classmethod
    def read(cls, stored: object) -> Payload:
        """Returns what was stored.

        Raises:
            ResumeError: If it is damaged or of another version.
            PlanFormatError: If the plan cannot be read.
        """
        if not isinstance(stored, Mapping):
            where = f"its {CHECKPOINT_KEY!r}"
            raise _damaged(where, stored, "a mapping")
        version = stored.get("version")
        if type(version) is not int or version != CHECKPOINT_VERSION:
            msg = (
                f"the checkpoint's compression has version {shown(version)}, this library reads {CHECKPOINT_VERSION}: "
                "update."
            )
            raise ResumeError(msg)
        plan, schedule, optimizers, teacher, frozen = (stored.get(name) for name in _PARTS)
        _require(isinstance(plan, str), "'plan' of its compression", plan, "the text of a plan")
        names = ", ".join(sorted(_SCHEDULE))
        known = schedule is None or _is_schedule(schedule)
        _require(known, "'schedule' of its compression", schedule, f"numbers by the names {names}")
        known = optimizers is None or _is_layout(optimizers)
        _require(known, "'optimizers' of its compression", optimizers, "classes and names of parameters")
        _require(isinstance(teacher, (str, type(None))), "'teacher' of its compression", teacher, "a fingerprint")
        known = frozen is None or _is_names(frozen)
        _require(known, "'frozen' of its compression", frozen, "names of parameters")
        return cls(Plan.from_json(cast(str, plan)), schedule, optimizers, teacher, frozen)

    def renamed(self, rename: Callable[[str], str]) -> Payload:
        """Returns it with the names of layers and parameters changed."""
        optimizers = self.optimizers and [
            {**each, "groups": [[rename(name) for name in group] for group in each["groups"]]}
            for each in self.optimizers
        ]
        frozen = self.frozen and [rename(name) for name in self.frozen]
        plan = plan_as_named(self.plan, rename)
        return dataclasses.replace(self, plan=plan, optimizers=optimizers, frozen=frozen)


def payload_of(checkpoint: Mapping[str, Any]) -> Payload | None:
    """Returns what a checkpoint holds of its compression, None for that of a dense run.

    Raises:
        ResumeError: If that is damaged or of another version, or the checkpoint holds no weights by name.
        PlanFormatError: If the plan cannot be read.
    """
    if CHECKPOINT_KEY not in checkpoint:
        return None
    payload = Payload.read(checkpoint[CHECKPOINT_KEY])
    weights = checkpoint.get("state_dict")
    known = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    _require(known, "its 'state_dict'", weights, "tensors by name")
    return payload


def _require(holds: bool, where: str, value: object, expected: str) -> None:
    if not holds:
        raise _damaged(where, value, expected)


def _damaged(where: str, value: object, expected: str) -> ResumeError:
    return ResumeError(
        f"the checkpoint is damaged: {where} is {shown(value)}, expected {expected}. Go on from another checkpoint."
    )


def _is_schedule(value: object) -> bool:
    if not isinstance(value, Mapping) or not set(value) >= _SCHEDULE:
        return False
    best = value["best"]
    known = best is None or (isinstance(best, (int, float)) and not isinstance(best, bool) and not math.isnan(best))
    return known and all(is_count(value[name]) for name in _SCHEDULE - {"best"})


def _is_layout(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, Mapping)
        and isinstance(each.get("type"), str)
        and isinstance(each.get("groups"), list)
        and all(_is_names(group) for group in each["groups"])
        for each in value
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)

"""How hard a compression tries: everything that trades time for quality, in one place.

Constants of the methods themselves (step sizes, tolerances, floors) stay beside their formulas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lightning_compress.core.checks import did_you_mean, is_number, require_count, shown
from lightning_compress.core.errors import ConfigurationError


@dataclass(frozen=True)
class Effort:
    """How hard a compression tries.

    Attributes:
        work: Multiply-accumulates that each part which runs the model may take: making inputs, the end-to-end
            descent, measuring layers, healing. What would take more is cut or left out.
        inputs: Synthetic inputs that are made, if `work` allows.
        input_steps: Steps of their optimisation.
        drawn: Inputs that are drawn beside them for the moments of models of large images.
        judging: Inputs of another kind on which the plan is compared with that of the weights alone.
        ranks: Ranks tabulated per kind; above that a geometric grid, finest at the small ranks.
        ranks_per_mode: Likewise for each mode of a kind with several ranks.
        fits: Iterative fits (CP) take this many times their usual number of sweeps.
        corrections: Times that predicted errors of iterative fits are corrected by whole fits, at most.
        descent_steps: Steps of the end-to-end descent.
        descent_inputs: Synthetic inputs per step.
        bisections: Plans tried for a quality target.
        solver_seconds: After which the exact solver gives its best choice and bound so far.
        healing_steps: Steps of the distillation that repairs the factors, at most.
        timed_sizes: Sizes of each kind at which layers are timed on the target.
        timing_seconds: How long each of these measurements takes at least.
        timing_limit: Seconds that they may take together; where they would take longer there are fewer sizes.

    Raises:
        ConfigurationError: If a count is no whole number of at least 1 (0 for corrections and healing steps), or
            another one is no number above 0.
    """

    work: int = 2 * 10**12
    inputs: int = 256
    input_steps: int = 40
    drawn: int = 1024
    judging: int = 64
    ranks: int = 256
    ranks_per_mode: int = 64
    fits: float = 1.0
    corrections: int = 8
    descent_steps: int = 20
    descent_inputs: int = 64
    bisections: int = 12
    solver_seconds: float = 20.0
    healing_steps: int = 240
    timed_sizes: int = 8
    timing_seconds: float = 0.03
    timing_limit: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in {"fits", "solver_seconds", "timing_seconds", "timing_limit"}:
                require_count(
                    f"Effort({name}={shown(value)})", value, 0 if name in {"corrections", "healing_steps"} else 1
                )
            elif not is_number(value) or value <= 0:
                msg = f"Effort({name}={shown(value)}): expected a number above 0."
                raise ConfigurationError(msg)


EffortName = Literal["fast", "balanced", "thorough"]
EFFORTS: dict[str, Effort] = {
    "fast": Effort(
        work=2 * 10**11,
        inputs=64,
        input_steps=20,
        drawn=256,
        ranks=64,
        ranks_per_mode=16,
        fits=0.25,
        corrections=1,
        descent_steps=8,
        descent_inputs=32,
        bisections=8,
        solver_seconds=5.0,
        healing_steps=80,
        timed_sizes=5,
        timing_seconds=0.01,
        timing_limit=15.0,
    ),
    "balanced": Effort(),
    "thorough": Effort(
        work=2 * 10**13,
        inputs=1024,
        input_steps=80,
        drawn=4096,
        judging=256,
        ranks=1024,
        ranks_per_mode=128,
        fits=4.0,
        descent_steps=40,
        bisections=16,
        solver_seconds=120.0,
        healing_steps=960,
        timed_sizes=12,
        timing_seconds=0.1,
        timing_limit=300.0,
    ),
}
"""The presets; "balanced" is the default, on which all reported figures are measured unless they say otherwise."""

_CURRENT: ContextVar[Effort] = ContextVar("effort", default=EFFORTS["balanced"])


def current_effort() -> Effort:
    """Returns how hard the running compression tries."""
    return _CURRENT.get()


@contextlib.contextmanager
def trying(effort: str | Effort | None) -> Iterator[Effort]:
    """Tries so hard inside.

    Args:
        effort: A preset's name or an `Effort`; None leaves it as it is.
    """
    chosen = current_effort() if effort is None else effort_of(effort)
    token = _CURRENT.set(chosen)
    try:
        yield chosen
    finally:
        _CURRENT.reset(token)


def effort_of(value: object) -> Effort:
    """Returns an effort from a preset's name, or as it is.

    Raises:
        ConfigurationError: If it is neither.
    """
    if isinstance(value, Effort):
        return value
    if isinstance(value, str) and value in EFFORTS:
        return EFFORTS[cast(EffortName, value)]
    msg = (
        f"effort={shown(value)} is unknown: expected an Effort or a preset.{did_you_mean(value, get_args(EffortName))}"
    )
    raise ConfigurationError(msg)

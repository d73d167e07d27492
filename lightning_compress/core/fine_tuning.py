"""Settings of the fine-tuning: phases, rounds and distillation."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lightning_compress.core.checks import did_you_mean, from_mapping, is_number, require_count, require_type, shown
from lightning_compress.core.errors import BudgetError, ConfigurationError
from lightning_compress.core.settings import Budget


@dataclass(frozen=True)
class Plateau:
    """When a metric counts as no longer getting better.

    It is looked at at the end of every epoch, in what the module has logged.

    Attributes:
        monitor: Name of the metric.
        mode: "min" if it is to fall, "max" if it is to rise.
        patience: Epochs in a row without an improvement until the phase is over.
        min_delta: Least change that counts as an improvement.

    Raises:
        ConfigurationError: If a value has a wrong type or is out of range.
    """

    monitor: str
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require_type("Plateau", "monitor", self.monitor, str, "the name of a logged metric")
        if self.mode not in ("min", "max"):
            msg = f"Plateau(mode={shown(self.mode)}): expected 'min' or 'max'."
            raise ConfigurationError(msg)
        require_count(f"Plateau(patience={shown(self.patience)})", self.patience, 1)
        if not is_number(self.min_delta) or self.min_delta < 0:
            msg = f"Plateau(min_delta={shown(self.min_delta)}): expected a number of at least 0."
            raise ConfigurationError(msg)

    def improves(self, value: float, best: float | None) -> bool:
        """Returns whether a value is better than the best one so far by more than `min_delta`."""
        if best is None:
            return not math.isnan(value)
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    @classmethod
    def from_value(cls, value: object) -> Plateau:
        """Returns a Plateau from a Plateau, a mapping, or the name of a metric that is to fall.

        Raises:
            ConfigurationError: If `value` is anything else.
        """
        if isinstance(value, Plateau):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and "monitor" in value:
            return from_mapping(cls, value, "until_plateau")
        msg = f"until_plateau={shown(value)}: expected a metric, as in {{'monitor': 'val_loss', 'patience': 3}}."
        raise ConfigurationError(msg)


TRAINABLE = ("all", "factors")
"""What `Phase.train` may be besides name patterns."""


@dataclass(frozen=True)
class Phase:
    """One part of a fit.

    Attributes:
        budget: Compress down to this budget when the phase begins; fractions of the ORIGINAL dense model.
            In the first phase the dense model is compressed, in later ones the factors are multiplied
            out and the search is repeated on the fine-tuned weights.
        epochs: Length in epochs; the one in which it begins counts, even if only partly.
        steps: Length in optimizer steps.
        until_plateau: Length is until a metric stops getting better; a `Plateau`, a mapping, or the
            name of a metric that is to fall.
        train: What is updated: "all", "factors" (of the factorised layers), or globs of parameter names.
            Everything else keeps its value; running statistics of norm layers still follow the data.
        lr_scale: Factor on the learning rate of every param group, in force only while a step
            runs: schedulers and checkpoints never see it.
        warmup_steps: Optimizer steps at the beginning of the phase over which the learning rate of every
            param group that holds a factor rises linearly.
        distill: Whether to distil; None for what the callback was told.

    Raises:
        ConfigurationError: If a value has a wrong type or is out of range, or more than one length is given.
    """

    budget: Budget | None = None
    epochs: int | None = None
    steps: int | None = None
    until_plateau: Plateau | None = None
    train: str | Sequence[str] = "all"
    lr_scale: float = 1.0
    warmup_steps: int = 0
    distill: bool | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.from_value(self.budget))
        if self.until_plateau is not None:
            object.__setattr__(self, "until_plateau", Plateau.from_value(self.until_plateau))
        for name in ("epochs", "steps"):
            if getattr(self, name) is not None:
                require_count(f"Phase({name}={shown(getattr(self, name))})", getattr(self, name), 1)
        given = [name for name in _LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            msg = f"Phase({', '.join(f'{name}={shown(getattr(self, name))}' for name in given)}): give one length."
            raise ConfigurationError(msg)
        if self.train not in TRAINABLE:
            named = not isinstance(self.train, (str, Mapping)) and isinstance(self.train, Sequence) and len(self.train)
            if not named or not all(isinstance(pattern, str) for pattern in self.train):
                msg = (
                    f"Phase(train={self.train!r}): expected 'all', 'factors' or a list of globs of parameter names, "
                    "as in ['net.head.*']."
                )
                raise ConfigurationError(msg)
            object.__setattr__(self, "train", tuple(self.train))
        if not is_number(self.lr_scale) or self.lr_scale < 0:
            msg = f"Phase(lr_scale={shown(self.lr_scale)}): expected a number of at least 0."
            raise ConfigurationError(msg)
        require_count(f"Phase(warmup_steps={shown(self.warmup_steps)})", self.warmup_steps, 0)
        require_type("Phase", "distill", self.distill, (bool, type(None)), "true, false or null")

    @property
    def endless(self) -> bool:
        """Whether it lasts until the end of the fit."""
        return all(getattr(self, name) is None for name in _LENGTHS)

    @classmethod
    def from_value(cls, value: object) -> Phase:
        """Returns a Phase from a Phase or a mapping.

        Raises:
            ConfigurationError: If `value` is anything else.
        """
        if isinstance(value, Phase):
            return value
        if isinstance(value, Mapping):
            return from_mapping(cls, value, "schedule.phases")
        msg = f"schedule.phases: {shown(value)} is no phase, expected a Phase or a mapping such as {{'epochs': 2}}."
        raise ConfigurationError(msg)


_LENGTHS = ("epochs", "steps", "until_plateau")


@dataclass(frozen=True)
class Schedule:
    """How the factorised model is fine-tuned inside the user's own fit.

    Attributes:
        warmup_steps: Optimizer steps over which the learning rate of every param group that
            holds a factor rises linearly to what the user's optimizer and scheduler ask for;
            with several optimizers their steps count together, as in `trainer.global_step`.
        phases: Parts of the fit, one after the other, each a `Phase` or a mapping; after the last one
            everything trains as the user's optimizer asks for. A phase that trains the factors alone first is
            `{"epochs": 1, "train": "factors"}`.

    Raises:
        ConfigurationError: If a count is no whole number of at least 0, or a phase but the last has no length.
        BudgetError: If only some of the rounds have a budget of their own, or the budgets do not decrease.
    """

    warmup_steps: int = 0
    phases: Sequence[Phase] = ()

    def __post_init__(self) -> None:
        require_count(f"Schedule(warmup_steps={shown(self.warmup_steps)})", self.warmup_steps, 0)
        if isinstance(self.phases, (str, Mapping)) or not isinstance(self.phases, Sequence):
            msg = f"Schedule(phases={shown(self.phases)}): expected a list of phases, as in [{{'epochs': 2}}]."
            raise ConfigurationError(msg)
        object.__setattr__(self, "phases", tuple(Phase.from_value(value) for value in self.phases))
        for number, phase in enumerate(self.phases[:-1]):
            if phase.endless:
                msg = (
                    f"phase {number} of the schedule never ends and {len(self.phases) - number - 1} come after it: "
                    "give it epochs, steps or until_plateau."
                )
                raise ConfigurationError(msg)
        _require_decreasing(self.phases)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Those of the phases, in order."""
        return tuple(phase.budget for phase in self.phases if phase.budget is not None)

    @classmethod
    def from_value(cls, value: object) -> Schedule:
        """Returns a Schedule from None (all defaults), a Schedule, or a mapping.

        Raises:
            ConfigurationError: If `value` is anything else.
        """
        if value is None:
            return cls()
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            return from_mapping(cls, value, "schedule")
        msg = f"schedule={shown(value)}: expected a Schedule or a mapping such as {{'warmup_steps': 100}}."
        raise ConfigurationError(msg)


def _require_decreasing(phases: Sequence[Phase]) -> None:
    """Checks the budgets of the rounds."""
    budgets = [phase.budget for phase in phases if phase.budget is not None]
    if budgets and phases[0].budget is None:
        msg = (
            f"a later phase of the schedule has a budget ({budgets[0]}) and the first has none: give the first one the "
            "budget the dense model is compressed to."
        )
        raise BudgetError(msg)
    for before, after in itertools.pairwise(budgets):
        first, second = before.bounds, after.bounds
        if not first or set(first) != set(second) or before.of != after.of:
            msg = f"the rounds of the schedule bound different things, {before}, then {after}: bound the same in all."
            raise BudgetError(msg)
        if first == second or any(second[name] > first[name] for name in first):
            msg = f"the budgets of the schedule do not decrease: {before} and then {after}."
            raise BudgetError(msg)


DISTILLED = ("logits", "layers", "blocks")
"""What `Distill.kind` may be."""


TEACHER_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Distill:
    """Distillation from the dense model, added to the user's own loss.

    - "logits": (1 - weight) * loss + weight * T^2 * KL(teacher || student), with both distributions
      softened by the temperature T (Hinton et al. 2015, "Distilling the Knowledge in a Neural
      Network", section 2).
    - "layers": loss + weight * the mean over all factorised layers of the normalised distance of their
      outputs from those of the dense ones, ||y - y'||^2 / ||y - mean y||^2, each network on its own
      activations. Of the fine-tuning loss of arXiv 2409.03555, L_ce + lambda * (distances), that is the
      distance of the layers' outputs with lambda = weight; that of the weights is left out, because
      on the layers' inputs it is contained in it.
    - "blocks": the same for the submodules named in `blocks` (hints: Romero et al. 2015, "FitNets").
    - a function: loss + weight * function(student's output, teacher's output, batch).

    With manual optimization the term enters `self.manual_backward(loss)`: every call gets that of the
    model's calls since the one before, a call without any gets none.

    Attributes:
        weight: Of the distillation term: above 0, and for "logits", where it is a share, at most 1.
        temperature: T, above 0.
        module: Name of the submodule whose output is compared, and within which layers and blocks are. By
            default the LightningModule itself, so its training step must call `self(...)`.
        kind: "logits", "layers" or "blocks".
        blocks: Names of submodules of `module`; makes the kind "blocks".
        function: A function, or its dotted import path; in the place of a kind.
        dtype: Precision of the teacher, such as "bfloat16"; None for the student's.

    Raises:
        ConfigurationError: If a value is out of range, or the function cannot be imported.
    """

    weight: float = 0.5
    temperature: float = 2.0
    module: str | None = None
    kind: str = "logits"
    blocks: Sequence[str] | None = None
    function: str | Callable[..., Any] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        self._check_kind()
        if not is_number(self.weight) or not 0 < self.weight <= (1 if self.is_share else math.inf):
            expected = "share of the distillation term, a number in (0, 1]" if self.is_share else "weight, above 0"
            msg = f"Distill(weight={shown(self.weight)}): expected the {expected}."
            raise ConfigurationError(msg)
        if not is_number(self.temperature) or self.temperature <= 0:
            msg = f"Distill(temperature={shown(self.temperature)}): expected a number above 0."
            raise ConfigurationError(msg)
        require_type("Distill", "module", self.module, (str, type(None)), "the name of a submodule")
        if self.dtype is not None and self.dtype not in TEACHER_DTYPES:
            msg = (
                f"Distill(dtype={self.dtype!r}): no precision of the teacher.{did_you_mean(self.dtype, TEACHER_DTYPES)}"
            )
            raise ConfigurationError(msg)

    def _check_kind(self) -> None:
        if self.kind not in DISTILLED:
            msg = f"Distill(kind={shown(self.kind)}): unknown.{did_you_mean(self.kind, DISTILLED)}"
            raise ConfigurationError(msg)
        if self.blocks is not None:
            given: Any = self.blocks
            if (
                isinstance(given, (str, Mapping))
                or not isinstance(given, Sequence)
                or not given
                or not all(isinstance(name, str) for name in given)
            ):
                msg = f"Distill(blocks={given!r}): expected a list of names of submodules, as in ['layer1', 'layer2']."
                raise ConfigurationError(msg)
            object.__setattr__(self, "blocks", tuple(given))
        if self.blocks is not None and self.kind == "logits":
            object.__setattr__(self, "kind", "blocks")
        if (self.kind == "blocks") != (self.blocks is not None):
            msg = f"Distill(kind={self.kind!r}, blocks={self.blocks!r}): 'blocks' needs blocks, other kinds have none."
            raise ConfigurationError(msg)
        if self.function is not None and self.kind != "logits":
            msg = f"Distill(kind={self.kind!r}, function={self.function!r}): give a kind or a function, not both."
            raise ConfigurationError(msg)
        self.imported()

    @property
    def is_share(self) -> bool:
        """Whether the user's loss gets what the weight leaves over."""
        return self.kind == "logits" and self.function is None

    def imported(self) -> Callable[..., Any] | None:
        """Returns the function, imported if it is a path.

        Raises:
            ConfigurationError: If there is none under that path.
        """
        function: Any = self.function
        if isinstance(function, str):
            home, _, name = function.rpartition(".")
            try:
                function = getattr(importlib.import_module(home), name)
            except (ImportError, AttributeError, ValueError) as error:
                msg = f"Distill(function={shown(self.function)}) cannot be imported: {error}."
                raise ConfigurationError(msg) from error
        if function is not None and not callable(function):
            msg = f"Distill(function={self.function!r}): expected a function or its import path, 'package.module.name'."
            raise ConfigurationError(msg)
        return cast("Callable[..., Any] | None", function)

    @classmethod
    def from_value(cls, value: object) -> Distill | None:
        """Returns a Distill from None (off), a Distill, a mapping, or the kind "logits" or "layers".

        Raises:
            ConfigurationError: If `value` is anything else.
        """
        if value is None or isinstance(value, Distill):
            return value
        if isinstance(value, Mapping):
            return from_mapping(cls, value, "distill")
        if value in ("logits", "layers"):
            return cls(kind=value)
        msg = f"distill={shown(value)}: expected a Distill or a mapping such as {{'weight': 0.5, 'temperature': 2}}."
        raise ConfigurationError(msg)

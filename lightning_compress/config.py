"""Settings a user passes: budgets, per-layer overrides, schedule and distillation.

Every class is a frozen dataclass that checks itself when it is made, and `from_value`
accepts what YAML and Hydra deliver (mappings, lists, plain numbers).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from lightning_compress.errors import BudgetError, ConfigurationError, UnsupportedError

RESOURCES = ("params", "macs", "bytes")
"""What a budget can bound, in the order every cost vector uses."""

_T = TypeVar("_T")


def did_you_mean(word: object, known: Iterable[str], *, most: int = 20) -> str:
    """Returns the end of an error message: a suggestion if one is close, then the known names."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    more = f", … ({len(known) - most} more)" if len(known) > most else ""
    return f"{hint} Known: {', '.join(known[:most])}{more}."


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_count(what: str, value: object, least: int) -> None:
    """Checks a whole number.

    Args:
        what: The input as the user wrote it, for the message.
        value: Its value.
        least: The smallest allowed.

    Raises:
        ConfigurationError: If it is none, or too small.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{what}: expected a whole number of at least {least}."
        raise ConfigurationError(msg)


def _require_type(owner: str, name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kind):
        msg = f"{owner}({name}={value!r}): expected {expected}."
        raise ConfigurationError(msg)


def _from_mapping(cls: type[_T], value: Mapping[Any, Any], owner: str) -> _T:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            msg = f"{owner}: unknown key {key!r}.{did_you_mean(key, known)}"
            raise ConfigurationError(msg)
    return cls(**value)


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the compressed model, as the fraction of the dense model that is kept.

    Several bounds at once all hold. The fraction is always of the WHOLE model: layers that
    cannot be factorised count too.

    Attributes:
        params: Kept fraction of the number of parameters, in (0, 1].
        macs: Kept fraction of the multiply-accumulate operations at batch 1, in (0, 1].
        latency: Kept fraction of the measured latency. Reserved: refused by this version.
        bytes: Kept fraction of the size of the state dict (parameters and buffers), in (0, 1].
        ratio: The same bound as `params` written as a compression: "5x" keeps 1/5.
        max_error: A quality target in the place of bounds: the smallest model whose outputs on synthetic
            inputs stay within this distance of the dense ones, ‖f − f̂‖² / ‖f − mean f‖² in (0, 1), right
            after the swap.

    Raises:
        BudgetError: If a bound is no number in (0, 1], no bound is given at all, both
            `params` and `ratio` are given, or `max_error` beside a bound.
        UnsupportedError: If `latency` is given.
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    bytes: float | None = None
    ratio: str | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if self.latency is not None:
            msg = (
                f"Budget(latency={self.latency!r}): this version measures latency but does not bound it; "
                "use macs=, the closest bound it can hold."
            )
            raise UnsupportedError(msg)
        if self.ratio is not None:
            if self.params is not None:
                msg = f"Budget(params={self.params!r}, ratio={self.ratio!r}): give one of the two, they bound the same."
                raise BudgetError(msg)
            object.__setattr__(self, "params", _parse_ratio(self.ratio))
            object.__setattr__(self, "ratio", None)  # one spelling from here on: equal budgets compare equal
        for name in RESOURCES:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                msg = (
                    f"Budget({name}={value!r}): expected the fraction of the dense model to keep, a number in (0, 1]; "
                    f"{name}=0.2 keeps at most 20 %."
                )
                raise BudgetError(msg)
        if self.max_error is not None:
            self._check_max_error()
        elif not self.limits():
            msg = f"Budget() bounds nothing: give at least one of {', '.join(RESOURCES)}, ratio='5x', or max_error."
            raise BudgetError(msg)

    def _check_max_error(self) -> None:
        if self.limits():
            msg = f"Budget({self}, max_error={self.max_error!r}): give bounds or a quality target, not both."
            raise BudgetError(msg)
        if not (_is_number(self.max_error) and 0 < cast(float, self.max_error) < 1):
            msg = (
                f"Budget(max_error={self.max_error!r}): expected the largest distance of the outputs, a number in "
                "(0, 1); 0.05 lets 5 % of the outputs' variance go."
            )
            raise BudgetError(msg)

    @property
    def budgeted(self) -> tuple[str, ...]:
        """What the search counts: the bounded resources; parameters for a quality target."""
        return tuple(self.limits()) or ("params",)

    def limits(self) -> dict[str, float]:
        """Returns the bounds that were given, resource to kept fraction."""
        return {name: float(getattr(self, name)) for name in RESOURCES if getattr(self, name) is not None}

    def as_dict(self) -> dict[str, float]:
        """Returns what was given: the bounds, or the quality target."""
        return self.limits() or {"max_error": float(cast(float, self.max_error))}

    def __str__(self) -> str:
        """Returns the bounds as a user would write them."""
        if not self.limits():
            return f"output distance <= {self.max_error:g}"
        return ", ".join(f"{name} <= {100 * limit:g} %" for name, limit in self.limits().items())

    @classmethod
    def from_value(cls, value: object) -> Budget:
        """Returns a Budget from a Budget or a mapping such as `{"params": 0.2}`.

        Raises:
            BudgetError: If `value` is anything else.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(cls, value, "budget")
        msg = (
            f"budget={value!r}: expected a Budget or a mapping, as in Budget(params=0.2), "
            "which keeps at most 20 % of the parameters."
        )
        raise BudgetError(msg)


def _parse_ratio(ratio: object) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", ratio) if isinstance(ratio, str) else None
    factor = float(match.group(1)) if match else 0.0
    if factor < 1:
        msg = (
            f"Budget(ratio={ratio!r}): expected a compression of at least 1x as a string such as '5x' "
            "(keep 1/5 of the parameters); to give the kept fraction itself use params=0.2."
        )
        raise BudgetError(msg)
    return 1 / factor


@dataclass(frozen=True)
class Override:
    """What is different for the layers a pattern matches.

    Attributes:
        kinds: Kinds to choose from, instead of the general ones.
        min_rank: Lower bound on every rank.
        max_rank: Upper bound on every rank.
        dense: Leave the layer alone; false takes back what an earlier pattern said.

    Raises:
        ConfigurationError: If a bound is no whole number of at least 1, or the two cross.
    """

    kinds: str | Sequence[str] | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    dense: bool | None = None

    def __post_init__(self) -> None:
        _require_type("Override", "dense", self.dense, (bool, type(None)), "true or false")
        for name in ("min_rank", "max_rank"):
            if getattr(self, name) is not None:
                require_count(f"Override({name}={getattr(self, name)!r})", getattr(self, name), 1)
        if self.min_rank is not None and self.max_rank is not None and self.min_rank > self.max_rank:
            msg = f"Override(min_rank={self.min_rank}, max_rank={self.max_rank}): min_rank must not exceed max_rank."
            raise ConfigurationError(msg)

    @classmethod
    def from_value(cls, value: object, pattern: str) -> Override:
        """Returns an Override from an Override, a mapping, or the word "dense".

        Raises:
            ConfigurationError: If `value` is anything else; the message names `pattern`.
        """
        if isinstance(value, Override):
            return value
        if value == "dense":
            return cls(dense=True)
        if isinstance(value, Mapping):
            return _from_mapping(cls, value, f"overrides[{pattern!r}]")
        msg = f"overrides[{pattern!r}]={value!r}: expected a mapping such as {{'max_rank': 8}}, or 'dense'."
        raise ConfigurationError(msg)


@dataclass(frozen=True)
class Schedule:
    """How the factorised model is fine-tuned inside the user's own fit.

    Attributes:
        warmup_steps: Optimizer steps over which the learning rate of every param group that
            holds a factor rises linearly to what the user's optimizer and scheduler ask for;
            with several optimizers their steps count together, as in `trainer.global_step`.
        freeze_epochs: Epochs in which only the factors are updated; all other parameters
            keep their values (running statistics of norm layers still follow the data).

    Raises:
        ConfigurationError: If a value is no whole number of at least 0.
    """

    warmup_steps: int = 0
    freeze_epochs: int = 0

    def __post_init__(self) -> None:
        require_count(f"Schedule(warmup_steps={self.warmup_steps!r})", self.warmup_steps, 0)
        require_count(f"Schedule(freeze_epochs={self.freeze_epochs!r})", self.freeze_epochs, 0)

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
            return _from_mapping(cls, value, "schedule")
        msg = f"schedule={value!r}: expected a Schedule or a mapping such as {{'warmup_steps': 100}}."
        raise ConfigurationError(msg)


@dataclass(frozen=True)
class Distill:
    """Logit distillation from the dense model, added to the user's own loss.

    loss = (1 - weight) * loss + weight * T^2 * KL(teacher || student), with both distributions
    softened by the temperature T (Hinton et al. 2015, "Distilling the Knowledge in a Neural
    Network", section 2).

    Attributes:
        weight: Share of the distillation term, in (0, 1].
        temperature: T, above 0.
        module: Name of the submodule whose output are the logits. By default the LightningModule
            itself, so its training step must call `self(...)`.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    weight: float = 0.5
    temperature: float = 2.0
    module: str | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.weight) or not 0 < self.weight <= 1:
            msg = f"Distill(weight={self.weight!r}): expected the share of the distillation term, a number in (0, 1]."
            raise ConfigurationError(msg)
        if not _is_number(self.temperature) or self.temperature <= 0:
            msg = f"Distill(temperature={self.temperature!r}): expected a number above 0."
            raise ConfigurationError(msg)
        _require_type("Distill", "module", self.module, (str, type(None)), "the name of a submodule")

    @classmethod
    def from_value(cls, value: object) -> Distill | None:
        """Returns a Distill from None (off), a Distill, or a mapping.

        Raises:
            ConfigurationError: If `value` is anything else.
        """
        if value is None or isinstance(value, Distill):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(cls, value, "distill")
        msg = f"distill={value!r}: expected a Distill or a mapping such as {{'weight': 0.5, 'temperature': 2}}."
        raise ConfigurationError(msg)

"""Settings a user passes: budgets, per-layer overrides, and how ranks are searched.

Every class is a frozen dataclass that checks itself when it is made, and `from_value`
accepts what YAML and Hydra deliver (mappings, lists, plain numbers).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast, get_args

from lightning_compress.core.checks import (
    did_you_mean,
    from_mapping,
    is_number,
    require_count,
    require_known,
    require_type,
    shown,
)
from lightning_compress.core.effort import Effort, EffortName, effort_of
from lightning_compress.core.errors import BudgetError, ConfigurationError
from lightning_compress.core.target import TargetLike, target_of
from lightning_compress.core.workers import Parallel, require_parallel

RESOURCES = ("params", "macs", "bytes", "latency")
"""What a budget can bound, in the order every cost vector uses."""


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the compressed model, as the fraction of the dense model that is kept.

    Several bounds at once all hold. The fraction is always of the WHOLE model, or of the part named by `of`: layers
    that cannot be factorised count too.

    Attributes:
        params: Kept fraction of the number of parameters, in (0, 1].
        macs: Kept fraction of the multiply-accumulate operations at batch 1, in (0, 1].
        latency: Kept fraction of the seconds of one forward pass on the target, in (0, 1]. It bounds the whole
            model as it is measured there, dense in its faster memory format.
        latency_ms: The same bound in milliseconds.
        bytes: Kept fraction of the size of the state dict (parameters and buffers), in (0, 1].
        ratio: The same bound as `params` written as a compression: "5x" keeps 1/5.
        max_error: A quality target in the place of bounds: the smallest model whose outputs on synthetic
            inputs stay within this distance of the dense ones, ‖f − f̂‖² / ‖f − mean f‖² in (0, 1), right
            after the swap.
        of: Name of a submodule, such as "generator", that bounds on parameters and bytes are of: it alone is
            compressed.

    Raises:
        BudgetError: If a bound is no number in (0, 1], milliseconds are none above 0, no bound is given at
            all, both `params` and `ratio` are given, `max_error` beside a bound, or `of` beside anything else than
            parameters and bytes.
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    bytes: float | None = None
    ratio: str | None = None
    max_error: float | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None:
            if self.params is not None:
                given = f"Budget(params={shown(self.params)}, ratio={shown(self.ratio)})"
                msg = f"{given}: give one of the two, they bound the same."
                raise BudgetError(msg)
            object.__setattr__(self, "params", _parse_ratio(self.ratio))
            object.__setattr__(self, "ratio", None)  # one spelling from here on: equal budgets compare equal
        for name in RESOURCES:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= 1):
                msg = (
                    f"Budget({name}={shown(value)}): expected the fraction of the dense model to keep, a number in "
                    f"(0, 1]; {name}=0.2 keeps at most 20 %."
                )
                raise BudgetError(msg)
        if self.latency_ms is not None and not (is_number(self.latency_ms) and self.latency_ms > 0):
            given = f"Budget(latency_ms={shown(self.latency_ms)})"
            msg = f"{given}: expected the most milliseconds of a forward pass, above 0."
            raise BudgetError(msg)
        if self.max_error is not None:
            self._check_max_error()
        elif not self.bounds:
            msg = (
                f"Budget() bounds nothing: give at least one of {', '.join(RESOURCES)}, latency_ms, ratio='5x', or "
                "max_error."
            )
            raise BudgetError(msg)
        if self.of is not None:
            self._check_of()

    def _check_of(self) -> None:
        named = isinstance(cast(Any, self.of), str) and self.of
        if not named or not self.bounds or not set(self.bounds) <= _OF:
            given = ", ".join(self.bounds or ["max_error"])
            msg = (
                f"Budget({given}, of={shown(self.of)}): expected the name of a submodule, and bounds on params and "
                "bytes alone; other bounds are of the whole model."
            )
            raise BudgetError(msg)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds as they were given."""
        absolute = {"latency_ms": float(self.latency_ms)} if self.latency_ms is not None else {}
        return {**self.limits(), **absolute}

    @property
    def bounds_latency(self) -> bool:
        """Whether time is bounded, so that it has to be measured."""
        return self.latency is not None or self.latency_ms is not None

    @property
    def needs_example_input(self) -> bool:
        """Whether it bounds what only a forward pass shows."""
        return self.macs is not None or self.bounds_latency

    def _check_max_error(self) -> None:
        if self.bounds:
            msg = f"Budget({self}, max_error={shown(self.max_error)}): give bounds or a quality target, not both."
            raise BudgetError(msg)
        if not (is_number(self.max_error) and 0 < cast(float, self.max_error) < 1):
            msg = (
                f"Budget(max_error={shown(self.max_error)}): expected the largest distance of the outputs, a number in "
                "(0, 1); 0.05 lets 5 % of the outputs' variance go."
            )
            raise BudgetError(msg)

    @property
    def budgeted(self) -> tuple[str, ...]:
        """What the search counts: the bounded resources; parameters for a quality target."""
        return tuple(name for name in RESOURCES if name in self.limits(1.0)) or ("params",)

    def limits(self, dense_seconds: float | None = None) -> dict[str, float]:
        """Returns the bounds as resource to kept fraction.

        Args:
            dense_seconds: Latency of the dense model; without it a bound in milliseconds is left out.
        """
        found = {name: float(getattr(self, name)) for name in RESOURCES if getattr(self, name) is not None}
        if self.latency_ms is not None and dense_seconds is not None:
            found["latency"] = min(found.get("latency", 1.0), 1e-3 * self.latency_ms / dense_seconds)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Returns what was given: the bounds or the quality target, and what they are of."""
        part = {"of": self.of} if self.of is not None else {}
        return {**(self.bounds or {"max_error": self.max_error}), **part}

    def __str__(self) -> str:
        """Returns the bounds as a user would write them."""
        if not self.bounds:
            return f"output distance <= {self.max_error:g}"
        part = f" of {self.of}" if self.of is not None else ""
        written = [f"{name}{part} <= {100 * limit:g} %" for name, limit in self.limits().items()]
        return ", ".join(written + ([f"latency <= {self.latency_ms:g} ms"] if self.latency_ms is not None else []))

    @classmethod
    def from_value(cls, value: object) -> Budget:
        """Returns a Budget from a Budget or a mapping such as `{"params": 0.2}`.

        Raises:
            BudgetError: If `value` is anything else.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            return from_mapping(cls, value, "budget")
        msg = (
            f"budget={shown(value)}: expected a Budget or a mapping, as in Budget(params=0.2), "
            "which keeps at most 20 % of the parameters."
        )
        raise BudgetError(msg)


_OF = {"params", "bytes"}
"""What can be bounded of a submodule alone."""


def _parse_ratio(ratio: object) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", ratio) if isinstance(ratio, str) else None
    factor = float(match.group(1)) if match else 0.0
    if not 1 <= factor < math.inf:
        msg = (
            f"Budget(ratio={shown(ratio)}): expected a compression of at least 1x as a string such as '5x' "
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
        require_type("Override", "dense", self.dense, (bool, type(None)), "true or false")
        for name in ("min_rank", "max_rank"):
            if getattr(self, name) is not None:
                require_count(f"Override({name}={shown(getattr(self, name))})", getattr(self, name), 1)
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
            return from_mapping(cls, value, f"overrides[{pattern!r}]")
        msg = f"overrides[{pattern!r}]={shown(value)}: expected a mapping such as {{'max_rank': 8}}, or 'dense'."
        raise ConfigurationError(msg)


Patterns = str | type | Sequence[str | type]
"""Names of layers, globs, class names or classes."""


def require_patterns(argument: str, patterns: object) -> list[str | type]:
    """Returns what `include` or `exclude` names, as a list; none for None.

    Raises:
        ConfigurationError: If it is no name, glob, type, or sequence of those.
    """
    listed: Any = [patterns] if isinstance(patterns, (str, type)) else ([] if patterns is None else patterns)
    if not isinstance(listed, Sequence) or not all(isinstance(p, (str, type)) for p in listed):
        msg = f"{argument}={shown(patterns)}: expected a name, a glob, a layer type, or a list of those."
        raise ConfigurationError(msg)
    return list(listed)


def overrides_of(overrides: object) -> dict[Any, Override]:
    """Returns overrides by pattern.

    Raises:
        ConfigurationError: If they are no mapping from patterns to what `Override.from_value` takes.
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        example = "{'head.*': 'dense'}"
        msg = f"overrides={shown(overrides)}: expected a mapping from patterns to settings, as in {example}."
        raise ConfigurationError(msg)
    for pattern in overrides:
        if not isinstance(pattern, (str, type)):
            msg = f"overrides: the pattern {pattern!r} is no string; quote it, as in {{'{pattern}': 'dense'}}."
            raise ConfigurationError(msg)
    return {pattern: Override.from_value(value, pattern) for pattern, value in overrides.items()}


Objective = Literal["auto", "weight", "moments", "end_to_end"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


@dataclass(frozen=True)
class SearchSettings:
    """How ranks are searched, whichever entrance it is asked for through: the keywords of `search_ranks`.

    Attributes:
        method: Name of a strategy: "continuous", "exact", "uniform", "energy", "paper" (arXiv 2409.03555), or one that
            was registered by `register_strategy`.
        objective: What is minimised: "weight", Σ −log(1 − e) over the relative errors e of the weights; "moments", the
            same over what the errors do to the model's outputs, for inputs with known second moments; "end_to_end",
            that plus log D, D the distance of the model's outputs on synthetic inputs, which takes longer and rarely
            leads elsewhere. "auto" is "moments" with an example input, statistics or calibration, if the method takes
            it, else "weight"; "uniform" and "energy" are "weight" too unless statistics are given. Where the model
            fails on synthetic inputs the search falls back, with a `CompressionWarning`. Where time is measured a small
            term for it is part of all of them, so that where little is lost either way the faster kinds are chosen.
        kinds: "auto", a kind of decomposition, or a list of kinds to choose from. "auto" is svd, interpolative,
            channel_svd, spatial_svd, tucker2, tt, cp3, cp for large kernels, tt_embedding for very large
            embeddings, or what the method says. Kinds that were registered by `register_kind` are used where
            they are named.
        include: Layers to factorise, None for all.
        exclude: Layers to leave alone.
        overrides: Pattern to `Override`, a mapping of its fields, or "dense".
        rank_multiple: Ranks are multiples of this number.
        seed: Of everything random in the search and the repair; None, as of a configuration that wants none, is 0.
        effort: How hard to try: "fast", "balanced", "thorough", or an `Effort` of one's own; None is that of the
            enclosing `trying`, "balanced" without one.
        target: What the compressed model is to run on, see `Target`: "torch" (this process, batch 1), "onnxruntime",
            a `Target` or a mapping of its fields, an object with a method `seconds(module, example)` that measures on
            a device of your own (`Stopwatch`), the path of a table that was measured elsewhere (`LatencyTable`), or
            None. With an example input the plan is no slower there than dense if that can be had within the budget;
            without one, or for None, time is left out.
        time_limit: Seconds that the whole compression should take at most: inputs become fewer, fits and healing
            shorter, and the plan says so (`Plan.cut`). It then depends on how fast the machine is. None for what
            the effort takes. Inside a compression that has a limit already that one holds.
        parallel: Who works out the tables and fits of single layers: the "threads" of this process, or the workers of
            "ray" (an extra), on as many machines as its cluster has.

    Raises:
        ConfigurationError: If the objective is unknown, or a number is out of range. Names of strategies, kinds and
            layers are checked where they are known.
    """

    method: str = "continuous"
    objective: Objective = "auto"
    kinds: str | Sequence[str] = "auto"
    include: Patterns | None = None
    exclude: Patterns | None = None
    overrides: Mapping[str, Any] | None = None
    rank_multiple: int = 1
    seed: int = 0
    effort: EffortName | Effort | None = None
    target: TargetLike = "torch"
    time_limit: float | None = None
    parallel: Parallel = "threads"

    def __post_init__(self) -> None:
        require_patterns("include", self.include)
        require_patterns("exclude", self.exclude)
        overrides_of(self.overrides)
        require_parallel(self.parallel)
        target_of(self.target)
        if self.effort is not None:
            effort_of(self.effort)
        if self.objective not in OBJECTIVES:
            msg = f"objective={shown(self.objective)} is unknown.{did_you_mean(self.objective, OBJECTIVES)}"
            raise ConfigurationError(msg)
        if self.time_limit is not None and (not is_number(self.time_limit) or self.time_limit <= 0):
            msg = f"time_limit={shown(self.time_limit)}: expected seconds, a number above 0, or None for no limit."
            raise ConfigurationError(msg)
        require_count(f"rank_multiple={shown(self.rank_multiple)}", self.rank_multiple, 1)
        if cast("int | None", self.seed) is None:
            object.__setattr__(self, "seed", 0)
        require_count(f"seed={shown(self.seed)}", self.seed, 0)

    @property
    def selection(self) -> dict[str, Any]:
        """What says which layers are factorised, and by which kinds."""
        return {name: getattr(self, name) for name in ("kinds", "include", "exclude", "overrides")}

    @classmethod
    def of(cls, keywords: Mapping[str, Any], *, owner: str, beside: Iterable[str]) -> SearchSettings:
        """Returns the settings of keyword arguments.

        Args:
            keywords: As the user passed them.
            owner: The function they were passed to, for messages.
            beside: Names of its other arguments, for suggestions.

        Raises:
            ConfigurationError: If a name is unknown, or a value is.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        require_known(keywords, [*known, *(name for name in beside if name not in known)], owner)
        return cls(**keywords)


class SearchKeywords(TypedDict, total=False):
    """The fields of `SearchSettings` as keyword arguments."""

    method: str
    objective: Objective
    kinds: str | Sequence[str]
    include: Patterns | None
    exclude: Patterns | None
    overrides: Mapping[str, Any] | None
    rank_multiple: int
    seed: int | None
    effort: EffortName | Effort | None
    target: TargetLike
    time_limit: float | None
    parallel: Parallel

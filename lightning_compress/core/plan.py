"""The plan: the only thing that crosses from search to surgery. Frozen, printable, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from lightning_compress.core.checks import shown
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import LightningCompressError, PlanFormatError
from lightning_compress.core.plan_checks import check_layer, check_plan
from lightning_compress.core.plan_html import plan_html
from lightning_compress.core.plan_text import (
    MOST_NAMED,
    WIDTH,
    change_text,
    compact,
    milliseconds,
    percent,
    plan_summary,
    plan_table,
    plan_text,
    plan_time_lines,
)
from lightning_compress.core.settings import Budget

__all__ = [
    "BETTER_ELSEWHERE",
    "DENSE",
    "FORMAT",
    "MOST_NAMED",
    "SCHEMA",
    "SLOWER",
    "WIDTH",
    "LayerPlan",
    "Plan",
    "change_text",
    "compact",
    "milliseconds",
    "percent",
    "signal_loss",
]

DENSE = "dense"
"""The kind of a layer that is left alone."""
BETTER_ELSEWHERE = "the search keeps it dense: the budget is better spent here"
FORMAT = "lightning_compress/plan"
SCHEMA = 1
SLOWER = 0.05
"""By which a layer's predicted time must exceed that of the dense one to be called slower."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one parameterised module.

    Attributes:
        name: Its first name in `model.named_modules()`.
        type: Name of its class.
        kind: Kind of decomposition, "dense" if the layer is left alone.
        ranks: Ranks of the decomposition, () for dense.
        weight_shape: Shape of the dense weight, () for a module that cannot be factorised.
        error: Predicted ‖(W − Ŵ) S^½‖²_F / ‖W S^½‖²_F in [0, 1], 0 for dense; with statistics, on inputs that the
            factors are not fitted to.
        params_before: Parameters of the dense layer, bias included.
        params_after: Parameters afterwards, bias included.
        macs_before: MACs of the dense layer, None if unknown.
        macs_after: MACs afterwards, None if unknown.
        reason: Why the layer stays dense, None if it does not.
        source: Where the metric of its error comes from, as in `Moments`; "weight" for none, None
            for a module that cannot be factorised.
        joint_with: The first of the layers that share their first factor with this one, itself included;
            None if it has factors of its own. `params_after` of the first alone holds that factor.
        samples: Number of independent inputs the error is estimated from, None if from none.
        error_spread: Standard error of `error` over parts of these inputs, None if unknown.
        latency_before: Seconds of the dense layer on the target, over all its calls; None if unknown.
        latency_after: Likewise afterwards, as predicted.
        merged: Whether it runs as the dense layer in eval mode, its factors multiplied out (see `FactorisedLayer`):
            its factors would take longer there. It saves parameters then, and neither MACs nor memory in use.

    Raises:
        ConfigurationError: If a field has a wrong type or is out of range.
    """

    name: str
    type: str
    kind: str
    ranks: tuple[int, ...]
    weight_shape: tuple[int, ...]
    error: float
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    reason: str | None = None
    source: str | None = None
    joint_with: str | None = None
    samples: int | None = None
    error_spread: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    merged: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "weight_shape"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_layer(self)

    @property
    def is_slower(self) -> bool:
        """Whether it takes more time than the dense layer, by more than can be predicted."""
        before, after = self.latency_before, self.latency_after
        return before is not None and after is not None and after > (1 + SLOWER) * before

    @property
    def is_dense(self) -> bool:
        """Whether the layer is left alone."""
        return self.kind == DENSE


@dataclass(frozen=True)
class Plan:
    """Kind and ranks of every layer, and how they were found.

    Attributes:
        layers: One entry for each parameterised module, in order.
        dense: Costs of the dense model; its latency is that in the faster memory format.
        compressed: Costs of the model once the plan is applied; its latency as measured where it could be.
        budget: The bounds the search kept, None for a plan read off a model.
        method: Search strategy.
        objective: What the search minimised: "weight" or "moments", `signal_loss` over the errors of the
            weights or of what they do to the outputs, or "end_to_end", that plus log `output_distance`.
        source: Where the metric of the errors comes from: "weight" for none, "batch norm", "generated", "tokens",
            "noise" for synthetic inputs of that kind, "real" for real inputs.
        data_free: Whether no real data was used.
        optimality_gap: (objective − lower bound) / lower bound, 0.01 = at most 1 % above the
            best plan possible on the separable objective; None for a plan read off a model.
        output_distance: ‖f − f̂‖² / ‖f − mean f‖² of the model's outputs right after the swap, on the
            inputs the search used; None without any.
        seconds: Duration of the search.
        timings: Seconds by part: "synthetic inputs", "moments", "search".
        seed: Its seed.
        target: What time was measured on, and the fingerprint of the table of times; None where time was left out.
        predicted_latency: Seconds of the compressed model as predicted from its layers.
        cut: What was cut short to keep the time limit, and how, by part; empty where nothing was.
        memory_format: "channels_last" if the model is put in it, None if it stays as it is.

    Raises:
        ConfigurationError: If a field has a wrong type or is out of range, two layers have one name, or one shares the
            first factor of a layer that the plan does not factorise.
    """

    layers: tuple[LayerPlan, ...]
    dense: Costs
    compressed: Costs
    budget: Budget | None = None
    method: str | None = None
    objective: str | None = None
    source: str | None = None
    data_free: bool = True
    optimality_gap: float | None = None
    output_distance: float | None = None
    seconds: float | None = None
    timings: Mapping[str, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    target: Mapping[str, Any] | None = field(default=None, hash=False)
    predicted_latency: float | None = None
    memory_format: str | None = None
    cut: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_plan(self)

    @property
    def slower(self) -> tuple[LayerPlan, ...]:
        """The layers that are slower than dense on the target."""
        return tuple(layer for layer in self.layers if layer.is_slower)

    @property
    def factorised(self) -> tuple[LayerPlan, ...]:
        """The layers that are replaced."""
        return tuple(layer for layer in self.layers if not layer.is_dense)

    @property
    def kept(self) -> dict[str, float | None]:
        """Fraction of the whole dense model that is kept, by resource; None if unknown."""
        return self.compressed.kept_of(self.dense)

    @property
    def signal_loss(self) -> float:
        """Σ_l −log(1 − e_l), most of what the search minimised; exp of its negative is the product of 1 − e_l."""
        return float(signal_loss(np.array([layer.error for layer in self.layers])).sum())

    def to_json(self) -> str:
        """Returns the plan as JSON text with a schema version."""
        return json.dumps({"format": FORMAT, "schema": SCHEMA, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Returns the plan that `to_json` wrote.

        Raises:
            PlanFormatError: If the text is no JSON, no plan, written by a newer version, or a
                field is missing or has a wrong type.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            msg = f"the plan is damaged: not JSON ({error}); it starts with {str(text)[:40]!r}."
            raise PlanFormatError(msg) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            msg = f'this is no plan of lightning_compress: expected "format": {FORMAT!r}, got {shown(data)[:60]!r}.'
            raise PlanFormatError(msg)
        schema = data.get("schema")
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            msg = (
                f"the plan has schema {shown(schema)}; this version reads schema {SCHEMA} and older. "
                "Update lightning_compress, or write the plan again with this version."
            )
            raise PlanFormatError(msg)
        try:
            return _plan_from_dict(data)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, LightningCompressError) as error:
            msg = f"the plan is damaged: {type(error).__name__}: {error}."
            raise PlanFormatError(msg) from error

    def __str__(self) -> str:
        """Returns a table: layers, kinds, ranks, errors, sizes, reasons."""
        return plan_text(self)

    def _repr_html_(self) -> str:
        """Returns the same for a notebook."""
        return plan_html(self)

    def table(self) -> Table:
        """Returns the layers as a rich table."""
        return plan_table(self)

    def time_lines(self) -> list[str]:
        """Returns what there is to say about time: before and after, and which layers are slower than dense."""
        return plan_time_lines(self)

    def summary(self) -> str:
        """Returns sizes, budget and optimality in one or two lines."""
        return plan_summary(self)


def signal_loss(errors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns −log(1 − e), the separable objective of one layer.

    Of the energy of a weight the fraction 1 − e survives. Layers act one after another, so what
    survives of the whole network is the product over the layers, and its negative logarithm is
    the sum of these terms. Unlike the plain sum of errors it never gives one layer up to spare
    the others: the loss of a layer grows without bound as its error nears 1.
    """
    return -np.log1p(-np.minimum(errors, 1 - 1e-9))


def _plan_from_dict(data: Mapping[str, Any]) -> Plan:
    budget = _typed(data, "budget", dict, optional=True)
    return Plan(
        layers=tuple(_layer_from_dict(layer) for layer in _typed(data, "layers", list)),
        dense=_costs_from_dict(_typed(data, "dense", dict)),
        compressed=_costs_from_dict(_typed(data, "compressed", dict)),
        budget=Budget.from_value(budget) if budget is not None else None,
        method=_typed(data, "method", str, optional=True),
        objective=_typed(data, "objective", str, optional=True),
        source=_typed(data, "source", str, optional=True),
        data_free=_typed(data, "data_free", bool),
        optimality_gap=_typed(data, "optimality_gap", float, optional=True),
        output_distance=_typed(data, "output_distance", float, optional=True),
        seconds=_typed(data, "seconds", float, optional=True),
        timings=_typed(data, "timings", dict),
        seed=_typed(data, "seed", int, optional=True),
        target=_typed(data, "target", dict, optional=True),
        predicted_latency=_typed(data, "predicted_latency", float, optional=True),
        memory_format=_typed(data, "memory_format", str, optional=True),
        cut=_typed(data, "cut", dict),
    )


def _layer_from_dict(data: Mapping[str, Any]) -> LayerPlan:
    if not isinstance(data, dict):
        msg = f"a layer is {shown(data)}, expected an object"
        raise TypeError(msg)
    return LayerPlan(
        name=_typed(data, "name", str),
        type=_typed(data, "type", str),
        kind=_typed(data, "kind", str),
        ranks=tuple(_typed(data, "ranks", list)),
        weight_shape=tuple(_typed(data, "weight_shape", list)),
        error=float(_typed(data, "error", float)),
        params_before=_typed(data, "params_before", int),
        params_after=_typed(data, "params_after", int),
        macs_before=_typed(data, "macs_before", int, optional=True),
        macs_after=_typed(data, "macs_after", int, optional=True),
        reason=_typed(data, "reason", str, optional=True),
        source=_typed(data, "source", str, optional=True),
        joint_with=_typed(data, "joint_with", str, optional=True),
        samples=_typed(data, "samples", int, optional=True),
        error_spread=_typed(data, "error_spread", float, optional=True),
        latency_before=_typed(data, "latency_before", float, optional=True),
        latency_after=_typed(data, "latency_after", float, optional=True),
        merged=_typed(data, "merged", bool),
    )


def _costs_from_dict(data: Mapping[str, Any]) -> Costs:
    return Costs(
        params=_typed(data, "params", int),
        macs=_typed(data, "macs", int, optional=True),
        bytes=_typed(data, "bytes", int),
        latency=_typed(data, "latency", float, optional=True),
    )


def _typed(data: Mapping[str, Any], key: str, kind: type, *, optional: bool = False) -> Any:
    value = data[key]
    if optional and value is None:
        return None
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        msg = f"{key!r} is {shown(value)}, expected {kind.__name__}"
        raise TypeError(msg)
    return value

"""What is factorised as one: a single layer, layers of one weight, or layers with a joint first factor.

A problem has one row of candidates per unit. What differs between the three is said here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.analysis.inventory import Layer
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.analysis.trace import Trace
from lightning_compress.core.plan import BETTER_ELSEWHERE, DENSE, LayerPlan
from lightning_compress.core.workers import outsourced
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.joint_svd import joint_factors
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import (
    DECOMPOSITIONS,
    Operator,
    fit_factors,
    multiplied_out,
    weighted_energy,
)
from lightning_compress.search.candidates import (
    Candidates,
    dense_macs,
    tabulate,
    tabulate_joint,
    unseen_joint_errors,
)


class Unit(ABC):
    """What is factorised as one.

    Attributes:
        layers: Its layers; the first one gives it its name.
    """

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """That of the first layer."""
        return self.layers[0].name

    @property
    def is_tied(self) -> bool:
        """Whether several modules hold the weight."""
        return False

    @property
    @abstractmethod
    def operator(self) -> Operator:
        """What is done with the weight."""

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Kinds of decomposition to choose from."""

    @abstractmethod
    def canonical_weight(self) -> Tensor:
        """Returns the dense weight as (groups · out, in, *kernel)."""

    def double_weight(self) -> Tensor:
        """Returns the canonical weight as kinds take it, float64 on the CPU."""
        return self.canonical_weight().detach().to("cpu", torch.float64)

    @abstractmethod
    def tabulate(self, compared: Sequence[str], rank_multiple: int, statistics: Statistics | None) -> Candidates:
        """Returns the candidates, see `candidates.tabulate`."""

    @abstractmethod
    def fit(
        self, kind: str, ranks: tuple[int, ...], statistics: Statistics, *, draft: bool = False
    ) -> dict[str, Tensor]:
        """Returns canonical factors, fitted in the metric, in the weight's dtype and on its device.

        Args:
            kind: Of decomposition.
            ranks: Of the kind.
            statistics: With the metric.
            draft: Whether a quick fit will do, see `Decomposition.draft`.
        """

    def fit_work(self, kind: str, ranks: tuple[int, ...], statistics: Statistics) -> float:  # noqa: ARG002
        """Returns about how many multiply-adds `fit` takes beyond a closed form."""
        return 0.0

    @abstractmethod
    def dense_weights(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns a canonical weight as the dense weight of each layer, by name and in its own layout."""

    @abstractmethod
    def plans(
        self, table: Candidates, row: int, traced: Trace | None, statistics: Statistics | None
    ) -> list[LayerPlan]:
        """Returns what becomes of each layer with a row of the candidates."""

    def multiplied_out(self, kind: str, factors: dict[str, Tensor]) -> Tensor:
        """Returns the canonical weight of factors."""
        return multiplied_out(DECOMPOSITIONS[kind], factors, self.operator.shape, self.operator.groups)


@dataclass(frozen=True)
class SingleLayer(Unit):
    """One layer with factors of its own.

    Attributes:
        layer: The layer.
    """

    layer: Layer

    @property
    def layers(self) -> tuple[Layer, ...]:  # type: ignore[override]
        """The layer alone."""
        return (self.layer,)

    @property
    def operator(self) -> Operator:
        """What the layer does."""
        return self.layer.operator

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of decomposition to choose from."""
        return self.layer.kinds

    @override
    def canonical_weight(self) -> Tensor:
        return self.layer.canonical_weight()

    def with_kinds(self, kinds: tuple[str, ...]) -> SingleLayer:
        """Returns the unit with other kinds to choose from."""
        return replace(self, layer=replace(self.layer, kinds=kinds))

    @override
    def tabulate(self, compared: Sequence[str], rank_multiple: int, statistics: Statistics | None) -> Candidates:
        metric = metric_of(self.layer, statistics)
        return outsourced(partial(tabulate, compared=compared, rank_multiple=rank_multiple, metric=metric), self.layer)

    @override
    def fit(
        self, kind: str, ranks: tuple[int, ...], statistics: Statistics, *, draft: bool = False
    ) -> dict[str, Tensor]:
        with threads_for(self.layer.weight), torch.no_grad():
            metric = metric_of(self.layer, statistics)
            found = fit_factors(kind, self.double_weight(), ranks, metric, self.operator.groups, draft=draft)
        return _as_weight(found, self.layer.weight)

    @override
    def fit_work(self, kind: str, ranks: tuple[int, ...], statistics: Statistics) -> float:
        metric, operator = metric_of(self.layer, statistics), self.operator
        in_metric = metric is not None and metric.inputs is not None
        return operator.groups * DECOMPOSITIONS[kind].fit_work(operator.shape, ranks, in_metric=in_metric)

    def lost_energy(self, weight: Tensor, statistics: Statistics) -> float:
        """Returns ‖G^½ (W − Ŵ) S^½‖² of a canonical weight Ŵ; see `Candidates.energy`."""
        with threads_for(self.layer.weight), torch.no_grad():
            lost = self.double_weight() - weight.to("cpu", torch.float64)
            return weighted_energy(lost, metric_of(self.layer, statistics), self.operator.groups)

    @override
    def dense_weights(self, weight: Tensor) -> dict[str, Tensor]:
        return {self.name: self.layer.own_layout(weight)}

    @override
    def plans(
        self, table: Candidates, row: int, traced: Trace | None, statistics: Statistics | None
    ) -> list[LayerPlan]:
        return [planned_layer(self.layer, table, row, traced, statistics)]


class TiedLayers(SingleLayer):
    """Modules of one weight, such as an embedding and the output layer: they become layers of the same factors.

    The layer is that of the first module; `Layer.partners` are the others.
    """

    @property
    def is_tied(self) -> bool:
        """True: one weight stands for all of them."""
        return True


@dataclass(frozen=True)
class JointLayers(Unit):
    """Linear layers that read the same and have a joint first factor.

    Attributes:
        layers: The layers.
    """

    layers: tuple[Layer, ...]

    @property
    def operator(self) -> Operator:
        """That of one linear layer of the stacked weights."""
        return Operator((sum(len(layer.weight) for layer in self.layers), self.layers[0].weight.shape[1]))

    @property
    def kinds(self) -> tuple[str, ...]:
        """SVD alone has a first factor that can be joint."""
        return ("svd",)

    def canonical_weight(self) -> Tensor:
        """The stacked weights, (Σ out, in)."""
        return torch.cat([layer.weight for layer in self.layers])

    @override
    def tabulate(self, compared: Sequence[str], rank_multiple: int, statistics: Statistics | None) -> Candidates:
        return tabulate_joint(
            self.layers, compared=compared, rank_multiple=rank_multiple, metrics=self._metrics(statistics)
        )

    @override
    def fit(
        self,
        kind: str,
        ranks: tuple[int, ...],
        statistics: Statistics,
        *,
        draft: bool = False,
    ) -> dict[str, Tensor]:
        with threads_for(self.layers[0].weight), torch.no_grad():
            weights = [layer.double_weight() for layer in self.layers]
            reduce, expand = joint_factors(weights, self._metrics(statistics), ranks[0])
        return _as_weight({"reduce": reduce, "expand": torch.cat(expand)}, self.layers[0].weight)

    @override
    def dense_weights(self, weight: Tensor) -> dict[str, Tensor]:
        parts = torch.split_with_sizes(weight, [len(layer.weight) for layer in self.layers])
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}

    @override
    def plans(
        self, table: Candidates, row: int, traced: Trace | None, statistics: Statistics | None
    ) -> list[LayerPlan]:
        dense = [planned_layer(each, Candidates.of_dense(each.name), 0, traced, statistics) for each in self.layers]
        if table.kinds[row] == DENSE:
            return [replace(plan, reason=BETTER_ELSEWHERE) for plan in dense]
        ranks = table.ranks[row]
        weights = [layer.double_weight() for layer in self.layers]
        errors = unseen_joint_errors(weights, self._metrics(statistics))[ranks[0] - 1]
        plans = []
        for index, (layer, plan, error) in enumerate(zip(self.layers, dense, errors, strict=True)):
            out, in_ = layer.weight_shape
            positions = sum(call.positions for call in layer.calls or ())
            planned = replace(
                plan,
                kind=table.kinds[row],
                ranks=ranks,
                error=float(error),
                params_after=layer.parameters
                - layer.spared[0]
                - out * in_
                + ranks[0] * (out + (in_ if index == 0 else 0)),
                macs_after=None if plan.macs_before is None else ranks[0] * (out + in_) * positions,
                reason=None,
                joint_with=self.name,
            )
            plans.append(planned)
        return plans

    def _metrics(self, statistics: Statistics | None) -> list[Metric | None]:
        return [metric_of(layer, statistics) for layer in self.layers]


def units_of(layers: Iterable[Layer]) -> tuple[SingleLayer, ...]:
    """Returns the layers that can be factorised as units, each with factors of its own."""
    return tuple(
        TiedLayers(layer) if layer.partners else SingleLayer(layer) for layer in layers if layer.reason is None
    )


def joint_units(units: Sequence[SingleLayer], traced: Trace | None) -> list[JointLayers]:
    """Returns the nn.Linear of one module that read the same tensor, several together."""
    if traced is None:
        return []
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for unit in units:
        layer = unit.layer
        if "svd" in layer.kinds and type(layer.module) is nn.Linear and layer.type == "Linear" and not unit.is_tied:
            key = (
                traced.inputs.get(layer.name),
                layer.name.rpartition(".")[0],
                layer.min_rank,
                layer.max_rank,
                layer.weight.dtype,
                layer.weight.device,
            )
            groups.setdefault(key, []).append(layer)
    return [JointLayers(tuple(group)) for key, group in groups.items() if key[0] is not None and len(group) > 1]


def metric_of(layer: Layer, statistics: Statistics | None) -> Metric | None:
    """Returns the metric of a layer's errors, None if nothing is known."""
    return statistics.metric(layer.name) if statistics is not None else None


def planned_layer(
    layer: Layer, table: Candidates | None, row: int, traced: Trace | None, statistics: Statistics | None
) -> LayerPlan:
    """Returns what becomes of one layer.

    Args:
        layer: The layer.
        table: Its candidates, None for a layer that cannot be factorised.
        row: Of the table.
        traced: What a forward pass showed, None if there was none.
        statistics: With the source of the metric.
    """
    factorisable = table is not None
    source = statistics.source_of(layer.name) if statistics is not None and factorisable else None
    if table is None:
        table = Candidates.of_dense(layer.name)
        reason = layer.reason
    elif len(table) == 1:
        reason = "every candidate is larger or slower than the dense layer"
    else:
        reason = BETTER_ELSEWHERE if table.kinds[row] == DENSE else None
    saved = table.costs[-1] - table.costs_as_run(row)
    before = dense_macs(layer) if traced is not None and factorisable else None
    return LayerPlan(
        name=layer.name,
        type=layer.type,
        kind=table.kinds[row],
        ranks=table.ranks[row],
        weight_shape=layer.weight_shape if factorisable else (),
        error=float(table.unseen_errors[row]),
        params_before=layer.parameters,
        params_after=layer.parameters - int(saved[0]),
        macs_before=before,
        macs_after=before - int(saved[1]) if before is not None else None,
        reason=reason,
        source=source or ("weight" if factorisable else None),
        samples=statistics.samples_of(layer.name) if statistics is not None and factorisable else None,
        error_spread=table.unseen.spread_at(float(table.errors[row])) if table.unseen is not None else None,
        merged=table.is_merged(row),
    )


def _as_weight(factors: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    return {name: value.to(weight.device, weight.dtype) for name, value in factors.items()}

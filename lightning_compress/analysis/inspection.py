"""What is known of a model before anything is worked out: its layers, its forward pass, its costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import Layer, take_inventory
from lightning_compress.analysis.trace import ExampleInput, Trace, trace
from lightning_compress.core.costs import Costs


@dataclass(frozen=True)
class Inspection:
    """What is known of a model, made once per search.

    Attributes:
        model: The model, its attention and recurrent layers unfused.
        layers: Every parameterised module in order, each with its kinds or its reason to stay dense.
        trace: What a forward pass showed, None if there is no example input.
        costs: Of the dense model.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    trace: Trace | None
    costs: Costs

    @property
    def chosen(self) -> tuple[Layer, ...]:
        """The layers that can be factorised."""
        return tuple(layer for layer in self.layers if layer.reason is None)


def inspect_model(model: nn.Module, selection: Mapping[str, Any], example_input: ExampleInput | None) -> Inspection:
    """Looks at a model.

    Args:
        model: Any module, unfused; it is not changed.
        selection: Keywords of `take_inventory`: kinds, include, exclude, overrides, spare_frozen.
        example_input: See `search_ranks`.

    Raises:
        LightningCompressError: As `take_inventory` and `trace`.
    """
    take_inventory(model, **selection)  # a wrong pattern shows before the model is run
    traced = trace(model, example_input) if example_input is not None else None
    layers = take_inventory(model, **selection, trace=traced)
    return Inspection(model, layers, traced, measure_costs(model, macs=traced.macs if traced is not None else None))

"""Synthetic inputs that were made before: found again for the same model, start and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments, inference, output_tensors, run
from lightning_compress.core import store
from lightning_compress.core.compat import is_wrapped, tree_flatten, tree_unflatten
from lightning_compress.core.parallel import current_processes

Matched = tuple[list[Arguments], "float | None", bool]
"""Batches, their mismatch, and whether they could be matched."""


def found_or_made(model: nn.Module, start: list[Arguments], steps: int, make: Callable[[], Matched]) -> Matched:
    """Returns what `make` returns, from the cache where it was made before.

    Args:
        model: The model; its weights, its structure and what it makes of the first input say whether it is the same.
        start: Batches as they were drawn.
        steps: Of their optimisation.
        make: Optimises them.
    """
    if current_processes().size > 1 or not store.is_kept():  # processes exchange what each has made
        return make()
    state = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    if any(value.layout != torch.strided or value.is_meta or is_wrapped(value) for value in state):
        return make()  # they have no plain values to go by
    leaves = [tree_flatten(batch)[0] for batch in start]
    drawn = [leaf if isinstance(leaf, Tensor) else type(leaf) for own in leaves for leaf in own]
    key = store.key_of("inputs", repr(model), steps, *_outputs(model, start[0]), *drawn, *state)
    if (stored := store.find(key)) is not None:
        return _rebuilt(start, stored)
    batches, mismatch, whole = make()
    if whole and mismatch is not None:
        tensors = {
            f"{number}.{index}": leaf
            for number, batch in enumerate(batches)
            for index, leaf in enumerate(tree_flatten(batch)[0])
            if isinstance(leaf, Tensor)
        }
        store.keep(key, {**tensors, "mismatch": torch.tensor(mismatch, dtype=torch.float64)})
    return batches, mismatch, whole


def _outputs(model: nn.Module, batch: Arguments) -> list[Tensor]:
    """Returns what the model makes of inputs, so that other code with the same weights is told apart.

    Raises:
        ExampleInputError: If it fails on them.
    """
    with inference(model):
        return output_tensors(run(model, batch, "synthetic inputs"))


def _rebuilt(start: list[Arguments], stored: dict[str, Tensor]) -> Matched:
    """Returns batches of stored values, laid in memory as they were drawn."""

    def value(number: int, index: int, leaf: Any) -> Any:
        return torch.empty_like(leaf).copy_(stored[f"{number}.{index}"]) if isinstance(leaf, Tensor) else leaf

    batches = []
    for number, batch in enumerate(start):
        leaves, spec = tree_flatten(batch)
        values = [value(number, index, leaf) for index, leaf in enumerate(leaves)]
        batches.append(cast(Arguments, tree_unflatten(values, spec)))
    return batches, float(stored["mismatch"]), True

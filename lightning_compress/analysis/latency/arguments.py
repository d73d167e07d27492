"""The example input as the target is called with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments, ExampleInput, as_arguments, hooked, inference, sample_counts
from lightning_compress.core.compat import tree_map
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.core.target import Target


def target_arguments(model: nn.Module, example_input: ExampleInput, target: Target) -> Arguments:
    """Returns the arguments of one forward pass at the target's batch size and in its dtype.

    Raises:
        ExampleInputError: If the batch size of the example input cannot be changed.
    """
    arguments = as_arguments(model, example_input)
    if target.batch != 1:
        if sample_counts(arguments) != {1}:
            msg = (
                f"target: batch={target.batch} cannot be made of the example input, whose tensors do not share a batch "
                "dimension. Use batch=1."
            )
            raise ExampleInputError(msg)
        arguments = tree_map(lambda leaf: _repeated(leaf, target.batch), arguments)
    if target.dtype is not None:
        dtype = getattr(torch, target.dtype)
        arguments = tree_map(lambda leaf: _cast(leaf, dtype), arguments)
    return arguments


def positional(model: nn.Module, arguments: Arguments) -> tuple[Any, ...]:
    """Returns the arguments by position, as an own device takes them.

    Raises:
        ExampleInputError: If there are others.
    """
    if arguments[1]:
        msg = (
            f"target: {type(model).__name__} is called with keyword arguments ({', '.join(arguments[1])}), and devices "
            "of your own and onnxruntime take positional ones. Pass the example_input as a tuple."
        )
        raise ExampleInputError(msg)
    return arguments[0]


def layer_inputs(model: nn.Module, names: set[str], arguments: Arguments) -> dict[str, tuple[Any, ...]]:
    """Returns what each layer is called with first, by name."""
    found: dict[str, tuple[Any, ...]] = {}

    def keep(name: str, args: tuple[Any, ...]) -> None:
        found.setdefault(name, tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, args))

    hooks = (
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        for name in names
    )
    with hooked(hooks), inference(model):
        model(*arguments[0], **arguments[1])
    return found


def _repeated(leaf: Any, batch: int) -> Any:
    return leaf.repeat(batch, *(1,) * (leaf.ndim - 1)) if isinstance(leaf, Tensor) else leaf


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

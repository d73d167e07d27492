"""What is exported: a copy of the model, called by position, and the inputs that it is traced and checked on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import ExampleInput, inference, run, sample_counts, whole_arguments
from lightning_compress.core.compat import tree_leaves, tree_map
from lightning_compress.core.copies import detached_copy
from lightning_compress.core.errors import ExampleInputError, UnsupportedError

Inputs = tuple[Any, ...]
"""Positional arguments of one forward pass."""
BATCH = 2
"""Samples a model is traced with at least: exporters take the size of a batch of one for a constant."""


@dataclass(frozen=True)
class Subject:
    """A model that is exported.

    Attributes:
        model: A copy in eval mode on the CPU, called by position.
        inputs: What it is traced with.
        path: Of the file or folder.
        dynamic: Whether the first dimension of every input is any size.
        int8: Whether the file holds 8-bit integers.
        calibration: Real inputs for static quantisation, none for the other ways.
        names: Of the arguments that were given by name, in the order of the positions.
    """

    model: nn.Module
    inputs: Inputs
    path: Path
    dynamic: bool
    int8: bool = False
    calibration: Sequence[Inputs] = field(default=())
    names: tuple[str, ...] = ()

    @property
    def shapes(self) -> tuple[Any, ...] | None:
        """The dynamic shapes, as torch.export takes them; None where all are fixed."""
        if not self.dynamic:
            return None
        size = {0: torch.export.Dim.DYNAMIC}
        shapes = tuple(tree_map(lambda leaf: size if isinstance(leaf, Tensor) else None, self.inputs))
        return (shapes,) if self.names else shapes  # one for all of *args

    def exported(self, model: nn.Module | None = None) -> torch.export.ExportedProgram:
        """Returns the model, or another one of the same inputs, through torch.export.

        Raises:
            UnsupportedError: If it cannot be exported.
        """
        given = (self.inputs, *((self.shapes,) if self.dynamic else ()))
        model = self.model if model is None else model
        with quiet(), torch.no_grad(), refusing(f"torch.export of {type(self.model).__name__}", self.dynamic):
            return torch.export.export(model, given[0], dynamic_shapes=given[1] if self.dynamic else None)


class ByPosition(nn.Module):
    """A model whose named arguments are given by position.

    Args:
        model: The model.
        names: Of the last arguments.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *args: Any) -> Any:
        """Returns the model's outputs."""
        first = len(args) - len(self.names)
        return self.model(*args[:first], **dict(zip(self.names, args[first:], strict=True)))


def subject_of(
    model: nn.Module,
    path: Path,
    example_input: ExampleInput,
    *,
    dynamic: bool,
    int8: bool = False,
    calibration: Iterable[Any] | None = None,
) -> Subject:
    """Returns a model as it is exported; the model itself is not changed.

    Raises:
        ExampleInputError: If the example input or a batch of the calibration is none, or the model fails on it.
    """
    twin = detached_copy(model).eval().cpu()
    args, kwargs = tree_map(_on_cpu, whole_arguments(model, example_input))
    names = tuple(kwargs)
    inputs: Inputs = (*args, *kwargs.values())
    if names:
        twin = ByPosition(twin, names)
    dynamic = dynamic and len(sample_counts(inputs)) == 1
    if dynamic and max(sample_counts(inputs)) < BATCH:
        inputs = with_batch(inputs, BATCH)
    batches = [as_inputs(batch, names, len(inputs)) for batch in calibration] if calibration is not None else []
    with inference(twin):
        run(twin, (inputs, {}), "the example input")
    return Subject(twin, inputs, path, dynamic, int8, batches, names)


def as_inputs(batch: Any, names: Sequence[str], count: int) -> Inputs:
    """Returns a batch of inputs by position.

    Raises:
        ExampleInputError: If it is no tensor, tuple or dict of `count` arguments.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    elif isinstance(batch, dict) and not set(names) - set(batch):
        batch = tuple(batch[name] for name in names)
    if not isinstance(batch, (tuple, list)) or len(batch) != count:
        msg = (
            f"calibration holds a {type(batch).__name__}, expected the {count} arguments of the model's forward pass: "
            "a tensor, a tuple, or a dict of them."
        )
        raise ExampleInputError(msg)
    return tuple(tree_map(_on_cpu, tuple(batch)))


def with_batch(inputs: Inputs, size: int) -> Inputs:
    """Returns inputs with this many samples, the given ones one after the other as often as needed."""

    def sized(leaf: Any) -> Any:
        return leaf[torch.arange(size) % len(leaf)] if isinstance(leaf, Tensor) else leaf

    return cast(Inputs, tree_map(sized, inputs))


def tensors_in(values: Any) -> list[Tensor]:
    """Returns the tensors in a nest, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def optional(module: str, extra: str, what: str) -> Any:
    """Returns a module that need not be installed.

    Raises:
        UnsupportedError: If it is not.
    """
    try:
        with quiet():
            return __import__(module, fromlist=["_"])
    except ImportError as error:
        msg = f"{what} needs {module.partition('.')[0]!r}: pip install 'lightning_compress[{extra}]' ({error})."
        raise UnsupportedError(msg) from error


@contextlib.contextmanager
def refusing(what: str, dynamic: bool = False) -> Iterator[None]:
    """Turns whatever an exporter raises into an error of our own.

    Raises:
        UnsupportedError: In the place of any other error.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0][:500]
        hint = " If the model takes one batch size only, use dynamic_batch=False." if dynamic else ""
        msg = f"{what} fails: {type(error).__name__}: {said}. Try another format, or leave out what it names.{hint}"
        raise UnsupportedError(msg) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out what exporters print, log and warn of."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _on_cpu(leaf: Any) -> Any:
    """Returns a tensor of its own memory: exporters write the whole storage of an example."""
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf

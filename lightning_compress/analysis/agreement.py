"""Whether two forward passes return the same, and whether a model runs with attention and recurrent layers unfused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments, ExampleInput, as_arguments, inference, run
from lightning_compress.core.compat import tree_flatten
from lightning_compress.core.errors import CompressionWarning, ExampleInputError
from lightning_compress.core.plan import MOST_NAMED, percent
from lightning_compress.layers.unfused import kept_fused, unfusable, unfused

LEAST_TOLERANCE = 1e-3
"""Relative difference of outputs that is no other computation: other kernels and memory formats round otherwise."""
FLOOR = 1e-5
"""Size of an output, relative to the largest one of the model, below which differences are rounding."""

_DECIDED: ContextVar[bool] = ContextVar("decided", default=False)


def difference_of_outputs(before: Any, now: Any, *, values: bool = True) -> str | None:
    """Returns in what the outputs of two forward passes differ, None if they are the same but for rounding.

    Args:
        before: Whatever a model returned.
        now: What it returns now.
        values: Whether to compare the numbers too, and not only structure, shapes and dtypes.
    """
    (leaves, form), (others, form_now) = tree_flatten(before), tree_flatten(now)
    if form != form_now or [form_of(leaf) for leaf in leaves] != [form_of(leaf) for leaf in others]:
        shown = [", ".join(map(form_of, each)) or "nothing" for each in (leaves, others)]
        return f"it returns {shown[1]} where it returned {shown[0]}"
    worst = _largest_difference(leaves, others) if values else 0.0
    return f"its outputs differ by {percent(worst)}" if worst else None


def form_of(leaf: Any) -> str:
    """Returns shape and dtype of a tensor, the class of anything else."""
    return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _largest_difference(before: Sequence[Any], now: Sequence[Any]) -> float:
    """Returns the largest relative difference of the outputs' numbers, 0 if there is none but that of rounding."""
    pairs = [(a, b) for a, b in zip(before, now, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    found = [(_finite_norm(a, a), _finite_norm(a - b, a), torch.finfo(a.dtype).eps ** 0.5) for a, b in pairs]
    largest = max((size for size, *_ in found), default=0.0)
    worst = 0.0
    for size, difference, tolerance in found:
        relative = difference / max(size, FLOOR * largest, torch.finfo(torch.float64).tiny)
        if relative > max(LEAST_TOLERANCE, tolerance):
            worst = max(worst, relative)
    return worst


def _finite_norm(values: Tensor, like: Tensor) -> float:
    """Returns the norm of values, those left out that are not finite in either."""
    finite = torch.isfinite(values) & torch.isfinite(like)
    return float(torch.linalg.vector_norm(values.detach().double()[finite]))


@contextlib.contextmanager
def unfusing_as_the_model_allows(model: Any, example_input: ExampleInput | None) -> Iterator[None]:
    """Keeps attention and recurrent layers as they are if the model does not run alike with their unfused twins.

    Code such as `isinstance(layer, nn.LSTM)` takes another branch with a twin. Whatever is done in this context leaves
    these layers alone then, and a warning says so. Nothing is known, and nothing done, without an example input.
    """
    names = [name for name, reason in unfusable(model).items() if reason is None] if _is_open(model) else []
    if example_input is None or not names:
        yield
        return
    said = _trouble_with_twins(model, as_arguments(model, example_input))
    with contextlib.ExitStack() as stack:
        if said is not None:
            shown = ", ".join(map(repr, names[:MOST_NAMED])) + (" and more" if len(names) > MOST_NAMED else "")
            warn(
                f"attention and recurrent layers ({shown}) stay as they are: with their projections as layers of their "
                f"own {said}. The model's code asks for their class, as in isinstance(layer, nn.LSTM).",
                CompressionWarning,
                stacklevel=4,
            )
            stack.enter_context(kept_fused())
        token = _DECIDED.set(True)
        stack.callback(_DECIDED.reset, token)
        yield


def _is_open(model: Any) -> bool:
    return isinstance(model, nn.Module) and not _DECIDED.get()


def _trouble_with_twins(model: nn.Module, arguments: Arguments) -> str | None:
    """Returns what is otherwise with unfused layers, None if nothing is or the model does not run at all.

    Numbers are not compared: torch's fast path leaves out what a padding mask hides.
    """
    try:
        before = _outputs(model, arguments)
    except ExampleInputError:
        return None  # whoever traces the model says so
    try:
        with unfused(model):
            now = _outputs(model, arguments)
    except ExampleInputError as error:
        return str(error).rstrip(". ")
    return difference_of_outputs(before, now, values=False)


def _outputs(model: nn.Module, arguments: Arguments) -> Any:
    with inference(model):
        seed_(model)
        return run(model, arguments, "the example input")


def seed_(model: nn.Module) -> None:
    """Seeds what is random in eval mode too, inside of `inference`, which puts the states back."""
    torch.default_generator.manual_seed(0)
    for index in {p.device.index or 0 for p in model.parameters() if p.is_cuda}:
        torch.cuda.default_generators[index].manual_seed(0)

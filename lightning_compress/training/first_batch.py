"""What the forward pass of a module is called with, guessed from the shapes of one batch of its training data.

The batch is fetched by a copy of this process, as by a worker of the loader: whatever data set, sampler and collate
function do there, such as opening files, counting or drawing random numbers, has not happened here.
"""

from __future__ import annotations

import inspect
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.core.errors import ExampleInputError

PATIENCE = 60.0
"""Seconds that the first batch may take."""

LABELS = frozenset({"label", "labels", "label_ids", "target", "targets", "y"})
"""Keys of a batch that are left out of the first guess: with labels many models return a loss alone."""


@dataclass(frozen=True)
class Shape:
    """A tensor of a batch without its values."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def shapes_of_first_batch(data: Any) -> Any:
    """Returns a batch of training data with shapes in the place of tensors and None in that of other values.

    Args:
        data: What a trainer takes as its training data.

    Raises:
        ExampleInputError: If it cannot be had without touching the data in this process, with the reason.
    """
    if not isinstance(data, DataLoader):
        msg = f"the training data are a {type(data).__name__}, no DataLoader"
        raise ExampleInputError(msg)
    if isinstance(data.dataset, IterableDataset):
        msg = "the training data are an IterableDataset, which may be read once"
        raise ExampleInputError(msg)
    if sys.platform != "linux":
        msg = f"on {sys.platform} a batch cannot be fetched without touching the data in this process"
        raise ExampleInputError(msg)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_fetch, args=(data, theirs), daemon=True)
    try:
        with warnings.catch_warnings():  # Python 3.12 on: the copy has one thread, and is stopped where it gets stuck
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        found = ours.recv() if ours.poll(PATIENCE) else f"fetching a batch took longer than {PATIENCE:.0f} s"
    except EOFError:
        found = "the process that fetched a batch died"
    except (OSError, AssertionError) as error:  # such as: daemonic processes are not allowed to have children
        found = f"no process could be started to fetch a batch: {error}"
    finally:
        ours.close()
        if process.pid is not None:
            process.kill()
            process.join()
    if isinstance(found, str):
        raise ExampleInputError(found)
    return found[0]


def _fetch(loader: DataLoader[Any], to: Connection) -> None:
    """Sends what the first batch looks like, or why there is none; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the threads of the process it is a copy of are not there
    loader.num_workers, loader.pin_memory, loader.timeout, loader.prefetch_factor = 0, False, 0, None
    try:
        found: Any = (_shapes(next(iter(loader))),)
    except StopIteration:
        found = "there are no training batches"
    except BaseException as error:  # of the user's data, which says so when it is really read
        found = f"fetching a batch by itself failed: {type(error).__name__}: {error}"
    to.send(found)
    to.close()


def _shapes(batch: Any) -> Any:
    """Returns a batch with shapes in the place of tensors; mappings and sequences become dicts and tuples."""
    if isinstance(batch, Tensor):
        return Shape(tuple(batch.shape), batch.dtype)
    if isinstance(batch, Mapping):
        return {str(key): _shapes(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(_shapes(value) for value in batch)
    return None


def guesses(batch: Any, forward: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yields what a forward pass may be called with, the likeliest first: what it is of the batch, and the arguments.

    Args:
        batch: As `shapes_of_first_batch` returns it.
        forward: The function that is called.
    """
    first = batch[0] if isinstance(batch, tuple) and batch else batch
    if isinstance(first, Shape):
        yield f"a tensor of shape {_alone(first)}", _example(first)
    elif isinstance(first, dict):
        for labels in (False, True):
            taken = _taken(first, forward, labels=labels)
            if taken:
                yield f"the entries {', '.join(taken)}", {key: _example(first[key], key) for key in taken}
        named = inspect.signature(forward).parameters
        if len([p for p in named.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]) == 1:
            inputs = {key: value for key, value in first.items() if key not in LABELS}
            yield "the whole batch", ({key: _example(value, key) for key, value in inputs.items()},)
    if isinstance(batch, tuple) and len(batch) > 1:
        yield f"the first {len(batch) - 1} of its parts", tuple(_example(part) for part in batch[:-1])


def _taken(entries: Mapping[str, Any], forward: Callable[..., Any], *, labels: bool) -> list[str]:
    """Returns the entries of a batch that hold tensors and that a function takes by name."""
    named = inspect.signature(forward).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in named)
    names = {p.name for p in named if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    return [
        key
        for key, value in entries.items()
        if isinstance(value, Shape) and (anything or key in names) and (labels or key not in LABELS)
    ]


def _alone(shape: Shape) -> tuple[int, ...]:
    """Returns the shape of the first sample alone, as a batch."""
    return (1, *shape.sizes[1:]) if shape.sizes else ()


def _example(part: Any, key: str = "") -> Any:
    """Returns values of the right shape: noise, zeros for whole numbers, and ones where they say what is to be read."""
    if isinstance(part, Shape):
        if part.dtype.is_floating_point:
            return torch.randn(_alone(part), generator=torch.Generator().manual_seed(0)).to(part.dtype)
        return torch.full(_alone(part), "mask" in key or part.dtype == torch.bool, dtype=part.dtype)
    if isinstance(part, dict):
        return {name: _example(value, name) for name, value in part.items()}
    return tuple(_example(value) for value in part) if isinstance(part, tuple) else part

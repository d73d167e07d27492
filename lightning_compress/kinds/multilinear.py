"""Multilinear algebra by tensorly, whatever backend the rest of the process has chosen for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tensorly
import torch
from tensorly import tenalg
from torch import Tensor


@contextmanager
def tensorly_backend(name: str) -> Iterator[None]:
    """Lets tensorly compute with a backend in this thread, until the block ends.

    The backend of other threads and that of the process stay what they are, which they do not after
    `tensorly.backend_context(name, local_threadsafe=True)`: on leaving it sets the old one for the whole process.

    Args:
        name: "numpy" or "pytorch".
    """
    before = tensorly.get_backend(), tenalg.get_backend()
    tensorly.set_backend(name, local_threadsafe=True)
    tenalg.set_backend("core", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(before[0], local_threadsafe=True)
        tenalg.set_backend(before[1], local_threadsafe=True)


def mode_basis(tensor: Tensor, mode: int) -> Tensor:
    """Returns the left singular vectors of the unfolding of a mode, largest first, (size, size)."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.T)[1]
    return vectors.flip(1)


def in_bases(tensor: Tensor, bases: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """Returns a tensor in the coordinates of a basis, (size, r), for each of some modes; those have size r then."""
    with tensorly_backend("pytorch"):
        core: Tensor = tenalg.multi_mode_dot(tensor, list(bases), modes=list(modes), transpose=True)
    return core

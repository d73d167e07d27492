"""The exact sum of the singular value decompositions of all places of a kernel: where CP fits start."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.kinds.base import tail_errors
from lightning_compress.kinds.multilinear import in_bases, mode_basis

LARGE = 256
"""Slices whose smaller side is at least this long are decomposed in float32: fits only start from them."""


class Slices:
    """The exact sum of the SVDs of all kernel slices, after a rotation of the filters' modes to their main axes.

    Its components are orthogonal, so the first R by norm lose just the squared norms of the others:
    a start for every rank, and an upper bound of its error.
    """

    def __init__(self, weight: Tensor) -> None:
        modes = range(2, weight.ndim)
        self._bases = [mode_basis(weight, mode) for mode in modes]
        core = in_bases(weight, self._bases, modes)
        self._sizes = tuple(weight.shape[2:])
        places = core.flatten(2).movedim(2, 0)
        places = places.float() if min(places.shape[1:]) >= LARGE else places
        _, values, rows = (part.to(weight) for part in torch.linalg.svd(places, full_matrices=False))
        self._rows = rows.flatten(0, 1)  # (slices * min(out, in), in)
        self._order = values.flatten().argsort(descending=True, stable=True)
        self._values = values.shape[1]
        self.errors = tail_errors(values.flatten()[self._order].square().numpy())

    def filters(self, rank: int) -> list[Tensor]:
        """Returns the filters of the largest components, columns of norm 1."""
        chosen = self._order[:rank]
        positions = torch.unravel_index(chosen // self._values, self._sizes)
        pairs = zip(self._bases, positions, strict=True)
        return [self._rows[chosen].T, *(basis[:, index] for basis, index in pairs)]

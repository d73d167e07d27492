"""Large matrices: one eigendecomposition for the errors of every rank and for the factors of any.

`svd` and `interpolative` have the same factors up to a change of basis, and these follow from the eigenvectors of the
smaller Gram matrix. The kinds work each of them out anew, for the errors and for the factors; here it is made once
and kept. The weight is turned into wider numbers block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.plan import DENSE, LayerPlan
from lightning_compress.core.settings import RESOURCES
from lightning_compress.kinds.base import Floats, Ints, RankProfile, equalise_norms, pointwise, tail_errors
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.search.candidates import Candidates, _allowed, _dense_costs, _worth_considering
from lightning_compress.surgery.build import build_layer

KINDS = ("svd", "interpolative")
"""Kinds that are made from the eigenvectors."""
LEAST = 256
"""Matrices whose smaller side is below this are left to the kinds themselves, which are quick enough there."""
HALVES = (torch.bfloat16, torch.float16)
"""Dtypes whose own rounding errors are larger than those of single precision by a factor of 2^13 or more."""
BLOCK = 1024
"""Rows of a matrix that are worked on at once."""
SMALL_PIVOT = 1e-6
"""Share of the largest pivot below which a matrix is rank-deficient in single precision."""


class Basis(NamedTuple):
    """Eigenvectors of the smaller Gram matrix of a matrix.

    Attributes:
        energies: The eigenvalues, the squared singular values of the matrix, largest first, shape (n,).
        vectors: One in each row, (n, n), in the same order.
    """

    energies: Floats
    vectors: Tensor


def is_large_matrix(layer: Layer) -> bool:
    """Returns whether a layer is factorised here: by kinds made from one matrix, and large."""
    operator = layer.operator
    return (
        operator.groups == 1
        and not operator.is_spatial
        and set(layer.kinds) <= set(KINDS)
        and min(operator.shape[:2]) >= LEAST
    )


def decompose(layer: Layer) -> Basis:
    """Returns the eigenvectors of a layer's weight.

    They are worked out in single precision for weights in half precision, else in double; sums over blocks of rows are
    in double.

    Args:
        layer: With its weight in memory.
    """
    matrix = layer.canonical_weight().flatten(1)  # (out, in)
    precision = _precision(matrix)
    tall, n = matrix.shape[0] > matrix.shape[1], min(matrix.shape)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part in _blocks(matrix, 0 if tall else 1):
        wide = part.to(precision)
        gram += wide.T @ wide if tall else wide @ wide.T
    values, vectors = torch.linalg.eigh(gram.to(precision))
    energies = values.flip(0).double().clamp_min(0).numpy()
    return Basis(energies, vectors.T.flip(0).contiguous())


def tabulate_matrix(layer: Layer, energies: Floats, *, compared: Sequence[str], rank_multiple: int) -> Candidates:
    """Returns what `tabulate` does for a layer without a metric, from the energies of its `Basis`.

    Raises:
        ConfigurationError: If the layer's rank bounds leave no rank.
    """
    profile = RankProfile(np.arange(1, len(energies) + 1)[:, None], tail_errors(energies))
    rows = np.flatnonzero(_allowed(layer, profile.ranks, rank_multiple))
    if not len(rows):
        msg = (
            f"layer {layer.name!r}: no rank is a multiple of {rank_multiple} between min_rank={layer.min_rank} and "
            f"max_rank={layer.max_rank}; its largest rank is {len(energies)}. Loosen its override or rank_multiple."
        )
        raise ConfigurationError(msg)
    columns = [RESOURCES.index(name) for name in compared]
    found = [(kind, *_worth_considering(layer, kind, profile, rows, columns)) for kind in layer.kinds]
    return Candidates(
        name=layer.name,
        kinds=(*(kind for kind, ranks, *_ in found for _ in ranks), DENSE),
        ranks=(*(tuple(map(int, row)) for _, ranks, *_ in found for row in ranks), ()),
        errors=np.concatenate([*(errors for *_, errors, _ in found), np.zeros(1)]),
        energy=float(energies.sum()),
        costs=np.concatenate([*(costs for *_, costs in found), _dense_costs(layer)[None]]),
    )


def build_from(layer: Layer, planned: LayerPlan, vectors: Tensor) -> FactorisedLayer:
    """Returns what `build_layer` does, from the leading eigenvectors.

    Args:
        layer: With its weight in memory.
        planned: Of one of `KINDS`.
        vectors: The first rows of its `Basis`, (rank, n).
    """
    weight = layer.canonical_weight()
    shape = tuple(weight.shape)
    expand, reduce = _projected(weight.flatten(1), vectors)
    if planned.kind == "svd":
        expand, columns = equalise_norms(expand, reduce.T)
        reduce = columns.T
    else:
        expand, reduce = _interpolated(expand, reduce)
    new = build_layer(layer, planned, None, decompose=False)
    new.load_factors({"reduce": reduce.reshape(-1, *shape[1:]), "expand": pointwise(expand, len(shape) - 2)})
    padding, first = getattr(layer.module, "padding_idx", None), next(new.children())
    table = isinstance(first, (nn.Embedding, nn.EmbeddingBag))
    if table and padding is not None and not bool(layer.weight[padding].any()):  # to the last bit
        cast(Tensor, first.weight).detach()[padding] = 0
    return new


def _precision(matrix: Tensor) -> torch.dtype:
    return torch.float32 if matrix.dtype in HALVES else torch.float64


def _blocks(matrix: Tensor, dim: int) -> Iterator[Tensor]:
    """Yields a matrix in blocks along a dimension."""
    size = matrix.shape[dim]
    return (matrix.narrow(dim, start, min(BLOCK, size - start)) for start in range(0, size, BLOCK))


def _projected(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors (out, r) and (r, in) of a matrix projected on eigenvectors."""
    if matrix.shape[0] > matrix.shape[1]:
        parts = [part.to(vectors.dtype) @ vectors.T for part in _blocks(matrix, 0)]
        return torch.cat(parts), vectors
    parts = [vectors @ part.to(vectors.dtype) for part in _blocks(matrix, 1)]
    return vectors.T, torch.cat(parts, dim=1)


def _interpolated(expand: Tensor, reduce: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors of the same matrix of which r rows of the first are those of the identity.

    The triangular factor of the QR decomposition that chooses the rows has what the others are made of; where it is
    singular, that is left to the kind.
    """
    sized = expand * reduce.norm(dim=1)
    rank = sized.shape[1]
    triangle, order = scipy.linalg.qr(sized.T.numpy(), mode="r", pivoting=True, check_finite=False)
    diagonal = np.abs(np.diagonal(triangle))
    if diagonal[rank - 1] <= SMALL_PIVOT * diagonal[0]:
        names = ("reduce", "expand")
        found = DECOMPOSITIONS["interpolative"].finished(
            dict(zip(names, (reduce.double(), expand.double()), strict=True))
        )
        return found["expand"], found["reduce"]
    others = scipy.linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, rank:], check_finite=False)
    places: Ints = np.asarray(order, dtype=np.int64)
    rows = torch.empty_like(sized)
    rows[torch.from_numpy(places[:rank])] = torch.eye(rank, dtype=rows.dtype)
    rows[torch.from_numpy(places[rank:])] = torch.from_numpy(np.ascontiguousarray(others.T))
    return rows, expand[torch.from_numpy(places[:rank])] @ reduce

"""Singular values of dense weights beside the ranks that a plan chose for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer, list_layers
from lightning_compress.core.plan import LayerPlan, Plan

MOST_LAYERS = 12
"""Layers that are looked at, the largest first."""
MOST_SIDE = 2048
"""Of larger matrices (their shorter side) the singular values would take too long."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one unfolding of a dense weight.

    Attributes:
        unfolding: What the rows and columns of the matrix are, such as "outputs x inputs".
        values: Its singular values over the largest, falling.
        rank: The rank that was chosen for it; None if the layer stays dense, or its kind has no rank of this matrix.
    """

    unfolding: str
    values: npt.NDArray[np.float64]
    rank: int | None = None

    @property
    def energy(self) -> float | None:
        """Share of the squared singular values up to the rank."""
        if self.rank is None:
            return None
        squares = self.values**2
        return float(squares[: self.rank].sum() / squares.sum()) if squares.any() else 1.0


@dataclass(frozen=True)
class LayerSpectra:
    """The spectra of one layer: one, or one for each side of a Tucker-2 or tensor train.

    Attributes:
        layer: What was planned for it.
        spectra: Of its unfoldings.
    """

    layer: LayerPlan
    spectra: tuple[Spectrum, ...]


def spectra_of(plan: Plan, dense: nn.Module, most: int = MOST_LAYERS) -> tuple[tuple[LayerSpectra, ...], int]:
    """Returns the spectra of the layers that could be factorised, the largest first.

    Args:
        plan: Of the model.
        dense: The model before it was compressed; layers that the plan names and it does not have are left out.
        most: Layers at most.

    Returns:
        The spectra, of the first group of a grouped layer, and the number of layers left out.
    """
    found = {layer.name: layer for layer in list_layers(dense)}
    known = [(layer, found[layer.name]) for layer in plan.layers if layer.weight_shape and layer.name in found]
    wanted = sum(bool(layer.weight_shape) for layer in plan.layers)
    known.sort(key=lambda pair: -math.prod(pair[0].weight_shape))
    shown: list[LayerSpectra] = []
    for planned, layer in known:
        if len(shown) == most:
            break
        if spectra := _spectra(planned, layer):
            shown.append(LayerSpectra(planned, spectra))
    return tuple(shown), wanted - len(shown)


def _spectra(planned: LayerPlan, layer: Layer) -> tuple[Spectrum, ...]:
    """Returns none where the matrices are too large, or have no numbers."""
    if layer.reason is not None or planned.weight_shape != layer.weight_shape or layer.weight.is_meta:
        return ()
    weight = layer.double_weight()[: layer.operator.shape[0]]
    spectra = []
    for name, unfold, rank in _unfoldings(planned):
        matrix = unfold(weight)
        if min(matrix.shape) > MOST_SIDE or not bool(matrix.isfinite().all()):
            return ()
        spectra.append(Spectrum(name, _singular_values(matrix), rank))
    return tuple(spectra)


_Unfold = Callable[[Tensor], Tensor]


def _outputs(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _inputs(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flatten(1)


def _spatial(weight: Tensor) -> Tensor:
    """Returns the matrix that spatial SVD splits, (out · k_w, in · k_h)."""
    columns = weight.flatten(3).permute(0, 3, 1, 2)
    return columns.reshape(columns.shape[0] * columns.shape[1], -1)


def _unfoldings(planned: LayerPlan) -> Sequence[tuple[str, _Unfold, int | None]]:
    """Returns name, matrix and chosen rank of what the ranks of a layer are ranks of."""
    ranks = planned.ranks
    if planned.kind in {"svd", "interpolative", "channel_svd"}:
        return [("outputs", _outputs, ranks[0])]
    if planned.kind == "spatial_svd":
        return [("outputs and columns", _spatial, ranks[0])]
    if planned.kind == "tucker2":
        return [("outputs", _outputs, ranks[0]), ("inputs", _inputs, ranks[1])]
    if planned.kind == "tt":
        return [("outputs", _outputs, ranks[-1]), ("inputs", _inputs, ranks[0])]
    return [("outputs", _outputs, None)]


def _singular_values(matrix: Tensor) -> npt.NDArray[np.float64]:
    """Returns the singular values over the largest, from the smaller Gram matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    energies = torch.linalg.eigvalsh(matrix @ matrix.T).clamp_min(0).flip(0)
    values = energies.sqrt()
    return (values / values[0]).numpy() if float(values[0]) > 0 else np.zeros(len(values))

"""Least squares in the metric of a layer's inputs: ‖(W − Ŵ) S^½‖_F with S = E[x xᵀ].

S is the second moment of what enters the layer, unfolded like the weight: shape (D, D) with
D = in for nn.Linear and in·k_h·k_w for convolutions. All of it is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.decompositions.base import Floats

RIDGE = 1e-6
"""Added to the diagonal of a second moment, relative to its mean: inputs that never vary stay defined."""


def regularised(metric: Tensor, ridge: float = RIDGE) -> Tensor:
    """Returns S with a ridge, symmetric positive definite, (D, D)."""
    scale = metric.diagonal().mean().clamp_min(torch.finfo(metric.dtype).tiny)
    return (metric + metric.T) / 2 + ridge * scale * torch.eye(len(metric), dtype=metric.dtype)


def energy(weight: Tensor, metric: Tensor) -> float:
    """Returns ‖W S^½‖²_F = tr(W S Wᵀ) of W, (out, D)."""
    return float(((weight @ metric) * weight).sum())


def output_basis(weight: Tensor, metric: Tensor) -> tuple[Floats, Tensor]:
    """Returns the energies of W S Wᵀ, largest first, and their directions, (out,) and (out, out)."""
    values, vectors = torch.linalg.eigh(weight @ metric @ weight.T)
    energies: Floats = values.clamp_min(0).flip(0).numpy()
    return energies, vectors.flip(1)


def whitened_targets(features: Tensor, cross: Tensor) -> Tensor:
    """Returns Y = L⁻¹ C with F = L Lᵀ, for nested least squares.

    Args:
        features: F = Φ S Φᵀ of the features Φ x, (n, n); leading blocks are the smaller problems.
        cross: C = Φ S Wᵀ, (n, out).

    Returns:
        (n, out). The first m rows are those of the problem with the first m features alone, whose
        explained energy is the sum of their squares.
    """
    root = torch.linalg.cholesky(features)
    targets: Tensor = torch.linalg.solve_triangular(root, cross, upper=False)
    return targets


def solvable(features: Tensor) -> Tensor:
    """Returns a Gram matrix with a relative ridge of 1e-10, so that it can be factored."""
    scale = features.diagonal().mean()
    return features + 1e-10 * scale * torch.eye(len(features), dtype=features.dtype)

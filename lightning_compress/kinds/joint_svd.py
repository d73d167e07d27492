"""Linear layers that read the same input share their first factor: query, key and value projections.

W_i ≈ E_i R with one R, (r, in), for all of them: the SVD of the stacked weights, each in units of its
own energy so that none counts more than the others. The layers then hold r · (in + Σ out_i)
weights instead of Σ r_i · (in + out_i).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_compress.kinds.base import Floats, equalise_norms, tail_errors
from lightning_compress.kinds.metric import Metric, regularised


def joint_errors(weights: Sequence[Tensor], metrics: Sequence[Metric | None]) -> Floats:
    """Returns ‖G_i^½ (W_i − E_i R) S^½‖² / ‖G_i^½ W_i S^½‖² of every layer at the ranks 1, 2, … in, (ranks, layers).

    Args:
        weights: W_i, (out_i, in) float64.
        metrics: Of each layer; S is the first one's, as they read the same.
    """
    whitened, basis, _ = _joint(weights, metrics)
    energies = [(weight @ basis).square().sum(dim=0).numpy() for weight in whitened]
    return np.stack([tail_errors(energy) for energy in energies], axis=1)


def joint_factors(
    weights: Sequence[Tensor], metrics: Sequence[Metric | None], rank: int
) -> tuple[Tensor, list[Tensor]]:
    """Returns R, (r, in), and every E_i, (out_i, r), with the norms of a component shared out evenly."""
    _, basis, root = _joint(weights, metrics)
    basis = basis[:, :rank]
    reduce, inputs = (basis.T, basis) if root is None else (_solved(root, basis.T), root @ basis)
    stacked = torch.cat([weight @ inputs for weight in weights])
    size = len(weights) ** 0.5  # a component counts with its mean over the layers
    first, last = equalise_norms(reduce.T, stacked / size)
    return first.T, list(torch.split_with_sizes(last * size, [len(weight) for weight in weights]))


def _joint(weights: Sequence[Tensor], metrics: Sequence[Metric | None]) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Returns the whitened weights G_i^½ W_i L, their common right basis (in, in) and L with S = L Lᵀ."""
    inputs = metrics[0].inputs if metrics[0] is not None else None
    root = torch.linalg.cholesky(regularised(inputs)) if inputs is not None else None
    whitened = []
    for weight, metric in zip(weights, metrics, strict=True):
        weighed = metric.weigh(weight) if metric is not None else weight
        whitened.append(weighed if root is None else weighed @ root)
    tiny = torch.finfo(weights[0].dtype).tiny
    gram = torch.stack([w.T @ w / w.square().sum().clamp_min(tiny) for w in whitened]).sum(dim=0)
    return whitened, torch.linalg.eigh(gram)[1].flip(1), root


def _solved(root: Tensor, rows: Tensor) -> Tensor:
    """Returns rows L⁻¹."""
    solution: Tensor = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    return solution

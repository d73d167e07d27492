"""Whether the weights of a model look like those it was initialised with: their spectra are those of random matrices.

The singular values of an (m, n) matrix of independent entries of deviation σ end at σ (√m + √n), the edge of Marchenko
and Pastur 1967; those of orthogonal matrices end below. Training puts some far beyond.
"""

from __future__ import annotations

from warnings import warn

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import list_layers
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.layers.unfused import unfused

LEAST_SIDE = 64
"""Rows and columns of a weight that says something, at least."""
LEAST_LAYERS = 3
MOST_LAYERS = 8
EDGE = 1.1
"""Largest singular value in units of the edge up to which a matrix counts as random."""
STEPS = 20


def warn_of_untrained(model: nn.Module) -> None:
    """Warns if every large layer of a model looks like a random matrix."""
    if looks_untrained(model):
        msg = (
            "the weights look untrained: the spectra of the largest layers are those of random matrices, which say "
            "nothing of the ranks that a trained model needs. Load trained weights or train first; where this is "
            "meant, ignore the warning."
        )
        warn(msg, CompressionWarning, stacklevel=4)


def looks_untrained(model: nn.Module) -> bool:
    """Returns whether the largest layers that can be factorised look like random matrices; false for few or small ones.

    All of them have to: one that is trained says that the model is.
    """
    with unfused(model):
        layers = [layer for layer in list_layers(model) if layer.reason is None]
    weights = [layer.canonical_weight().detach().flatten(1) for layer in layers]
    large = sorted((w for w in weights if min(w.shape) >= LEAST_SIDE), key=lambda w: -w.numel())[:MOST_LAYERS]
    return len(large) >= LEAST_LAYERS and all(edge_ratio(weight) <= EDGE for weight in large)


@torch.no_grad()
def edge_ratio(weight: Tensor) -> float:
    """Returns the largest singular value of a matrix in units of the edge of a random one of the same energy."""
    matrix = weight.float()
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(STEPS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp_min(torch.finfo(torch.float32).tiny)
    edge = matrix.square().mean().sqrt() * sum(side**0.5 for side in matrix.shape)
    return float((matrix @ vector).norm() / edge) if float(edge) else 0.0

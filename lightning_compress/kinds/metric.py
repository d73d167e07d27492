"""Least squares in the metric of a layer: ‖G^½ (W − Ŵ) S^½‖_F with S = E[x xᵀ] and G = E[g gᵀ].

S is the second moment of what enters the layer, unfolded like the weight: shape (D, D) with
D = in for nn.Linear and in·k_h·k_w for convolutions. G, (out, out), is that of the gradients of the
model's outputs by the layer's own: what of an error reaches the outputs at all. The product of the
two is the Kronecker-factored Gauss-Newton approximation of the outputs' squared error (Martens and
Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", section 3).
All of it is float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.store import key_of
from lightning_compress.kinds.base import Floats
from lightning_compress.kinds.shrinkage import Folds, UnseenErrors

RIDGE = 1e-6
"""Added to the diagonal of a second moment, relative to its mean: inputs that never vary stay defined."""


OUTPUT_FLOOR = 0.05
"""Share of the identity in G: directions that never reached the outputs still count a little."""


@dataclass(frozen=True)
class Metric:
    """In what the error of a layer's factors is measured.

    Attributes:
        inputs: S, (D, D); None for the identity.
        outputs: G, (out, out); None for the identity. Only its shape matters, not its scale.
        folds: What says how errors grow on inputs that S was not made from; None for not at all.
        channels: S of the input channels alone, (in, in), in the place of `inputs` where that would be too large: as if
            what enters at one place of the kernel said nothing of the others. A change of the basis of the inputs, as
            the first factor of every kind takes all of them. Of one group.
        fits: Factors of iterative fits in this metric, see `fit_factors`: what the search has fitted is what the swap
            installs.

    Those of several groups have a leading dimension of that size, see `group`.
    """

    inputs: Tensor | None
    outputs: Tensor | None = None
    folds: Folds | None = None
    channels: Tensor | None = None
    fits: dict[tuple[object, ...], dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was fitted: workers, which copies are sent to, need not see it."""
        return {**vars(self), "fits": {}}

    @functools.cached_property
    def digest(self) -> str:
        """Of all that fits depend on."""
        return key_of("metric", self.inputs, self.outputs, self.channels)

    @functools.cached_property
    def _groups(self) -> tuple[Metric, ...]:
        known = self.inputs if self.inputs is not None else self.outputs
        count = len(known) if known is not None else 0

        def part(of: Tensor | None, index: int) -> Tensor | None:
            return of[index] if of is not None else None

        return tuple(
            Metric(part(self.inputs, i), part(self.outputs, i), self.folds.group(i) if self.folds else None)
            for i in range(count)
        )

    def group(self, index: int) -> Metric:
        """Returns the metric of one group of several."""
        return self._groups[index]

    @functools.cached_property
    def _roots(self) -> tuple[Tensor, Tensor] | None:
        """G^½ and G^-½ of the floored G, None for the identity."""
        if self.outputs is None:
            return None
        scale = self.outputs.diagonal().mean()
        if not scale > 0:
            return None
        floored = (1 - OUTPUT_FLOOR) * self.outputs / scale
        floored = floored + OUTPUT_FLOOR * torch.eye(len(floored), dtype=floored.dtype)
        values, vectors = torch.linalg.eigh((floored + floored.T) / 2)
        root = values.clamp_min(OUTPUT_FLOOR / 2).sqrt()
        return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T

    @functools.cached_property
    def _channel_roots(self) -> tuple[Tensor, Tensor] | None:
        """L and L⁻¹ of S = L Lᵀ of the channels, None for the identity."""
        if self.channels is None:
            return None
        root = torch.linalg.cholesky(regularised(self.channels))
        eye = torch.eye(len(root), dtype=root.dtype)
        return root, torch.linalg.solve_triangular(root, eye, upper=False)

    def unseen(self, groups: int = 1) -> UnseenErrors | None:
        """Returns how errors grow on inputs that S was not made from, None if unknown.

        Args:
            groups: Of the layer.
        """
        if self.folds is None:
            return None
        metrics = [self.group(i) for i in range(groups)] if groups > 1 else [self]
        return UnseenErrors.mean(
            [m.folds.errors(m._roots[0] if m._roots is not None else None) for m in metrics if m.folds is not None]
        )

    def weigh(self, weight: Tensor) -> Tensor:
        """Returns G^½ W, in the shape of the weight (out, …), with the inputs in the basis of their channels."""
        weighed = weight if self._roots is None else (self._roots[0] @ weight.flatten(1)).reshape(weight.shape)
        return weighed if self._channel_roots is None else _on_inputs(weighed, self._channel_roots[0])

    def unweigh(self, weight: Tensor) -> Tensor:
        """Returns G^-½ W, in the shape of the weight (out, …)."""
        return weight if self._roots is None else (self._roots[1] @ weight.flatten(1)).reshape(weight.shape)

    def unweigh_inputs(self, factor: Tensor) -> Tensor:
        """Returns the first factor, (r, in, …), for the inputs as they are."""
        return factor if self._channel_roots is None else _on_inputs(factor, self._channel_roots[1])


def _on_inputs(weight: Tensor, matrix: Tensor) -> Tensor:
    """Returns a weight (n, in, …) times a matrix (in, in) on its inputs."""
    product: Tensor = torch.tensordot(weight, matrix, dims=([1], [0])).movedim(-1, 1)
    return product.contiguous()


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

"""Tucker-2: the two channel modes of a convolution are compressed, the spatial ones kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor
from typing_extensions import override

from lightning_compress.kinds.base import (
    Decomposition,
    Ints,
    Operator,
    RankProfile,
    Stage,
    along,
    pointwise,
)
from lightning_compress.kinds.metric import energy, regularised, solvable, whitened_targets
from lightning_compress.kinds.multilinear import in_bases, mode_basis, tensorly_backend
from lightning_compress.kinds.svd import axes_of, needs_spatial_kernel


class Tucker2(Decomposition):
    """1x1 into r_in channels, k_h x k_w into r_out, 1x1 out; ranks are (r_out, r_in).

    Errors are those of the truncated higher-order SVD, which one decomposition gives for every
    pair of ranks; the factors are then refined by higher-order orthogonal iteration, which can
    only lower them, so the predicted error is an upper bound.

    Source: Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low
    Power Mobile Applications", section 3; De Lathauwer et al. 2000 for HOSVD and HOOI.
    """

    kind = "tucker2"
    refines = True

    @override
    def unsupported(self, operator: Operator) -> str | None:
        return needs_spatial_kernel(operator, self.kind)

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        out, in_, *kernel = shape
        size = int(np.prod(kernel))
        return min(out, in_ * size), min(in_, out * size)

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        if metric is not None and bool(metric.any()) and bool(weight.any()):
            return _TuckerFit(weight, metric).profile()
        limits = self.max_ranks(tuple(weight.shape))
        bases = [mode_basis(weight, mode)[:, :limit] for mode, limit in enumerate(limits)]
        kept = in_bases(weight, bases, (0, 1)).square().flatten(2).sum(dim=2).cumsum(0).cumsum(1)
        total = kept[-1, -1]
        errors = (1 - kept / total).clamp(0, 1) if total > 0 else torch.zeros_like(kept)
        grid = np.indices(limits).reshape(2, -1).T + 1
        return RankProfile(ranks=grid, errors=errors.reshape(-1).numpy())

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        (out, in_), (r_out, r_in) = shape[:2], ranks.T
        return Stage("reduce", r_in, in_), Stage("core", r_out, r_in, axes_of(shape)), Stage("expand", out, r_out)

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        if metric is not None and bool(metric.any()) and bool(weight.any()):
            return _TuckerFit(weight, metric).fit(*ranks)
        if not bool(weight.any()):  # nothing to iterate on; bases that are not zero let the core train
            (r_out, r_in), (out, in_, *kernel) = ranks, weight.shape
            return {
                "reduce": pointwise(torch.eye(r_in, in_, dtype=weight.dtype), len(kernel)),
                "core": torch.zeros(r_out, r_in, *kernel, dtype=weight.dtype),
                "expand": pointwise(torch.eye(out, r_out, dtype=weight.dtype), len(kernel)),
            }
        # LAPACK through numpy takes half the time of "pytorch" on small kernels.
        with tensorly_backend("numpy"), warnings.catch_warnings():  # ranks beyond the other mode's are harmless
            warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
            (core, (u_out, u_in)), _ = partial_tucker(
                weight.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=50, tol=1e-7, random_state=0
            )
        # The bases are orthonormal: put the core's scale into all three factors, so that they train alike.
        scale = (np.linalg.norm(core) / np.sqrt(core.size)) ** (1 / 3)
        core, u_out, u_in = (torch.from_numpy(np.ascontiguousarray(a)) for a in (core, u_out, u_in))
        return {
            "reduce": pointwise(u_in.T * scale, weight.ndim - 2),
            "core": core / scale**2,
            "expand": pointwise(u_out * scale, weight.ndim - 2),
        }

    @override
    def gated(self, factors: Mapping[str, Tensor], gates: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """Gates the basis of the outputs with the first rank and that of the inputs with the second."""
        reduce, expand = factors["reduce"], factors["expand"]
        return {
            **factors,
            "reduce": along(reduce, gates(1, len(reduce))),
            "expand": along(expand, gates(0, expand.shape[1]), dim=1),
        }

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        reduce, core, expand = (factors[name].flatten(2) for name in ("reduce", "core", "expand"))
        return torch.einsum("or,rsk,si->oik", expand[:, :, 0], core, reduce[:, :, 0]).reshape(shape)


class _TuckerFit:
    """Tucker-2 in the metric: input channels from the channel moments, the rest by least squares.

    The input map is the whitened mode-1 basis in the metric of one kernel position, averaged over
    the positions; given it, core and output basis are the exact minimum of ‖(W − Ŵ) S^½‖_F by
    reduced-rank regression, nested in the input rank.
    """

    def __init__(self, weight: Tensor, metric: Tensor) -> None:
        _, in_, *size = weight.shape
        self._shape, self._kernel = tuple(weight.shape), int(np.prod(size))
        kernel = self._kernel
        self._weight = weight.flatten(1)
        metric = regularised(metric)
        self._metric = metric.reshape(in_, kernel, in_, kernel)
        channels = torch.einsum("ikjl,kl->ij", self._metric, torch.eye(kernel, dtype=weight.dtype)) / kernel
        root = torch.linalg.cholesky(channels)
        mode = root.T @ weight.transpose(0, 1).flatten(1)  # (in, out * k_h * k_w)
        basis = mode_basis(mode, 0)[:, : min(mode.shape)]
        self._reduce = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)  # (r, in): Qᵀ L⁻¹
        self.total = energy(self._weight, metric)

    def _normal(self, reduce: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.einsum("ri,ikjl->rkjl", reduce, self._metric)
        features = torch.einsum("rkjl,qj->rkql", half, reduce)
        n = len(reduce) * self._kernel
        weight = self._weight.reshape(-1, self._shape[1], self._kernel)
        return features.reshape(n, n), torch.einsum("rkjl,ojl->rko", half, weight).reshape(n, -1)

    def profile(self) -> RankProfile:
        features, cross = self._normal(self._reduce)
        targets = whitened_targets(solvable(features), cross).reshape(len(self._reduce), self._kernel, -1)
        grams = torch.einsum("rko,rkp->rop", targets, targets).cumsum(0)  # (r_in, out, out)
        limit = min(self._shape[0], self._shape[1] * self._kernel)
        energies = torch.linalg.eigvalsh(grams).flip(1)[:, :limit].clamp_min(0).cumsum(1)  # (r_in, r_out)
        errors = (1 - energies / self.total).clamp(0, 1).T  # (r_out, r_in)
        grid = np.indices(tuple(errors.shape)).reshape(2, -1).T + 1
        return RankProfile(ranks=grid, errors=errors.reshape(-1).numpy())

    def fit(self, r_out: int, r_in: int) -> dict[str, Tensor]:
        kernel = self._shape[2:]
        reduce = self._reduce[:r_in]
        features, cross = self._normal(reduce)
        features = solvable(features)
        mapping = torch.linalg.solve(features, cross).T  # (out, r_in * kernel)
        _, vectors = torch.linalg.eigh(mapping @ features @ mapping.T)
        expand = vectors.flip(1)[:, :r_out]
        core = expand.T @ mapping
        norms = [f.norm() / f.numel() ** 0.5 for f in (reduce, core, expand)]
        mean = (norms[0] * norms[1] * norms[2]).clamp_min(1e-300) ** (1 / 3)
        scales = [mean / n.clamp_min(1e-300) for n in norms]
        return {
            "reduce": pointwise(reduce * scales[0], len(kernel)),
            "core": (core * scales[1]).reshape(r_out, r_in, *kernel),
            "expand": pointwise(expand * scales[2], len(kernel)),
        }

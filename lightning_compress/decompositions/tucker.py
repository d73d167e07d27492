"""Tucker-2: the two channel modes of a convolution are compressed, the spatial ones kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from tensorly.base import unfold
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import Tensor, nn
from typing_extensions import override

from lightning_compress.decompositions.base import (
    Decomposition,
    Floats,
    Ints,
    LayerCall,
    RankProfile,
    conv_like,
)
from lightning_compress.decompositions.svd import needs_spatial_kernel


class Tucker2(Decomposition):
    """1x1 into r_in channels, k_h x k_w into r_out, 1x1 out; ranks are (r_out, r_in).

    Errors are those of the truncated higher-order SVD, which one decomposition gives for every
    pair of ranks; the factors are then refined by higher-order orthogonal iteration, which can
    only lower them, so the predicted error is an upper bound.

    Source: Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low
    Power Mobile Applications", section 3; De Lathauwer et al. 2000 for HOSVD and HOOI.
    """

    kind = "tucker2"

    @override
    def unsupported(self, layer: nn.Module) -> str | None:
        return needs_spatial_kernel(layer, self.kind)

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        out, in_, k_h, k_w = shape
        return min(out, in_ * k_h * k_w), min(in_, out * k_h * k_w)

    @override
    def profile(self, weight: Tensor) -> RankProfile:
        array = weight.numpy()
        max_out, max_in = self.max_ranks(array.shape)
        bases = [_mode_basis(array, mode) for mode in (0, 1)]
        core = multi_mode_dot(array, bases, modes=[0, 1], transpose=True)
        energy = np.square(core).sum(axis=(2, 3))  # (max_out, max_in)
        kept = energy.cumsum(axis=0).cumsum(axis=1)
        total = kept[-1, -1]
        errors: Floats = np.clip(1 - kept / total, 0.0, 1.0) if total > 0 else np.zeros_like(kept)
        grid = np.indices((max_out, max_in)).reshape(2, -1).T + 1
        return RankProfile(ranks=grid, errors=errors.reshape(-1))

    @override
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        out, in_, k_h, k_w = shape
        r_out, r_in = ranks[:, 0], ranks[:, 1]
        return in_ * r_in + k_h * k_w * r_in * r_out + out * r_out

    @override
    def macs(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        out, in_, k_h, k_w = shape
        r_out, r_in = ranks[:, 0], ranks[:, 1]
        before, after = (int(np.prod(size)) * call.rows for size in (call.inputs, call.outputs))
        return in_ * r_in * before + (k_h * k_w * r_in * r_out + out * r_out) * after

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...]) -> dict[str, Tensor]:
        if not bool(weight.any()):  # nothing to iterate on; bases that are not zero let the core train
            (r_out, r_in), (out, in_, k_h, k_w) = ranks, weight.shape
            return {
                "reduce": torch.eye(r_in, in_, dtype=weight.dtype)[:, :, None, None],
                "core": torch.zeros(r_out, r_in, k_h, k_w, dtype=weight.dtype),
                "expand": torch.eye(out, r_out, dtype=weight.dtype)[:, :, None, None],
            }
        with warnings.catch_warnings():  # ranks beyond what the other mode allows are harmless
            warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
            (core, (u_out, u_in)), _ = partial_tucker(
                weight.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=50, tol=1e-7
            )
        # The bases are orthonormal: put the core's scale into all three factors, so that they train alike.
        scale = (np.linalg.norm(core) / np.sqrt(core.size)) ** (1 / 3)
        core, u_out, u_in = (torch.from_numpy(np.ascontiguousarray(a)) for a in (core, u_out, u_in))
        return {
            "reduce": (u_in.T * scale)[:, :, None, None],
            "core": core / scale**2,
            "expand": (u_out * scale)[:, :, None, None],
        }

    @override
    def children(self, layer: nn.Module, ranks: tuple[int, ...]) -> dict[str, nn.Module]:
        conv = cast(nn.Conv2d, layer)
        r_out, r_in = ranks
        return {
            "reduce": conv_like(conv, conv.in_channels, r_in, axes=()),
            "core": conv_like(conv, r_in, r_out),
            "expand": conv_like(conv, r_out, conv.out_channels, axes=(), bias=conv.bias is not None),
        }

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        reduce, expand = (factors[name][:, :, 0, 0] for name in ("reduce", "expand"))
        return torch.einsum("or,rshw,si->oihw", expand, factors["core"], reduce)


def _mode_basis(array: Floats, mode: int) -> Floats:
    """Returns the left singular vectors of an unfolding, (size of the mode, its rank)."""
    matrix = unfold(array, mode)
    _, vectors = np.linalg.eigh(matrix @ matrix.T)  # ascending
    return cast(Floats, vectors[:, ::-1][:, : min(matrix.shape)])

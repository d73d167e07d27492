"""CP fits of trained and random kernels: time, and error against the best of ten random starts.

python -m benchmarks.cp_fit

About 4 minutes on two idle cores. The random starts get 60 sweeps each of the same alternating least squares,
without the correction of the norms.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import publish, reference
from lightning_compress.kinds.cp import _Canonical
from lightning_compress.kinds.cp_fit import _random_filters
from lightning_compress.kinds.cp_problem import Problem
from lightning_compress.kinds.registry import DECOMPOSITIONS

STARTS = 10
SWEEPS = 60


def main() -> None:
    """Prints one row per kernel and kind."""
    trained = dict(reference("vgg").named_parameters())
    generator = torch.Generator().manual_seed(0)
    kernels = {
        "vgg features.7.0": (trained["features.7.0.weight"].detach().double(), 128),
        "random": (torch.randn(512, 512, 3, 3, dtype=torch.float64, generator=generator), 128),
    }
    rows = [_row(name, kind, *kernels[name]) for name in kernels for kind in ("cp", "cp3")]
    publish("cp_fit", f"CP fits, ‖W − Ŵ‖ / ‖W‖, against {STARTS} random starts of {SWEEPS} sweeps", rows)


def _row(name: str, kind: str, kernel: Tensor, rank: int) -> dict[str, Any]:
    decomposition = DECOMPOSITIONS[kind]
    assert isinstance(decomposition, _Canonical)
    shape = tuple(kernel.shape)
    start = time.perf_counter()
    profile = decomposition.profile(kernel)
    profiled = time.perf_counter() - start
    start = time.perf_counter()
    factors = decomposition.factorise(kernel, (rank,))
    seconds = time.perf_counter() - start
    error = float((decomposition.dense_weight(factors, shape) - kernel).norm() / kernel.norm())
    dims = decomposition._dims(shape)
    problem = Problem.of(kernel.reshape(dims), None)
    others = [problem.run(_random_filters(dims[1:], rank, 100 + i), SWEEPS).error ** 0.5 for i in range(STARTS)]
    return {
        "kernel": name,
        "shape": "x".join(map(str, shape)),
        "kind": kind,
        "rank": rank,
        "profile s": profiled,
        "fit s": seconds,
        "predicted": float(profile.errors[rank - 1]) ** 0.5,
        "error": error,
        "best of ten": min(others),
        "worst of ten": max(others),
        "error / best": error / min(others),
    }


if __name__ == "__main__":
    main()

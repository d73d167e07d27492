"""Compressions that are quick enough for tests of everything else."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_compress import Budget, Compress, compress_, search_ranks
from lightning_compress.compress import Compression, compress_model_
from lightning_compress.core.settings import SearchSettings

WEIGHTS_ALONE = {"objective": "weight", "heal": False}
"""No synthetic inputs: fast, and the factors are those of the weights, for tests of everything else."""


DEFAULTS = {"objective": "auto", "heal": True}


CLOSED_FORM = ("svd", "spatial_svd", "tucker2")
"""Kinds that need no iterative fit: of a tiny net CP takes longer than all else, and only its own tests need it."""


BESIDE_SETTINGS = ("example_input", "calibration", "statistics", "heal", "progress")


def compressed_model(model: nn.Module, budget, **arguments) -> Compression:
    """All that `compress_` does, with its keywords."""
    beside = {name: arguments.pop(name) for name in BESIDE_SETTINGS if name in arguments}
    return compress_model_(model, budget, SearchSettings(**arguments), **beside)


def compress(params: float = 0.4, **settings) -> Compress:
    return Compress(Budget(params=params), **{"method": "exact", "kinds": CLOSED_FORM, **WEIGHTS_ALONE, **settings})


def entrances(net: nn.Module, **settings) -> list[Callable[[], object]]:
    """Every entrance that takes the settings of a search, with these."""
    budget = Budget(params=0.5)
    return [
        lambda: search_ranks(net, budget, **settings),
        lambda: compress_(net, budget, **settings),
        lambda: Compress(budget, **settings),
    ]

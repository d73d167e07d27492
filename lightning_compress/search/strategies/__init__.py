"""Search strategies, one a file; importing this package registers them."""

from lightning_compress.search.strategies.continuous import search_continuous
from lightning_compress.search.strategies.energy import search_energy
from lightning_compress.search.strategies.exact import search_exact
from lightning_compress.search.strategies.paper import search_paper
from lightning_compress.search.strategies.registry import (
    STRATEGIES,
    RegisteredStrategy,
    Strategy,
    register_strategy,
    strategy_of,
)
from lightning_compress.search.strategies.uniform import search_uniform

__all__ = [
    "STRATEGIES",
    "RegisteredStrategy",
    "Strategy",
    "register_strategy",
    "search_continuous",
    "search_energy",
    "search_exact",
    "search_paper",
    "search_uniform",
    "strategy_of",
]

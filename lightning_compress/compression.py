"""Compression without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.config import Budget
from lightning_compress.plan import Plan
from lightning_compress.search import search_ranks
from lightning_compress.swap import apply_plan_
from lightning_compress.tracing import ExampleInput


def compress_(
    model: nn.Module, budget: Budget | Mapping[str, Any], *, example_input: ExampleInput | None = None, **settings: Any
) -> Plan:
    """Searches the ranks and swaps in the factorised layers, in place.

    Args:
        model: Any module.
        budget: Upper bounds, see `Budget`.
        example_input: See `search_ranks`.
        **settings: Any other argument of `search_ranks`.

    Returns:
        The plan that was applied.

    Raises:
        LightningCompressError: As `search_ranks` and `apply_plan_`; the model is then as it was.
    """
    plan = search_ranks(model, budget, example_input=example_input, **settings)
    apply_plan_(model, plan)
    return plan

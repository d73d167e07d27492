"""The whole compression of a model in one call: search, swap, repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.config import Budget
from lightning_compress.copying import detached_copy
from lightning_compress.errors import ExampleInputError
from lightning_compress.heal import Healing, heal_
from lightning_compress.moments import gather_statistics
from lightning_compress.plan import Plan
from lightning_compress.progress import Progress, silent
from lightning_compress.search import search_ranks
from lightning_compress.swap import Replacement, apply_plan_, uninstall
from lightning_compress.tracing import ExampleInput


def compress_(
    model: nn.Module, budget: Budget | Mapping[str, Any], *, example_input: ExampleInput | None = None, **settings: Any
) -> Plan:
    """Searches the ranks, swaps in the factorised layers and repairs them, in place.

    Args:
        model: Any module.
        budget: Upper bounds, see `Budget`.
        example_input: See `search_ranks`.
        **settings: `heal`, whether to repair the factors on synthetic inputs (False by default),
            and any other argument of `search_ranks`.

    Returns:
        The plan that was applied.

    Raises:
        LightningCompressError: As `search_ranks` and `apply_plan_`; the model is then as it was.
    """
    return compress_model_(model, budget, example_input=example_input, **settings).plan


@dataclass(frozen=True)
class Compression:
    """What was done to a model.

    Attributes:
        plan: The plan that was applied.
        replacements: What was replaced by what.
        healing: What the repair did, None without one.
        biases: The dense layers' biases as they were before it.
    """

    plan: Plan
    replacements: tuple[Replacement, ...]
    healing: Healing | None
    biases: tuple[Tensor | None, ...]

    def undo_(self, model: nn.Module) -> None:
        """Puts the dense layers back, their biases as they were before the repair."""
        uninstall(model, self.replacements)
        with torch.no_grad():
            for replacement, bias in zip(self.replacements, self.biases, strict=True):
                if bias is not None:
                    cast(nn.Parameter, replacement.dense.bias).copy_(bias)


def compress_model_(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    *,
    example_input: ExampleInput | None = None,
    objective: str = "auto",
    heal: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Compression:
    """Like `compress_`, and returns all that was done.

    Raises:
        ExampleInputError: If statistics are needed and there is no example input to make them with.
    """
    report = progress or silent
    statistics = None
    if heal or objective == "moments":
        if example_input is None:
            msg = "heal=True and objective='moments' need an example_input to make synthetic inputs with."
            raise ExampleInputError(msg)
        statistics = gather_statistics(model, example_input, seed=seed, progress=report)
    metric = statistics if objective == "moments" else None
    plan = search_ranks(
        model,
        budget,
        example_input=example_input,
        objective=objective,
        statistics=metric,
        seed=seed,
        progress=progress,
        **settings,
    )
    dense = detached_copy(model) if heal else None
    replacements = apply_plan_(model, plan, statistics=metric, progress=progress)
    biases = tuple(r.factorised.bias.detach().clone() if r.factorised.bias is not None else None for r in replacements)
    if dense is None or statistics is None:
        return Compression(plan, replacements, None, biases)
    try:
        healing = heal_(dense, model, replacements, statistics.batches, progress=report)
    except BaseException:
        uninstall(model, replacements)
        raise
    return Compression(plan, replacements, healing, biases)

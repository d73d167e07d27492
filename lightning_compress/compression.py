"""The whole compression of a model in one call: search, swap, repair."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from warnings import warn

from torch import Tensor, nn

from lightning_compress.config import Budget
from lightning_compress.copying import detached_copy
from lightning_compress.errors import CompressionWarning, ExampleInputError
from lightning_compress.heal import Healing, heal_, restore_, shared_state
from lightning_compress.inventory import require_usable_weights
from lightning_compress.moments import gather_statistics
from lightning_compress.plan import Plan
from lightning_compress.progress import Progress, silent
from lightning_compress.search import AUTOMATIC_METHODS, check_settings, search_ranks
from lightning_compress.swap import Replacement, apply_plan_, uninstall
from lightning_compress.tracing import ExampleInput, trace


def compress_(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    *,
    example_input: ExampleInput | None = None,
    objective: str = "auto",
    heal: bool = True,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Plan:
    """Searches the ranks, swaps in the factorised layers and repairs them, in place.

    Args:
        model: Any module.
        budget: Upper bounds or a quality target, see `Budget`.
        example_input: See `search_ranks`.
        objective: See `search_ranks`.
        heal: Whether to repair the factors on synthetic inputs (see `heal`); without an example input
            and calibration there are none, and a `CompressionWarning` says so.
        calibration: Batches of real inputs, in the place of synthetic ones; the plan then says that it
            is not data-free.
        seed: Of everything random.
        **settings: Any other argument of `search_ranks`.

    Returns:
        The plan that was applied.

    Raises:
        LightningCompressError: As `search_ranks` and `apply_plan_`; the model is then as it was.
    """
    settings = {"objective": objective, "heal": heal, "calibration": calibration, "seed": seed, **settings}
    return compress_model_(model, budget, example_input=example_input, **settings).plan


@dataclass(frozen=True)
class Compression:
    """What was done to a model.

    Attributes:
        plan: The plan that was applied.
        replacements: What was replaced by what.
        healing: What the repair did, None without one.
        kept: What the dense and the compressed model share and the repair may change, as it was: biases
            of the factorised layers, parameters and buffers of the norms; each with its value.
        seconds: How long each part took.
    """

    plan: Plan
    replacements: tuple[Replacement, ...]
    healing: Healing | None
    kept: Sequence[tuple[Tensor, Tensor]]
    seconds: Mapping[str, float]

    def undo_(self, model: nn.Module) -> None:
        """Puts the dense layers back, and everything else as it was before the repair."""
        uninstall(model, self.replacements)
        restore_(self.kept)


def compress_model_(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    *,
    example_input: ExampleInput | None = None,
    calibration: Iterable[Any] | None = None,
    objective: str = "auto",
    heal: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Compression:
    """Like `compress_`, and returns all that was done."""
    report = progress or silent
    if objective == "auto" and settings.get("method", "continuous") not in AUTOMATIC_METHODS:
        objective = "weight"
    needs_inputs = heal or objective != "weight"
    statistics = None
    if needs_inputs and (example_input is not None or calibration is not None):
        check_settings(settings.get("method", "continuous"), objective, settings.get("rank_multiple", 1), seed)
        require_usable_weights(model)
        try:
            statistics = gather_statistics(model, example_input, calibration=calibration, seed=seed, progress=report)
        except ExampleInputError as error:
            if calibration is not None:
                raise
            trace(model, cast(ExampleInput, example_input))  # an input that fails as it was given is the user's mistake
            warn(f"objective='weight' and no healing: {error}", CompressionWarning, stacklevel=3)
            objective, heal = "weight", False
    elif heal:
        msg = (
            "no synthetic inputs without an example_input: the search uses the weights alone and the factors are not "
            "healed. Pass an example_input, or heal=False."
        )
        warn(msg, CompressionWarning, stacklevel=3)
    plan = search_ranks(
        model,
        budget,
        example_input=example_input,
        objective=objective,
        statistics=statistics if objective != "weight" else None,
        seed=seed,
        progress=progress,
        **settings,
    )
    start = time.perf_counter()
    metric = statistics if plan.objective != "weight" else None
    dense = detached_copy(model) if heal and statistics is not None else None
    replacements = apply_plan_(model, plan, statistics=metric, progress=progress)
    seconds = {
        **(statistics.seconds if statistics is not None else {}),
        **plan.timings,
        "swap": time.perf_counter() - start,
    }
    if dense is None or statistics is None or not statistics.batches or not replacements:
        return Compression(plan, replacements, None, (), seconds)
    kept = shared_state(model, replacements)
    try:
        healing = heal_(dense, model, replacements, statistics, seed=seed, progress=report)
    except BaseException:
        uninstall(model, replacements)
        restore_(kept)
        raise
    return Compression(plan, replacements, healing, kept, {**seconds, **healing.seconds})

"""The whole compression of a model in one call: search, swap, repair."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from warnings import warn

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_compress.analysis.agreement import unfusing_as_the_model_allows
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.analysis.untrained import warn_of_untrained
from lightning_compress.core.checks import require_flag
from lightning_compress.core.copies import detached_copy
from lightning_compress.core.effort import trying
from lightning_compress.core.errors import CompressionWarning, ExampleInputError
from lightning_compress.core.forecast import forecasting
from lightning_compress.core.parallel import current_processes
from lightning_compress.core.plan import Plan
from lightning_compress.core.progress import Progress, bar, reporting
from lightning_compress.core.settings import Budget, SearchKeywords, SearchSettings
from lightning_compress.core.workers import working_on
from lightning_compress.search.api import search_with_statistics
from lightning_compress.surgery.repair import Healing, heal_
from lightning_compress.surgery.state import restore_, shared_state
from lightning_compress.surgery.swap import Replacement, apply_checked_, uninstall


def compress_(
    model: nn.Module,
    budget: Budget | Mapping[str, Any],
    *,
    example_input: ExampleInput | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    heal: bool = True,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Plan:
    """Searches the ranks, swaps in the factorised layers and repairs them, in place.

    Args:
        model: Any module.
        budget: Upper bounds or a quality target, see `Budget`.
        example_input: See `search_ranks`.
        calibration: Batches of real inputs, in the place of synthetic ones; the plan then says that it
            is not data-free.
        statistics: See `search_ranks`.
        heal: Whether to repair the factors on synthetic inputs (see `heal_`); without an example input
            and calibration there are none, and for models of large images they are too few to repair on;
            a `CompressionWarning` says so.
        progress: Called with what is being done and the fraction done; None for a bar, in a terminal or a notebook.
        **settings: The fields of `SearchSettings`.

    Returns:
        The plan that was applied.

    Raises:
        LightningCompressError: As `search_ranks` and `apply_plan_`; the model is then as it was.
    """
    beside = ("example_input", "calibration", "statistics", "heal", "progress")
    chosen = SearchSettings.of(settings, owner="compress_", beside=beside)
    with bar(shown_at_all=progress is None) as shown:
        return compress_model_(
            model,
            budget,
            chosen,
            example_input=example_input,
            calibration=calibration,
            statistics=statistics,
            heal=heal,
            progress=shown if progress is None else progress,
        ).plan


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
    settings: SearchSettings | None = None,
    *,
    example_input: ExampleInput | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    heal: bool = True,
    progress: Progress | None = None,
    spare_frozen: bool = False,
) -> Compression:
    """Like `compress_`, and returns all that was done; for `spare_frozen` see `take_inventory`."""
    require_flag("heal", heal)
    settings, report = settings or SearchSettings(), reporting(progress)
    agreed = unfusing_as_the_model_allows(model, example_input)
    with forecasting(settings.time_limit) as forecast, trying(settings.effort), agreed, working_on(settings.parallel):
        forecast.heals = heal
        plan, metric = search_with_statistics(
            model,
            budget,
            settings,
            example_input=example_input,
            calibration=calibration,
            statistics=statistics,
            progress=report,
            spare_frozen=spare_frozen,
        )
        if settings.objective == "auto":
            warn_of_untrained(model)
        seed = settings.seed
        with trying(forecast.tried):
            inputs = _inputs_for_healing(model, metric, example_input, calibration, seed, report) if heal else None
            done = _compress_(model, plan, metric, inputs, example_input, seed, report)
        return replace(done, plan=replace(done.plan, cut=dict(forecast.cut)))


def _compress_(  # noqa: PLR0917
    model: nn.Module,
    plan: Plan,
    metric: Statistics | None,
    inputs: Statistics | None,
    example_input: ExampleInput | None,
    seed: int,
    progress: Progress,
) -> Compression:
    """Swaps the layers of a plan in, and heals them if there are inputs for it."""
    start = time.perf_counter()
    if current_processes().rank:  # the first process's factors are everyone's
        replacements, plan = apply_checked_(model, plan, example_input=example_input, decompose=False)
        kept = shared_state(model, replacements) if inputs is not None else ()
        return Compression(plan, replacements, None, kept, plan.timings)
    dense = detached_copy(model) if inputs is not None else None
    replacements, plan = apply_checked_(model, plan, statistics=metric, example_input=example_input, progress=progress)
    gathered = inputs.seconds if inputs is not None else {}
    seconds = {**gathered, **plan.timings, "swap": time.perf_counter() - start}
    if dense is None or inputs is None or not replacements:
        return Compression(plan, replacements, None, (), seconds)
    kept = shared_state(model, replacements)
    try:
        healing = heal_(dense, model, replacements, inputs, seed=seed, progress=progress)
    except BaseException:
        uninstall(model, replacements)
        restore_(kept)
        raise
    return Compression(plan, replacements, healing, kept, {**seconds, **healing.seconds})


def _inputs_for_healing(  # noqa: PLR0917
    model: nn.Module,
    known: Statistics | None,
    example_input: ExampleInput | None,
    calibration: Iterable[Any] | None,
    seed: int,
    progress: Progress,
) -> Statistics | None:
    """Returns statistics with inputs, None and a warning if there can be none."""
    if known is not None:
        return _unless_scarce(known)
    if example_input is None and calibration is None:
        msg = (
            "without an example_input there are no synthetic inputs: the search sees the weights alone and "
            "the factors are not healed. Pass an example_input, or heal=False."
        )
        warn(msg, CompressionWarning, stacklevel=4)
        return None
    try:
        found = gather_statistics(model, example_input, calibration=calibration, seed=seed, progress=progress)
    except ExampleInputError as error:
        warn(f"the factors are not healed: {error}", CompressionWarning, stacklevel=4)
        return None
    return _unless_scarce(found)


def _unless_scarce(statistics: Statistics) -> Statistics | None:
    """Returns the statistics, None and a warning if their inputs are no good to repair factors on."""
    if not statistics.scarce:
        return statistics
    msg = (
        "the factors are not healed: inputs of this model are so large that only few could be synthesised, and what "
        "brings the outputs nearer on those does not on real ones. Pass batches of real inputs as calibration, "
        "fine-tune, or pass heal=False."
    )
    warn(msg, CompressionWarning, stacklevel=5)
    return None

"""Which objective can be had, and the statistics it needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from warnings import warn

from lightning_compress.analysis.inspection import Inspection
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.core.errors import CompressionWarning, ExampleInputError
from lightning_compress.core.progress import Progress
from lightning_compress.core.settings import SearchSettings
from lightning_compress.search.strategies import RegisteredStrategy


def weighs_alone(strategy: RegisteredStrategy, settings: SearchSettings, *, known: bool, given: bool = False) -> bool:
    """Returns whether a search looks at the weights alone, so that it needs no statistics.

    Args:
        strategy: Of the search.
        settings: Likewise.
        known: Whether there is anything to make statistics of.
        given: Whether they are there already.
    """
    if "weight" in (settings.objective, strategy.automatic):
        return True
    return settings.objective == "auto" and not given and not (known and strategy.thorough)


def statistics_for(  # noqa: PLR0917
    inspection: Inspection,
    strategy: RegisteredStrategy,
    settings: SearchSettings,
    example_input: ExampleInput | None,
    calibration: Iterable[Any] | None,
    given: Statistics | None,
    progress: Progress,
) -> tuple[Statistics | None, str]:
    """Returns the statistics an objective needs, and the objective that can be had with them; see `search_ranks`."""
    objective = settings.objective
    known = given is not None or example_input is not None or calibration is not None
    if weighs_alone(strategy, settings, known=known, given=given is not None):
        return None, "weight"
    if not known:
        msg = f"objective={objective!r} needs an example_input to make inputs with, statistics or calibration."
        raise ExampleInputError(msg)
    statistics = given
    if statistics is None:
        try:
            statistics = gather_statistics(
                inspection.model,
                example_input,
                calibration=calibration,
                seed=settings.seed,
                progress=progress,
                layers=inspection.chosen,
            )
        except ExampleInputError as error:
            if calibration is not None:
                raise
            warn(f"the search falls back to objective='weight': {error}", CompressionWarning, stacklevel=3)
            return None, "weight"
    return statistics, strategy.automatic if objective == "auto" else objective

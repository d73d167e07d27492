"""Candidates of every unit of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_compress.analysis.inspection import Inspection
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.core.parallel import shared_map
from lightning_compress.core.progress import Progress
from lightning_compress.core.settings import RESOURCES, Budget
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.units import SingleLayer, Unit, joint_units


def tabulate_units(
    units: Sequence[SingleLayer],
    compared: Sequence[str],
    rank_multiple: int,
    statistics: Statistics | None,
    progress: Progress,
) -> tuple[Candidates, ...]:
    """Returns the candidates of each unit; the work is shared out over processes and threads.

    Args:
        units: Single layers.
        compared: See `compared_resources`.
        rank_multiple: See `SearchSettings`.
        statistics: With the metric.
        progress: Called with what is being done and the fraction done.
    """

    def table(index: int) -> Candidates:
        progress("decomposing layers", index / len(units))
        return units[index].tabulate(compared, rank_multiple, statistics)

    what = f"decomposing layers, source {statistics.source if statistics is not None else 'weight'}"
    weights = [unit.layer.weight for unit in units]
    work = [weight.numel() * min(weight.flatten(1).shape) for weight in weights]
    tables = shared_map(what, table, range(len(units)), work, threads=True)
    progress("decomposing layers", 1.0)
    return tuple(tables)


def compared_resources(budgeted: Sequence[str], *, timed: bool) -> tuple[str, ...]:
    """Returns the resources in which candidates are compared; before layers are timed MACs stand for time."""
    resources = ["macs" if name == "latency" else name for name in budgeted]
    return tuple(dict.fromkeys([*resources, "macs"] if timed else resources))


def join_where_better(  # noqa: PLR0917
    units: Sequence[SingleLayer],
    tables: tuple[Candidates, ...],
    inspection: Inspection,
    budget: Budget,
    compared: Sequence[str],
    rank_multiple: int,
    statistics: Statistics | None,
) -> tuple[tuple[Unit, ...], tuple[Candidates, ...]]:
    """Puts layers that read the same together where a joint first factor loses less at the budget's share."""
    own = {table.name: table for table in tables}
    bounded = tuple(name for name in budget.limits() if name != "latency") or ("params",)
    fractions = np.array([budget.limits().get(name, 1.0) for name in bounded])
    columns = [RESOURCES.index(name) for name in bounded]
    found: dict[str, Unit] = {unit.name: unit for unit in units}
    for joint in joint_units(units, inspection.trace):
        together = joint.tabulate(compared, rank_multiple, statistics)
        apart = tuple(own[layer.name] for layer in joint.layers)
        limits = together.costs[-1, columns] * fractions
        losses = []
        for alternative in (apart, (together,)):
            problem = Problem(alternative, bounded, limits)
            best = solve(problem).choice if problem.fits(smallest(problem)) else None
            losses.append(problem.loss_of(best) if best is not None else np.inf)
        if losses[1] < losses[0]:
            for layer in joint.layers:
                del found[layer.name], own[layer.name]
            found[joint.name], own[joint.name] = joint, together
    return tuple(found.values()), tuple(own[name] for name in found)

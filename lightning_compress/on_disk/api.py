"""`compress_checkpoint`: from a folder of weights to a compressed one, without the dense model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import Unpack

from lightning_compress.analysis.inspection import Inspection, inspect_model
from lightning_compress.analysis.usable import require_module
from lightning_compress.core.checks import path_of, require_count
from lightning_compress.core.effort import current_effort, trying
from lightning_compress.core.errors import BudgetError, ConfigurationError
from lightning_compress.core.plan import Plan
from lightning_compress.core.progress import Progress, reporting
from lightning_compress.core.settings import Budget, SearchKeywords, SearchSettings
from lightning_compress.core.workers import working_on
from lightning_compress.kinds.registry import is_automatic
from lightning_compress.layers.unfused import unfused
from lightning_compress.on_disk.layerwise import Layerwise
from lightning_compress.on_disk.matrices import KINDS
from lightning_compress.on_disk.output import origins, publish, require_usable, write_staged
from lightning_compress.on_disk.source import open_source
from lightning_compress.on_disk.work import NAME, WorkFolder, digest
from lightning_compress.search.candidates import Candidates
from lightning_compress.search.choice import Choice, choose
from lightning_compress.search.strategies import strategy_of
from lightning_compress.search.tables import compared_resources
from lightning_compress.search.timed import require_sizes_feasible, timed_problem
from lightning_compress.search.to_plan import to_plan, warn_of_layers_given_up
from lightning_compress.search.units import SingleLayer, units_of

SHARD_BYTES = 2 * 10**9
"""Bytes of a file of weights at most, unless one tensor alone is larger."""
_FIXED = {"method": ("exact",), "objective": ("auto", "weight"), "target": (None,)}
"""Settings that a search on the weights alone leaves no choice in, with the values it takes."""
_WRITING = "writing the checkpoint"
_BESIDE = ("model", "shard_bytes", "progress")


def compress_checkpoint(
    folder_in: str | Path,
    folder_out: str | Path,
    budget: Budget | Mapping[str, Any],
    *,
    model: nn.Module | Callable[[], nn.Module],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Plan:
    """Compresses a checkpoint on disk, layer by layer: for models that do not fit into memory.

        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        compress_checkpoint("llama", "llama-half", Budget(params=0.5), model=model)

    What is chosen is what `search_ranks` chooses with `method="exact"`, `objective="weight"` and `target=None`, with
    `kinds="auto"` meaning svd and interpolative for weights without a kernel. Of the weights those of a few layers are
    in memory at a time. Tensors stay in their dtypes; the errors and factors of layers in half precision with a smaller
    side of 256 or more are worked out in single precision, all others in double.

    A run that was broken off goes on where it was if it is started again with the same arguments: what is done lies in
    `folder_out/.work`, which is removed at the end, and holds about as many bytes as the checkpoint in half precision.
    Nothing else is in `folder_out` before all is done; `plan.json` comes last. One run at a time may write to a folder.

    Args:
        folder_in: With `model.safetensors`, or shards and `model.safetensors.index.json`. Its other small files, such
            as config.json, are copied.
        folder_out: Made if needed; it may hold no model yet. `load_compressed` reads it.
        budget: Upper bounds on parameters or bytes; what needs an example input cannot be bounded.
        model: The architecture on the meta device, in the dtypes of the checkpoint, or a function that returns it and
            is called with the meta device as the default one. It is not changed.
        shard_bytes: Of a file of weights at most; a larger tensor has a file of its own.
        progress: Called with what is being done and the fraction done, from several threads.
        **settings: The fields of `SearchSettings`; of method, objective and target only the values named above.

    Returns:
        The plan, without seconds and timings.

    Raises:
        ConfigurationError: If an argument has a wrong type, name or value, or both folders are the same.
        BudgetError: If a budget is malformed or needs an example input; InfeasibleBudgetError, with the smallest one,
            if no plan keeps it.
        SelectionError: If a pattern matches no layer.
        ModelError: If there is nothing to factorise, or parameters are not on the meta device or not finite.
        WeightsError: If files are missing or damaged, or their tensors are not exactly those of the model by name,
            shape and dtype; of tied ones one name is enough.
        OutputFolderError: If the output folder cannot be written or holds a model.
    """
    own, limits = _settings(settings), _budget(budget)
    require_count(f"shard_bytes={shard_bytes!r}", shard_bytes, 1)
    where_from, where_to = path_of("folder_in", folder_in), path_of("folder_out", folder_out)
    report, meta = reporting(progress), _meta_model(model)
    source = open_source(where_from, meta)
    require_usable(where_from, where_to)
    work = WorkFolder(where_to / NAME)
    with trying(own.effort), working_on(own.parallel):
        with unfused(meta):
            inspection = inspect_model(meta, own.selection, None)
            units = tuple(_affordable(unit, own) for unit in units_of(inspection.layers))
            work.make()
            source.require_finite(meta, [unit.layer.weight for unit in units])
            compared = compared_resources(limits.budgeted, timed=False)
            layerwise = Layerwise(source, work, compared, own.rank_multiple, report)
            tables = layerwise.tables(units)
            key = _key_of_plan(layerwise, inspection, units, limits, own)
            plan = work.plan(key)
            if plan is None:
                plan = _plan(inspection, units, tables, limits, own, report)
                work.keep_plan(key, plan)
            factors = layerwise.factors(units, plan.factorised)
        tensors = origins(meta, plan, source, factors)
        staged = work.final(digest(plan=key, shard_bytes=shard_bytes))
        write_staged(staged, tensors, source, plan, most=shard_bytes, report=partial(report, _WRITING))
        publish(staged, where_to, work)
    report(_WRITING, 1.0)
    return plan


def _plan(  # noqa: PLR0917
    inspection: Inspection,
    units: Sequence[SingleLayer],
    tables: tuple[Candidates, ...],
    budget: Budget,
    settings: SearchSettings,
    progress: Progress,
) -> Plan:
    """Returns the optimum; it has no times in it, so that it is the same whenever a run is broken off."""
    strategy = strategy_of(settings)
    require_sizes_feasible(tables, inspection.costs, budget, inspection.layers)
    problem = timed_problem(tables, tuple(units), inspection.costs, budget, (), no_slower=False)
    problem, rows, objective = choose(problem, strategy, "weight", None, progress)
    plan = to_plan(Choice(problem, rows, tuple(units), objective, None, None), inspection, budget, settings, {})
    warn_of_layers_given_up(plan)
    return plan


def _affordable(unit: SingleLayer, settings: SearchSettings) -> SingleLayer:
    """Returns the unit with the kinds to choose from: of weights without a kernel the quick ones, if any is left."""
    layer = unit.layer
    quick = tuple(kind for kind in layer.kinds if kind in KINDS)
    if layer.operator.is_spatial or not quick or not is_automatic(settings.kinds):
        return unit
    return unit.with_kinds(quick)


def _key_of_plan(
    layerwise: Layerwise, inspection: Inspection, units: Sequence[SingleLayer], budget: Budget, settings: SearchSettings
) -> str:
    """Returns the name of a plan in the work folder, by all that it depends on."""
    return digest(
        units=[layerwise.key(unit) for unit in units],
        layers=[(layer.name, layer.type, layer.parameters, layer.reason) for layer in inspection.layers],
        budget=budget.as_dict(),
        seed=settings.seed,
        solver_seconds=current_effort().solver_seconds,
    )


def _settings(keywords: Mapping[str, Any]) -> SearchSettings:
    for name, values in _FIXED.items():
        if name in keywords and keywords[name] not in values:
            known = " or ".join(map(repr, values))
            msg = f"{name}={keywords[name]!r}: a checkpoint is compressed by its weights alone, with {name}={known}."
            raise ConfigurationError(msg)
    found = SearchSettings.of(keywords, owner="compress_checkpoint", beside=_BESIDE)
    if found.time_limit is not None:
        msg = (
            f"time_limit={found.time_limit:g}: what a checkpoint takes is not cut; it may be killed at any time and "
            "goes on from there. Leave the limit out."
        )
        raise ConfigurationError(msg)
    return replace(found, method="exact", objective="weight", target=None)


def _budget(value: Budget | Mapping[str, Any]) -> Budget:
    budget = Budget.from_value(value)
    if budget.of is not None:
        msg = f"{budget}: a checkpoint is compressed as a whole, give bounds without of={budget.of!r}."
        raise BudgetError(msg)
    if budget.needs_example_input or budget.max_error is not None:
        msg = (
            f"a budget in MACs, latency or max_error ({budget}) needs forward passes, and a checkpoint is compressed "
            "without any: bound params or bytes."
        )
        raise BudgetError(msg)
    return budget


def _meta_model(value: object) -> nn.Module:
    if not isinstance(value, nn.Module) and callable(value):
        with torch.device("meta"):
            value = value()
    require_module(value)
    model = cast(nn.Module, value)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            msg = (
                f"parameter {name!r} of the model is on {parameter.device}: make the model on the meta device, as in "
                "with torch.device('meta'): model = MyModel(). Its values are read from the checkpoint."
            )
            raise ConfigurationError(msg)
    return model

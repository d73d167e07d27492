"""One layer after the other: its candidates, and later its factors; nothing of it stays in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.effort import current_effort
from lightning_compress.core.parallel import as_here, one_thread
from lightning_compress.core.plan import LayerPlan
from lightning_compress.core.progress import Progress
from lightning_compress.core.workers import current_workers, outsourced
from lightning_compress.on_disk.files import Stored
from lightning_compress.on_disk.matrices import build_from, decompose, is_large_matrix, tabulate_matrix
from lightning_compress.on_disk.source import Source
from lightning_compress.on_disk.work import WorkFolder, digest
from lightning_compress.search.candidates import Candidates, tabulate
from lightning_compress.search.units import SingleLayer
from lightning_compress.surgery.build import build_layer

LAYERS_AT_ONCE = 4
"""Layers that are worked on at the same time at most, each by a thread: as many are in memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layerwise:
    """What every layer's work needs.

    Attributes:
        source: The checkpoint.
        work: What is done so far.
        compared: See `tabulate`.
        rank_multiple: See `SearchSettings`.
        progress: Called with what is being done and the fraction done.
    """

    source: Source
    work: WorkFolder
    compared: tuple[str, ...]
    rank_multiple: int
    progress: Progress

    def tables(self, units: Sequence[SingleLayer]) -> tuple[Candidates, ...]:
        """Returns the candidates of each unit.

        Raises:
            NonFiniteWeightError: If a weight holds NaN or infinite values.
            ConfigurationError: If a layer's rank bounds leave no rank of any kind.
        """
        return tuple(each(self._table, units, sizes_of(units), partial(self.progress, "decomposing layers")))

    def factors(self, units: Sequence[SingleLayer], plans: Sequence[LayerPlan]) -> dict[str, dict[str, Stored]]:
        """Returns where the factors of each factorised layer lie, by its name and theirs in it.

        Args:
            units: Of the layers.
            plans: Of the factorised layers.
        """
        own = {unit.name: unit for unit in units}
        pairs = [(own[planned.name], planned) for planned in plans]
        sizes, report = sizes_of([unit for unit, _ in pairs]), partial(self.progress, "factorising layers")
        found = each(lambda pair: self._factors(*pair), pairs, sizes, report)
        return {planned.name: factors for (_, planned), factors in zip(pairs, found, strict=True)}

    def key(self, unit: SingleLayer) -> str:
        """Returns the name of what is made from a unit: of where its weight lies and all that its table depends on."""
        layer, stored = unit.layer, self.source.of(unit.layer.weight)
        file = stored.path.stat()
        effort = asdict(current_effort())
        return digest(
            layer=layer.name,
            module=repr(layer.module),
            tied=unit.is_tied,
            stored=[stored.name, stored.dtype, stored.shape, stored.start],
            file=[stored.path.name, file.st_size, file.st_mtime_ns],
            kinds=layer.kinds,
            ranks=[layer.min_rank, layer.max_rank, self.rank_multiple],
            effort={name: effort[name] for name in ("ranks", "ranks_per_mode", "fits")},
            compared=self.compared,
        )

    def _table(self, unit: SingleLayer) -> Candidates:
        key = self.key(unit)
        known = self.work.table(key)
        if known is not None:
            return known
        layer = self.source.filled(unit.layer)
        if is_large_matrix(layer):
            basis = outsourced(decompose, layer)
            self.work.keep_vectors(key, basis.vectors)
            found = tabulate_matrix(layer, basis.energies, compared=self.compared, rank_multiple=self.rank_multiple)
        else:
            found = outsourced(partial(tabulate, compared=self.compared, rank_multiple=self.rank_multiple), layer)
        self.work.keep_table(key, found)
        return found

    def _factors(self, unit: SingleLayer, planned: LayerPlan) -> dict[str, Stored]:
        whole = self.key(unit)
        key = digest(layer=whole, kind=planned.kind, ranks=planned.ranks)
        known = self.work.factors(key)
        if known is None:
            self.work.keep_factors(key, self._fitted(self.source.filled(unit.layer), planned, whole))
            known = self.work.factors(key) or {}
        self.work.drop_vectors(whole)
        return known

    def _fitted(self, layer: Layer, planned: LayerPlan, key: str) -> dict[str, Tensor]:
        """Returns the tensors of the factorised layer by their names in it, without its bias."""
        if is_large_matrix(layer):
            vectors = self.work.vectors(key, planned.ranks[0])
            vectors = vectors if vectors is not None else outsourced(decompose, layer).vectors[: planned.ranks[0]]
            new = build_from(layer, planned, vectors)
        else:
            new = build_layer(layer, planned, None, decompose=True)  # which has its factors fitted by workers
        return {name: value for name, value in new.state_dict().items() if not value.is_meta}


def sizes_of(units: Sequence[SingleLayer]) -> list[int]:
    """Returns the number of weights of each unit."""
    return [unit.layer.weight.numel() for unit in units]


def each(
    function: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], report: Callable[[float], None]
) -> list[Result]:
    """Returns the function's results of all items, in order, the largest ones first worked out.

    Each item has one thread, so that the numbers do not depend on how many there are.

    Args:
        function: Of one item.
        items: Any number.
        sizes: Of the items.
        report: Called with the fraction done.
    """
    workers = current_workers()
    count = max(1, min(torch.get_num_threads() if workers is None else workers.size, LAYERS_AT_ONCE, len(items)))
    finished = itertools.count(1)

    def one(index: int) -> Result:
        result = function(items[index])
        report(next(finished) / len(items))
        return result

    report(0.0)
    order = sorted(range(len(items)), key=lambda index: -sizes[index])
    with one_thread():
        if count == 1:
            found = [as_here(one)(index) for index in order]
        else:
            with ThreadPoolExecutor(count) as pool:
                found = list(pool.map(as_here(one), order))
    return [result for _, result in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

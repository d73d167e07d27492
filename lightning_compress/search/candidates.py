"""Per layer: every (kind, ranks) worth considering, with its error and its costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.plan import DENSE, signal_loss
from lightning_compress.core.settings import RESOURCES
from lightning_compress.kinds.base import Floats, Ints, LayerCall, RankProfile, threads_for
from lightning_compress.kinds.joint_svd import joint_errors
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, kept_rank_errors, weighted_energy
from lightning_compress.kinds.shrinkage import UnseenErrors

Mask = npt.NDArray[np.bool_]
MACS = RESOURCES.index("macs")


@dataclass(frozen=True)
class Candidates:
    """The candidates of one layer as parallel arrays; the last row is the dense layer.

    Attributes:
        name: The layer's name.
        kinds: Kind of each row, length n.
        ranks: Ranks of each row, length n.
        errors: Relative errors in [0, 1] on the inputs that the moments are made from, shape (n,).
        energy: ‖G^½ W S^½‖²_F, what the errors are relative to; ‖W‖²_F without a metric.
        costs: Absolute costs in the order of `RESOURCES`, shape (n, 4); MACs and seconds are 0 where unknown.
        unseen: How the errors grow on other inputs, None if unknown.
        merged: Whether the layer runs multiplied out, shape (n,); None if no row does.
    """

    name: str
    kinds: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    errors: Floats
    energy: float
    costs: Floats
    unseen: UnseenErrors | None = None
    merged: Mask | None = None

    @classmethod
    def of_dense(cls, name: str) -> Candidates:
        """Returns the one candidate of a layer that stays as it is, whose costs are not looked at."""
        return cls(name, (DENSE,), ((),), np.zeros(1), 0.0, np.zeros((1, len(RESOURCES))))

    @property
    def losses(self) -> Floats:
        """What each row adds to the separable objective, shape (n,)."""
        return signal_loss(self.unseen_errors)

    @property
    def unseen_errors(self) -> Floats:
        """Relative errors to expect on inputs that the moments are not made from, shape (n,)."""
        return self.errors if self.unseen is None else self.unseen.at(self.errors)

    def __len__(self) -> int:
        return len(self.kinds)

    def is_merged(self, row: int) -> bool:
        """Returns whether the layer runs multiplied out with a row."""
        return self.merged is not None and bool(self.merged[row])

    def costs_as_run(self, row: int) -> Floats:
        """Returns the costs of a row, shape (4,): what runs multiplied out takes the MACs of the dense layer."""
        costs: Floats = self.costs[row].copy()
        if self.is_merged(row):
            costs[MACS] = self.costs[-1, MACS]
        return costs

    def rows_of(self, kind: str) -> Ints:
        """Returns the rows of one kind."""
        return np.array([row for row, k in enumerate(self.kinds) if k == kind], dtype=np.int64)


def tabulate(
    layer: Layer, *, compared: Sequence[str], rank_multiple: int = 1, metric: Metric | None = None
) -> Candidates:
    """Returns the candidates of a layer: smaller than dense, no more MACs, none dominated.

    Only lookups may cost more MACs than dense, as a dense one costs none. A candidate is dominated if another of its
    kind has no larger error and no larger cost in any compared resource.

    Args:
        layer: A layer that can be factorised.
        compared: The resources in which candidates are compared.
        rank_multiple: See `SearchSettings`.
        metric: In which errors are measured, None for the identity.

    Raises:
        ConfigurationError: If the layer's rank bounds leave no rank of any kind.
    """
    weight, groups = layer.double_weight(), layer.operator.groups
    columns = [RESOURCES.index(name) for name in compared]
    found: list[tuple[str, Ints, Floats, Floats]] = []
    in_bounds = False
    with threads_for(weight):
        profiles = kept_rank_errors(layer.kinds, weight, metric, groups)
    for kind, profile in zip(layer.kinds, profiles, strict=True):
        rows = np.flatnonzero(_allowed(layer, profile.ranks, rank_multiple))
        in_bounds = in_bounds or len(rows) > 0
        found.append((kind, *_worth_considering(layer, kind, profile, rows, columns)))
    if not in_bounds:
        msg = (
            f"layer {layer.name!r}: no rank of {list(layer.kinds)} is a multiple of {rank_multiple} between "
            f"min_rank={layer.min_rank} and max_rank={layer.max_rank}; "
            f"its largest ranks are {_largest(layer)}. Loosen its override or rank_multiple."
        )
        raise ConfigurationError(msg)
    return Candidates(
        name=layer.name,
        kinds=(*(kind for kind, ranks, *_ in found for _ in ranks), DENSE),
        ranks=(*(tuple(map(int, row)) for _, ranks, *_ in found for row in ranks), ()),
        errors=np.concatenate([*(errors for *_, errors, _ in found), np.zeros(1)]),
        energy=weighted_energy(weight, metric, groups),
        costs=np.concatenate([*(costs for *_, costs in found), _dense_costs(layer)[None]]),
        unseen=metric.unseen(groups) if metric is not None else None,
    )


def _worth_considering(
    layer: Layer, kind: str, profile: RankProfile, rows: Ints, columns: list[int]
) -> tuple[Ints, Floats, Floats]:
    """Returns ranks, errors and costs of the rows of a profile that are smaller than dense and not dominated."""
    dense = _dense_costs(layer)
    rows = rows[_thinned(profile.ranks[rows])]
    ranks, errors = profile.ranks[rows], profile.errors[rows]
    costs = _costs(layer, kind, ranks)
    rows = np.flatnonzero((costs[:, 0] < dense[0]) & ((costs[:, 1] <= dense[1]) | layer.operator.lookup))
    rows = rows[_undominated(errors[rows], costs[rows][:, columns])]
    return ranks[rows], errors[rows], costs[rows]


def tabulate_joint(
    layers: Sequence[Layer], *, compared: Sequence[str], rank_multiple: int = 1, metrics: Sequence[Metric | None]
) -> Candidates:
    """Like `tabulate`, for linear layers with a joint first factor.

    Their error is 1 − Π_i (1 − e_i), so that their loss is the sum of each layer's.

    Args:
        layers: Linear layers that read the same.
        compared: See `tabulate`.
        rank_multiple: See `tabulate`.
        metrics: Of each layer.
    """
    first, weights = layers[0], [layer.double_weight() for layer in layers]
    columns = [RESOURCES.index(name) for name in compared]
    with threads_for(weights[0]):
        errors = unseen_joint_errors(weights, metrics)
    ranks = np.arange(1, len(errors) + 1)[:, None]
    rows = np.flatnonzero(_allowed(first, ranks, rank_multiple))
    rows = rows[_thinned(ranks[rows])]
    outputs, inputs = np.array([len(w) for w in weights]), weights[0].shape[1]
    positions = sum(call.positions for call in first.calls or ())
    params = ranks[rows, 0] * (inputs + outputs.sum())
    macs = ranks[rows, 0] * (len(weights) * inputs + outputs.sum()) * positions  # each computes the shared factor
    sizes = params * first.weight.element_size()
    costs = np.column_stack([params, macs, sizes, np.zeros(len(params))]).astype(np.float64)
    together = 1 - np.prod(1 - errors[rows], axis=1)
    dense = np.sum([_dense_costs(layer) for layer in layers], axis=0)
    kept = np.flatnonzero((costs[:, 0] < dense[0]) & (costs[:, 1] <= dense[1]))
    kept = kept[_undominated(together[kept], costs[kept][:, columns])]
    return Candidates(
        name=first.name,
        kinds=(*("svd" for _ in kept), DENSE),
        ranks=(*((int(rank),) for rank in ranks[rows[kept], 0]), ()),
        errors=np.append(np.clip(together[kept], 0, 1), 0.0),
        energy=1.0,
        costs=np.concatenate([costs[kept], dense[None]]),
    )


def unseen_joint_errors(weights: Sequence[Tensor], metrics: Sequence[Metric | None]) -> Floats:
    """Returns `joint_errors` as they are to be expected on inputs that the moments are not made from."""
    errors = joint_errors(weights, metrics)
    unseen = [metric.unseen() if metric is not None else None for metric in metrics]
    return np.stack([own.at(e) if own is not None else e for e, own in zip(errors.T, unseen, strict=True)], axis=1)


def _largest(layer: Layer) -> str:
    return ", ".join(f"{kind} {DECOMPOSITIONS[kind].max_ranks(layer.operator.shape)}" for kind in layer.kinds)


def _allowed(layer: Layer, ranks: Ints, multiple: int) -> Mask:
    upper = layer.max_rank if layer.max_rank is not None else np.iinfo(np.int64).max
    # A mode smaller than the bound or the multiple is allowed at its own full size.
    full = ranks == np.array([ranks[:, mode].max() for mode in range(ranks.shape[1])])
    within = (ranks >= layer.min_rank) & (ranks <= upper) & (ranks % multiple == 0)
    tolerated = full & (ranks < max(layer.min_rank, multiple)) & (ranks <= upper)
    allowed: Mask = (within | (tolerated & (ranks.shape[1] > 1))).all(axis=1)
    return allowed


def _thinned(ranks: Ints) -> Ints:
    """Returns the rows to keep so that no mode has more ranks than its limit."""
    effort = current_effort()
    limit = effort.ranks if ranks.shape[1] == 1 else effort.ranks_per_mode
    keep = np.ones(len(ranks), dtype=bool)
    for mode in range(ranks.shape[1]):
        values = np.unique(ranks[:, mode])
        keep &= np.isin(ranks[:, mode], values[_geometric(len(values), limit)])
    return np.flatnonzero(keep)


def _geometric(n: int, limit: int) -> Ints:
    """Returns at most `limit` indices below n: all of them, or a geometric grid with both ends."""
    if n <= limit:
        return np.arange(n)
    return np.unique(np.round(np.geomspace(1, n, limit)).astype(np.int64)) - 1


def _undominated(errors: Floats, costs: Floats) -> Ints:
    """Returns the rows that no other row beats or equals in every column, cheapest first."""
    points = np.column_stack([costs, errors])
    order = np.lexsort(points.T)  # by error first, then by the costs from the last to the first
    points = points[order]
    front: list[int] = []
    alive = np.ones(len(points), dtype=bool)
    for row in range(len(points)):
        if alive[row]:
            front.append(row)
            alive[row + 1 :] &= (points[row + 1 :] < points[row]).any(axis=1)
    kept: Ints = order[front]
    return kept[np.lexsort((errors[kept], costs[kept].sum(axis=1)))]


def _dense_costs(layer: Layer) -> Floats:
    params, (more, more_bytes) = layer.weight.numel(), layer.spared
    size = params * layer.weight.element_size() + more_bytes
    return np.array([params + more, dense_macs(layer), size, 0.0], dtype=np.float64)


def dense_macs(layer: Layer) -> int:
    """Returns the MACs of the dense layer over its traced calls, 0 if none was traced."""
    return sum(layer.weight.numel() * call.positions for call in layer.calls or ())


def _costs(layer: Layer, kind: str, ranks: Ints) -> Floats:
    decomposition, operator = DECOMPOSITIONS[kind], layer.operator
    params = decomposition.parameters(operator.shape, ranks) * operator.groups
    macs = _over_calls(layer, decomposition.macs, ranks)
    size = params * layer.weight.element_size() + decomposition.buffer_bytes(operator.shape) * operator.groups
    return np.column_stack([params, macs, size, np.zeros(len(params))]).astype(np.float64)


def _over_calls(layer: Layer, measure: Callable[[tuple[int, ...], Ints, LayerCall], Ints], ranks: Ints) -> Ints:
    """Returns what a kind measures for one call and group, summed over the traced calls and groups, shape (n,)."""
    total = np.zeros(len(ranks), dtype=np.int64)
    for call in layer.calls or ():
        total += measure(layer.operator.shape, ranks, call) * layer.operator.groups
    return total

"""From some measured sizes of a layer to the time of every size.

The time of a stage is fitted by a non-negative combination of what costs time on processors that work on blocks of
channels: a constant (the call), its multiply-accumulates, the numbers it writes, the multiply-accumulates of as many
whole blocks as its channels fill, and those of the ever smaller blocks that what is left over is cut into. Of 15
channels that is 8 + 4 + 2 + 1: in oneDNN's and MKL's matrix products they take more than twice as long as 16. What the
combination misses at the measured sizes is interpolated between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from lightning_compress.analysis.inventory import Layer
from lightning_compress.kinds.base import Floats, Ints, LayerCall
from lightning_compress.kinds.registry import DECOMPOSITIONS

BLOCK = 16
"""Channels that processors work on at once: float32 in a vector of 512 bits, a multiple of what narrower ones hold."""
LARGEST_SHARE = 0.9
SMALLEST_SHARE = 0.02
"""Of the dense layer's parameters, between which sizes are measured."""


@dataclass(frozen=True)
class KindTimes:
    """Times of one layer by one kind.

    Attributes:
        layer: The layer.
        kind: The kind.
        ranks: That were measured, shape (m, R).
        seconds: Of each part, shape (m, parts): those of the stages and what is left, or one of all.
    """

    layer: Layer
    kind: str
    ranks: Ints
    seconds: Floats

    def at(self, ranks: Ints) -> Floats:
        """Returns the predicted seconds of other ranks, shape (n, R) to (n,)."""
        known, asked = (stage_work(self.layer, self.kind, r) for r in (self.ranks, ranks))  # (stages, n, features)
        stages, parts = len(known), self.seconds.shape[1]
        if parts != stages + 1:
            return _fitted(known.sum(axis=0), self.seconds.sum(axis=1), asked.sum(axis=0))
        total = np.full(len(ranks), float(np.median(self.seconds[:, -1])))
        for index in range(stages):
            total = total + _fitted(known[index], self.seconds[:, index], asked[index])
        return total


def _fitted(known: Floats, seconds: Floats, asked: Floats) -> Floats:
    """Returns seconds for features (n, f), from some (m, f) whose seconds (m,) are known."""
    scale = np.maximum(known.max(axis=0), 1e-12)
    target = np.maximum(seconds, 1e-12)
    weights, _ = nnls(known / scale / target[:, None], np.ones(len(target)))
    order = np.argsort(known[:, 1], kind="stable")
    missed = np.log(target / np.maximum((known / scale) @ weights, 1e-12))[order]
    positions = np.log(np.maximum(known[order, 1], 1.0))
    between = np.interp(np.log(np.maximum(asked[:, 1], 1.0)), positions, missed)
    found: Floats = (asked / scale) @ weights * np.exp(between)
    return found


def stage_work(layer: Layer, kind: str, ranks: Ints) -> Floats:
    """Returns what each stage of a factorised layer does in all its calls, shape (stages, n, 5).

    The columns: calls, multiply-accumulates, numbers written, multiply-accumulates of whole blocks of output channels,
    and of what is left of these in blocks of 8, 4, 2 and 1, each at the price of a whole one.
    """
    decomposition, operator = DECOMPOSITIONS[kind], layer.operator
    total: Floats = np.zeros((0, len(ranks), 5))
    for call in layer.calls or ():
        rows = [] if decomposition.stages(operator.shape, ranks) else [_without_stages(layer, kind, ranks, call)]
        for stage, before, after in decomposition.stage_positions(operator.shape, ranks, call):
            outputs = np.broadcast_to(np.asarray(stage.outputs, dtype=np.int64), len(ranks))
            groups = np.broadcast_to(np.asarray(stage.groups, dtype=np.int64), len(ranks))
            macs = np.broadcast_to(stage.parameters(operator.kernel), len(ranks)) * float(call.rows * operator.groups)
            macs = macs * (before if call.transposed else after)
            own = outputs // groups
            left = own % BLOCK
            small = sum((left >> bit) & 1 for bit in range(BLOCK.bit_length() - 1))
            per_channel = macs / np.maximum(own, 1)
            written = outputs * float(after * call.rows * operator.groups)
            one = np.ones(len(ranks))
            rows.append(np.column_stack([one, macs, written, per_channel * (own - left), per_channel * BLOCK * small]))
        work = np.stack(rows)
        total = work if not len(total) else total + work
    return total


def _without_stages(layer: Layer, kind: str, ranks: Ints, call: LayerCall) -> Floats:
    """Returns the work of a kind whose children are modules of their own, as one stage, (n, 5)."""
    macs = DECOMPOSITIONS[kind].macs(layer.operator.shape, ranks, call).astype(np.float64)
    written = DECOMPOSITIONS[kind].activations(layer.operator.shape, ranks, call).astype(np.float64)
    return np.column_stack([np.ones(len(ranks)), macs, written, macs, np.zeros(len(ranks))])


def sizes_to_measure(layer: Layer, kind: str, count: int) -> Ints:
    """Returns ranks of rising size, (m, R) with m at most `count`, every other one of whole blocks.

    Args:
        layer: The layer.
        kind: Of decomposition.
        count: How many, at least 2.
    """
    decomposition, shape = DECOMPOSITIONS[kind], layer.operator.shape
    largest = np.array(decomposition.max_ranks(shape))
    grid = np.unique(np.ceil(np.linspace(0, 1, 401)[1:, None] * largest[None]).astype(np.int64), axis=0)
    shares = decomposition.parameters(shape, grid) / np.prod(shape)
    wanted = np.geomspace(SMALLEST_SHARE, LARGEST_SHARE, count)
    found = []
    for index, share in enumerate(wanted):
        row = grid[max(0, int(np.searchsorted(shares, share, side="right")) - 1)]
        found.append(_aligned(row) if index % 2 else row)
    return np.unique(np.array(found), axis=0)


def _aligned(ranks: Sequence[int] | Ints) -> Ints:
    """Returns the ranks cut to whole blocks, or to the largest power of two below one."""
    cut = [r - r % BLOCK if r >= BLOCK else 1 << (int(r).bit_length() - 1) for r in ranks]
    return np.array(cut, dtype=np.int64)

"""The split kinds: channel SVD in k groups of input channels (Liebenwein et al. 2021)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.baselines import SplitSvd
from lightning_compress import Budget, search_ranks, testing
from lightning_compress.kinds.registry import AUTOMATIC, DECOMPOSITIONS, resolve_kinds
from tests.support.nets import TinyNet
from tests.support.zoo import error_in, normal, random_metric

SPLITS = {"split2_svd": 2, "split4_svd": 4}
SHAPES = [(5, 8, 3, 3), (6, 4, 1, 1), (40, 8, 3, 1)]


@pytest.mark.parametrize("kind", SPLITS)
def test_kind_holds_what_everything_relies_on(kind, monkeypatch):
    monkeypatch.setattr(testing, "BETTERED", 1.0)  # the sweeps over the splits may better their start by any fraction
    testing.check_decomposition(kind)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", SPLITS)
def test_errors_are_those_of_the_truncated_blocks_by_numpy(kind, shape, known):
    weight = normal(*shape, seed=3)
    size, splits = weight[0].numel(), SPLITS[kind]
    metric = random_metric(size) if known else torch.eye(size, dtype=torch.float64)
    profile, width = DECOMPOSITIONS[kind].profile(weight, metric if known else None), size // splits
    own = [slice(start, start + width) for start in range(0, size, width)]
    roots = [np.linalg.cholesky(metric[block, block].numpy()) for block in own]
    whitened = [weight.flatten(1)[:, block].numpy() @ root for block, root in zip(own, roots, strict=True)]
    spectra = [np.linalg.svd(block, full_matrices=False) for block in whitened]
    for (rank,), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        kept = [(u[:, :rank] * s[:rank]) @ v[:rank] for u, s, v in spectra]
        product = np.concatenate([b @ np.linalg.inv(root) for b, root in zip(kept, roots, strict=True)], axis=1)
        product = torch.from_numpy(product).reshape(shape)
        assert error == pytest.approx(min(error_in(metric, weight, product), 1), abs=1e-9)


@pytest.mark.parametrize("kind", SPLITS)
def test_blocks_that_cancel_do_not_end_worse_than_nothing(kind):
    # All blocks see the same inputs and hardly anything is left of W x, but the start keeps other directions of each.
    splits, decomposition, cancelled = SPLITS[kind], DECOMPOSITIONS[kind], 0
    metric = torch.eye(6).double().repeat(splits, splits) + 1e-5 * torch.eye(6 * splits).double()
    for seed in range(12):
        square = normal(splits, 6, 6, seed=seed)
        blocks = [torch.linalg.qr(block)[0] for block in square[1:]]
        weight = torch.cat([*blocks, 0.005 * square[0] - sum(blocks)], dim=1)[:, :, None, None]
        profile = decomposition.profile(weight, metric)
        cancelled += int((profile.errors == 1).sum())
        for (rank,), predicted in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
            product = decomposition.dense_weight(decomposition.factorise(weight, (rank,), metric), tuple(weight.shape))
            assert error_in(metric, weight, product) <= predicted + 1e-12
    assert cancelled > 10


def test_split_kinds_are_used_only_where_they_are_named_and_apply():
    assert {k: d.splits for k, d in DECOMPOSITIONS.items() if isinstance(d, SplitSvd)} == SPLITS
    assert set(SPLITS).isdisjoint(AUTOMATIC)
    assert resolve_kinds("split4_svd") == ("split4_svd",)
    plan = search_ranks(TinyNet(), Budget(params=0.75), kinds="split2_svd", method="exact")
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["conv1"] == "split2_svd needs in_channels divisible by 2, not 3"
    assert reasons["fc1"] == "split2_svd factorises convolutions only, nn.Linear has no groups"

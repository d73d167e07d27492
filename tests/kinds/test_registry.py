"""Errors of ranks that are found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_compress.core.effort import EFFORTS, trying
from lightning_compress.kinds import registry
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import kept_rank_errors, rank_errors, register_kind
from lightning_compress.kinds.svd import Svd

KINDS = ("svd", "tucker2", "cp")
WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The kinds whose errors are worked out."""
    kinds: list[str] = []

    def noted(kind, *args):
        kinds.append(kind)
        return rank_errors(kind, *args)

    monkeypatch.setattr(registry, "rank_errors", noted)
    return kinds


def gram(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("metric", [None, Metric(gram(36, 1), gram(6, 2))])
def test_errors_are_worked_out_once_and_found_again_as_they_were(real_store, computed, metric):
    first = kept_rank_errors(KINDS, WEIGHT, metric)
    again = kept_rank_errors(KINDS, WEIGHT, metric)
    assert computed == list(KINDS)
    for kind, one, other in zip(KINDS, first, again, strict=True):
        own = rank_errors(kind, WEIGHT, metric)
        for found in (one, other):
            assert (found.ranks == own.ranks).all()
            assert np.array_equal(found.errors, own.errors)


@pytest.mark.parametrize(
    "other",
    [
        lambda: kept_rank_errors(KINDS, WEIGHT + 1e-9),
        lambda: kept_rank_errors(KINDS, WEIGHT, Metric(gram(36, 1))),
        lambda: kept_rank_errors(KINDS, WEIGHT, groups=2),
        lambda: kept_rank_errors(KINDS[:2], WEIGHT),
    ],
)
def test_errors_of_something_else_are_not_found(real_store, computed, other):
    kept_rank_errors(KINDS, WEIGHT)
    computed.clear()
    other()
    assert computed


def test_errors_of_another_effort_are_not_found(real_store, computed):
    kept_rank_errors(KINDS, WEIGHT)
    computed.clear()
    with trying(EFFORTS["fast"]):
        kept_rank_errors(KINDS, WEIGHT)
    assert computed == list(KINDS)


def test_errors_of_a_kind_from_elsewhere_are_worked_out_each_time(real_store, computed, monkeypatch):
    monkeypatch.setattr(registry, "DECOMPOSITIONS", dict(registry.DECOMPOSITIONS))

    class Other(Svd):
        kind = "other"

    register_kind(Other())
    for _ in range(2):
        kept_rank_errors(("svd", "other"), WEIGHT)
    assert computed == ["svd", "other"] * 2
    assert not list(real_store.glob("profiles*"))

"""Large nn.Embedding from two tensor-train cores."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import PlanMismatchError
from lightning_compress.kinds import tensorised
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import (
    DECOMPOSITIONS,
    LayerCall,
    fit_factors,
    gated_weight,
    rank_errors,
)
from lightning_compress.kinds.tensorised import balanced_factors, modes_of
from lightning_compress.layers.families import operator_of
from lightning_compress.surgery.save import load_compressed, save_compressed
from tests.support.zoo import normal, plan_for, random_metric

TABLE = (1030, 48)  # 32 x 33 rows with room for 26 more, 8 x 6 columns


def table(seed=0, **settings):
    layer = nn.Embedding(*TABLE, **settings)
    layer.weight.data.copy_(normal(*TABLE, seed=seed))
    return layer


def lookup(layer, rank):
    model = nn.Sequential(layer)
    apply_plan_(model, plan_for(layer, "tt_embedding", (rank,)))
    return model[0]


@pytest.fixture
def small_ones(monkeypatch):
    monkeypatch.setattr(tensorised, "SMALLEST", 1)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
@pytest.mark.usefixtures("small_ones")
def test_lookup_gives_the_rows_of_its_dense_weight(shape):
    new = lookup(table(), 9)
    index = torch.randint(TABLE[0], shape, generator=torch.Generator().manual_seed(0))
    assert new(index).shape == (*shape, TABLE[1])
    torch.testing.assert_close(new(index), new.dense_weight()[index])
    everything = new(torch.arange(TABLE[0]))
    torch.testing.assert_close(everything, new.dense_weight())
    torch.testing.assert_close(new.to_dense()(index), new(index))


@pytest.mark.usefixtures("small_ones")
def test_table_at_full_rank_is_the_dense_one_and_errors_are_those_of_the_rearranged_table():
    layer = table()
    weight = layer.weight.detach().double().T.contiguous()
    profile = DECOMPOSITIONS["tt_embedding"].profile(weight)
    (full,) = DECOMPOSITIONS["tt_embedding"].max_ranks(tuple(weight.shape))
    assert len(profile.errors) == full
    filled = np.zeros((48, 33 * 32))
    filled[:, :1030] = weight.numpy()
    rearranged = filled.reshape(8, 6, 32, 33).transpose(0, 2, 1, 3).reshape(256, 198)
    values = np.square(np.linalg.svd(rearranged, compute_uv=False))
    assert profile.errors == pytest.approx(1 - values.cumsum() / values.sum(), abs=1e-12)
    torch.testing.assert_close(lookup(layer, full).dense_weight(), layer.weight.detach(), rtol=1e-4, atol=1e-5)
    for rank in (3, 40):
        lost = (lookup(layer, rank).dense_weight().detach().double() - weight.T).square().sum() / weight.square().sum()
        predicted = profile.errors[rank - 1]  # of the filled table: what is put in the place of the zeros counts
        assert 0.99 * predicted <= float(lost) <= predicted + 1e-6


@pytest.mark.usefixtures("small_ones")
def test_padding_passes_no_gradient_and_other_rows_that_of_the_multiplied_table():
    new = lookup(table(padding_idx=4), 9)
    new(torch.tensor([4, 4])).sum().backward()
    assert not any(bool(p.grad.any()) for p in new.parameters())
    index = torch.tensor([4, 7, 1029, 7])
    new(index).square().sum().backward()
    found = [p.grad.clone() for p in new.parameters()]
    new.zero_grad()
    new.dense_weight()[index[1:]].square().sum().backward()
    for gradient, parameter in zip(found, new.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.usefixtures("small_ones")
def test_costs_of_a_lookup_are_those_of_the_built_layers():
    decomposition, shape = DECOMPOSITIONS["tt_embedding"], TABLE[::-1]
    new = lookup(table(), 9)
    assert decomposition.parameters(shape, np.array([[9]])).tolist() == [sum(p.numel() for p in new.parameters())]
    with FlopCounterMode(display=False) as counter:
        new(torch.arange(7))
    macs = decomposition.macs(shape, np.array([[9]]), LayerCall((), (), rows=7, lookup=True))
    assert (macs * 2).tolist() == [counter.get_total_flops()]


@pytest.mark.usefixtures("small_ones")
def test_lookup_is_copied_saved_loaded_and_exported(tmp_path):
    model = nn.Sequential(lookup(table(), 9))
    index = torch.tensor([[0, 5, 1029], [7, 33, 512]])
    assert torch.equal(copy.deepcopy(model)(index), model(index))
    other = nn.Sequential(lookup(table(seed=1), 9))
    assert not torch.equal(other(index), model(index))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(index), model(index))
    torch.testing.assert_close(torch.export.export(model, (index,)).module()(index), model(index))
    save_compressed(model, tmp_path)
    again = nn.Sequential(table(seed=2))
    load_compressed(again, tmp_path)
    assert torch.equal(again(index), model(index))


def test_moments_of_the_outputs_are_left_out():
    weight, metric = normal(*TABLE).T.contiguous(), Metric(None, random_metric(48))
    assert (rank_errors("tt_embedding", weight, metric).errors == rank_errors("tt_embedding", weight).errors).all()
    found, expected = (fit_factors("tt_embedding", weight, (4,), known) for known in (metric, None))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_table_of_zeros_has_no_error_and_can_still_be_trained():
    decomposition, zero = DECOMPOSITIONS["tt_embedding"], torch.zeros(TABLE[::-1], dtype=torch.float64)
    assert not decomposition.profile(zero).errors.any()
    factors = decomposition.factorise(zero, (4,))
    assert not decomposition.dense_weight(factors, TABLE[::-1]).any()
    assert [bool(factor.any()) for factor in factors.values()].count(False) <= 1


def test_gates_remove_components():
    factors, asked = DECOMPOSITIONS["tt_embedding"].factorise(normal(*TABLE).T.contiguous(), (4,)), {}

    def gates(index, count):
        asked[index] = count
        return torch.arange(1.0, count + 1)

    gated = gated_weight("tt_embedding", factors, operator_of(table()), gates)
    assert asked == {0: 4}
    expected = sum(np.kron(factors["outer"][:, :, i], factors["inner"][i]) * (i + 1) for i in range(4))
    torch.testing.assert_close(gated, torch.from_numpy(np.asarray(expected))[:, : TABLE[0]])


def test_sizes_are_split_evenly_and_ranks_bounded():
    assert [balanced_factors(n) for n in (1, 7, 12, 64, 768)] == [(1, 1), (1, 7), (3, 4), (8, 8), (24, 32)]
    assert modes_of(TABLE[::-1]) == (8, 6, 32, 33)
    with pytest.raises(PlanMismatchError, match=r"its ranks go up to \(384,\)"):
        lookup(nn.Embedding(1024, 144), 385)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Linear(1024, 256), "factorises nn.Embedding only"),
        (nn.Embedding(1024, 32), "is for weights of 65536 entries or more, not 32768"),
        (nn.Embedding(1024, 127), "needs sizes with two balanced factors; 127 is 1 x 127 at best"),
        (nn.Embedding(1024, 128, sparse=True), "looks up row by row, without sparse or scaled gradients"),
        (nn.Embedding(1024, 128, scale_grad_by_freq=True), "looks up row by row, without sparse or scaled gradients"),
        (nn.EmbeddingBag(1024, 128), "looks up row by row, without sparse or scaled gradients"),
        (nn.Embedding(1009, 128), None),
    ],
)
def test_kind_of_embeddings_says_why_it_does_not_apply(layer, why):
    refusal = DECOMPOSITIONS["tt_embedding"].unsupported(operator_of(layer))
    assert refusal is None if why is None else refusal.startswith(f"tt_embedding {why}")


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = table()
        self.words.weight.data.copy_(torch.from_numpy(np.asarray(self.kronecker()[:1030])))
        self.out = nn.Linear(48, 5)

    @staticmethod
    def kronecker():
        return sum(np.kron(normal(32, 8, seed=i), normal(33, 6, seed=10 + i)) for i in range(3))

    def forward(self, index):
        return self.out(self.words(index).mean(1))


@pytest.mark.usefixtures("small_ones")
def test_table_of_kronecker_products_is_found_and_trains(tmp_path, monkeypatch):
    model, index = Words(), torch.arange(1030).reshape(103, 10)
    dense = copy.deepcopy(model)
    plan = search_ranks(model, Budget(params=0.1), kinds=["svd", "tt_embedding"], example_input=index, seed=0)
    chosen = {layer.name: layer for layer in plan.layers}["words"]
    assert (chosen.kind, chosen.ranks) == ("tt_embedding", (6,))  # three, and three for the cut in the last block
    assert chosen.error < 1e-6
    replacements = apply_plan_(model, plan)
    torch.testing.assert_close(model(index), dense(index), rtol=1e-3, atol=1e-3)
    save_compressed(model, tmp_path)
    again = Words()
    load_compressed(again, tmp_path)
    assert torch.equal(again(index), model(index))
    model(index).square().sum().backward()
    assert all(bool(p.grad.any()) for r in replacements for p in r.factorised.parameters())


# --- the choice of "auto"


def test_auto_tries_it_on_very_large_tables_alone():
    words = nn.Sequential(nn.Embedding(2**14, 512), nn.Embedding(2**13, 512), nn.Linear(4096, 2048))
    kinds = [layer.kinds for layer in take_inventory(words)]
    assert kinds == [("svd", "tt_embedding"), ("svd",), ("svd", "interpolative")]
    assert take_inventory(words[:2], kinds=["svd", "tt_embedding"])[1].kinds == ("svd", "tt_embedding")


@pytest.mark.parametrize("shape", [(1030, 1100), (1100, 1030)])
def test_few_leading_vectors_of_a_large_matrix_are_those_of_the_whole_decomposition(shape):
    left, right = normal(shape[0], 40, seed=1), normal(40, shape[1], seed=2)
    matrix = left * torch.linspace(3, 1, 40, dtype=torch.float64) @ right + 0.1 * normal(*shape, seed=3)
    found = tensorised._leading(matrix, 7)
    assert found.shape == (shape[0], 7)
    torch.testing.assert_close(found.T @ found, torch.eye(7, dtype=torch.float64))
    whole, *_ = torch.linalg.svd(matrix)
    torch.testing.assert_close((found.T @ whole[:, :7]).abs(), torch.eye(7, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(found, tensorised._leading(matrix, 7))
    assert tensorised._leading(torch.zeros(shape, dtype=torch.float64), 7).isfinite().all()

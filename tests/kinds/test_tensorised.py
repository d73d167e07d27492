"""Large nn.Linear as tensors of four modes: sums of Kronecker products, and Tucker."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import PlanMismatchError
from lightning_compress.kinds import tensorised
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import (
    DECOMPOSITIONS,
    LayerCall,
    Operator,
    factorise_in,
    gated_weight,
    profile_in,
)
from lightning_compress.kinds.tensorised import balanced_factors, modes_of
from lightning_compress.layers.families import operator_of
from lightning_compress.surgery.save import load_compressed, save_compressed
from tests.support.zoo import normal, plan_for, random_metric

KINDS = ["tt_linear", "tucker_linear"]
RANKS = {"tt_linear": [(1,), (5,), (17,)], "tucker_linear": [(1, 1, 1, 1), (4, 3, 5, 6), (16, 16, 2, 20)]}
BIG = (256, 320)
SMALL = (24, 30)  # out 6 x 4, in 5 x 6


def error_in(metric, weight, product):
    metric = torch.eye(weight.shape[1], dtype=torch.float64) if metric is None else metric
    lost = weight - product
    return float(((lost @ metric) * lost).sum() / ((weight @ metric) * weight).sum())


def factorised(layer, kind, ranks, wrap=nn.Sequential):
    model = wrap(layer)
    apply_plan_(model, plan_for(layer, kind, tuple(ranks)))
    return model


CASES = [(kind, ranks) for kind in KINDS for ranks in RANKS[kind]]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_multiplies_by_its_dense_weight(kind, ranks, lead, bias):
    linear = nn.Linear(BIG[1], BIG[0], bias=bias).double()
    own, x = linear.bias, normal(*lead, BIG[1]).requires_grad_()
    (new,) = factorised(linear, kind, ranks)
    assert new.bias is own
    through = F.linear(x, new.dense_weight(), new.bias)
    torch.testing.assert_close(new(x), through, rtol=1e-10, atol=1e-10)
    wanted = [x, *new.parameters()]
    got = torch.autograd.grad(new(x).square().sum(), wanted)
    for g, e in zip(got, torch.autograd.grad(through.square().sum(), wanted), strict=True):
        assert bool(g.any())
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_gives_the_dense_output(kind):
    linear, x = nn.Linear(BIG[1], BIG[0]), normal(4, BIG[1]).float()
    (new,) = factorised(copy.deepcopy(linear), kind, DECOMPOSITIONS[kind].max_ranks(BIG))
    assert new(x).dtype == torch.float32
    torch.testing.assert_close(new(x), linear(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_costs_are_those_of_the_built_layers(kind, ranks):
    decomposition = DECOMPOSITIONS[kind]
    (new,) = factorised(nn.Linear(BIG[1], BIG[0], bias=False), kind, ranks)
    assert decomposition.parameters(BIG, np.array([ranks])).tolist() == [sum(p.numel() for p in new.parameters())]
    with FlopCounterMode(display=False) as counter:
        new(torch.ones(7, BIG[1]))
    call, written = LayerCall((), (), rows=7), []
    macs = decomposition.macs(BIG, np.array([ranks]), call)
    assert (macs * 2).tolist() == [counter.get_total_flops()]
    for child in new:
        child.register_forward_hook(lambda _, __, output: written.append(output.numel()))
    new(torch.ones(7, BIG[1]))
    assert decomposition.activations(BIG, np.array([ranks]), call).tolist() == [sum(written)]


@pytest.mark.parametrize(("kind", "ranks"), [(kind, RANKS[kind][1]) for kind in KINDS])
def test_layer_is_copied_saved_loaded_and_exported(kind, ranks, tmp_path):
    model = factorised(nn.Linear(BIG[1], BIG[0]), kind, ranks)
    x = normal(3, BIG[1]).float()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    other = factorised(nn.Linear(BIG[1], BIG[0]), kind, ranks)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    save_compressed(model, tmp_path)
    again = nn.Sequential(nn.Linear(BIG[1], BIG[0]))
    load_compressed(again, tmp_path)
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(model[0].to_dense()(x), model(x), rtol=1e-4, atol=1e-5)


# --- errors


def test_plain_errors_of_the_tensor_train_are_the_tails_of_the_rearranged_weight():
    weight = normal(*SMALL)
    rearranged = weight.numpy().reshape(6, 4, 5, 6).transpose(0, 2, 1, 3).reshape(30, 24)
    values = np.square(np.linalg.svd(rearranged, compute_uv=False))
    profile = DECOMPOSITIONS["tt_linear"].profile(weight)
    assert profile.ranks.tolist() == [[r] for r in range(1, 25)]
    assert profile.errors == pytest.approx(1 - values.cumsum() / values.sum(), abs=1e-12)
    for rank in (1, 7, 24):
        factors = DECOMPOSITIONS["tt_linear"].factorise(weight, (rank,))
        by_hand = sum(np.kron(factors["outer"][:, :, i], factors["inner"][i]) for i in range(rank))
        product = DECOMPOSITIONS["tt_linear"].dense_weight(factors, SMALL)
        torch.testing.assert_close(product, torch.from_numpy(by_hand))
        assert error_in(None, weight, product) == pytest.approx(profile.errors[rank - 1], abs=1e-12)


def test_plain_errors_of_tucker_are_those_of_the_truncated_hosvd():
    weight = normal(*SMALL)
    tensor = weight.numpy().reshape(6, 4, 5, 6)
    bases = [np.linalg.svd(np.moveaxis(tensor, m, 0).reshape(n, -1))[0] for m, n in enumerate(tensor.shape)]
    core = np.square(np.einsum("abij,as,bt,ip,jq->stpq", tensor, *bases))
    profile = DECOMPOSITIONS["tucker_linear"].profile(weight)
    assert len(profile.ranks) > 100
    for (a, b, i, j), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        assert error == pytest.approx(1 - core[:a, :b, :i, :j].sum() / core.sum(), abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", [None, "random"])
def test_fit_never_exceeds_the_prediction(kind, metric):
    weight, metric = normal(*SMALL, seed=3), None if metric is None else random_metric(30)
    profile = DECOMPOSITIONS[kind].profile(weight, metric)
    errors = []
    for ranks, predicted in list(zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True))[::3]:
        product = DECOMPOSITIONS[kind].dense_weight(DECOMPOSITIONS[kind].factorise(weight, tuple(ranks), metric), SMALL)
        errors.append((error_in(metric, weight, product), predicted))
    attained, predicted = np.array(errors).T
    assert (attained <= predicted + 1e-6).all()
    assert (attained < predicted - 1e-3).any() == (kind != "tt_linear" or metric is not None)  # SVD is the best already


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", [None, "random"])
def test_error_falls_along_each_rank(kind, metric):
    profile = DECOMPOSITIONS[kind].profile(normal(*SMALL), None if metric is None else random_metric(30))
    for (one, a), (other, b) in itertools.permutations(zip(profile.ranks, profile.errors, strict=True), 2):
        if (one <= other).all():
            assert b <= a + 1e-9


@pytest.mark.parametrize("metric", [None, "random"])
def test_weights_of_low_rank_are_found_again(metric):
    metric = None if metric is None else random_metric(30, condition=30)
    kron = sum(np.kron(normal(6, 5, seed=i), normal(4, 6, seed=10 + i)) for i in range(3))
    core, bases = normal(2, 3, 2, 3), [normal(n, r, seed=n + r) for n, r in ((6, 2), (4, 3), (5, 2), (6, 3))]
    tucker = np.einsum("stpq,as,bt,ip,jq->abij", core, *bases).reshape(SMALL)
    for kind, ranks, array in (("tt_linear", (3,), kron), ("tucker_linear", (2, 3, 2, 3), tucker)):
        weight = torch.from_numpy(np.asarray(array))
        product = DECOMPOSITIONS[kind].dense_weight(DECOMPOSITIONS[kind].factorise(weight, ranks, metric), SMALL)
        torch.testing.assert_close(product, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "ranks"), [("tt_linear", (6,)), ("tucker_linear", (4, 3, 3, 4))])
def test_fit_in_the_metric_beats_the_plain_fit_there(kind, ranks):
    weight, metric, decomposition = normal(*SMALL), random_metric(30), DECOMPOSITIONS[kind]
    plain, fitted = (
        error_in(metric, weight, decomposition.dense_weight(decomposition.factorise(weight, ranks, m), SMALL))
        for m in (None, metric)
    )
    assert fitted < 0.9 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_the_outputs_are_left_out(kind):
    weight, inputs, ranks = normal(*SMALL), random_metric(30), {"tt_linear": (4,)}.get(kind, (3, 2, 3, 3))
    both, alone = Metric(inputs, random_metric(24)), Metric(inputs)
    assert (profile_in(kind, weight, both).errors == profile_in(kind, weight, alone).errors).all()
    found, expected = (factorise_in(kind, weight, ranks, metric) for metric in (both, alone))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", [None, "random", "zero"])
def test_zero_weight_and_dead_inputs(kind, metric):
    ranks, zero = {"tt_linear": (4,)}.get(kind, (3, 2, 3, 3)), torch.zeros(SMALL, dtype=torch.float64)
    metric = {"random": random_metric(30), "zero": torch.zeros(30, 30, dtype=torch.float64)}.get(metric)
    if metric is not None:
        metric[:, 3:9] = metric[3:9] = 0
    decomposition = DECOMPOSITIONS[kind]
    assert not decomposition.profile(zero, metric).errors.any()
    factors = decomposition.factorise(zero, ranks, metric)
    assert not decomposition.dense_weight(factors, SMALL).any()
    assert [bool(factor.any()) for factor in factors.values()].count(False) <= 1
    assert all(bool(torch.isfinite(f).all()) for f in decomposition.factorise(normal(*SMALL), ranks, metric).values())


@pytest.mark.parametrize("kind", KINDS)
def test_gates_remove_components_of_the_own_rank(kind):
    ranks = {"tt_linear": (4,)}.get(kind, (3, 2, 4, 5))
    factors, asked = DECOMPOSITIONS[kind].factorise(normal(*SMALL), ranks, random_metric(30)), {}

    def gates(index, count):
        asked[index] = count
        return torch.arange(1.0, count + 1)

    gated = gated_weight(kind, factors, Operator(SMALL), gates)
    assert tuple(asked[i] for i in range(len(ranks))) == ranks
    if kind == "tt_linear":
        expected = sum(np.kron(factors["outer"][:, :, i], factors["inner"][i]) * (i + 1) for i in range(4))
    else:
        bases = (factors[name].numpy() for name in ("expand1", "expand2", "reduce1", "reduce2"))
        steps = (np.arange(1, rank + 1) for rank in ranks)
        core = factors["core"].reshape(ranks).numpy()
        expected = np.einsum("stpq,as,bt,pi,qj,s,t,p,q->abij", core, *bases, *steps).reshape(SMALL)
    torch.testing.assert_close(gated, torch.from_numpy(np.asarray(expected)))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(256, 256, 1), "factorises nn.Linear only"),
        (nn.Embedding(1024, 256), "multiplies its inputs and cannot look rows up; embeddings take svd or tt_embedding"),
        (nn.Linear(128, 128), "is for weights of 65536 entries or more, not 16384"),
        (nn.Linear(1009, 256), "needs sizes with two balanced factors; 1009 is 1 x 1009 at best"),
        (nn.Linear(256, 2 * 167 * 3), "needs sizes with two balanced factors; 1002 is 6 x 167 at best"),
        (nn.Linear(1024, 256), None),
    ],
)
def test_kinds_say_why_they_do_not_apply(layer, why):
    for kind in KINDS:
        assert DECOMPOSITIONS[kind].unsupported(operator_of(layer)) == (why and f"{kind} {why}")


def test_sizes_are_split_evenly_and_ranks_bounded():
    assert [balanced_factors(n) for n in (1, 7, 12, 64, 768)] == [(1, 1), (1, 7), (3, 4), (8, 8), (24, 32)]
    assert modes_of((3072, 768)) == (64, 48, 24, 32)
    with pytest.raises(PlanMismatchError, match=r"its ranks go up to \(256,\)"):
        factorised(nn.Linear(256, 256), "tt_linear", (257,))


# --- embeddings

TABLE = (1030, 48)  # 32 x 33 rows with room for 26 more, 8 x 6 columns


def table(seed=0, **settings):
    layer = nn.Embedding(*TABLE, **settings)
    layer.weight.data.copy_(normal(*TABLE, seed=seed))
    return layer


def lookup(layer, rank):
    return factorised(layer, "tt_embedding", (rank,))[0]


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
    monkeypatch.setattr(
        "lightning_compress.search.problem.ACTIVATION_WEIGHT", 0.0
    )  # all of the table, whatever it writes
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


def test_auto_tries_them_on_very_large_layers_alone():
    net = nn.Sequential(nn.Linear(2048, 4096, bias=False), nn.Linear(4096, 1024), nn.Conv2d(4096, 2048, 1))
    large, small, pointwise = (layer.kinds for layer in take_inventory(net))
    assert large == ("svd", "interpolative", *KINDS)
    assert small == ("svd", "interpolative")
    assert set(KINDS).isdisjoint(pointwise)
    assert take_inventory(net, kinds=["svd", *KINDS])[1].kinds == ("svd", *KINDS)
    words = nn.Sequential(nn.Embedding(2**14, 512), nn.Embedding(2**13, 512))
    assert [layer.kinds for layer in take_inventory(words)] == [("svd", "tt_embedding"), ("svd",)]


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


def test_profile_of_few_ranks_is_that_of_the_whole_decomposition():
    weight = normal(2048, 2048, seed=1) @ torch.diag(torch.linspace(2, 0, 2048, dtype=torch.float64) ** 3)
    profile = profile_in("tt_linear", weight)
    out_1, out_2, in_1, in_2 = modes_of(tuple(weight.shape))
    matrix = weight.reshape(out_1, out_2, in_1, in_2).transpose(1, 2).reshape(out_1 * in_1, out_2 * in_2)
    values = torch.linalg.svdvals(matrix).square()
    expected = 1 - values.cumsum(0)[: len(profile.errors)] / values.sum()
    np.testing.assert_allclose(profile.errors, expected.numpy(), atol=1e-6)

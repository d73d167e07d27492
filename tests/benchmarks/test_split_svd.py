"""The split kinds: channel SVD in k groups of input channels (Liebenwein et al. 2021)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import SplitSvd
from lightning_compress import Budget, apply_plan_, compress_, load_compressed, save_compressed, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.core.costs import Costs
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.kinds.base import Operator
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import (
    AUTOMATIC,
    DECOMPOSITIONS,
    LayerCall,
    factorise_in,
    gated_weight,
    profile_in,
    resolve_kinds,
)
from lightning_compress.layers.families import operator_of
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.compressing import DEFAULTS, WEIGHTS_ALONE
from tests.support.errors import error_in as error_in_both
from tests.support.nets import TinyNet
from tests.support.zoo import LAYERS, SAMPLE_OR_ALL, error_in, full_ranks, normal, random_metric, randomised
from tests.support.zoo import factorised as replacement_of

SPLITS = {"split2_svd": 2, "split4_svd": 4}
SHAPES = [(5, 8, 3, 3), (6, 4, 1, 1), (40, 8, 3, 1), (3, 12, 5, 3)]
CASES = list(itertools.product(SPLITS, SHAPES))


def factorised(layer, kind, rank):
    costs = Costs(1, None, 4)
    planned = LayerPlan("0", "Conv2d", kind, (rank,), tuple(layer.weight.shape), 0.0, 1, 1)
    model = nn.Sequential(layer)
    apply_plan_(model, Plan((planned,), costs, costs))
    return model[0]


def full_rank(kind, shape):
    return min(shape[0], int(np.prod(shape[1:])) // SPLITS[kind])


def blocks_of(weight, splits):
    """The blocks of the unfolding, cut with numpy along the input channels."""
    return [part.reshape(len(part), -1) for part in np.split(np.asarray(weight), splits, axis=1)]


# --- the layer


@SAMPLE_OR_ALL
@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
def test_full_rank_gives_the_dense_output_for_every_geometry(kind, kernel, step):
    x = normal(2, 8, 11, 10, seed=9)
    paddings, modes = [(0, 0), (1, 2), "same", "valid"], ["zeros", "reflect", "replicate", "circular"]
    geometries = itertools.product([(1, 1), (2, 1)], paddings, modes, [(1, 1), (2, 1)], (True, False))
    possible = [g for g in geometries if g[1] != "same" or g[0] == (1, 1)]  # torch refuses the others
    assert len(possible) == 7 * 4 * 2 * 2
    for seed, (stride, padding, mode, dilation, bias) in enumerate(possible[::step]):
        conv = randomised(nn.Conv2d(8, 5, kernel, stride, padding, dilation, bias=bias, padding_mode=mode), seed)
        expected = conv(x).detach()
        got = factorised(conv, kind, full_rank(kind, conv.weight.shape))(x).detach()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SPLITS)
def test_layer_is_a_grouped_convolution_and_a_pointwise_one(kind):
    conv = nn.Conv2d(8, 6, 3, stride=2, padding=1)
    bias = conv.bias
    new = factorised(conv, kind, 2)
    assert list(new.factors()) == ["reduce", "expand"]
    assert (new.reduce.groups, new.reduce.kernel_size, new.reduce.stride) == (SPLITS[kind], (3, 3), (2, 2))
    assert new.reduce.weight.shape == (2 * SPLITS[kind], 8 // SPLITS[kind], 3, 3)
    assert (new.expand.groups, new.expand.kernel_size, new.expand.stride) == (1, (1, 1), (1, 1))
    assert new.bias is bias
    assert (new.kind, new.ranks, new.groups) == (kind, (2,), 1)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_parameters_and_macs_are_those_of_the_built_layers(kind, shape):
    decomposition = DECOMPOSITIONS[kind]
    conv = randomised(nn.Conv2d(shape[1], shape[0], shape[2:], stride=(2, 1), padding=(1, 0)))
    x = normal(1, shape[1], 9, 8)
    call = LayerCall((9, 8), tuple(conv(x).shape[-2:]), rows=1)
    ranks = decomposition.profile(conv.weight.detach()).ranks
    assert ranks.tolist() == [[r] for r in range(1, full_rank(kind, shape) + 1)]
    assert decomposition.max_ranks(shape) == (full_rank(kind, shape),)
    parameters, macs = decomposition.parameters(shape, ranks), decomposition.macs(shape, ranks, call)
    assert parameters.shape == macs.shape == (len(ranks),)
    for index, (rank,) in enumerate(ranks.tolist()):
        new = factorised(conv, kind, rank)
        assert parameters[index] == sum(child.weight.numel() for child in new)
        with FlopCounterMode(display=False) as counter:
            new(x)
        assert macs[index] * 2 == counter.get_total_flops()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_dense_weight_and_gradients_are_those_of_the_layer(kind, shape):
    conv = randomised(nn.Conv2d(shape[1], shape[0], shape[2:], stride=(2, 1), padding=(1, 0)))
    x = normal(1, shape[1], 9, 8)
    new = factorised(conv, kind, max(1, full_rank(kind, shape) - 1))
    assert new.weight.shape == conv.weight.shape
    through_product = F.conv2d(x, new.dense_weight(), new.bias, conv.stride, conv.padding)
    torch.testing.assert_close(new(x), through_product, rtol=1e-10, atol=1e-10)
    target, factors = normal(*through_product.shape, seed=5), list(new.factors().values())
    got = torch.autograd.grad((new(x) - target).square().sum(), factors)
    expected = torch.autograd.grad((through_product - target).square().sum(), factors)
    for g, e in zip(got, expected, strict=True):
        assert float(g.abs().max()) > 1e-6
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


# --- errors


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_errors_are_the_sum_of_the_block_tails_and_those_of_the_factors(kind, shape):
    weight, decomposition = normal(*shape, seed=3), DECOMPOSITIONS[kind]
    profile = decomposition.profile(weight)
    values = [np.linalg.svd(block, compute_uv=False) for block in blocks_of(weight, SPLITS[kind])]
    for (rank,), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        tails = sum(np.square(s[rank:]).sum() for s in values)
        assert error == pytest.approx(tails / np.square(weight.numpy()).sum(), abs=1e-13)
        product = decomposition.dense_weight(decomposition.factorise(weight, (rank,)), shape)
        assert error_in(torch.eye(weight[0].numel(), dtype=torch.float64), weight, product) == pytest.approx(
            error, abs=1e-12
        )


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("metric", [None, "random"])
def test_zero_weight_gives_zero_errors_and_only_the_bias(kind, metric):
    conv = randomised(nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        conv.weight.zero_()
    weight, metric = conv.weight.detach(), None if metric is None else random_metric(36)
    profile = DECOMPOSITIONS[kind].profile(weight, metric)
    assert not profile.errors.any()
    factors = DECOMPOSITIONS[kind].factorise(weight, (2,), metric)
    assert not DECOMPOSITIONS[kind].dense_weight(factors, (5, 4, 3, 3)).any()
    assert factors["expand"].any()  # or the factors could never train
    x = normal(1, 4, 6, 6)
    assert torch.equal(factorised(conv, kind, 2)(x), conv(x))


# --- in a metric


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_profile_in_a_metric_is_the_exact_error_of_the_start(kind, shape):
    weight, splits = normal(*shape, seed=1), SPLITS[kind]
    size = weight[0].numel()
    metric = random_metric(size)
    profile = DECOMPOSITIONS[kind].profile(weight, metric)
    width = size // splits
    roots = [np.linalg.cholesky(metric[i : i + width, i : i + width].numpy()) for i in range(0, size, width)]
    for (rank,), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        start = []
        for block, root in zip(blocks_of(weight, splits), roots, strict=True):
            u, s, vt = np.linalg.svd(block @ root, full_matrices=False)  # the whitened block
            start.append((u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root))
        product = torch.from_numpy(np.concatenate(start, axis=1)).reshape(shape)
        assert error == pytest.approx(min(error_in(metric, weight, product), 1), abs=1e-9)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_fit_is_never_worse_than_the_start_and_mostly_better(kind, shape):
    weight = normal(*shape, seed=1)
    metric = random_metric(weight[0].numel())
    decomposition = DECOMPOSITIONS[kind]
    profile = decomposition.profile(weight, metric)
    gains = []
    for (rank,), start in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        fitted = decomposition.dense_weight(decomposition.factorise(weight, (rank,), metric), shape)
        error = error_in(metric, weight, fitted)
        assert error <= start + 1e-12
        gains.append(start - error)
    assert max(gains) > 1e-2 * profile.errors[0] or len(gains) == 1
    assert profile.errors[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", SPLITS)
def test_no_other_factors_of_one_block_lower_the_error_of_the_fit(kind):
    shape, rank, splits = (7, 8, 3, 3), 2, SPLITS[kind]
    weight = normal(*shape, seed=2)
    metric = random_metric(72, condition=50)
    fitted = DECOMPOSITIONS[kind].dense_weight(DECOMPOSITIONS[kind].factorise(weight, (rank,), metric), shape)
    error, width = error_in(metric, weight, fitted), 72 // splits
    improved = []
    for block in range(splits):  # the exact optimum over one block: whiten with S_ii, truncate
        own = slice(block * width, (block + 1) * width)
        lost = (weight - fitted).flatten(1).numpy()
        lost[:, own] = weight.flatten(1).numpy()[:, own]
        root = np.linalg.cholesky(metric[own, own].numpy())
        target = lost @ metric[:, own].numpy() @ np.linalg.inv(root).T  # of the whitened block
        u, s, vt = np.linalg.svd(target, full_matrices=False)
        product = fitted.flatten(1).clone()
        product[:, own] = torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root))
        improved.append(error_in(metric, weight, product.reshape(shape)))
    assert improved[-1] == pytest.approx(error, rel=1e-5)  # the block fitted last is at its optimum
    assert min(improved) >= error * 0.97  # a few rounds come close for the others


@pytest.mark.parametrize("kind", SPLITS)
def test_blocks_that_cancel_do_not_end_worse_than_nothing(kind):
    # All blocks see the same inputs and hardly anything is left of W x, but the start keeps other directions of each.
    splits, decomposition, cancelled = SPLITS[kind], DECOMPOSITIONS[kind], 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        square = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(splits)]
        blocks = [torch.linalg.qr(block)[0] for block in square[1:]]
        blocks.append(0.005 * square[0] - sum(blocks))
        weight = torch.cat(blocks, dim=1)[:, :, None, None]
        size = 6 * splits
        metric = torch.eye(6, dtype=torch.float64).repeat(splits, splits) + 1e-5 * torch.eye(size, dtype=torch.float64)
        profile = decomposition.profile(weight, metric)
        cancelled += int((profile.errors == 1).sum())
        for (rank,), predicted in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
            product = decomposition.dense_weight(decomposition.factorise(weight, (rank,), metric), tuple(weight.shape))
            assert error_in(metric, weight, product) <= predicted + 1e-12
    assert cancelled > 10


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("dead", [slice(0, 3), slice(0, 36), slice(0, 72)])
def test_inputs_that_never_vary_give_finite_factors(kind, dead):
    weight, metric = normal(5, 8, 3, 3), random_metric(72)
    metric[dead] = 0
    metric[:, dead] = 0  # a few inputs, whole splits, everything
    profile = DECOMPOSITIONS[kind].profile(weight, metric)
    assert ((profile.errors >= 0) & (profile.errors <= 1)).all()
    for factor in DECOMPOSITIONS[kind].factorise(weight, (2,), metric).values():
        assert bool(torch.isfinite(factor).all())


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_fit_in_both_metrics_is_never_worse_than_predicted(kind, shape):
    weight = normal(*shape, seed=1)
    metric = Metric(random_metric(weight[0].numel()), random_metric(len(weight)))
    profile = profile_in(kind, weight, metric)
    for (rank,), predicted in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        fitted = DECOMPOSITIONS[kind].dense_weight(factorise_in(kind, weight, (rank,), metric), shape)
        assert error_in_both(metric, weight, fitted) <= predicted * (1 + 1e-4) + 1e-6


# --- gates of its components


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_gates_weigh_the_components_of_every_split_alike(kind, shape):
    weight, full = normal(*shape, seed=1), full_rank(kind, shape)
    factors, gates, asked = DECOMPOSITIONS[kind].factorise(weight, (full,)), normal(full, seed=2), []

    def given(index, count):
        asked.append((index, count))
        return gates

    gated = gated_weight(kind, factors, Operator(shape), given).numpy()
    assert asked == [(0, full)]
    expected = []
    for block in blocks_of(weight, SPLITS[kind]):
        u, s, vt = np.linalg.svd(block, full_matrices=False)
        expected.append((u * s * np.pad(gates.numpy(), (0, len(s) - full))) @ vt)
    assert gated.reshape(len(weight), -1) == pytest.approx(np.concatenate(expected, axis=1), abs=1e-9)


# --- where it applies, and everything behind it


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("Conv") and name != "Conv1D"])
def test_every_type_of_convolution_keeps_its_outputs_at_full_rank(kind, name):
    layer, (x,) = LAYERS[name].layer(), LAYERS[name].call()
    new = replacement_of(layer, kind, full_ranks(layer, kind))
    torch.testing.assert_close(new(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "layer", "why"),
    [
        ("split2_svd", nn.Linear(4, 4), "split2_svd factorises convolutions only, nn.Linear has no groups"),
        ("split2_svd", nn.Conv2d(3, 4, 3), "split2_svd needs in_channels divisible by 2, not 3"),
        ("split4_svd", nn.Conv2d(6, 4, 1), "split4_svd needs in_channels divisible by 4, not 6"),
        ("split4_svd", nn.Conv2d(8, 4, 1), None),
    ],
)
def test_kind_says_why_it_does_not_apply(kind, layer, why):
    assert DECOMPOSITIONS[kind].unsupported(operator_of(layer)) == why


def test_split_kinds_are_used_only_where_they_are_named():
    assert resolve_kinds("auto") == AUTOMATIC
    assert resolve_kinds(["auto"]) == AUTOMATIC
    assert resolve_kinds("split4_svd") == ("split4_svd",)
    assert set(DECOMPOSITIONS) >= {*AUTOMATIC, *SPLITS}
    assert set(SPLITS).isdisjoint(AUTOMATIC)
    assert {k: d.splits for k, d in DECOMPOSITIONS.items() if isinstance(d, SplitSvd)} == SPLITS
    net = TinyNet()
    assert {p.kind for p in search_ranks(net, Budget(params=0.5)).factorised}.isdisjoint(SPLITS)
    plan = search_ranks(net, Budget(params=0.75), kinds="split2_svd", method="exact")
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["conv1"] == "split2_svd needs in_channels divisible by 2, not 3"
    assert reasons["fc1"] == "split2_svd factorises convolutions only, nn.Linear has no groups"


@pytest.mark.slow
@pytest.mark.parametrize("heal", [False, True])
@pytest.mark.parametrize("kind", SPLITS)
def test_model_is_compressed_saved_and_loaded(kind, heal, tmp_path):
    net = TinyNet().eval()
    shape = (1, 3, 8, 8)
    settings = DEFAULTS if heal else WEIGHTS_ALONE
    plan = compress_(net, Budget(params=0.7, macs=0.8), example_input=shape, kinds=kind, **settings)
    assert plan.objective == ("end_to_end" if heal else "weight")
    assert {p.kind for p in plan.factorised} == {kind}
    assert measure_costs(net, shape) == plan.compressed
    seen = embodied_plan(net, shape)
    assert [(p.name, p.kind, p.ranks, p.params_after, p.macs_after) for p in seen.factorised] == [
        (p.name, p.kind, p.ranks, p.params_after, p.macs_after) for p in plan.factorised
    ]
    save_compressed(net, tmp_path)
    again = TinyNet().eval()
    loaded = load_compressed(again, tmp_path)
    assert [(p.name, p.kind, p.ranks) for p in loaded.factorised] == [
        (p.name, p.kind, p.ranks) for p in plan.factorised
    ]
    x = normal(2, 3, 8, 8).float()
    assert torch.equal(again(x), net(x))
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))

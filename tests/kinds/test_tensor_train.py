"""The tensor train of convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensorly.decomposition import tensor_train
from tensorly.tt_tensor import tt_to_tensor
from torch import nn

from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import PlanMismatchError
from lightning_compress.kinds.registry import DECOMPOSITIONS, gated_weight
from lightning_compress.layers.families import operator_of
from lightning_compress.search.candidates import tabulate
from lightning_compress.search.problem import Problem
from lightning_compress.search.space import Space
from tests.support.nets import TinyNet
from tests.support.zoo import error_in, factorised, normal, random_metric, randomised

TT = DECOMPOSITIONS["tt"]
SHAPES = [(5, 4, 3, 3), (7, 3, 5, 2), (2, 9, 3, 3), (4, 3, 2, 3, 2), (4, 5, 1, 3, 3)]


def product_of(factors):
    """The kernel of the chain of a Conv2d, summed out by numpy."""
    reduce, axis0, axis1, expand = (factor.numpy() for factor in factors.values())
    return torch.from_numpy(
        np.einsum("ot,tsw,srh,ri->oihw", expand[:, :, 0, 0], axis1[:, :, 0], axis0[..., 0], reduce[:, :, 0, 0])
    )


def tt_svd(weight, ranks):
    """Oseledets 2011, algorithm 1, in the order (in, k_h, k_w, out)."""
    cores = tensor_train(np.moveaxis(weight.numpy(), 0, -1), [1, *ranks, 1])
    return torch.from_numpy(tt_to_tensor(cores)).movedim(-1, 0)


# --- the layer


def test_layer_is_a_chain_of_one_dimensional_convolutions():
    new = factorised(nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(1, 2)), "tt", (3, 4, 5))
    assert {name: tuple(f.shape) for name, f in new.factors().items()} == {
        "reduce": (3, 8, 1, 1),
        "axis0": (4, 3, 3, 1),
        "axis1": (5, 4, 1, 5),
        "expand": (6, 5, 1, 1),
    }
    assert [child.stride for child in new] == [(1, 1), (2, 1), (1, 1), (1, 1)]
    assert [child.padding for child in new] == [(0, 0), (1, 0), (0, 2), (0, 0)]


def test_volumes_have_one_axis_more_and_flat_axes_join_their_neighbour():
    assert TT.max_ranks((5, 4, 2, 3, 3)) == (4, 8, 15, 5)
    for kernel, kernels in {
        (1, 3, 3): [(1, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1, 1)],
        (3, 1, 3): [(1, 1, 1), (3, 1, 1), (1, 1, 3), (1, 1, 1)],
    }.items():
        conv, x = randomised(nn.Conv3d(4, 5, kernel, stride=2, padding=1)), normal(2, 4, 5, 6, 7, seed=3)
        new = factorised(conv, "tt", TT.max_ranks((5, 4, *kernel)))
        assert [child.kernel_size for child in new] == kernels
        torch.testing.assert_close(new(x), conv(x).detach(), rtol=1e-9, atol=1e-9)


# --- errors


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_the_tt_svd(shape):
    weight = normal(*shape, seed=3)
    identity = torch.eye(weight[0].numel(), dtype=torch.float64)
    squeezed = weight.reshape(*shape[:2], *(size for size in shape[2:] if size > 1))
    for metric in (None, identity):
        profile = TT.profile(weight, metric)
        assert len(profile.ranks) > 10
        for ranks, error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
            product = tt_svd(squeezed, ranks).reshape(shape)
            assert error == pytest.approx(error_in(identity, weight, product), abs=1e-8 if metric is None else 1e-5)


def test_profile_is_a_grid_of_the_shape_alone_and_smaller_than_dense():
    shape, other = (24, 16, 3, 3), normal(24, 16, 3, 3, seed=8)
    profile = TT.profile(normal(*shape))
    assert (profile.ranks == TT.profile(other, random_metric(144)).ranks).all()
    inner = profile.ranks[:-1]
    assert (TT.parameters(shape, inner) < 24 * 16 * 9).all()
    assert (inner[:, 1:] <= 3 * inner[:, :-1]).all()
    assert (inner[:, :-1] <= 3 * inner[:, 1:]).all()
    assert tuple(profile.ranks[-1]) == TT.max_ranks(shape)
    assert profile.errors[-1] == 0
    assert 100 < len(profile.ranks) <= 1501
    assert len({tuple(row) for row in profile.ranks.tolist()}) == len(profile.ranks)


@pytest.mark.parametrize("metric", [None, "random"])
def test_a_kernel_of_low_rank_is_found_again(metric):
    ranks, shape = (2, 3, 2), (8, 7, 3, 3)
    parts = [normal(2, 7, 1, 1, seed=1), normal(3, 2, 3, 1, seed=2), normal(2, 3, 1, 3, seed=3), normal(8, 2, 1, 1)]
    weight = product_of(dict(enumerate(parts)))
    metric = None if metric is None else random_metric(63, condition=30)
    factors = TT.factorise(weight, ranks, metric)
    torch.testing.assert_close(product_of(factors), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(product_of(factors), TT.dense_weight(factors, shape))
    scales = [float(factor.norm() / factor.numel() ** 0.5) for factor in factors.values()]
    assert max(scales) == pytest.approx(min(scales))


def test_no_other_right_cores_lower_the_error():
    shape, metric = (6, 5, 3, 3), random_metric(45)
    weight = normal(*shape)
    factors = TT.factorise(weight, (3, 4, 2), metric)
    error = error_in(metric, weight, TT.dense_weight(factors, shape))
    reduce, axis0 = factors["reduce"][:, :, 0, 0].numpy(), factors["axis0"][..., 0].numpy()
    # features (s, w) of the patch (i, h, w), and reduced-rank regression on them by whitening and SVD
    maps = np.einsum("srh,ri,wv->swihv", axis0, reduce, np.eye(3)).reshape(12, 45)
    root = np.linalg.cholesky(metric.numpy())
    basis, _ = np.linalg.qr((maps @ root).T)
    target = weight.flatten(1).numpy() @ root
    values = np.linalg.svd(target @ basis, compute_uv=False)
    assert error == pytest.approx(1 - np.square(values[:2]).sum() / np.square(target).sum(), abs=1e-6)


# --- what could break


def test_ranks_beyond_what_neighbours_allow_are_met_and_those_beyond_the_largest_refused():
    weight = normal(5, 4, 3, 3)
    factors = TT.factorise(weight, (1, 12, 5))
    assert [f.shape[:2] for f in factors.values()] == [(1, 4), (12, 1), (5, 12), (5, 5)]
    assert bool(factors["axis0"].flatten(1).any(dim=1).all())
    same = TT.dense_weight(TT.factorise(weight, (1, 3, 5)), (5, 4, 3, 3))
    torch.testing.assert_close(TT.dense_weight(factors, (5, 4, 3, 3)), same)
    with pytest.raises(PlanMismatchError, match=r"its ranks go up to \(4, 12, 5\)"):
        factorised(nn.Conv2d(4, 5, 3), "tt", (4, 13, 5))


# --- everything behind it


def test_each_bond_has_its_own_gates():
    conv = nn.Conv2d(6, 5, 3)
    operator, ranks = operator_of(conv), (3, 4, 2)
    factors = TT.factorise(normal(5, 6, 3, 3), ranks)
    asked = []

    def gates(index, count):
        asked.append((index, count))
        return torch.arange(1, count + 1, dtype=torch.float64) * 10.0**-index

    gated = gated_weight("tt", factors, operator, gates)
    assert asked == [(0, 3), (1, 4), (2, 2)]
    reduce, axis0, axis1, expand = (factor.numpy() for factor in factors.values())
    by_hand = np.einsum(
        "ot,tsw,srh,ri,r,s,t->oihw",
        *(expand[:, :, 0, 0], axis1[:, :, 0], axis0[..., 0], reduce[:, :, 0, 0]),
        *(np.arange(1, 4), np.arange(1, 5) / 10, np.arange(1, 3) / 100),
    )
    torch.testing.assert_close(gated, torch.from_numpy(by_hand))


def test_leading_components_explain_most():
    weight, metric = normal(8, 6, 3, 3), random_metric(54)
    operator, factors = operator_of(nn.Conv2d(6, 8, 3)), TT.factorise(weight, (4, 6, 4), metric)
    for bond, count in enumerate((4, 6, 4)):

        def gates(index, size, at, bond=bond):
            kept = torch.ones(size, dtype=torch.float64)
            if index == bond:
                kept[at] = 0
            return kept

        def error(at, gates=gates):
            left = gated_weight("tt", factors, operator, lambda index, size: gates(index, size, at))
            return error_in(metric, weight, left)

        without = [error(at) for at in range(count)]
        assert without[0] > without[-1]


def test_space_holds_all_three_ranks():
    layers = take_inventory(TinyNet(), kinds=["tt", "tucker2", "svd"])
    tables = tuple(tabulate(layer, compared=["params"]) for layer in layers if layer.kinds)
    space = Space.of(Problem(tables, ("params",), np.array([3000.0])))
    assert space.ranks.shape[2] == 3
    for path, kind in enumerate(space.kinds):
        used = {"tt": 3, "tucker2": 2, "svd": 1, "dense": 0}[kind]
        assert bool((space.ranks[path, :, used:] == 1).all())

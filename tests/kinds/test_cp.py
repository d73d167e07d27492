"""The CP kinds: sums of separable filters (Lebedev et al. 2015), fitted with bounded norms (Phan et al. 2020)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tensorly.decomposition import parafac
from torch import nn
from torch.nn import functional as F

from benchmarks.common import reference
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.kinds import cp_fit
from lightning_compress.kinds.cp_problem import Problem, unit_columns
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.kinds.slices import Slices
from lightning_compress.layers.families import children_of
from tests.support.zoo import error_of, normal, random_metric

KINDS = ("cp", "cp3")
SHAPES = [(6, 5, 3, 3), (3, 7, 5, 3), (4, 4, 2, 3, 2), (5, 4, 1, 3, 3)]
CASES = [*itertools.product(KINDS, SHAPES), ("cp3", (6, 5, 3)), ("cp3", (6, 5, 3, 1))]


def separable(shape, rank, seed=0):
    """A kernel of given rank with components of comparable norm, written out with numpy."""
    generator = np.random.default_rng(seed)
    letters = "abcde"[: len(shape)]
    factors = [generator.standard_normal((size, rank)) for size in shape]
    return torch.from_numpy(np.einsum(",".join(f"{x}r" for x in letters) + "->" + letters, *factors))


def component_norms(factors):
    return torch.stack(
        [f.flatten(1).norm(dim=0 if name == "expand" else 1) for name, f in factors.items()]
    )  # (modes, R)


def smooth_metric(channels, size, seed=0):
    """The second moment of patches of smooth, correlated images."""
    images = torch.einsum("bihw,ij->bjhw", normal(8, channels, 20, 20, seed=seed), normal(channels, channels, seed=9))
    images = F.avg_pool2d(images, 3, 1).relu() + 0.1 * images[:, :, 1:-1, 1:-1]
    rows = F.unfold(images, size).transpose(1, 2).flatten(0, 1)
    return rows.T @ rows / len(rows)


def trained(network, layer):
    return dict(reference(network).named_parameters())[f"{layer}.weight"].detach().double()


def test_children_filter_each_channel_alone():
    conv = nn.Conv2d(8, 6, (3, 5), stride=(2, 1), padding=(1, 2))
    new = children_of(DECOMPOSITIONS["cp"], conv, (4,))
    assert list(new) == ["reduce", "axis0", "axis1", "expand"]
    assert [child.kernel_size for child in new.values()] == [(1, 1), (3, 1), (1, 5), (1, 1)]
    assert [child.stride for child in new.values()] == [(1, 1), (2, 1), (1, 1), (1, 1)]
    assert [child.groups for child in new.values()] == [1, 4, 4, 1]
    whole = children_of(DECOMPOSITIONS["cp3"], conv, (4,))
    assert [(name, child.kernel_size) for name, child in whole.items()] == [
        *(("reduce", (1, 1)), ("kernel", (3, 5)), ("expand", (1, 1)))
    ]
    flat = children_of(DECOMPOSITIONS["cp"], nn.Conv3d(8, 6, (1, 3, 3), stride=2), (4,))
    assert [child.kernel_size for child in flat.values()] == [(1, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1, 1)]
    assert [child.stride for child in flat.values()] == [(1, 1, 1), (2, 2, 1), (1, 1, 2), (1, 1, 1)]


def test_auto_tries_cp_only_where_its_components_are_clearly_smaller_than_those_of_cp3():
    net = nn.Sequential(nn.Conv2d(3, 16, 11), nn.Conv2d(16, 32, 3), nn.Conv3d(32, 8, 3), nn.Conv1d(8, 8, 31))
    kinds = [layer.kinds for layer in take_inventory(net)]
    assert ["cp" in own for own in kinds] == [True, False, True, False]
    assert all("cp3" in own for own in kinds)
    assert all("cp" in layer.kinds for layer in take_inventory(net[:3], kinds="cp"))
    named = take_inventory(net, overrides={"1": {"kinds": ["cp", "svd"]}})
    assert ["cp" in layer.kinds for layer in named] == [True, True, True, False]
    automatic = take_inventory(net[:3], kinds="cp", overrides={"1": {"kinds": "auto"}})
    assert "cp" not in automatic[1].kinds


# --- the fit


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("metric", [False, True])
def test_a_kernel_of_low_rank_is_recovered(kind, shape, metric):
    whole = separable(shape, 2) if kind == "cp" else separable((*shape[:2], int(np.prod(shape[2:]))), 2).reshape(shape)
    size = whole[0].numel()
    moment = random_metric(size, condition=100) if metric else None
    factors = DECOMPOSITIONS[kind].factorise(whole, (2,), moment)
    assert error_of(kind, whole, factors, moment) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_fit_is_at_least_as_good_as_tensorly_from_several_starts(kind):
    weight = trained("resnet20", "blocks.3.conv2")
    tensor = weight.numpy() if kind == "cp" else weight.flatten(2).numpy()
    for rank in (4, 24):
        errors = [
            parafac(tensor, rank, n_iter_max=60, init="random", random_state=seed, return_errors=True)[1][-1]
            for seed in range(3)
        ]
        fitted = error_of(kind, weight, DECOMPOSITIONS[kind].factorise(weight, (rank,))) ** 0.5
        assert fitted <= 1.01 * float(min(errors))


@pytest.mark.parametrize("size", [2, 5])
def test_components_of_a_degenerate_tensor_stay_bounded(size):
    # a∘a∘b + a∘b∘a + b∘a∘a has rank 3, but n (a + b/n)∘(a + b/n)∘(a + b/n) − n a∘a∘a comes as close as one likes.
    a, b = torch.linalg.qr(normal(size, 2))[0].T
    tensor = sum(torch.einsum("i,j,k->ijk", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a)))
    factors = DECOMPOSITIONS["cp3"].factorise(tensor, (2,))
    assert float(component_norms(factors).prod(dim=0).norm() / tensor.norm()) <= cp_fit.LARGEST
    assert error_of("cp3", tensor, factors) < 0.02
    problem = Problem.of(tensor, None)
    near = unit_columns(torch.stack([a + b / 500, a], dim=1))
    diverging = problem.solve([near, near])
    assert diverging.size > 100
    assert diverging.error < 1e-4
    bounded, _ = cp_fit._bounded(problem, diverging, 0.0)
    assert bounded.size <= cp_fit.LARGEST
    assert bounded.error < 0.02


def test_large_products_in_single_precision_change_nothing_but_the_time(monkeypatch):
    weight, metric = trained("vgg", "features.3.0"), random_metric(288)
    problem = Problem.of(weight, metric)
    start = Slices(problem.weight).filters(22)
    double = problem.run(start, 30).error
    monkeypatch.setattr("lightning_compress.kinds.cp_problem.LARGE", 0.0)
    found = problem.run(start, 30)
    assert found.error == pytest.approx(double, rel=1e-2)
    assert found.expand.dtype == torch.float64
    exact = separable((8, 7, 9), 3).reshape(8, 7, 3, 3)
    assert error_of("cp3", exact, DECOMPOSITIONS["cp3"].factorise(exact, (3,))) < 1e-5


def test_correction_shrinks_norms_at_hardly_more_error():
    weight = trained("vgg", "features.3.0")
    problem = Problem.of(weight, None)
    free = problem.run(Slices(problem.weight).filters(22), 150)
    found, _ = cp_fit._corrected(problem, free, 6)
    assert found.size < 0.97 * free.size
    assert found.error <= (1 + cp_fit.SLACK) * free.error + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_scale_does_not_matter(kind, scale):
    weight = normal(6, 5, 3, 3)
    one, other = (DECOMPOSITIONS[kind].factorise(w, (4,)) for w in (weight, weight * scale))
    product = DECOMPOSITIONS[kind].dense_weight(other, (6, 5, 3, 3)) / scale
    torch.testing.assert_close(product, DECOMPOSITIONS[kind].dense_weight(one, (6, 5, 3, 3)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", ["slices", "random"])
def test_starts_that_are_not_finite_are_left_out(kind, broken, monkeypatch):
    weight = trained("resnet20", "blocks.3.conv2")
    expected = error_of(kind, weight, DECOMPOSITIONS[kind].factorise(weight, (8,)))

    def not_a_number(*args):
        return [
            torch.full((n, 8), torch.nan, dtype=torch.float64) for n in DECOMPOSITIONS[kind]._dims(weight.shape)[1:]
        ]

    if broken == "slices":
        monkeypatch.setattr(Slices, "filters", not_a_number)
    else:
        monkeypatch.setattr(cp_fit, "_random_filters", not_a_number)
    got = error_of(kind, weight, DECOMPOSITIONS[kind].factorise(weight, (8,)))
    assert got == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_in_a_metric_beats_the_plain_one_in_it_and_its_own_start(kind):
    weight, metric = trained("resnet20", "blocks.3.conv2"), smooth_metric(32, 3)
    decomposition = DECOMPOSITIONS[kind]
    for rank in (6, 24):
        plain = error_of(kind, weight, decomposition.factorise(weight, (rank,)), metric)
        fitted = error_of(kind, weight, decomposition.factorise(weight, (rank,), metric), metric)
        problem = Problem.of(weight.reshape(decomposition._dims(weight.shape)), metric)
        slices = Slices(problem.weight).filters(rank)
        start = problem.solve(cp_fit._separable(problem).run(slices, 60).filters).error
        assert fitted < 0.8 * plain
        assert fitted < 0.97 * start


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_separable_metric_the_fit_is_that_of_the_whitened_weight(kind):
    weight, decomposition = normal(8, 6, 3, 3), DECOMPOSITIONS[kind]
    roots = [normal(n, 2 * n, seed=n) for n in (6, 3, 3)]
    moments = [root @ root.T for root in roots]
    metric = torch.kron(moments[0], torch.kron(moments[1], moments[2]))
    white = torch.einsum("oihw,ij,hk,wl->ojkl", weight, *(torch.linalg.cholesky(m) for m in moments))
    expected = error_of(kind, white, decomposition.factorise(white, (5,)))
    assert error_of(kind, weight, decomposition.factorise(weight, (5,), metric), metric) < expected * 1.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", [False, True])
def test_factors_share_the_norm_and_come_in_its_order(kind, metric):
    factors = DECOMPOSITIONS[kind].factorise(
        trained("resnet20", "blocks.2.conv1"), (7,), smooth_metric(16, 3) if metric else None
    )
    norms = component_norms(factors)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    if not metric:
        sizes = norms.prod(dim=0)
        assert bool((sizes[1:] <= sizes[:-1] * (1 + 1e-12)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("network", "layer"),
    [
        ("resnet20", "blocks.2.conv1"),
        *(pytest.param("vgg", f"features.{n}.0", marks=pytest.mark.slow) for n in (3, 4, 6)),
    ],
)
def test_profile_of_a_trained_kernel_ends_below_its_size_and_is_kept(kind, network, layer):
    weight, decomposition = trained(network, layer), DECOMPOSITIONS[kind]
    shape = tuple(weight.shape)
    for metric in (None, smooth_metric(weight.shape[1], 3)):
        profile = decomposition.profile(weight, metric)
        last = len(profile.ranks)
        assert profile.ranks[:, 0].tolist() == list(range(1, last + 1))
        costs = decomposition.parameters(shape, np.array([[last], [last + 1]]))
        assert costs[0] < weight.numel() <= costs[1]
        ranks = np.geomspace(1, last, 8 if network == "vgg" else 4).round().astype(int).tolist()
        errors = [error_of(kind, weight, decomposition.factorise(weight, (r,), metric), metric) for r in ranks]
        ratios = errors / profile.errors[np.array(ranks) - 1]
        assert max(ratios) <= 1.05
        assert ratios[0] > 0.8  # a bound that says something

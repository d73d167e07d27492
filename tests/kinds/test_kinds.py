from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.kinds.base import equalise_norms
from lightning_compress.kinds.registry import DECOMPOSITIONS, resolve_kinds
from lightning_compress.layers.families import operator_of
from lightning_compress.surgery.swap import apply_plan_
from tests.support.zoo import SAMPLE_OR_ALL

KERNELS = [(1, 1), (3, 3), (1, 3), (3, 1), (5, 3)]
STRIDES = [(1, 1), (2, 1), (2, 2)]
PADDINGS = [(0, 0), (1, 2), (2, 0), "same", "valid"]
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]
DILATIONS = [(1, 1), (2, 1)]
KINDS_OF_KERNEL = {k: (["svd"] if k == (1, 1) else ["channel_svd", "spatial_svd", "tucker2"]) for k in KERNELS}
CONV_KINDS = [(kind, kernel) for kernel in KERNELS for kind in KINDS_OF_KERNEL[kernel]]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factorised(layer, kind, ranks):
    shape = tuple(layer.weight.shape)
    costs = Costs(1, None, 4)
    planned = LayerPlan("0", type(layer).__name__, kind, tuple(ranks), shape, 0.0, 1, 1)
    model = nn.Sequential(layer)
    apply_plan_(model, Plan((planned,), costs, costs))
    return model[0]


def full_rank(layer, kind):
    return DECOMPOSITIONS[kind].max_ranks(tuple(layer.weight.shape))


def randomised(layer, seed=0):
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + index))
    return layer


def require_same_output(layer, kind, x, tolerance):
    expected = layer(x).detach()
    got = factorised(layer, kind, full_rank(layer, kind))(x).detach()
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@SAMPLE_OR_ALL
@pytest.mark.parametrize(("kind", "kernel"), CONV_KINDS)
def test_full_rank_gives_the_dense_output_for_every_geometry(kind, kernel, step):
    x = normal(2, 3, 11, 10, seed=9)
    geometries = itertools.product(STRIDES, PADDINGS, PADDING_MODES, DILATIONS, (True, False))
    possible = [g for g in geometries if g[1] != "same" or g[0] == (1, 1)]  # torch refuses the others
    assert len(possible) == 2 * 4 * 2 * (3 * 4 + 1)
    for seed, (stride, padding, mode, dilation, bias) in enumerate(possible[::step]):
        conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).double()
        require_same_output(randomised(conv, seed), kind, x, 1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from(KERNELS),
    stride=st.sampled_from(STRIDES),
    padding=st.sampled_from(PADDINGS),
    mode=st.sampled_from(PADDING_MODES),
    dilation=st.sampled_from(DILATIONS),
    bias=st.booleans(),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_full_rank_gives_the_dense_output_of_any_convolution(
    kernel, stride, padding, mode, dilation, bias, channels, dtype, seed
):
    stride = (1, 1) if padding == "same" else stride
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).to(dtype)
    for kind in KINDS_OF_KERNEL[kernel]:
        x = normal(2, channels[0], 12, 11, seed=seed + 1, dtype=dtype)
        require_same_output(randomised(conv, seed), kind, x, 1e-5 if dtype == torch.float32 else 1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    lead=st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_full_rank_gives_the_dense_output_of_any_linear(sizes, lead, bias, dtype, seed):
    linear = randomised(nn.Linear(*sizes, bias=bias).to(dtype), seed)
    x = normal(*lead, sizes[0], seed=seed + 1, dtype=dtype)
    require_same_output(linear, "svd", x, 1e-5 if dtype == torch.float32 else 1e-10)


def all_layers():
    yield "svd", nn.Linear(5, 7)
    yield "svd", nn.Linear(6, 4, bias=False)
    for kind, kernel in CONV_KINDS:
        yield kind, nn.Conv2d(3, 5, kernel, stride=(2, 1), padding=(1, 0))
        yield kind, nn.Conv2d(5, 2, kernel, bias=False)


LAYERS = [pytest.param(k, m, id=f"{k}-{tuple(m.weight.shape)}") for k, m in all_layers()]


@pytest.mark.parametrize(("kind", "layer"), LAYERS)
def test_profile_lists_every_rank_once(kind, layer):
    shape = tuple(layer.weight.shape)
    ranks = DECOMPOSITIONS[kind].profile(normal(*shape)).ranks
    largest = full_rank(layer, kind)
    assert sorted(map(tuple, ranks.tolist())) == list(itertools.product(*(range(1, m + 1) for m in largest)))


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (2, 6, 1, 3), (9, 1, 2, 2)])
def test_tucker2_error_is_that_of_the_truncated_hosvd(shape):
    weight = normal(*shape, seed=4).numpy()
    profile = DECOMPOSITIONS["tucker2"].profile(torch.from_numpy(weight))
    u_out = np.linalg.svd(weight.reshape(shape[0], -1), full_matrices=False)[0]
    u_in = np.linalg.svd(weight.transpose(1, 0, 2, 3).reshape(shape[1], -1), full_matrices=False)[0]
    for (r_out, r_in), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        p_out, p_in = u_out[:, :r_out] @ u_out[:, :r_out].T, u_in[:, :r_in] @ u_in[:, :r_in].T
        approximation = np.einsum("ab,bchw,cd->adhw", p_out, weight, p_in)
        assert error == pytest.approx(np.square(weight - approximation).sum() / np.square(weight).sum(), abs=1e-12)


def multiplied(factors):
    letters = "abcd"[: len(factors)]
    return torch.einsum(",".join(f"{letter}r" for letter in letters) + f"->{letters}", *factors)


@pytest.mark.parametrize("sizes", [(7, 5), (5, 3, 4), (6, 5, 3, 2)])
def test_equalised_factors_have_one_norm_per_component_and_the_same_product(sizes):
    factors = [normal(size, 4, seed=size) * 10.0**power for power, size in enumerate(sizes)]
    equalised = equalise_norms(*factors)
    norms = torch.stack([factor.norm(dim=0) for factor in equalised])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    torch.testing.assert_close(multiplied(equalised), multiplied(factors))


@pytest.mark.parametrize("zeros", [(0,), (1,), (2,), (0, 1, 2)])
def test_component_of_zero_is_zero_in_the_second_factor_alone(zeros):
    factors = [normal(size, 4, seed=size) for size in (6, 5, 2)]
    for index in zeros:
        factors[index][:, 1:3] = 0
    equalised = equalise_norms(*factors)
    norms = torch.stack([factor.norm(dim=0) for factor in equalised])
    assert not norms[1, 1:3].any()
    torch.testing.assert_close(norms[0::2, 1:3], 1e-2 * norms.max().expand(2, 2))
    torch.testing.assert_close(multiplied(equalised), multiplied(factors))
    assert all(bool((factor.norm(dim=0) > 0).all()) for factor in equalise_norms(*(0 * f for f in factors))[0::2])


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_factors_of_a_weight_of_lower_rank_than_asked_for_have_one_scale(shape):
    layer = nn.Linear(*reversed(shape))
    with torch.no_grad():  # to the last bit: columns, or rows, of zero
        layer.weight.copy_(torch.eye(*shape) * (torch.arange(shape[1]) < 3))
        expected = layer.weight.clone()
    new = factorised(layer, "svd", (6,))
    reduce, expand = (factor.norm() for factor in new.factors().values())
    assert 0.5 < reduce / expand < 2
    torch.testing.assert_close(new.dense_weight(), expected)


def test_weight_of_exactly_low_rank_is_found():
    weight = normal(6, 2) @ normal(2, 27, seed=1)
    errors = DECOMPOSITIONS["channel_svd"].profile(weight.reshape(6, 3, 3, 3)).errors
    assert errors[0] > 1e-3
    assert errors[1:] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "layer", "names"),
    [
        ("svd", nn.Linear(4, 6), ["reduce", "expand"]),
        ("svd", nn.Conv2d(4, 6, 1), ["reduce", "expand"]),
        ("channel_svd", nn.Conv2d(4, 6, 3), ["reduce", "expand"]),
        ("spatial_svd", nn.Conv2d(4, 6, 3), ["reduce", "expand"]),
        ("tucker2", nn.Conv2d(4, 6, 3), ["reduce", "core", "expand"]),
    ],
)
def test_factorised_layer_shows_what_it_is(kind, layer, names):
    bias = layer.bias
    ranks = (2,) * len(full_rank(layer, kind))
    new = factorised(layer, kind, ranks)
    assert f"kind={kind}, ranks={ranks}" in repr(new)
    assert repr(new).startswith("FactorisedLayer(")
    assert (new.kind, new.ranks, new.dense_type) == (kind, ranks, type(layer).__name__)
    assert new.bias is bias
    assert list(new.factors()) == names
    assert new.weight.shape == layer.weight.shape == new.weight_shape
    assert torch.equal(new.weight, new.dense_weight())
    assert all(value is getattr(new, name).weight for name, value in new.factors().items())
    attributes = {"in_features", "out_features"} if isinstance(layer, nn.Linear) else {"in_channels", "out_channels"}
    attributes |= set() if isinstance(layer, nn.Linear) else {"kernel_size", "stride", "padding", "dilation", "groups"}
    assert all(getattr(new, name) == getattr(layer, name) for name in attributes)
    with pytest.raises(AttributeError):
        new.weight = new.weight.detach()


def test_factorised_layer_without_bias_has_none():
    assert factorised(nn.Conv2d(4, 6, 3, bias=False), "tucker2", (2, 2)).bias is None


@pytest.mark.parametrize(
    ("kind", "layer", "why"),
    [
        ("svd", nn.Conv2d(2, 2, 3), "1x1 convolutions only"),
        ("channel_svd", nn.Linear(2, 2), "convolutions only"),
        ("channel_svd", nn.Conv2d(2, 2, 1), "1x1 convolution is svd"),
        ("spatial_svd", nn.Linear(2, 2), "convolutions over two axes or more only"),
        ("spatial_svd", nn.Conv1d(2, 2, 3), "convolutions over two axes or more only"),
        ("spatial_svd", nn.Conv2d(2, 2, 1), "1x1 convolution is svd"),
        ("tucker2", nn.Linear(2, 2), "convolutions only"),
        ("tucker2", nn.Conv2d(2, 2, 1), "1x1 convolution is svd"),
    ],
)
def test_kind_says_why_it_does_not_apply(kind, layer, why):
    assert why in DECOMPOSITIONS[kind].unsupported(operator_of(layer))


def test_kinds_are_resolved_in_the_order_given_without_repeats():
    own = {kind for kind, d in DECOMPOSITIONS.items() if type(d).__module__.startswith("lightning_compress.")}
    assert set(resolve_kinds("auto")) == own
    assert resolve_kinds("tucker2") == ("tucker2",)
    assert resolve_kinds(["tucker2", "svd", "tucker2"]) == ("tucker2", "svd")


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("tuker2", r"kinds='tuker2'.*Did you mean 'tucker2'.*channel_svd"),
        (["svd", "hosvd"], r"kinds=\['svd', 'hosvd'\]: unknown kind 'hosvd'.*channel_svd"),
        ([], r"kinds=\[\]: expected 'auto', a kind, or a list of kinds"),
        (None, r"kinds=None: expected 'auto'"),
        (3, r"kinds=3: expected 'auto'"),
        ([["svd"]], r"kinds=\[\['svd'\]\]"),
        ([1], r"kinds=\[1\]: unknown kind 1"),
    ],
)
def test_wrong_kinds_are_refused(kinds, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_kinds(kinds)

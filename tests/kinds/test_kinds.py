"""The registry of kinds, where each applies, and what the closed-form ones compute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.kinds.base import equalise_norms
from lightning_compress.kinds.registry import DECOMPOSITIONS, resolve_kinds
from lightning_compress.layers.families import operator_of
from tests.support.zoo import factorised, full_ranks, normal, randomised

# --- what they compute


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (5, 3)]),
    stride=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    padding=st.sampled_from([(0, 0), (1, 2), (2, 0), "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    bias=st.booleans(),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_full_rank_gives_the_dense_output_of_any_convolution(
    kernel, stride, padding, mode, dilation, bias, channels, dtype
):
    stride = (1, 1) if padding == "same" else stride
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode)
    conv, x = randomised(conv).to(dtype), normal(2, channels[0], 12, 11, seed=9).to(dtype)
    expected, tolerance = conv(x).detach(), 1e-5 if dtype == torch.float32 else 1e-10
    for kind in ["svd"] if kernel == (1, 1) else ["channel_svd", "spatial_svd", "tucker2"]:
        got = factorised(conv, kind, full_ranks(conv, kind))(x).detach()
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("svd", (7, 5)), ("svd", (5, 3, 1, 1)), ("channel_svd", (5, 3, 3, 3)), ("channel_svd", (2, 5, 1, 3))),
        *(("spatial_svd", (5, 3, 3, 3)), ("spatial_svd", (2, 5, 5, 3)), ("tucker2", (5, 3, 3, 1))),
    ],
)
def test_profile_lists_every_rank_once(kind, shape):
    ranks = DECOMPOSITIONS[kind].profile(normal(*shape)).ranks
    largest = DECOMPOSITIONS[kind].max_ranks(shape)
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


# --- the norms of factors


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
    layer.weight.data.copy_(torch.eye(*shape) * (torch.arange(shape[1]) < 3))  # columns, or rows, of zero to the bit
    new = factorised(layer, "svd", (6,))
    reduce, expand = (factor.norm() for factor in new.factors().values())
    assert 0.5 < reduce / expand < 2
    torch.testing.assert_close(new.dense_weight(), layer.weight)


# --- where they apply, and their names


@pytest.mark.parametrize(
    ("kind", "layer", "why"),
    [
        ("svd", nn.Conv2d(2, 2, 3), "svd factorises nn.Linear, embeddings and 1x1 convolutions only"),
        ("channel_svd", nn.Linear(2, 2), "channel_svd factorises convolutions only"),
        ("channel_svd", nn.Conv2d(2, 2, 1), "channel_svd of a 1x1 convolution is svd"),
        ("spatial_svd", nn.Linear(2, 2), "spatial_svd factorises convolutions over two axes or more only"),
        ("spatial_svd", nn.Conv1d(2, 2, 3), "spatial_svd factorises convolutions over two axes or more only"),
        ("spatial_svd", nn.Conv2d(2, 2, 1), "spatial_svd of a 1x1 convolution is svd"),
        ("tucker2", nn.Linear(2, 2), "tucker2 factorises convolutions only"),
        ("tucker2", nn.Conv2d(2, 2, 1), "tucker2 of a 1x1 convolution is svd"),
        ("cp", nn.Linear(4, 4), "cp factorises convolutions only"),
        ("cp3", nn.Linear(4, 4), "cp3 factorises convolutions only"),
        ("cp", nn.Conv2d(3, 4, 1), "cp of a 1x1 convolution is svd"),
        ("cp3", nn.Conv2d(3, 4, 1), "cp3 of a 1x1 convolution is svd"),
        ("cp", nn.Conv1d(3, 4, 3), "cp of a kernel along one axis is cp3"),
        ("cp", nn.Conv2d(3, 4, (3, 1)), "cp of a kernel along one axis is cp3"),
        ("cp3", nn.Conv2d(3, 4, (3, 1)), None),
        ("cp", nn.Conv3d(3, 4, (1, 3, 3)), None),
        ("tt", nn.Linear(4, 4), "tt factorises convolutions only"),
        ("tt", nn.Conv2d(4, 4, 1), "tt of a 1x1 convolution is svd"),
        ("tt", nn.Conv1d(4, 4, 3), "tt of a kernel that spans one axis is tucker2"),
        ("tt", nn.Conv2d(4, 4, (1, 3)), "tt of a kernel that spans one axis is tucker2"),
        ("tt", nn.Conv3d(4, 4, (1, 3, 3)), None),
        *(
            ("interpolative", layer, "interpolative factorises nn.Linear and 1x1 convolutions of one group only")
            for layer in (nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
        ),
    ],
)
def test_kind_says_why_it_does_not_apply(kind, layer, why):
    assert DECOMPOSITIONS[kind].unsupported(operator_of(layer)) == why


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

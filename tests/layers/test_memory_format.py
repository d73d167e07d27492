"""Channels last: by strides alone, through the swap and back, saved and loaded, compiled."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, load_compressed, merge_, save_compressed, search_ranks
from lightning_compress.layers.memory_format import (
    CHANNELS_LAST,
    can_be_channels_last,
    channels_last_format,
    in_channels_last,
    is_channels_last,
    put_back_,
    put_in_channels_last_,
)
from lightning_compress.surgery.swap import uninstall
from tests.support.nets import TinyNet

SHAPES = [(4, 3, 5, 5), (4, 3, 1, 1), (4, 1, 3, 3), (1, 6, 1, 1), (2, 3, 2, 2, 2), (4, 3, 1, 1, 1)]


def planned(net, **kinds):
    plan = search_ranks(net, Budget(params=0.5), example_input=(1, 3, 8, 8), objective="weight", **kinds)
    return replace(plan, memory_format=CHANNELS_LAST)


def strides(module):
    return {name: p.stride() for name, p in module.named_parameters()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_tell_the_format_whatever_the_kernel(shape):
    weight = torch.randn(shape)
    laid = in_channels_last(weight)
    assert torch.equal(laid, weight)
    assert channels_last_format(weight) is None
    assert channels_last_format(laid) in (torch.channels_last, torch.channels_last_3d)
    assert in_channels_last(laid) is laid


@pytest.mark.parametrize("conv", [nn.Conv2d(6, 8, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 3)], ids=str)
def test_torch_goes_on_in_the_format_behind_any_kernel(conv):
    put_in_channels_last_(conv.parameters())
    assert conv(torch.randn(2, 6, 5, 5)).is_contiguous(memory_format=torch.channels_last)


def test_weights_come_back_as_they_were():
    net = TinyNet()
    before, values = strides(net), copy.deepcopy(net.state_dict())
    assert can_be_channels_last(net)
    kept = list(net.parameters())
    put_in_channels_last_(kept)
    assert is_channels_last(net)
    assert not can_be_channels_last(net)
    put_back_(kept)
    assert strides(net) == before
    assert [id(p) for p in net.parameters()] == list(map(id, kept))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in values.items())


@pytest.mark.parametrize("kinds", [["svd", "tucker2"], ["svd", "cp3"], ["svd", "channel_svd"]], ids=str)
def test_plan_puts_the_whole_model_in_it_and_the_outputs_stay(kinds, images):
    net = TinyNet().eval()
    plan = planned(net, kinds=kinds)
    plain = copy.deepcopy(net)
    apply_plan_(plain, replace(plan, memory_format=None))
    before = strides(net)
    replacements = apply_plan_(net, plan)
    assert all(channels_last_format(p) is not None for p in net.parameters() if p.ndim == 4)
    torch.testing.assert_close(net(images), plain(images))
    uninstall(net, replacements)
    assert strides(net) == before


def test_format_is_saved_loaded_and_multiplied_out(tmp_path, images):
    net = TinyNet().eval()
    apply_plan_(net, planned(net, kinds=["svd", "tucker2"]))
    save_compressed(net, tmp_path)
    fresh = TinyNet().eval()
    assert load_compressed(fresh, tmp_path).memory_format == CHANNELS_LAST
    assert strides(fresh) == strides(net)
    assert torch.equal(fresh(images), net(images))
    merge_(net)
    assert is_channels_last(net)
    torch.testing.assert_close(net(images), fresh(images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel_svd", "spatial_svd", "tucker2", "tt", "cp3"])
def test_factorised_layers_compile_to_one_graph(kind, images):
    torch.compiler.reset()  # the number of models that are compiled in one process is limited
    net = TinyNet().eval()
    apply_plan_(net, planned(net, kinds=["svd", kind]))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), net(images))

"""Layers that run as the dense one in eval mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import FactorisedLayer
from tests.support.zoo import LAYERS, factorised

KINDS = {"Linear": "svd", "Conv1d": "tucker2", "Conv2d": "cp3", "ConvTranspose2d": "tt", "Conv2d grouped": "tucker2"}
NAMES = list(KINDS)


def merged_and_plain(name):
    """A merged layer in float32, one by its factors, and arguments of a call."""
    layer = factorised(LAYERS[name].layer(), KINDS[name]).float().eval()
    plain = copy.deepcopy(layer)
    layer.merged = True
    return layer, plain, tuple(a.float() for a in LAYERS[name].call())


def factors_are_run(layer, arguments):
    calls = []
    handles = [child.register_forward_hook(lambda *_: calls.append(1)) for child in layer]
    layer(*arguments)
    for handle in handles:
        handle.remove()
    return bool(calls)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_as_one_dense_operator_in_eval_without_gradients(name, context):
    layer, plain, arguments = merged_and_plain(name)
    as_dense = layer.to_dense()
    with context():
        with FlopCounterMode(display=False) as counted:
            layer(*arguments)
        with FlopCounterMode(display=False) as dense:
            as_dense(*arguments)
        torch.testing.assert_close(layer(*arguments), plain(*arguments), rtol=1e-4, atol=1e-5)
        assert not factors_are_run(layer, arguments)
    assert counted.get_total_flops() == dense.get_total_flops()
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_runs_by_its_factors_in_training_and_with_gradients(name):
    layer, _, arguments = merged_and_plain(name)
    assert factors_are_run(layer, arguments)  # in eval: gradients flow to the factors
    layer(*arguments).square().sum().backward()
    assert all(factor.grad is not None for factor in layer.factors().values())
    layer.train()
    with torch.no_grad():
        assert factors_are_run(layer, arguments)


def step(layer):
    factor = next(iter(layer.factors().values()))
    factor.grad = torch.ones_like(factor)
    torch.optim.SGD([factor], lr=0.5).step()


def give_another_parameter(layer):
    child = next(iter(layer.children()))
    child.weight = nn.Parameter(child.weight.detach() + 1)


def give_other_data(layer):
    factor = next(iter(layer.factors().values()))
    factor.data = torch.ones_like(factor)


def write_past_the_counter_and_return_to_eval(layer):
    layer.train()
    next(iter(layer.factors().values())).data.add_(1.0)
    layer.eval()


CHANGES = {
    "optimizer": step,
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "other data": give_other_data,
    "another parameter": give_another_parameter,
    "data between training and eval": write_past_the_counter_and_return_to_eval,
    "dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices_that_its_factors_changed(change):
    dense = nn.Conv2d(6, 8, 3, padding=1).double()
    layer = factorised(dense, "tucker2").float().eval()
    layer.merged = True
    images = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        before = layer(images)
        CHANGES[change](layer)
        plain = copy.deepcopy(layer)
        plain.merged = False
        images = images.to(next(iter(layer.factors().values())).dtype)
        after = layer(images)
        torch.testing.assert_close(after, plain(images), rtol=1e-4, atol=1e-4)
    assert change == "dtype" or not torch.allclose(before, after)


def test_copies_and_pickles_do_not_hold_the_product():
    layer, _, arguments = merged_and_plain("Conv2d")
    size = len(pickle.dumps(layer))
    with torch.no_grad():
        expected = layer(*arguments)
    assert layer._product is not None
    assert len(pickle.dumps(layer)) == size
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._product is None
        assert other.merged
        with torch.no_grad():
            torch.testing.assert_close(other(*arguments), expected)


def test_factors_of_inference_mode_are_not_multiplied_out():
    with torch.inference_mode():
        layer, plain, arguments = merged_and_plain("Linear")
        torch.testing.assert_close(layer(*arguments), plain(*arguments))
        assert layer._product is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")  # torch's own
def test_exports_and_traces_have_the_factors():
    layer, _, arguments = merged_and_plain("Conv2d")
    with torch.no_grad():
        expected = layer(*arguments)
        program = torch.export.export(layer, arguments)
        traced = torch.jit.trace(layer, arguments)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for other in (program.module(), traced, compiled):
            torch.testing.assert_close(other(*arguments), expected, rtol=1e-4, atol=1e-5)
    assert set(program.state_dict) == set(layer.state_dict())
    assert str(traced.graph).count("CallMethod") >= len(layer)


def test_weight_is_in_the_memory_format_of_the_factors():
    layer, _, arguments = merged_and_plain("Conv2d")
    layer = layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        layer(*arguments)
    assert isinstance(layer, FactorisedLayer)
    run = layer._product.run
    assert run.__self__.weight.is_contiguous(memory_format=torch.channels_last)

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, compress_
from lightning_compress.analysis.costs import measure_costs, measure_latency
from lightning_compress.analysis.trace import as_arguments, inference, shape_text, trace
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.kinds.registry import LayerCall
from tests.support.compressing import WEIGHTS_ALONE


class Recorder(nn.Module):
    def __init__(self, fail=False):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.fail = fail
        self.seen = []

    def forward(self, *args, **kwargs):
        self.seen.append((args, kwargs, self.training, torch.is_grad_enabled()))
        x = args[0] if args else kwargs["x"]
        x = self.fc(self.drop(x) + torch.rand(4))
        if self.fail:
            msg = "on purpose"
            raise ValueError(msg)
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_trace_restores_modes_hooks_and_random_state(unchanged, fail):
    model = Recorder(fail)
    model.fc.register_forward_hook(lambda *_: None)
    before = unchanged(model)
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
    if fail:
        message = r"the model fails on example_input \(1, 4\): ValueError: on purpose. Shapes include the batch"
        with pytest.raises(ExampleInputError, match=message) as error:
            trace(model, (1, 4))
        assert isinstance(error.value.__cause__, ValueError)
    else:
        trace(model, (1, 4))
    before.check()
    assert model.training
    assert not model.frozen.training
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert [seen[2:] for seen in model.seen] == [(False, False)]
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_inference_restores_when_its_body_raises(net, unchanged):
    net.norm.eval()
    before = unchanged(net)

    def body():
        with inference(net):
            torch.rand(3)
            assert not net.training
            raise KeyError

    with pytest.raises(KeyError):
        body()
    before.check()


def test_running_statistics_stay(net, images, unchanged):
    before = unchanged(net)
    trace(net, images)
    before.check()


@pytest.mark.parametrize(
    "example",
    [
        torch.arange(12.0).reshape(3, 4),
        (torch.arange(12.0).reshape(3, 4),),
        {"x": torch.arange(12.0).reshape(3, 4)},
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_batch_is_cut_to_its_first_sample(example):
    model = Recorder()
    trace(model, example)
    args, kwargs, *_ = model.seen[0]
    given = args[0] if args else kwargs["x"]
    assert torch.equal(given, torch.arange(4.0)[None])
    assert bool(args) != isinstance(example, dict)


def test_batch_is_cut_in_nested_arguments_and_other_values_pass():
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(2)
    args, kwargs = as_arguments(nn.Linear(1, 1), (a, {"mask": [b, "word"]}, 7))
    assert kwargs == {}
    assert torch.equal(args[0], a[:1])
    assert torch.equal(args[1]["mask"][0], b[:1])
    assert args[1]["mask"][1] == "word"
    assert args[2] == 7


def test_tensors_of_different_lengths_are_not_cut():
    args, _ = as_arguments(nn.Linear(1, 1), (torch.zeros(2, 3), torch.zeros(5)))
    assert [tuple(a.shape) for a in args] == [(2, 3), (5,)]
    args, _ = as_arguments(nn.Linear(1, 1), (torch.zeros(2, 3), torch.tensor(1.0)))
    assert [tuple(a.shape) for a in args] == [(2, 3), ()]


@pytest.mark.parametrize("shape", [(2, 3, 8), [2, 3, 8], torch.Size([2, 3, 8])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_becomes_the_same_normal_values_in_the_models_dtype(shape, dtype):
    state = torch.get_rng_state()
    model = nn.Linear(8, 8, dtype=dtype)
    (first,), kwargs = as_arguments(model, shape)
    torch.set_rng_state(state)
    (second,), _ = as_arguments(model, shape)
    assert kwargs == {}
    assert first.shape == (1, 3, 8)
    assert first.dtype == dtype
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))[:1].to(dtype)
    assert torch.equal(first, expected)


@pytest.mark.parametrize(
    "example", [3, "images", None, 1.5, [torch.zeros(1, 3)], [], [1, 0], [1, True], {1, 2}, np.zeros((1, 3))]
)
def test_example_input_of_a_wrong_type_is_an_error(example, unchanged):
    model = nn.Sequential(nn.Linear(3, 3))
    before = unchanged(model)
    with pytest.raises(
        ExampleInputError, match=r"expected a tensor, a tuple or dict .* or a shape with its batch"
    ) as e:
        trace(model, example)
    assert f"example_input={example!r}" in str(e.value)
    before.check()


def test_wrong_shape_is_named_with_what_the_model_said(net, unchanged):
    before = unchanged(net)
    message = r"fails on example_input \(1, 5, 8, 8\): RuntimeError: .*channels.*Shapes include the batch dimension"
    with pytest.raises(ExampleInputError, match=message):
        trace(net, (1, 5, 8, 8))
    before.check()


def test_shape_text_shows_shapes_and_not_values():
    assert shape_text([1, 3, 8]) == "(1, 3, 8)"
    assert shape_text(torch.zeros(2, 3)) == "(2, 3)"
    assert shape_text({"x": torch.zeros(2, 3), "n": 4}) == "{'x': (2, 3), 'n': 4}"


def test_macs_and_calls_are_the_hand_computed_ones(net):
    found = trace(net, (7, 3, 8, 8))
    assert found.calls == {
        "conv1": (LayerCall((8, 8), (8, 8), 1),),
        "conv2": (LayerCall((8, 8), (4, 4), 1),),
        "point": (LayerCall((4, 4), (4, 4), 1),),
        "fc1": (LayerCall((), (), 1),),
        "fc2": (LayerCall((), (), 1),),
    }
    by_hand = 8 * 3 * 9 * 64 + 16 * 8 * 9 * 16 + 16 * 16 * 16 + 32 * 16 + 4 * 32
    assert found.macs == by_hand == 36992
    assert found.read_elsewhere == frozenset()


def test_macs_count_every_row_of_a_sequence_and_every_call():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 2))
    found = trace(model, (3, 5, 6))
    assert [call.rows for call in found.calls["0"]] == [5, 5]
    assert found.macs == 5 * (36 + 36 + 12)


def test_macs_of_padding_and_unbatched_images():
    conv = nn.Sequential(nn.Conv2d(2, 3, (3, 1), stride=(2, 1), padding=(1, 2), padding_mode="circular"))
    found = trace(conv, torch.zeros(1, 2, 7, 5))
    assert found.calls["0"] == (LayerCall((7, 5), (4, 9), 1),)
    assert found.macs == 3 * 2 * 3 * 4 * 9


def test_layer_called_by_keyword_is_recorded():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(input=x)

    assert trace(ByKeyword(), (1, 4)).calls["fc"] == (LayerCall((), (), 1),)


def test_costs_of_the_whole_model(net):
    params = 3 * 8 * 9 + 8 + 16 + 8 * 16 * 9 + 16 * 16 + 16 + 16 * 32 + 32 + 32 * 4 + 4
    costs = measure_costs(net, (1, 3, 8, 8))
    assert costs == Costs(params=params, macs=36992, bytes=4 * params + 4 * 16 + 8)  # running statistics, int64 counter
    assert measure_costs(net) == Costs(params, None, costs.bytes)
    assert measure_costs(net, macs=5).macs == 5
    assert measure_costs(net.double()).bytes == 8 * params + 8 * 16 + 8


def test_tied_parameters_count_once_and_unsaved_buffers_not_at_all():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    model["head"].register_buffer("cache", torch.zeros(100), persistent=False)
    model["head"].register_buffer("kept", torch.zeros(3, dtype=torch.int16))
    model["again"] = model["head"]
    assert measure_costs(model) == Costs(params=40, macs=None, bytes=4 * 40 + 2 * 3)


def test_kept_fractions():
    dense = Costs(100, 1000, 400)
    assert Costs(25, 100, 200).kept_of(dense) == {"params": 0.25, "macs": 0.1, "bytes": 0.5}
    assert Costs(25, None, 200).kept_of(dense)["macs"] is None
    assert Costs(25, 100, 200).kept_of(Costs(100, None, 400))["macs"] is None


def test_latency_is_positive_for_each_model_and_changes_nothing(net, unchanged):
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    before = [unchanged(net), unchanged(small)]
    found = measure_latency([net, small], (1, 3, 8, 8), rounds=2, seconds=0.01)
    assert len(found) == 2
    assert all(isinstance(seconds, float) and 0 < seconds < 1 for seconds in found)
    for check in before:
        check.check()


def test_latency_shows_which_model_is_slower():
    small, large = nn.Linear(4, 4), nn.Sequential(*[nn.Linear(256, 256) for _ in range(20)], nn.Linear(256, 4))
    example = torch.zeros(1, 4)
    large = nn.Sequential(nn.Linear(4, 256), *large)
    quick, slow = measure_latency([small, large], example, rounds=3, seconds=0.01)
    assert slow > 3 * quick


def test_costs_of_a_compressed_model_count_its_factors(net):
    compress_(net, Budget(params=0.7), example_input=(1, 3, 8, 8), method="exact", **WEIGHTS_ALONE)
    assert measure_costs(net).params == sum(p.numel() for p in net.parameters())
    assert trace(net, (1, 3, 8, 8)).macs < 36992

"""What a forward pass shows, on which example input, and that it changes nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.analysis.trace import as_arguments, shape_text, trace
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.kinds.registry import LayerCall


class Recorder(nn.Module):
    def __init__(self, fail=False):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.fail = fail
        self.seen = []

    def forward(self, *args, **kwargs):
        self.seen.append((args, kwargs, self.training, torch.is_grad_enabled()))
        x = args[0] if args else kwargs["x"]
        x = self.fc(self.drop(self.norm(x)) + torch.rand(4))
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
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert [seen[2:] for seen in model.seen] == [(False, False)]
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


X = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize("example", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_batch_is_cut_to_its_first_sample(example):
    model = Recorder()
    trace(model, example)
    args, kwargs, *_ = model.seen[0]
    assert torch.equal(args[0] if args else kwargs["x"], torch.arange(4.0)[None])
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


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((1, 5, 8, 8), r"\(1, 5, 8, 8\): RuntimeError: .*channels.*Shapes include the batch dimension"),
        ((1, 8), r"\(1, 8\): .*Shapes include the batch dimension"),
        ({"y": torch.zeros(1, 3, 8, 8)}, r"\{'y': \(1, 3, 8, 8\)\}: TypeError.*'y'"),
    ],
)
def test_example_input_that_does_not_fit_is_named_with_what_the_model_said(net, unchanged, example, message):
    before = unchanged(net)
    with pytest.raises(ExampleInputError, match=rf"fails on example_input {message}"):
        trace(net, example)
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

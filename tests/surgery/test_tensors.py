"""Tensors that are no plain weights: views, masks of infinities, quantised weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, FactorisedLayer, compress_, load_compressed, merge_, save_compressed
from lightning_compress.core.compat import is_quantised, is_wrapped
from lightning_compress.core.errors import NonFiniteWeightError, NothingToFactoriseError, WeightsError

SETTINGS = {"target": None, "objective": "weight", "heal": False}


class WithViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, whole = nn.Linear(32, 32), torch.randn(10, 4)
        self.register_buffer("rows", whole[2:5])
        self.register_buffer("part", whole[3:8, 1:3])
        self.register_buffer("same", torch.randn(1, 3).expand(6, 3))
        self.strided = nn.Parameter(torch.randn(8)[::2])

    def forward(self, inputs):
        return self.fc(inputs)


def test_views_are_saved_and_loaded_by_value(tmp_path):
    model, other = WithViews(), WithViews()
    model.same.data = torch.randn(6, 3)
    compress_(model, Budget(params=0.8), **SETTINGS)
    save_compressed(model, tmp_path)
    load_compressed(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_load_that_fails_leaves_expanded_buffers(tmp_path, monkeypatch):
    model, other = WithViews(), WithViews()
    compress_(model, Budget(params=0.8), **SETTINGS)
    save_compressed(model, tmp_path)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    buffer = other.same
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: 1 // 0)
    with pytest.raises(WeightsError, match="cannot be copied"):
        load_compressed(other, tmp_path)
    assert other.same is buffer
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())


class WithMask(nn.Module):
    def __init__(self, value: float = -torch.inf, *, trained: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.mask = nn.Parameter(torch.full((8, 8), value).triu(1), requires_grad=trained)

    def forward(self, inputs):
        return self.fc(inputs)


def test_masks_of_infinities_are_no_weights(tmp_path):
    model = WithMask()
    compress_(model, Budget(params=0.8), example_input=(1, 32), **SETTINGS)
    assert isinstance(model.fc, FactorisedLayer)
    save_compressed(model, tmp_path)
    other = WithMask()
    load_compressed(other, tmp_path)
    assert torch.equal(other.mask, model.mask)
    for bad in (WithMask(trained=True), WithMask(torch.nan)):
        with pytest.raises(NonFiniteWeightError, match="'mask' holds 28 NaN or infinite values"):
            compress_(bad, Budget(params=0.8), **SETTINGS)
    layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    layer[0].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteWeightError, match=r"'0\.weight'"):
        compress_(layer, Budget(params=0.8), **SETTINGS)


class Parts(torch.Tensor):
    """A tensor around others that stands for what it holds, as a sharded one does."""

    def __tensor_flatten__(self):
        return ["parts"], None


class Levels(Parts):
    def dequantize(self):
        return self.as_subclass(torch.Tensor) * 2


def test_tensors_around_others_are_quantised_where_they_stand_for_other_numbers():
    plain, sharded, quantised = torch.ones(2), torch.ones(2).as_subclass(Parts), torch.ones(2).as_subclass(Levels)
    assert [is_wrapped(tensor) for tensor in (plain, sharded, quantised)] == [False, True, True]
    assert [is_quantised(tensor) for tensor in (plain, sharded, quantised)] == [False, False, True]


def linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("merged", [False, True])
def test_quantised_before_and_after(tmp_path, merged):
    quantization = pytest.importorskip("torchao.quantization")
    int8, inputs = quantization.Int8WeightOnlyConfig(), torch.randn(4, 64)
    model = linears()
    quantization.quantize_(model, int8)
    with pytest.raises(
        NothingToFactoriseError, match=r"its weight is a \w+: compress the model before it is quantised"
    ):
        compress_(model, Budget(params=0.5), **SETTINGS)
    model = linears()
    compress_(model, Budget(params=0.5), **SETTINGS)
    for layer in (model[0], model[2]):
        layer.merged = merged
    with torch.no_grad():
        expected = model(inputs)
        quantization.quantize_(model, int8)
        torch.testing.assert_close(model(inputs), expected, atol=0.03, rtol=0.03)
        with pytest.raises(WeightsError, match=r"Save the model before it is quantised, and quantise it again"):
            save_compressed(model, tmp_path)
        assert model[0].weight.shape == (64, 64)
        outputs = model(inputs)
        merge_(model)
        torch.testing.assert_close(model(inputs), outputs, atol=1e-5, rtol=1e-4)

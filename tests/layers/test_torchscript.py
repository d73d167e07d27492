"""TorchScript: compressed models are scripted and traced, and what is scripted already is left alone."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lightning_compress import Budget, FactorisedLayer, compress_
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.layers.scripted import ORDER, InOrder

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")
SETTINGS = {"heal": False, "objective": "weight", "target": None}


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))


def pointwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 32), nn.Linear(32, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


IMAGES, IDS = torch.randn(2, 8, 6, 6), torch.arange(12).reshape(3, 4)
CASES = [
    *((linear, torch.randn(3, 48), kind) for kind in ("svd", "interpolative")),
    *((convolutional, IMAGES, kind) for kind in ("channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "cp")),
    *((pointwise, IMAGES, kind) for kind in ("svd", "interpolative")),
    (Tied, IDS, "svd"),
]


def compressed(make, kind):
    torch.manual_seed(0)
    model = make().eval()
    compress_(model, Budget(params=0.7), kinds=[kind] if kind != "auto" else kind, **SETTINGS)
    return model


@pytest.mark.parametrize(("make", "inputs", "kind"), CASES, ids=[f"{case[0].__name__} {case[2]}" for case in CASES])
def test_scripted_and_traced_models_compute_the_same(make, inputs, kind, tmp_path):
    model = compressed(make, kind)
    classes = [type(module) for module in model.modules()]
    expected = model(inputs)
    scripted = torch.jit.script(model)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(scripted(inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(model, inputs)(inputs), expected, rtol=1e-5, atol=1e-5)
    scripted.save(str(tmp_path / "model.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(inputs), expected, rtol=1e-5, atol=1e-5)


def test_modules_of_lightning_become_torchscript():
    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, inputs: torch.Tensor):
            return self.net(inputs)

    net, inputs = Net(), torch.randn(2, 48)
    compress_(net, Budget(params=0.5), **SETTINGS)
    expected = net.eval()(inputs)
    for how in ({}, {"method": "trace", "example_inputs": inputs}):
        torch.testing.assert_close(net.to_torchscript(**how)(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "inputs", "name"),
    [
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(32, 2, 32)), torch.randn(4, 2, 32), "UnfusedAttention"),
        (lambda: nn.Sequential(nn.LSTM(32, 32)), torch.randn(4, 2, 32), "UnfusedRecurrent"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(16, 16, 3)), torch.randn(1, 16, 4, 4), "FactorisedTransposed"),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_cannot_be_scripted_says_so_and_is_traced(make, inputs, name):
    model = compressed(make, "auto")
    with pytest.raises(UnsupportedError, match=rf"torch\.jit\.script cannot compile a {name}: trace the model"):
        torch.jit.script(model)
    assert name in {type(module).__name__ for module in model.modules()}
    expected = model(inputs)
    found = torch.jit.trace(model, inputs, check_trace=False)(inputs)
    first = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(first, expected[0] if isinstance(expected, tuple) else expected, rtol=1e-4, atol=1e-5)


def test_children_in_another_order_are_not_run_in_torchscript():
    layer = InOrder({"expand": nn.Linear(2, 2), "reduce": nn.Linear(2, 2)})
    with pytest.raises(torch.jit.Error, match="TorchScript runs the kinds of lightning_compress alone"):
        torch.jit.script(_Calls(layer))(torch.zeros(1, 2))
    assert not InOrder({"other": nn.Linear(2, 2)}).is_in_order
    assert InOrder({name: nn.Identity() for name in ORDER}).is_in_order


class _Calls(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: torch.Tensor):
        return self.layer.scripted(inputs)


_Calls.forward.__annotations__["inputs"] = torch.Tensor


def test_children_of_torchscript_are_left_alone():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(48, 48)

        def forward(self, inputs):
            return self.fc(inputs).relu()

    heads = [torch.jit.script(Head()), torch.jit.trace(Head(), torch.zeros(1, 48))]
    model, inputs = nn.Sequential(nn.Linear(48, 48), *heads).eval(), torch.randn(2, 48)
    plan = compress_(copy.deepcopy(model), Budget(params=0.9), example_input=(1, 48), **SETTINGS)
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert "compiled by TorchScript" in reasons["1.fc"]
    assert "compiled by TorchScript" in reasons["2.fc"]
    assert [layer.name for layer in plan.factorised] == ["0"]
    compress_(model, Budget(params=0.9), example_input=(1, 48), **SETTINGS)
    assert isinstance(model[0], FactorisedLayer)
    assert model(inputs).shape == (2, 48)

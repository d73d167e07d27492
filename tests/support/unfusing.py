"""Attention and recurrent layers, models of them, and plans of their unfused projections."""

from __future__ import annotations

import functools

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_compress.analysis.inventory import list_layers
from lightning_compress.core.costs import Costs
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.layers.unfused import UnfusedAttention, unfused
from tests.support import zoo

E, HEADS = 8, 2
RECURRENT = {
    "LSTM": (nn.LSTM, {}),
    "LSTM with projections": (nn.LSTM, {"proj_size": 3}),
    "GRU": (nn.GRU, {}),
    "RNN tanh": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}
NO_ONEDNN = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

normal = functools.partial(zoo.normal, dtype=torch.float32)


class Wrapped(nn.Module):
    """One layer, which a plan can replace, and only its first output."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        attends = isinstance(self.layer, (nn.MultiheadAttention, UnfusedAttention)) and len(args) == 1
        return self.layer(*(args * 3 if attends else args))[0]


class Encoder(nn.Module):
    """Inputs (B, T, 12), outputs (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


class Sequences(L.LightningModule):
    """Inputs (B, T, 12), outputs (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)
        self.example_input_array = torch.zeros(1, 6, 12)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


MODELS = {"encoder": Encoder, "LSTM": Sequences}


def same(found, expected, atol=1e-5):
    found, expected = ([leaf for leaf in tree_leaves(v) if isinstance(leaf, torch.Tensor)] for v in (found, expected))
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in expected]
    assert len(found) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


def randomised(layer):
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=index))
    return layer


def results_and_gradients(layer, inputs, parameters, *args, seed=0, **kwargs):
    """What a layer returns, and the gradients of a random combination of it by inputs and parameters."""
    torch.manual_seed(seed)
    results = layer(*args, **kwargs)
    tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    total = sum((t * normal(*t.shape, seed=7 + i)).sum() for i, t in enumerate(tensors))
    return results, torch.autograd.grad(total, [*inputs, *parameters], allow_unused=True)


def plan_for(model, rank=None, kind="svd", chosen=lambda name: True):
    """A plan that factorises the chosen projections, at full rank by default."""
    with unfused(model):
        planned = tuple(
            LayerPlan(layer.name, "Linear", kind, (rank or min(layer.weight_shape),), layer.weight_shape, 0.0, 1, 1)
            for layer in list_layers(model)
            if layer.type == "Linear" and chosen(layer.name)
        )
    return Plan(planned, Costs(1, None, 4), Costs(1, None, 4))

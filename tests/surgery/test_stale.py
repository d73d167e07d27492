"""Optimizers that were made before the compression."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_compress import Budget, compress_, merge_
from lightning_compress.core.errors import CompressionWarning

SETTINGS = {"target": None, "objective": "weight", "heal": False}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def step(model, optimizer) -> None:
    model(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()


def test_first_step_of_an_optimizer_of_the_dense_model_warns_once(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    compress_(model, Budget(params=0.5), **SETTINGS)
    with pytest.warns(
        CompressionWarning, match=r"this SGD was made before the compression: .* 0, 2 had, .* after compress_"
    ):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        step(model, torch.optim.Adam(model.parameters()))


def test_nothing_is_said_where_nothing_is_lost(model):
    frozen = model[0].requires_grad_(False)
    before = torch.optim.SGD(frozen.parameters(), lr=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    compress_(model, Budget(params=0.8), include=["0"], **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        before.step()
    merge_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))

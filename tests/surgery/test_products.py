"""Factorised layers that are trained by the product of their factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import apply_plan_
from lightning_compress.surgery.products import faster_multiplied_out, multiplied_out
from tests.support.zoo import LAYERS, factorised, fitting, plan_for


@pytest.mark.parametrize(("name", "kind"), [p for p in fitting() if not p.values[0].startswith("Embedding")])
def test_outputs_and_gradients_are_those_of_the_stages(name, kind):
    layer = factorised(LAYERS[name].layer(), kind).double()
    arguments = tuple(a.double() for a in LAYERS[name].call())
    results = []
    for by_product in (False, True):
        layer.zero_grad()
        with multiplied_out([layer] if by_product else []):
            output = layer(*arguments)
        output.square().sum().backward()
        results.append((output.detach(), [parameter.grad.clone() for parameter in layer.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert "forward" not in vars(layer)


def test_ends_with_an_error_inside():
    layer = factorised(nn.Linear(8, 6), "svd")
    with pytest.raises(ZeroDivisionError), multiplied_out([layer]):
        raise ZeroDivisionError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    ("dense", "kind", "ranks", "inputs", "cheaper"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), "cp3", (40,), (8, 16, 28, 28), True),  # grouped stages on many positions
        (nn.Conv2d(64, 64, 3, padding=1), "tucker2", (4, 4), (8, 64, 28, 28), False),
        (nn.Linear(512, 512), "svd", (8,), (2, 512), False),
    ],
)
def test_which_is_cheaper_is_worked_out_from_the_sizes(dense, kind, ranks, inputs, cheaper):
    model = nn.Sequential(dense)
    apply_plan_(model, plan_for(dense, kind, ranks))
    found = faster_multiplied_out(model, [model[0]], ((torch.randn(inputs),), {}))
    assert bool(found) == cheaper

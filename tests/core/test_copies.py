"""Copies of modules that hold what cannot be copied."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_compress.core.copies import detached_copy


class Holding(nn.Module):
    """A lock on itself and in containers, activations, a parent in a tuple, layers that are shared and tied."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.body = nn.Sequential(self.first, nn.Linear(3, 3))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(2.0))
        self.lock = threading.Lock()
        self.held = {"locks": [threading.Lock(), self.first], "ordered": OrderedDict(lock=self.lock)}
        self.parent = (self,)
        self.settings = {"width": [3]}

    def forward(self, x):
        with self.lock:
            self.features = torch.relu(self.first(x))
            self.kept = [self.features]
        return self.body(self.features) * self.steps


def test_what_can_be_copied_is_and_the_rest_is_shared():
    module = Holding()
    module(torch.randn(2, 3))
    copied = detached_copy(module)
    assert {id(t) for t in module.state_dict(keep_vars=True).values()}.isdisjoint(map(id, copied.parameters()))
    assert all(torch.equal(copied.state_dict()[name], value) for name, value in module.state_dict().items())
    assert copied.first is copied.body[0] is copied.held["locks"][1]
    assert copied.tied.weight is copied.first.weight
    assert copied.parent[0] is copied
    assert copied.lock is module.lock is copied.held["ordered"]["lock"]
    assert copied.settings["width"] is not module.settings["width"]
    assert copied.held is not module.held


def test_activations_are_copied_without_their_graph():
    module = Holding()
    module(torch.randn(2, 3))
    copied = detached_copy(module)
    assert torch.equal(copied.features, module.features)
    assert copied.features is copied.kept[0]
    assert copied.features.grad_fn is None
    assert module.features.grad_fn is not None


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda m: nn.Sequential(torch.compile(m, backend="eager"))])
def test_copies_run_alike_and_are_independent(wrap):
    module, x = wrap(Holding()), torch.randn(2, 3)
    copied = detached_copy(module)
    expected = module(x)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(module(x), expected)


class Failing:
    """Raises in the middle of a copy that has begun."""

    def __init__(self, module):
        self.module = module

    def __deepcopy__(self, memo):
        memo[id(self.module)] = "half a copy"
        raise RuntimeError


def test_copies_that_failed_midway_are_forgotten():
    module = Holding()
    module.strange = Failing(module.body)
    copied = detached_copy(module)
    assert isinstance(copied.body, nn.Sequential)
    assert copied.strange is module.strange

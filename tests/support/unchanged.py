"""A model that must stay as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Unchanged:
    """Remembers a module and says whether it is still exactly the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = copy.deepcopy(module.state_dict())
        self.modules = [(name, m, m.training) for name, m in module.named_modules()]
        self.parameters = [(name, p) for name, p in module.named_parameters()]
        self.hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in module.named_modules()}
        self.rng = torch.get_rng_state()

    def check(self) -> None:
        now = self.module.state_dict()
        assert list(now) == list(self.state)
        assert all(torch.equal(now[name], value) for name, value in self.state.items())
        assert [(n, id(m), m.training) for n, m in self.module.named_modules()] == [
            (n, id(m), training) for n, m, training in self.modules
        ]
        assert [(n, id(p)) for n, p in self.module.named_parameters()] == [(n, id(p)) for n, p in self.parameters]
        assert {
            name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in self.module.named_modules()
        } == self.hooks
        assert torch.equal(torch.get_rng_state(), self.rng)

"""A model that must stay as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Unchanged:
    """Remembers a module, gradients and random state too, and says whether all is still exactly the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = copy.deepcopy(module.state_dict())
        self.modules = [(name, m, m.training) for name, m in module.named_modules()]
        self.parameters = [(name, p) for name, p in module.named_parameters()]
        self.trained = [(p.requires_grad, p.grad) for p in module.parameters()]
        self.gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        self.momenta = [getattr(m, "momentum", None) for m in module.modules()]
        self.hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in module.named_modules()}
        self.rng = torch.get_rng_state()

    def check(self) -> None:
        self.check_all_but_values()
        now = self.module.state_dict()
        assert all(torch.equal(now[name], value) for name, value in self.state.items())

    def check_all_but_values(self) -> None:
        assert list(self.module.state_dict()) == list(self.state)
        assert [(n, id(m), m.training) for n, m in self.module.named_modules()] == [
            (n, id(m), training) for n, m, training in self.modules
        ]
        assert [(n, id(p)) for n, p in self.module.named_parameters()] == [(n, id(p)) for n, p in self.parameters]
        for parameter, (required, grad) in zip(self.module.parameters(), self.trained, strict=True):
            assert parameter.requires_grad is required
            assert parameter.grad is grad
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        assert all(torch.equal(now, value) for now, value in zip(gradients, self.gradients, strict=True))
        assert [getattr(m, "momentum", None) for m in self.module.modules()] == self.momenta
        assert {
            name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in self.module.named_modules()
        } == self.hooks
        assert torch.equal(torch.get_rng_state(), self.rng)

"""What tests of fits share: the usual warnings, what is compared, and fits that must come to the same end."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_compress import FactorisedLayer, apply_plan_

QUIET = [
    # TinyTask has a validation_step; most fits need no validation data.
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    # The trainers that load a checkpoint need not save any, or save theirs elsewhere.
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


CUT_SHORT = [
    # Fits that others go on with end before the last round of their schedule.
    pytest.mark.filterwarnings("ignore:the fit is too short for its schedule"),
    pytest.mark.filterwarnings("ignore:the fit ended in round"),
]


def factorised(module: nn.Module) -> dict[str, tuple]:
    return {n: (m.kind, m.ranks) for n, m in module.named_modules() if isinstance(m, FactorisedLayer)}


def planned(callback) -> dict[str, tuple]:
    return {p.name: (p.kind, p.ranks) for p in callback.plan.factorised}


def factors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    own = {id(f) for m in module.modules() if isinstance(m, FactorisedLayer) for f in m.factors().values()}
    return {name: p for name, p in module.named_parameters() if id(p) in own}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def held_by(optimizers) -> list[int]:
    return [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]


def require_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def require_dense(task: nn.Module, before) -> None:
    """Checks that a module is the one an `Unchanged` has seen, whatever mode and hooks a trainer left."""
    assert [(n, id(m)) for n, m in task.named_modules()] == [(n, id(m)) for n, m, _ in before.modules]
    assert [(n, id(p)) for n, p in task.named_parameters()] == [(n, id(p)) for n, p in before.parameters]
    assert all(torch.equal(v, before.state[n]) for n, v in task.state_dict().items())
    assert "configure_optimizers" not in task.__dict__


def require_plain_fit(make_trainer, loader, task, plain, callback, **settings) -> L.Trainer:
    """Fits with the callback, and checks that a fit without it of the module with the plan applied ends alike."""
    trainer = make_trainer(callback, **settings)
    trainer.fit(task, loader)
    apply_plan_(plain, callback.plan)
    make_trainer(**settings).fit(plain, loader)
    require_same_state(task, plain)
    return trainer

"""Fits that are broken off and go on."""

from __future__ import annotations

import copy

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from lightning_compress import FactorisedLayer
from tests.support.compressing import compress

EPOCHS, BATCHES = 4, 4

IN_STEPS = {
    "phases": [{"budget": {"params": 0.8}, "steps": 3}, {"budget": {"params": 0.5}, "steps": 3, "warmup_steps": 2}]
}


def factorised(module: nn.Module) -> dict[str, tuple]:
    return {n: (m.kind, m.ranks) for n, m in module.named_modules() if isinstance(m, FactorisedLayer)}


def require_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def require_same_optimizers(a: L.Trainer, b: L.Trainer) -> None:
    for first, second in zip(a.optimizers, b.optimizers, strict=True):
        ours, theirs = first.state_dict(), second.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert list(ours["state"]) == list(theirs["state"])
        assert ours["state"]
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    for first, second in zip(a.lr_scheduler_configs, b.lr_scheduler_configs, strict=True):
        state, other = first.scheduler.state_dict(), second.scheduler.state_dict()
        assert {k: v for k, v in state.items() if k != "lr_lambdas"} == {
            k: v for k, v in other.items() if k != "lr_lambdas"
        }


def momentum(task):
    return SGD(task.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def groups(task):
    decayed = [p for p in task.parameters() if p.ndim > 1]
    rest = [p for p in task.parameters() if p.ndim <= 1]
    return AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 3e-3}], lr=1e-2)


def named(task):
    return AdamW(task.named_parameters(), lr=1e-2)


def one_cycle(task):
    optimizer = momentum(task)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * BATCHES + 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lbfgs(task):
    return torch.optim.LBFGS(task.parameters(), lr=0.1, max_iter=3, history_size=4)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if outputs is not None and "loss" in outputs:
            self.losses.append(outputs["loss"].item())


def run(make_trainer, loader, task, callback, folder, *, epochs=EPOCHS, ckpt_path=None, **settings):
    losses = Losses()
    every_epoch = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    callbacks = [callback] if callback is not None else []
    trainer = make_trainer(*callbacks, losses, every_epoch, max_epochs=epochs, **settings)
    trainer.fit(task, loader, loader, ckpt_path=ckpt_path)
    return trainer, losses.losses


def require_identical_resume(make_trainer, loader, tmp_path, task, settings, after, **trainer_settings) -> None:
    fresh, stopped = copy.deepcopy(task), copy.deepcopy(task)
    whole, losses = run(make_trainer, loader, task, compress(**settings), tmp_path / "whole", **trainer_settings)
    assert whole.global_step > 0
    # The first run really ends there, so that nothing of what follows can be in its checkpoint.
    run(make_trainer, loader, stopped, compress(**settings), tmp_path / "first", epochs=after + 1, **trainer_settings)
    callback = compress(**settings)
    path = tmp_path / "first" / f"epoch={after}.ckpt"
    again, rest = run(make_trainer, loader, fresh, callback, tmp_path / "again", ckpt_path=path, **trainer_settings)
    assert rest == losses[len(losses) - len(rest) :]
    assert again.global_step == whole.global_step
    assert factorised(fresh) == factorised(task) == {p.name: (p.kind, p.ranks) for p in callback.plan.factorised}
    require_same_state(task, fresh)
    require_same_optimizers(whole, again)
    held = {id(p) for o in again.optimizers for group in o.param_groups for p in group["params"]}
    assert held <= {id(p) for p in fresh.parameters()}

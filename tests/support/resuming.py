"""Fits that are broken off and go on."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.support.compressing import compress
from tests.support.fitting import factorised, planned, require_same_state

EPOCHS, BATCHES = 4, 4

IN_STEPS = {
    "phases": [{"budget": {"params": 0.8}, "steps": 3}, {"budget": {"params": 0.5}, "steps": 3, "warmup_steps": 2}]
}

THREE = {
    "phases": [
        {"budget": {"params": 0.8}, "epochs": 1},
        {"budget": {"params": 0.6}, "epochs": 1},
        {"budget": {"params": 0.4}},
    ]
}


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


def first_epoch(make_trainer, loader, tmp_path, task, callback, **settings) -> str:
    run(make_trainer, loader, task, callback, tmp_path / "first", epochs=1, **settings)
    return str(tmp_path / "first" / "epoch=0.ckpt")


def dense_checkpoint(make_trainer, loader, tmp_path, task) -> Path:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    return tmp_path / "dense.ckpt"


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
    assert factorised(fresh) == factorised(task) == planned(callback)
    require_same_state(task, fresh)
    require_same_optimizers(whole, again)
    held = {id(p) for o in again.optimizers for group in o.param_groups for p in group["params"]}
    assert held <= {id(p) for p in fresh.parameters()}

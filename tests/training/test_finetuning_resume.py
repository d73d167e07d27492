"""Fits beside finetuning callbacks that go on after the unfreezing: what was thawed stays so."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.optim import SGD

from lightning_compress.training.payload import CHECKPOINT_KEY
from tests.support.compressing import compress
from tests.support.fitting import CUT_SHORT, QUIET, factorised, held_by, require_same_state
from tests.support.nets import TinyTask
from tests.support.resuming import require_same_optimizers

pytestmark = [
    *QUIET,
    *CUT_SHORT,
    # Norms are trained from the beginning.
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist within another group"),
]


class Transfer(TinyTask):
    """A backbone and a head, trained as Lightning's documentation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net, nn.Linear(4, 4)
        del self.net

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


def by_lightning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.5, backbone_initial_lr=0.01)


class WithNorms(BaseFinetuning):
    """Freezes norm layers too, which then do not follow the data."""

    def freeze_before_training(self, pl_module) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.backbone.conv1, pl_module.backbone.norm], optimizer, lr=0.02)
        if epoch == 2:
            self.unfreeze_and_add_param_group([pl_module.backbone.conv2, pl_module.backbone.fc1], optimizer, lr=0.01)


def fit(make_trainer, loader, task, folder, make, first, epochs=4, **settings):
    fitted, others = compress(0.5, **settings.pop("compress", {})), [make()]
    pair = [fitted, *others] if first else [*others, fitted]
    trainer = make_trainer(*pair, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), max_epochs=epochs)
    trainer.fit(task, loader, **settings)
    return trainer


ROUNDS = {"schedule": {"phases": [{"budget": {"params": 0.8}, "epochs": 2}, {"budget": {"params": 0.5}}]}}


@pytest.mark.parametrize("make", [by_lightning, WithNorms])
@pytest.mark.parametrize("first", [True, False], ids=["Compress first", "Compress last"])
@pytest.mark.parametrize(
    ("after", "settings"), [(0, {}), (1, {}), (2, {}), (1, ROUNDS), (2, ROUNDS)], ids=["0", "1", "2", "1r", "2r"]
)
def test_resume_after_the_unfreezing_is_identical(make_trainer, loader, tmp_path, make, first, after, settings):
    task = Transfer()
    fresh, stopped = copy.deepcopy(task), copy.deepcopy(task)
    whole = fit(make_trainer, loader, task, tmp_path / "whole", make, first, compress=settings)
    fit(make_trainer, loader, stopped, tmp_path / "first", make, first, after + 1, compress=settings)
    path = tmp_path / "first" / f"epoch={after}.ckpt"
    again = fit(make_trainer, loader, fresh, tmp_path / "again", make, first, compress=settings, ckpt_path=path)
    assert factorised(fresh) == factorised(task)
    require_same_state(fresh, task)
    require_same_optimizers(again, whole)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in task.parameters()]
    assert [m.track_running_stats for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)] == [True]
    frozen = torch.load(path, weights_only=True)[CHECKPOINT_KEY]["frozen"]
    assert bool(frozen) == (after == 0 or make is WithNorms)


@pytest.mark.parametrize("first", [True, False], ids=["Compress first", "Compress last"])
def test_dense_run_after_the_unfreezing_is_gone_on_from_and_resumed(make_trainer, loader, tmp_path, first):
    task = Transfer()
    make_trainer(by_lightning(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), max_epochs=2).fit(
        task, loader
    )
    module, fresh = Transfer(), Transfer()
    path = tmp_path / "epoch=1.ckpt"
    whole = fit(make_trainer, loader, module, tmp_path / "whole", by_lightning, first, ckpt_path=path)
    assert factorised(module)
    assert set(held_by(whole.optimizers)) == {id(p) for p in module.parameters()}
    assert len(whole.optimizers[0].param_groups) == 2
    path = tmp_path / "whole" / "epoch=2.ckpt"
    again = fit(make_trainer, loader, fresh, tmp_path / "again", by_lightning, first, ckpt_path=path)
    require_same_state(fresh, module)
    require_same_optimizers(again, whole)

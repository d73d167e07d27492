"""Checkpoints that cannot be gone on from, and what is said."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning_compress import load_compressed_checkpoint
from lightning_compress.core.errors import PlanFormatError, PlanMismatchError, ResumeError
from lightning_compress.training.checkpoint import CHECKPOINT_KEY
from tests.support.compressing import compress
from tests.support.fitting import QUIET, factorised, require_dense
from tests.support.nets import TinyTask, TwoManual
from tests.support.optimizers import groups, head_only, momentum
from tests.support.resuming import dense_checkpoint, first_epoch

pytestmark = QUIET


def reordered(task):
    return Adam(list(task.parameters())[::-1], lr=1e-2)


def two_groups(task):
    parameters = list(task.parameters())
    return Adam([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=1e-2)


class OneManual(TwoManual):
    def configure_optimizers(self):
        return Adam(self.parameters(), lr=1e-2)


OTHER_OPTIMIZERS = {
    "another order": (TinyTask, lambda: TinyTask(reordered)),
    "more groups": (TinyTask, lambda: TinyTask(two_groups)),
    "fewer parameters": (lambda: TinyTask(momentum), lambda: TinyTask(head_only)),
    "fewer optimizers": (TwoManual, OneManual),
    "another class": (TinyTask, lambda: TinyTask(lambda task: SGD(task.parameters(), lr=1e-2))),
}


@pytest.mark.parametrize(("make", "make_other"), OTHER_OPTIMIZERS.values(), ids=OTHER_OPTIMIZERS)
def test_resume_with_other_optimizers_is_refused(make_trainer, loader, tmp_path, make, make_other):
    path = first_epoch(make_trainer, loader, tmp_path, make(), compress())
    said = r"(?s)checkpoint's optimizers differ from those that.*in the checkpoint, .* now\. Resume with the same"
    with pytest.raises(ResumeError, match=said):
        make_trainer(compress(), max_epochs=2).fit(make_other(), loader, ckpt_path=path)


def test_dense_checkpoint_of_other_optimizers_is_refused(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(groups))
    task = TinyTask(momentum)
    with pytest.raises(ResumeError, match=r"hold \[\[5, 6\]\] parameters by group.*\[\[11\]\]"):
        make_trainer(compress(), max_epochs=2).fit(task, loader, ckpt_path=path)
    assert not factorised(task)


@pytest.mark.parametrize(
    ("into", "said"),
    [
        ("another module", "weights are not those of the teacher the checkpoint was distilled from.*with the weights"),
        ("the first module", r"already factorised, so the dense teacher cannot be rebuilt.*Give fit"),
    ],
)
def test_distilled_resume_without_the_dense_weights_is_refused(make_trainer, loader, tmp_path, unchanged, into, said):
    first = TinyTask()
    path = first_epoch(make_trainer, loader, tmp_path, first, compress(distill={}))
    task = first if into == "the first module" else TinyTask()
    before = unchanged(task)
    with pytest.raises(ResumeError, match=said):
        make_trainer(compress(distill={}), max_epochs=2).fit(task, loader, ckpt_path=path)
    require_dense(task, before)


def newer_plan(payload) -> None:
    plan = json.loads(payload["plan"])
    plan["schema"] = 99
    payload["plan"] = json.dumps(plan)


CHANGES = {
    "newer checkpoint": (lambda p: p.update(version=2), ResumeError, r"has version 2, this library reads 1: update"),
    "no version": (lambda p: p.pop("version"), ResumeError, r"has version None, this library reads 1"),
    "newer plan": (newer_plan, PlanFormatError, r"plan has schema 99; this version reads schema 1.*Update"),
    "damaged plan": (lambda p: p.update(plan="{"), PlanFormatError, r"plan is damaged: not JSON"),
}


@pytest.mark.parametrize(("change", "error", "said"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("stage", ["fit", "test", "test without the callback"])
def test_checkpoint_that_cannot_be_read_is_refused(
    make_trainer, loader, tmp_path, unchanged, change, error, said, stage
):
    path = first_epoch(make_trainer, loader, tmp_path, TinyTask(), compress())
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint[CHECKPOINT_KEY])
    torch.save(checkpoint, path)
    task = TinyTask()
    if stage == "test without the callback":
        compress().setup(make_trainer(), task, "fit")  # a module that was compressed in an earlier fit
    before = unchanged(task)
    trainer = make_trainer(*([] if "without" in stage else [compress()]), max_epochs=2)
    enter = trainer.fit if stage == "fit" else trainer.test
    with pytest.raises(error, match=said):
        enter(task, loader, ckpt_path=path)
    require_dense(task, before)
    with pytest.raises(error, match=said):
        load_compressed_checkpoint(TinyTask, path)


def test_checkpoint_of_another_architecture_leaves_a_factorised_module_as_it_was(
    make_trainer, loader, tmp_path, unchanged
):
    path = first_epoch(make_trainer, loader, tmp_path, TinyTask(), compress(0.4))

    class Other(TinyTask):
        def __init__(self) -> None:
            super().__init__()
            self.net.fc1 = nn.Linear(16, 48)
            self.net.fc2 = nn.Linear(48, 4)

    task = Other()
    make_trainer(compress(0.6)).fit(task, loader)
    before = unchanged(task)
    with pytest.raises(PlanMismatchError, match=r"layer 'net\.fc.' is a Linear with weight"):
        make_trainer(compress(0.6)).test(task, loader, ckpt_path=path, verbose=False)
    before.check()

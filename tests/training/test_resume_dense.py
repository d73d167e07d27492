"""Fits that go on from the checkpoint of a dense run."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import apply_plan_
from tests.support.compressing import compress
from tests.support.fitting import QUIET, require_same_state
from tests.support.nets import TinyTask
from tests.support.optimizers import groups, lbfgs, momentum
from tests.support.resuming import IN_STEPS, dense_checkpoint, require_same_optimizers, run

pytestmark = QUIET


class AtStart(Callback):
    # Optimizer states by parameter name before the first batch.
    def on_train_start(self, trainer, pl_module) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.states = [{names[id(p)]: copy.deepcopy(state) for p, state in o.state.items()} for o in trainer.optimizers]
        self.place = trainer.current_epoch, trainer.global_step
        self.weights = copy.deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("configure", [groups, momentum])
def test_fit_goes_on_from_a_dense_checkpoint(make_trainer, loader, tmp_path, configure):
    dense = TinyTask(configure)
    fresh = TinyTask(configure)
    path = dense_checkpoint(make_trainer, loader, tmp_path, dense)
    saved = dense._trainer.optimizers[0].state
    start, callback = AtStart(), compress()
    trainer = make_trainer(callback, start, max_epochs=3)
    trainer.fit(fresh, loader, ckpt_path=path)
    expected = copy.deepcopy(dense)
    apply_plan_(expected, callback.plan)
    assert all(torch.equal(v, start.weights[n]) for n, v in expected.state_dict().items())
    assert start.place == (1, 4)
    assert trainer.global_step == 12
    owners = {name for name, p in fresh.named_parameters()}
    by_name = {name: saved[p] for name, p in dense.named_parameters()}
    kept = {name.replace(".expand.bias", ".bias") for name in start.states[0]}
    assert kept <= set(by_name)
    assert {"net.norm.weight", "net.norm.bias", "net.fc1.bias"} <= kept
    assert set(start.states[0]) <= owners
    for name, state in start.states[0].items():
        torch.testing.assert_close(state, by_name[name.replace(".expand.bias", ".bias")], rtol=0, atol=0)


def test_dense_checkpoint_with_lbfgs_starts_its_history_anew(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(lbfgs))
    start = AtStart()
    make_trainer(compress(), start, max_epochs=2).fit(TinyTask(lbfgs), loader, ckpt_path=path)
    assert start.states == [{}]


def test_dense_checkpoint_with_no_optimizers_starts_them_anew(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(momentum))
    content = torch.load(path, weights_only=True)
    content["optimizer_states"] = []  # of a trainer that has not fitted
    torch.save(content, path)
    start = AtStart()
    make_trainer(compress(), start, max_epochs=2).fit(TinyTask(momentum), loader, ckpt_path=path)
    assert start.states == [{}]


@pytest.mark.filterwarnings("ignore:layer .* loses")  # of an untrained net one layer goes first
def test_dense_checkpoint_into_a_factorised_module_makes_it_dense_first(make_trainer, loader, tmp_path):
    dense = TinyTask(momentum)
    path = dense_checkpoint(make_trainer, loader, tmp_path, dense)
    task, fresh = TinyTask(momentum), TinyTask(momentum)
    make_trainer(compress(0.7)).fit(task, loader)
    for module in (task, fresh):
        make_trainer(compress(), max_epochs=2).fit(module, loader, ckpt_path=path)
    require_same_state(task, fresh)


def test_run_from_a_dense_checkpoint_resumes_identically(make_trainer, loader, tmp_path):
    path = dense_checkpoint(make_trainer, loader, tmp_path, TinyTask(groups))
    settings = {"params": 0.5, "schedule": IN_STEPS}  # counted from where the compression began
    task, fresh = TinyTask(groups), TinyTask(groups)
    whole, losses = run(make_trainer, loader, task, compress(**settings), tmp_path / "a", ckpt_path=path, epochs=3)
    again, rest = run(
        make_trainer, loader, fresh, compress(**settings), tmp_path / "b", ckpt_path=tmp_path / "a" / "epoch=1.ckpt",
        epochs=3,
    )  # fmt: skip
    assert rest == losses[-4:]
    require_same_state(task, fresh)
    require_same_optimizers(whole, again)


def test_dense_checkpoint_can_still_be_tested(make_trainer, loader, tmp_path):
    dense, task = TinyTask(), TinyTask()
    path = dense_checkpoint(make_trainer, loader, tmp_path, dense)
    expected = make_trainer().test(dense, loader, verbose=False)
    assert make_trainer(compress()).test(task, loader, ckpt_path=path, verbose=False) == expected
    require_same_state(task, dense)

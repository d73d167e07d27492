"""Checkpoints of compressed modules: what they hold, and how a trainer loads them into any module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from lightning_compress import Compress, Plan, apply_plan_
from lightning_compress.core.errors import ResumeError
from lightning_compress.training.checkpoint import CHECKPOINT_KEY
from tests.support.compressing import WEIGHTS_ALONE, compress
from tests.support.fitting import QUIET, factorised, planned, require_same_state
from tests.support.nets import TinyTask
from tests.support.optimizers import one_cycle_adam
from tests.support.resuming import first_epoch

pytestmark = QUIET

# --- in test, validate and predict --------------------------------------------------------------------------


class Predicts(TinyTask):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def loss_of(task: nn.Module, loader) -> float:
    with torch.no_grad():
        task.eval()
        losses = [F.cross_entropy(task.net(x), y) for x, y in loader]
    return torch.stack(losses).mean().item()


def rebuilt(dense: nn.Module, checkpoint) -> nn.Module:
    module = copy.deepcopy(dense)
    apply_plan_(module, Plan.from_json(checkpoint[CHECKPOINT_KEY]["plan"]))
    module.load_state_dict(checkpoint["state_dict"])
    return module


@pytest.mark.parametrize("weights_only", [False, True])
def test_best_checkpoint_is_tested_in_the_same_trainer(make_trainer, loader, tmp_path, weights_only):
    task = Predicts()
    dense = copy.deepcopy(task)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max", save_weights_only=weights_only)
    trainer = make_trainer(compress(), best, max_epochs=3)
    trainer.fit(task, loader, loader)
    expected = rebuilt(dense, torch.load(best.best_model_path, weights_only=True))
    end = loss_of(task, loader)
    result = trainer.test(task, loader, ckpt_path="best", verbose=False)
    require_same_state(task, expected)
    assert result[0]["test_loss"] == pytest.approx(loss_of(expected, loader), rel=1e-6)
    assert result[0]["test_loss"] != pytest.approx(end, rel=1e-3)  # the best is not simply the last


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_checkpoint_works_in_a_fresh_trainer_and_module(make_trainer, loader, tmp_path, weights_only, stage):
    task = Predicts()
    dense = copy.deepcopy(task)
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", save_weights_only=weights_only)
    make_trainer(compress(), checkpoints).fit(task, loader)
    path = checkpoints.best_model_path
    expected = rebuilt(dense, torch.load(path, weights_only=True))
    require_same_state(expected, task)
    torch.manual_seed(99)
    fresh, callback = Predicts(), compress()
    trainer = make_trainer(callback)
    if stage == "predict":
        result = torch.cat(trainer.predict(fresh, loader, ckpt_path=path))
        with torch.no_grad():
            assert torch.equal(result, torch.cat([expected.eval().net(x) for x, _ in loader]))
    else:
        result = getattr(trainer, stage)(fresh, loader, ckpt_path=path, verbose=False)
        name = "test_loss" if stage == "test" else "val_loss"
        assert result[0][name] == pytest.approx(loss_of(expected, loader), rel=1e-6)
    require_same_state(fresh, expected)
    assert planned(callback) == factorised(fresh) == factorised(task)


@pytest.mark.parametrize("stage", ["test", "validate"])
@pytest.mark.parametrize("with_callback", [True, False])
def test_a_dense_checkpoint_is_tested_as_what_it_is(make_trainer, loader, tmp_path, with_callback, stage):
    dense = Predicts()
    checkpoints = ModelCheckpoint(tmp_path / "dense", save_weights_only=True)
    make_trainer(checkpoints).fit(dense, loader)
    expected = loss_of(dense, loader)
    task, callback = Predicts(), compress()
    make_trainer(callback).fit(task, loader)
    trainer = make_trainer(*([callback] if with_callback else []))
    result = getattr(trainer, stage)(task, loader, ckpt_path=checkpoints.best_model_path, verbose=False)
    assert next(value for name, value in result[0].items() if "loss" in name) == pytest.approx(expected, rel=1e-6)
    assert factorised(task) == {}
    require_same_state(task, dense)


def test_a_dense_checkpoint_that_does_not_fit_leaves_a_compressed_module_as_it_is(make_trainer, loader, tmp_path):
    task, callback = Predicts(), compress()
    trainer = make_trainer(callback)
    trainer.fit(task, loader)
    before, state = factorised(task), copy.deepcopy(task.state_dict())
    content = {"state_dict": {"net.other": torch.zeros(3)}, "pytorch-lightning_version": "2.0.0"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ResumeError, match="the weights of the checkpoint do not fit Predicts, which is left as it was"):
        trainer.test(task, loader, ckpt_path=tmp_path / "other.ckpt", verbose=False)
    assert factorised(task) == before
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("with_callback", [True, False])
@pytest.mark.parametrize("params", [0.4, 0.6])
def test_checkpoint_of_any_plan_is_rebuilt_in_a_factorised_module(
    make_trainer, loader, tmp_path, with_callback, params
):
    source = Predicts()
    task = copy.deepcopy(source)
    path = first_epoch(make_trainer, loader, tmp_path, source, compress(0.4))
    make_trainer(compress(params), max_epochs=2).fit(task, loader)
    assert (factorised(task) != factorised(source)) == (params == 0.6)
    callbacks = [compress(params)] if with_callback else []
    result = make_trainer(*callbacks).test(task, loader, ckpt_path=path, verbose=False)
    assert factorised(task) == factorised(source)
    require_same_state(task, source)
    assert result[0]["test_loss"] == pytest.approx(loss_of(source, loader), rel=1e-6)


def test_checkpoint_of_a_later_fit_without_the_callback_still_holds_the_plan(make_trainer, loader, tmp_path):
    task = Predicts()
    make_trainer(compress()).fit(task, loader)
    trainer = make_trainer()
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    fresh = Predicts()
    make_trainer(compress()).test(fresh, loader, ckpt_path=tmp_path / "later.ckpt", verbose=False)
    require_same_state(fresh, task)


# --- what a checkpoint holds -------------------------------------------------------------------------------


def test_checkpoint_saved_after_the_fit_or_a_test_holds_all_that_one_of_the_fit_holds(make_trainer, loader, tmp_path):
    task, callback = TinyTask(), compress(distill={}, schedule={"warmup_steps": 3})
    dense = copy.deepcopy(task)
    trainer = make_trainer(callback)
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "fitted.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.test(task, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "tested.ckpt")
    fitted, weights, tested = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("fitted", "weights", "tested")
    )
    for checkpoint in (fitted, weights, tested):
        assert Plan.from_json(checkpoint[CHECKPOINT_KEY]["plan"]) == callback.plan
        require_same_state(rebuilt(dense, checkpoint), task)
    assert tested[CHECKPOINT_KEY] == fitted[CHECKPOINT_KEY]
    assert {"plan", "schedule", "teacher", "optimizers"} <= set(fitted[CHECKPOINT_KEY])
    assert "optimizers" not in weights[CHECKPOINT_KEY]
    assert "optimizer_states" not in weights


def require_primitive(value, where: str) -> None:
    assert value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, torch.Tensor)), where
    assert not type(value).__module__.startswith(("numpy", "omegaconf", "lightning_compress")), where
    assert not isinstance(value, nn.Parameter), where
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int), where
            require_primitive(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            require_primitive(item, f"{where}[{index}]")


def test_checkpoint_holds_primitives_and_tensors_only(make_trainer, loader, tmp_path):
    settings = OmegaConf.create({"exclude": ["net.fc2"], "overrides": {"net.fc1": {"max_rank": 4}}, "distill": {}})
    task = TinyTask(one_cycle_adam)
    names = [name for name, _ in copy.deepcopy(task).named_parameters()]
    callback = Compress(OmegaConf.create({"params": 0.5}), method="continuous", **WEIGHTS_ALONE, **settings)
    path = first_epoch(make_trainer, loader, tmp_path, task, callback)
    checkpoint = torch.load(path, weights_only=True)
    require_primitive(checkpoint, "checkpoint")
    payload = checkpoint[CHECKPOINT_KEY]
    assert set(payload) == {"version", "plan", "optimizers", "teacher", "schedule"}
    assert payload["version"] == 1
    assert Plan.from_json(payload["plan"]) == callback.plan
    assert [optimizer["groups"] for optimizer in payload["optimizers"]] == [[[n for n, _ in task.named_parameters()]]]
    assert payload["optimizers"][0]["groups"] != [names]


def test_dense_module_in_a_trainer_with_the_callback_saves_no_plan(make_trainer, loader, tmp_path):
    task = TinyTask()
    trainer = make_trainer(compress())
    trainer.validate(task, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    assert CHECKPOINT_KEY not in torch.load(tmp_path / "dense.ckpt", weights_only=True)


# --- hooks and copies ----------------------------------------------------------------------------------------


class Hooked(TinyTask):
    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["mine"] = [*checkpoint.get("mine", []), *sorted(checkpoint[CHECKPOINT_KEY])]

    def on_load_checkpoint(self, checkpoint) -> None:
        self.loaded = (checkpoint["mine"], len(factorised(self)))


def hooked_instance() -> TinyTask:
    task = TinyTask()
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        setattr(task, name, getattr(Hooked, name).__get__(task))
    return task


@pytest.mark.parametrize("make", [Hooked, hooked_instance], ids=["of the class", "of the instance"])
def test_checkpoint_hooks_of_the_user_run_once_after_ours(make_trainer, loader, tmp_path, make):
    task, fresh = make(), make()
    trainer = make_trainer(compress())
    trainer.fit(task, loader)
    trainer.test(task, loader, verbose=False)  # sets the module up again
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    make_trainer(compress()).test(fresh, loader, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert fresh.loaded == (["optimizers", "plan", "schedule", "version"], len(factorised(task)))


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch(module):
    torch.save(module, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("fitted", [False, True], ids=["after setup", "after the fit"])
def test_copy_of_a_module_lives_on_its_own(make_trainer, loader, tmp_path, duplicate, fitted):
    source = TinyTask()
    path = first_epoch(make_trainer, loader, tmp_path, source, compress(distill={}))
    task = source if fitted else TinyTask()
    if not fitted:
        trainer = make_trainer(compress())
        trainer.strategy.connect(task)
        trainer.callbacks[-1].setup(trainer, task, "fit")
    clone = duplicate(task)
    assert clone.on_load_checkpoint.args == (clone, None)
    assert clone.on_save_checkpoint.args == (clone, None)
    require_same_state(clone, task)
    assert factorised(clone) == factorised(task)
    before = copy.deepcopy(task)
    make_trainer().test(clone, loader, ckpt_path=path, verbose=False)
    make_trainer(compress()).fit(clone, loader)  # only fine-tunes
    trainer = make_trainer()
    trainer.strategy.connect(clone)
    trainer.save_checkpoint(tmp_path / "copy.ckpt")
    assert factorised(clone) == factorised(source)
    require_same_state(rebuilt(TinyTask(), torch.load(tmp_path / "copy.ckpt", weights_only=True)), clone)
    require_same_state(task, before)
    assert not torch.equal(clone.net.fc2.bias, source.net.fc2.bias)

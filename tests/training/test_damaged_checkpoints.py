"""Checkpoints that are damaged, and fits that fail after they were loaded: the module is what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import CompressedCheckpointMixin, load_compressed_checkpoint
from lightning_compress.core.errors import PlanFormatError, ResumeError
from lightning_compress.training.payload import CHECKPOINT_KEY
from tests.support.compressing import compress
from tests.support.fitting import CUT_SHORT, QUIET, factorised, held_by, require_dense
from tests.support.nets import TinyTask
from tests.support.optimizers import Prebuilt, lbfgs
from tests.support.resuming import first_epoch

pytestmark = [*QUIET, *CUT_SHORT]
SCHEDULE = {"phases": [{"budget": {"params": 0.4}, "epochs": 1}, {"warmup_steps": 2}]}


@pytest.fixture(scope="module")
def originals():
    return {}


@pytest.fixture
def saved(make_trainer, loader, tmp_path, originals):
    def save(make=TinyTask, change=None):
        path = tmp_path / "saved.ckpt"
        if make not in originals:
            first = first_epoch(make_trainer, loader, tmp_path, make(), compress(schedule=SCHEDULE))
            originals[make] = torch.load(first, weights_only=True)
        checkpoint = copy.deepcopy(originals[make])
        if change is not None:
            change(checkpoint)
        torch.save(checkpoint, path)
        return path

    return save


def put(name, value):
    return lambda checkpoint: checkpoint.__setitem__(name, value)


def in_payload(name, value):
    return lambda checkpoint: checkpoint[CHECKPOINT_KEY].__setitem__(name, value)


def without(name):
    return lambda checkpoint: checkpoint[CHECKPOINT_KEY].pop(name)


def in_schedule(**values):
    return lambda checkpoint: checkpoint[CHECKPOINT_KEY]["schedule"].update(values)


DAMAGED = r"the checkpoint is damaged: .*expected .*Go on from another checkpoint"
PAYLOADS = {
    "no mapping": (put(CHECKPOINT_KEY, "plan"), ResumeError, DAMAGED),
    "nothing": (put(CHECKPOINT_KEY, None), ResumeError, DAMAGED),
    "a list": (put(CHECKPOINT_KEY, [1]), ResumeError, DAMAGED),
    "version as text": (in_payload("version", "1"), ResumeError, r"has version '1', this library reads 1: update"),
    "version true": (in_payload("version", True), ResumeError, r"has version True, this library reads 1"),
    "version as a tensor": (in_payload("version", torch.ones(2)), ResumeError, r"has version tensor"),
    "no plan": (without("plan"), ResumeError, r"damaged: 'plan' of its compression is None, expected the text"),
    "plan is a number": (in_payload("plan", 3), ResumeError, r"'plan' of its compression is 3"),
    "plan is a mapping": (in_payload("plan", {}), ResumeError, r"'plan' of its compression is \{\}"),
    "plan is no plan": (in_payload("plan", "{}"), PlanFormatError, "no plan of lightning_compress"),
    "schedule is a list": (in_payload("schedule", [1, 2]), ResumeError, r"'schedule' of its compression is \[1, 2\]"),
    "schedule is empty": (in_payload("schedule", {}), ResumeError, r"'schedule'.*expected numbers by the names best"),
    "phase as text": (in_schedule(phase="0"), ResumeError, "'schedule' of its compression"),
    "phase below 0": (in_schedule(phase=-1), ResumeError, "'schedule' of its compression"),
    "step is None": (in_schedule(step=None), ResumeError, "'schedule' of its compression"),
    "best as text": (in_schedule(best="low"), ResumeError, "'schedule' of its compression"),
    "waited is a fraction": (in_schedule(waited=0.5), ResumeError, "'schedule' of its compression"),
    "optimizers as text": (in_payload("optimizers", "Adam"), ResumeError, "'optimizers' of its compression is 'Adam'"),
    "optimizers of numbers": (in_payload("optimizers", [1]), ResumeError, "'optimizers' of its compression"),
    "groups of numbers": (in_payload("optimizers", [{"type": "Adam", "groups": [[1]]}]), ResumeError, "'optimizers'"),
    "teacher is a number": (in_payload("teacher", 3), ResumeError, "'teacher' of its compression is 3"),
    "no weights": (lambda checkpoint: checkpoint.pop("state_dict"), ResumeError, "'state_dict' is None"),
    "weights in a list": (put("state_dict", [1]), ResumeError, r"'state_dict' is \[1\], expected tensors by name"),
}


@pytest.mark.parametrize(("change", "error", "said"), PAYLOADS.values(), ids=PAYLOADS)
def test_damaged_payload_is_refused_before_anything_is_changed(
    make_trainer, loader, saved, unchanged, change, error, said
):
    path, task, callback = saved(change=change), TinyTask(), compress(schedule=SCHEDULE)
    before = unchanged(task)
    for enter in ("fit", "test"):
        with pytest.raises(error, match=said):
            getattr(make_trainer(callback, max_epochs=2), enter)(task, loader, ckpt_path=path)
        require_dense(task, before)
        assert callback.plan is None
    with pytest.raises(error, match=said):
        load_compressed_checkpoint(TinyTask, path)


@pytest.mark.parametrize(("phase", "schedule", "has"), [(99, SCHEDULE, 2), (1, None, 0)])
def test_phase_that_the_schedule_does_not_have_is_refused_in_a_fit_alone(
    make_trainer, loader, saved, unchanged, phase, schedule, has
):
    path, task = saved(change=in_schedule(phase=phase)), TinyTask()
    before = unchanged(task)
    said = (
        rf"stands in phase {phase} of its schedule.*that of the callback has {has} phases: give Compress the schedule"
    )
    with pytest.raises(ResumeError, match=said):
        make_trainer(compress(schedule=schedule), max_epochs=2).fit(task, loader, ckpt_path=path)
    require_dense(task, before)
    make_trainer(compress(schedule=schedule)).test(task, loader, ckpt_path=path, verbose=False)
    assert factorised(task)


def last_factor(checkpoint) -> str:
    return [name for name in checkpoint["state_dict"] if "." in name.removeprefix("net.").removesuffix(".weight")][-1]


def other_shape(checkpoint) -> None:
    checkpoint["state_dict"]["net.norm.bias"] = torch.zeros(7)


def one_missing(checkpoint) -> None:
    del checkpoint["state_dict"][last_factor(checkpoint)]


def one_too_many(checkpoint) -> None:
    checkpoint["state_dict"]["net.more"] = torch.zeros(1)


def no_tensor(checkpoint) -> None:
    checkpoint["state_dict"][last_factor(checkpoint)] = "zeros"


WEIGHTS = {
    other_shape: "size mismatch for net.norm.bias",
    one_missing: "Missing key",
    one_too_many: "Unexpected key",
    no_tensor: "expected torch.Tensor",
}


class Mixed(CompressedCheckpointMixin, TinyTask):
    pass


@pytest.mark.parametrize("how", ["fit", "test", "test without the callback", "fit of the mixin", "test of the mixin"])
@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_that_do_not_fit_leave_the_module_as_it_was(make_trainer, loader, saved, unchanged, change, how):
    path = saved(change=change)
    task = Mixed() if "mixin" in how else TinyTask()
    if how == "test without the callback":
        compress().setup(make_trainer(), task, "fit")
    trainer = make_trainer(*([] if "test " in how else [compress(schedule=SCHEDULE)]), max_epochs=2)
    before = unchanged(task)
    said = (
        rf"(?s)weights of the checkpoint do not fit {type(task).__name__}, which is left as it was: .*{WEIGHTS[change]}"
    )
    with pytest.raises(ResumeError, match=said):
        getattr(trainer, how[:4].strip())(task, loader, ckpt_path=path)
    require_dense(task, before)
    assert "load_state_dict" not in task.__dict__
    with pytest.raises(ResumeError, match="weights of the checkpoint do not fit"):
        load_compressed_checkpoint(TinyTask, path)


def test_weights_that_do_not_fit_leave_a_module_of_another_round_as_it_was(make_trainer, loader, saved, unchanged):
    path, task = saved(change=other_shape), TinyTask()
    make_trainer(compress(0.6)).fit(task, loader)
    before, layers = unchanged(task), factorised(task)
    with pytest.raises(ResumeError, match="which is left as it was"):
        make_trainer(compress(0.6, schedule=None), max_epochs=2).test(task, loader, ckpt_path=path)
    assert factorised(task) == layers
    before.check_all_but_values()
    require_dense(task, before)


# --- fits that fail later -----------------------------------------------------------------------------------


class Fails(Callback):
    def __init__(self, where: str) -> None:
        setattr(self, where, self.fail)

    def fail(self, *_) -> None:
        msg = "a callback of the user's"
        raise OSError(msg)


def other_group(checkpoint) -> None:
    checkpoint["optimizer_states"][0]["param_groups"].append({"params": [], "lr": 1.0})


def other_names(checkpoint) -> None:
    checkpoint[CHECKPOINT_KEY]["optimizers"][0]["groups"][0].reverse()


def by_lbfgs():
    return TinyTask(lbfgs)


LATER = {
    "optimizers of other names": (other_names, (), ResumeError, "checkpoint's optimizers differ"),
    "optimizer states of other groups": (other_group, (), ValueError, "different number of parameter groups"),
    "callbacks' states": (None, ("on_load_checkpoint",), OSError, "of the user's"),
    "on_fit_start": (None, ("on_fit_start",), OSError, "of the user's"),
    "sanity check": (None, ("on_sanity_check_start",), OSError, "of the user's"),
}


@pytest.mark.parametrize("make", [Prebuilt, by_lbfgs])
@pytest.mark.parametrize(("change", "fails", "error", "said"), LATER.values(), ids=LATER)
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_fit_that_fails_before_its_first_batch_leaves_module_and_optimizers_as_they_were(
    make_trainer, loader, saved, unchanged, make, change, fails, error, said, precision
):
    path, task, callback = saved(make, change), make(), compress(schedule=SCHEDULE)
    before, groups = unchanged(task), None
    if make is Prebuilt:
        groups = copy.copy(task.optimizer.param_groups), [list(g["params"]) for g in task.optimizer.param_groups]
    others = [Fails(where) for where in fails]
    trainer = make_trainer(callback, *others, max_epochs=2, num_sanity_val_steps=1, precision=precision)
    with pytest.raises(error, match=said):
        trainer.fit(task, loader, loader, ckpt_path=path)
    require_dense(task, before)
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    assert callback.plan is None
    if groups is not None:
        assert task.optimizer.param_groups == groups[0]
        assert held_by([task.optimizer]) == [id(p) for group in groups[1] for p in group]
        assert not task.optimizer.state
    make_trainer(compress()).fit(task, loader)  # it can be trained all the same
    assert factorised(task)


def test_fit_that_fails_after_its_first_batch_keeps_what_it_went_on_from(make_trainer, loader, saved):
    path, task = saved(), TinyTask()
    with pytest.raises(OSError, match="of the user's"):
        make_trainer(compress(schedule=SCHEDULE), Fails("on_train_batch_end"), max_epochs=2).fit(
            task, loader, ckpt_path=path
        )
    assert factorised(task)

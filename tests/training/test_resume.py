from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lightning_compress import Compress, Plan, apply_plan_
from lightning_compress.core.errors import PlanFormatError, PlanMismatchError, ResumeError
from lightning_compress.training.checkpoint import CHECKPOINT_KEY
from tests.support.compressing import DEFAULTS, WEIGHTS_ALONE, compress
from tests.support.nets import TinyTask, TwoManual
from tests.support.resuming import (
    BATCHES,
    EPOCHS,
    factorised,
    groups,
    lbfgs,
    momentum,
    named,
    one_cycle,
    require_identical_resume,
    require_same_optimizers,
    require_same_state,
    run,
)

pytestmark = [
    # TinyTask has a validation_step; some fits here need no validation data.
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    # The trainers that load a checkpoint need not save any, or save theirs elsewhere.
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


# --- resume at the end of an epoch -------------------------------------------------------------------


def lambdas(task):
    optimizer = groups(task)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plateau(task):
    optimizer = momentum(task)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Prebuilt(TinyTask):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = momentum(self)

    def configure_optimizers(self):
        return self.optimizer


class ReadsTheWeight(TinyTask):
    def configure_optimizers(self):
        weights = [self.net.fc1.weight, self.net.conv2.weight]
        return Adam([{"params": weights, "lr": 0.02}, {"params": self.net.fc2.parameters()}], lr=0.01)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("configure", [None, momentum, groups, named, one_cycle, lambdas, lbfgs])
def test_resumed_run_is_identical(make_trainer, loader, tmp_path, configure, after):
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(configure), {}, after)


@pytest.mark.parametrize("kinds", ["auto", ("svd", "cp"), ("svd", "tt")])
def test_resumed_run_is_identical_with_other_kinds(make_trainer, loader, tmp_path, kinds):
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(momentum), {"kinds": kinds}, 1)


@pytest.mark.parametrize("task_class", [Prebuilt, ReadsTheWeight, TwoManual])
def test_resumed_run_is_identical_for_other_ways_to_build_optimizers(make_trainer, loader, tmp_path, task_class):
    require_identical_resume(make_trainer, loader, tmp_path, task_class(), {}, 1)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("configure", "settings"), [(plateau, {}), (momentum, {"precision": "64-true"})], ids=["plateau", "64-true"]
)
def test_resumed_run_is_that_of_a_plain_trainer(make_trainer, loader, tmp_path, configure, settings, after):
    # Lightning's own resume is not exact here: it saves before ReduceLROnPlateau steps at the end of an
    # epoch, and loads double precision into a module that is still in single.
    task = TinyTask(configure)
    task.example_input_array = None
    first, resumed, plain = (copy.deepcopy(task) for _ in range(3))
    callback = compress(example_input=(1, 3, 8, 8))
    run(make_trainer, loader, first, callback, tmp_path / "first", epochs=after + 1, **settings)
    path = tmp_path / "first" / f"epoch={after}.ckpt"
    ours, losses = run(make_trainer, loader, resumed, compress(), tmp_path / "ours", ckpt_path=path, **settings)
    apply_plan_(plain, callback.plan)
    theirs, expected = run(make_trainer, loader, plain, None, tmp_path / "theirs", ckpt_path=path, **settings)
    assert len(losses) == (EPOCHS - 1 - after) * BATCHES
    assert losses == expected
    require_same_state(resumed, plain)
    require_same_optimizers(ours, theirs)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_distilled_run_resumes_in_every_precision(make_trainer, loader, tmp_path, precision):
    task = TinyTask()
    fresh = copy.deepcopy(task)
    settings = {"distill": {}, "example_input": (1, 3, 8, 8)}
    run(make_trainer, loader, task, compress(**settings), tmp_path / "a", epochs=1, precision=precision)
    path = tmp_path / "a" / "epoch=0.ckpt"
    trainer, losses = run(
        make_trainer, loader, fresh, compress(**settings), tmp_path / "b", ckpt_path=path, precision=precision
    )
    assert trainer.global_step == EPOCHS * BATCHES
    assert len(set(losses)) == (EPOCHS - 1) * BATCHES


SETTINGS = {
    "warm-up across": ({"schedule": {"warmup_steps": 6}}, 0),
    "warm-up over": ({"schedule": {"warmup_steps": 3}}, 0),
    "frozen across": ({"schedule": {"freeze_epochs": 2}}, 0),
    "frozen until then": ({"schedule": {"freeze_epochs": 2}}, 1),
    "frozen before": ({"schedule": {"freeze_epochs": 1}}, 1),
    "distilled": ({"distill": {"weight": 0.4, "temperature": 3}}, 1),
    "distilled submodule": ({"distill": {"module": "net"}}, 1),
    "all at once": ({"schedule": {"warmup_steps": 7, "freeze_epochs": 2}, "distill": {}}, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "after"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("configure", [groups, one_cycle])
def test_resumed_schedule_and_distillation_are_identical(make_trainer, loader, tmp_path, settings, after, configure):
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(configure), settings, after)


@pytest.mark.slow
def test_resumed_run_is_identical_with_healing_and_the_search_over_outputs(make_trainer, loader, tmp_path):
    settings = {"method": "continuous", "kinds": "auto", "distill": {}, **DEFAULTS}
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(groups), settings, 1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("distill", [None, {}], ids=["plain", "distilled"])
def test_resumed_run_is_identical_in_other_precisions(make_trainer, loader, tmp_path, precision, distill):
    settings = {"distill": distill, "example_input": (1, 3, 8, 8)}
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(momentum), settings, 1, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 6}, {"freeze_epochs": 2}], ids=["", "warm-up", "frozen"])
def test_resume_into_the_module_of_the_first_run_is_identical(make_trainer, loader, tmp_path, schedule):
    # As in a notebook: the fit ended or was interrupted, and goes on with the same, factorised module.
    task = TinyTask(groups)
    whole_task = copy.deepcopy(task)
    whole, _ = run(make_trainer, loader, whole_task, compress(schedule=schedule), tmp_path / "whole")
    run(make_trainer, loader, task, compress(schedule=schedule), tmp_path / "first", epochs=1)
    path = tmp_path / "first" / "epoch=0.ckpt"
    again, _ = run(make_trainer, loader, task, compress(schedule=schedule), tmp_path / "again", ckpt_path=path)
    require_same_state(task, whole_task)
    require_same_optimizers(whole, again)


def test_resume_with_the_same_callback_and_optimizer_objects(make_trainer, loader, tmp_path):
    task = Prebuilt()
    whole_task = copy.deepcopy(task)
    assert whole_task.optimizer.param_groups[0]["params"][0] is next(whole_task.parameters())
    whole, _ = run(make_trainer, loader, whole_task, compress(), tmp_path / "whole")
    callback = compress()
    run(make_trainer, loader, task, callback, tmp_path / "first", epochs=2)
    path = tmp_path / "first" / "epoch=1.ckpt"
    again, _ = run(make_trainer, loader, task, callback, tmp_path / "again", ckpt_path=path)
    require_same_state(task, whole_task)
    require_same_optimizers(whole, again)


@pytest.mark.slow
@pytest.mark.parametrize("configure", [momentum, plateau])
@pytest.mark.parametrize("distill", [None, {}], ids=["plain", "distilled"])
def test_resume_from_a_checkpoint_saved_after_the_fit_is_identical(make_trainer, loader, tmp_path, configure, distill):
    task = TinyTask(configure)
    first, fresh = copy.deepcopy(task), copy.deepcopy(task)
    whole, _ = run(make_trainer, loader, task, compress(distill=distill), tmp_path / "whole")
    trainer, _ = run(make_trainer, loader, first, compress(distill=distill), tmp_path / "first", epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, _ = run(
        make_trainer,
        loader,
        fresh,
        compress(distill=distill),
        tmp_path / "again",
        ckpt_path=tmp_path / "end.ckpt",
    )
    require_same_state(task, fresh)
    require_same_optimizers(whole, again)


def test_checkpoint_saved_after_fit_and_test_holds_schedule_and_teacher_as_one_saved_after_the_fit(
    make_trainer, loader, tmp_path
):
    task, paths = TinyTask(), [tmp_path / "fitted.ckpt", tmp_path / "tested.ckpt"]
    trainer = make_trainer(compress(distill={}, schedule={"warmup_steps": 3}))
    trainer.fit(task, loader)
    trainer.save_checkpoint(paths[0])
    trainer.test(task, loader, verbose=False)
    trainer.save_checkpoint(paths[1])
    fitted, tested = (torch.load(path, weights_only=True)[CHECKPOINT_KEY] for path in paths)
    assert tested == fitted
    assert {"plan", "schedule", "teacher", "optimizers"} <= set(tested)


def test_resumed_fit_leaves_nothing_of_the_callback_on_the_module(make_trainer, loader, tmp_path):
    task = TinyTask()
    fresh = copy.deepcopy(task)
    run(make_trainer, loader, task, compress(distill={}), tmp_path / "first", epochs=1)
    path = tmp_path / "first" / "epoch=0.ckpt"
    run(make_trainer, loader, fresh, compress(distill={}), tmp_path / "again", epochs=2, ckpt_path=path)
    assert set(fresh.__dict__) == set(task.__dict__)
    assert "configure_optimizers" not in fresh.__dict__
    assert "training_step" not in fresh.__dict__


def test_configure_optimizers_of_the_instance_survives_a_resume(make_trainer, loader, tmp_path):
    task = TinyTask()
    fresh = copy.deepcopy(task)
    configure = functools.partial(momentum, fresh)
    task.configure_optimizers, fresh.configure_optimizers = functools.partial(momentum, task), configure
    run(make_trainer, loader, task, compress(), tmp_path / "first", epochs=1)
    path = tmp_path / "first" / "epoch=0.ckpt"
    trainer, _ = run(make_trainer, loader, fresh, compress(), tmp_path / "again", epochs=2, ckpt_path=path)
    assert isinstance(trainer.optimizers[0], SGD)
    assert fresh.__dict__.get("configure_optimizers") is configure


# --- refused resumes --------------------------------------------------------------------------------------


def first_epoch(make_trainer, loader, tmp_path, task, callback) -> str:
    run(make_trainer, loader, task, callback, tmp_path / "first", epochs=1)
    return str(tmp_path / "first" / "epoch=0.ckpt")


def reordered(task):
    return Adam(list(task.parameters())[::-1], lr=1e-2)


def two_groups(task):
    parameters = list(task.parameters())
    return Adam([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=1e-2)


def head_only(task):
    return Adam(task.net.fc2.parameters(), lr=1e-2)


class OneManual(TwoManual):
    def configure_optimizers(self):
        return Adam(self.parameters(), lr=1e-2)


OTHER_OPTIMIZERS = {
    "another order": (TinyTask, lambda: TinyTask(reordered)),
    "more groups": (TinyTask, lambda: TinyTask(two_groups)),
    "fewer parameters": (TinyTask, lambda: TinyTask(head_only)),
    "fewer optimizers": (TwoManual, OneManual),
    "another class": (TinyTask, lambda: TinyTask(lambda task: SGD(task.parameters(), lr=1e-2))),
}


@pytest.mark.parametrize(("make", "make_other"), OTHER_OPTIMIZERS.values(), ids=OTHER_OPTIMIZERS)
def test_resume_with_other_optimizers_is_refused(make_trainer, loader, tmp_path, make, make_other):
    path = first_epoch(make_trainer, loader, tmp_path, make(), compress())
    said = r"(?s)checkpoint's optimizers differ from those that.*in the checkpoint, .* now\. Resume with the same"
    with pytest.raises(ResumeError, match=said):
        make_trainer(compress(), max_epochs=2).fit(make_other(), loader, ckpt_path=path)


def require_dense(task: nn.Module, before) -> None:
    assert [(n, id(m)) for n, m in task.named_modules()] == [(n, id(m)) for n, m, _ in before.modules]
    assert [(n, id(p)) for n, p in task.named_parameters()] == [(n, id(p)) for n, p in before.parameters]
    assert all(torch.equal(v, before.state[n]) for n, v in task.state_dict().items())
    assert "configure_optimizers" not in task.__dict__


def test_distilled_resume_from_other_dense_weights_is_refused(make_trainer, loader, tmp_path, unchanged):
    path = first_epoch(make_trainer, loader, tmp_path, TinyTask(), compress(distill={}))
    other = TinyTask()
    before = unchanged(other)
    said = "weights are not those of the teacher the checkpoint was distilled from.*with the weights it had when"
    with pytest.raises(ResumeError, match=said):
        make_trainer(compress(distill={}), max_epochs=2).fit(other, loader, ckpt_path=path)
    require_dense(other, before)


def test_distilled_resume_into_a_factorised_module_is_refused(make_trainer, loader, tmp_path, unchanged):
    task = TinyTask()
    path = first_epoch(make_trainer, loader, tmp_path, task, compress(distill={}))
    before = unchanged(task)
    with pytest.raises(ResumeError, match=r"already factorised, so the dense teacher cannot be rebuilt.*Give fit"):
        make_trainer(compress(distill={}), max_epochs=2).fit(task, loader, ckpt_path=path)
    before.check()


def test_dense_checkpoint_can_still_be_tested(make_trainer, loader, tmp_path):
    dense, task = TinyTask(), TinyTask()
    trainer = make_trainer()
    trainer.fit(dense, loader)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    result = make_trainer(compress()).test(task, loader, ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    require_same_state(task, dense)
    assert result[0]["test_loss"] == pytest.approx(loss_of(dense, loader), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("task_class", [TinyTask, Prebuilt])
def test_resume_into_a_module_of_another_plan_is_identical(make_trainer, loader, tmp_path, task_class):
    task = task_class()
    whole_task, fresh = copy.deepcopy(task), copy.deepcopy(task)
    whole, _ = run(make_trainer, loader, whole_task, compress(0.4), tmp_path / "whole")
    path = first_epoch(make_trainer, loader, tmp_path, task, compress(0.4))
    make_trainer(compress(0.6)).fit(fresh, loader)
    again, _ = run(make_trainer, loader, fresh, compress(0.4), tmp_path / "again", ckpt_path=path)
    require_same_state(fresh, whole_task)
    require_same_optimizers(whole, again)


def rewritten(path: str, target, change) -> str:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint[CHECKPOINT_KEY])
    torch.save(checkpoint, target)
    return str(target)


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
    path = rewritten(path, tmp_path / "changed.ckpt", change)
    task = TinyTask()
    if stage == "test without the callback":
        compress().setup(make_trainer(), task, "fit")  # a module that was compressed in an earlier fit
    before = unchanged(task)
    trainer = make_trainer(*([] if "without" in stage else [compress()]), max_epochs=2)
    enter = trainer.fit if stage == "fit" else trainer.test
    with pytest.raises(error, match=said):
        enter(task, loader, ckpt_path=path)
    require_dense(task, before)


# --- checkpoints in test, validate and predict ------------------------------------------------------------


class Predicts(TinyTask):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def loss_of(task: nn.Module, loader) -> float:
    with torch.no_grad():
        task.eval()
        losses = [F.cross_entropy(task.net(x), y) for x, y in loader]
    return torch.stack(losses).mean().item()


def rebuilt(dense: nn.Module, path) -> nn.Module:
    checkpoint = torch.load(path, weights_only=True)
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
    expected = rebuilt(dense, best.best_model_path)
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
    expected = rebuilt(dense, path)
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
    assert {p.name: (p.kind, p.ranks) for p in callback.plan.factorised} == factorised(fresh) == factorised(task)


def test_checkpoint_works_for_a_compressed_module_in_a_trainer_without_the_callback(make_trainer, loader, tmp_path):
    task = Predicts()
    path = first_epoch(make_trainer, loader, tmp_path, task, compress())
    end = copy.deepcopy(task)
    make_trainer().fit(task, loader)
    result = make_trainer().test(task, loader, ckpt_path=path, verbose=False)
    require_same_state(task, end)
    assert result[0]["test_loss"] == pytest.approx(loss_of(end, loader), rel=1e-6)


def test_checkpoint_of_a_later_fit_without_the_callback_still_holds_the_plan(make_trainer, loader, tmp_path):
    task = Predicts()
    make_trainer(compress()).fit(task, loader)
    trainer = make_trainer()
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    fresh = Predicts()
    make_trainer(compress()).test(fresh, loader, ckpt_path=tmp_path / "later.ckpt", verbose=False)
    require_same_state(fresh, task)


@pytest.mark.parametrize("with_callback", [True, False])
def test_checkpoint_of_another_plan_is_rebuilt_in_a_factorised_module(make_trainer, loader, tmp_path, with_callback):
    source = TinyTask()
    path = first_epoch(make_trainer, loader, tmp_path, source, compress(0.4))
    task = TinyTask()
    make_trainer(compress(0.6)).fit(task, loader)
    assert factorised(task) != factorised(source)
    callbacks = [compress(0.6)] if with_callback else []
    make_trainer(*callbacks).test(task, loader, ckpt_path=path, verbose=False)
    assert factorised(task) == factorised(source)
    require_same_state(task, source)


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


def test_checkpoint_saved_after_the_fit_holds_plan_and_weights(make_trainer, loader, tmp_path):
    task, callback = TinyTask(), compress()
    dense = copy.deepcopy(task)
    trainer = make_trainer(callback)
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("end", "weights"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert Plan.from_json(checkpoint[CHECKPOINT_KEY]["plan"]) == callback.plan
        require_same_state(rebuilt(dense, tmp_path / f"{name}.ckpt"), task)
        assert ("optimizers" in checkpoint[CHECKPOINT_KEY]) == (name == "end") == ("optimizer_states" in checkpoint)


# --- what a checkpoint holds -------------------------------------------------------------------------------


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
    from omegaconf import OmegaConf

    settings = OmegaConf.create({"exclude": ["net.fc2"], "overrides": {"net.fc1": {"max_rank": 4}}, "distill": {}})
    task = TinyTask(one_cycle)
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


def test_checkpoint_hooks_of_the_users_class_run_after_ours(make_trainer, loader, tmp_path):
    class Hooked(TinyTask):
        def on_save_checkpoint(self, checkpoint) -> None:
            checkpoint["mine"] = sorted(checkpoint[CHECKPOINT_KEY])

        def on_load_checkpoint(self, checkpoint) -> None:
            self.loaded = (checkpoint["mine"], len(factorised(self)))

    task = Hooked()
    path = first_epoch(make_trainer, loader, tmp_path, task, compress())
    fresh = Hooked()
    make_trainer(compress()).test(fresh, loader, ckpt_path=path, verbose=False)
    assert fresh.loaded == (["optimizers", "plan", "schedule", "version"], len(factorised(task)))


# --- copies ------------------------------------------------------------------------------------------------


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("moment", ["after setup", "after the fit"])
def test_copy_of_a_module_has_its_own_checkpoint_hooks(make_trainer, loader, tmp_path, duplicate, moment):
    source = TinyTask()
    path = first_epoch(make_trainer, loader, tmp_path, source, compress())
    if moment == "after setup":
        task, trainer = TinyTask(), make_trainer(compress())
        trainer.strategy.connect(task)
        trainer.callbacks[-1].setup(trainer, task, "fit")
    else:
        task = source
    clone = duplicate(task)
    assert clone.on_load_checkpoint.args == (clone, None)
    assert clone.on_save_checkpoint.args == (clone, None)
    require_same_state(clone, task)
    assert factorised(clone) == factorised(task)
    before = copy.deepcopy(task.state_dict())
    checkpoint = torch.load(path, weights_only=True)
    if moment == "after the fit":
        checkpoint["state_dict"] = {n: v + 1 for n, v in checkpoint["state_dict"].items()}
        torch.save(checkpoint, path)
    make_trainer().test(clone, loader, ckpt_path=path, verbose=False)
    assert factorised(clone) == factorised(source)
    assert all(torch.equal(v, checkpoint["state_dict"][n]) for n, v in clone.state_dict().items())
    assert all(torch.equal(v, before[n]) for n, v in task.state_dict().items())
    assert list(task.state_dict()) == list(before)


def test_setup_twice_wraps_the_hooks_once(make_trainer, loader, tmp_path):
    calls = []

    class Hooked(TinyTask):
        def on_save_checkpoint(self, checkpoint) -> None:
            calls.append("saved")

    task = Hooked()
    trainer = make_trainer(compress())
    trainer.fit(task, loader)
    trainer.test(task, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert calls == ["saved"]

"""The phases of a fit: where it stands in them, how they scale the rates, what they train."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_compress import FactorisedLayer, Phase, Plateau, Schedule, apply_plan_
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.training.schedule import PhaseTracker
from tests.support import optimizers
from tests.support.compressing import compress
from tests.support.fitting import QUIET, factors_of, require_plain_fit, require_same_state
from tests.support.nets import TinyTask, TwoManual
from tests.support.optimizers import in_steps, momentum

pytestmark = QUIET

# --- where a fit stands in its schedule -------------------------------------------------------------------


def test_course_goes_through_epochs_steps_and_plateaus():
    schedule = Schedule(
        phases=[{"epochs": 2}, {"steps": 5}, {"until_plateau": {"monitor": "loss", "patience": 2, "min_delta": 0.1}}]
    )
    tracker = PhaseTracker(schedule)
    tracker.begin(3, 100)  # a fit that goes on from a dense run
    assert [tracker.over(e, 0, boundary=True) for e in (3, 4, 5)] == [False, False, True]
    assert not tracker.over(5, 0, boundary=False)
    assert tracker.advance(5, 120).steps == 5
    assert [tracker.over(5, step, boundary=False) for step in (120, 124, 125)] == [False, False, True]
    assert tracker.advance(6, 125).until_plateau == Plateau("loss", patience=2, min_delta=0.1)
    waits = []
    for value in (1.0, 0.95, float("nan"), 0.5, 0.45, 0.41):  # only 0.5 is better by more than 0.1
        tracker.observe({"loss": torch.tensor(value), "other": 0.0})
        waits.append(tracker.over(7, 130, boundary=True))
    assert waits == [False, False, True, False, False, True]
    assert tracker.advance(8, 140) == Phase()
    assert not tracker.over(10**6, 10**6, boundary=True)


def test_course_goes_on_from_its_state():
    schedule = Schedule(warmup_steps=4, phases=[{"epochs": 1, "lr_scale": 0.5}, {"until_plateau": "loss"}])
    tracker, other = PhaseTracker(schedule), PhaseTracker(schedule)
    tracker.begin(0, 0)
    tracker.advance(1, 2)
    tracker.observe({"loss": 1.0})
    tracker.observe({"loss": 2.0})
    other.load(tracker.state())
    assert other.state() == tracker.state()
    assert all(type(value) in (int, float) for value in tracker.state().values())
    assert [other.scale(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


# --- rates --------------------------------------------------------------------------------------------


class Seen(Optimizer):
    # Plain gradient descent that writes down the rate of every group in every step.
    def __init__(self, params, lr: float, fails_at: int | None = None) -> None:
        super().__init__(params, {"lr": lr})
        self.seen: list[list[float]] = []
        self.fails_at = fails_at

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        self.seen.append([group["lr"] for group in self.param_groups])
        if len(self.seen) == self.fails_at:
            msg = "out of luck"
            raise RuntimeError(msg)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(group["lr"] * p.grad)
        return loss


def weights_and_rest(task):
    weights, rest = optimizers.weights_and_rest(task)
    return [{"params": weights, "lr": 0.1}, {"params": rest, "lr": 0.3}]


@pytest.mark.parametrize(
    ("steps", "accumulate", "fails_at"),
    [(0, 1, None), (1, 1, None), (3, 1, None), (5, 2, None), (100, 1, None), (6, 1, 2)],
)
def test_rate_of_the_factors_rises_linearly_and_only_theirs_until_the_fit_ends_or_fails(
    make_trainer, loader, steps, accumulate, fails_at
):
    task = TinyTask(lambda m: Seen(weights_and_rest(m), lr=0.7, fails_at=fails_at))
    trainer = make_trainer(
        compress(schedule=Schedule(warmup_steps=steps)), max_epochs=2, accumulate_grad_batches=accumulate
    )
    if fails_at is None:
        trainer.fit(task, loader)
    else:
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(task, loader)
    (optimizer,) = trainer.optimizers
    scales = [min(1.0, (n + 1) / steps) if steps else 1.0 for n in range(fails_at or 8 // accumulate)]
    assert optimizer.seen == [[0.1 * scale, 0.3] for scale in scales]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_group_with_one_factor_among_others_is_scaled(make_trainer, loader):
    def configure(task):
        return Seen(
            [{"params": [task.net.fc1.bias, task.net.fc1.weight]}, {"params": task.net.norm.parameters()}], lr=0.5
        )

    task = TinyTask(configure)
    trainer = make_trainer(compress(schedule={"warmup_steps": 4}))
    trainer.fit(task, loader)
    assert isinstance(task.net.fc1, FactorisedLayer)
    assert trainer.optimizers[0].seen == [[0.5 * scale, 0.5] for scale in (0.25, 0.5, 0.75, 1.0)]


class Watch(Callback):
    # What schedulers and checkpoints can see of the rates after every batch.
    def __init__(self) -> None:
        self.last: list[list[float]] = []
        self.groups: list[list[float]] = []
        self.scales: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.last.append(trainer.lr_scheduler_configs[0].scheduler.get_last_lr())
        saved = trainer.strategy.optimizer_state(trainer.optimizers[0])["param_groups"]
        self.groups.append([group["lr"] for group in saved])
        self.scales.append(trainer.callback_metrics["compress/lr_scale"].item())


def test_schedulers_and_checkpoints_never_see_the_warm_up(make_trainer, loader, tmp_path):
    def configure(task):
        optimizer = Seen(weights_and_rest(task), lr=0.7)
        scheduler = LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 1 / (n + 1)])
        return in_steps(optimizer, scheduler)

    task, watch = TinyTask(configure), Watch()
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(compress(schedule={"warmup_steps": 6}), watch, checkpoints, max_epochs=2)
    trainer.fit(task, loader)
    asked = [[0.1 * 0.9**n, 0.3 / (n + 1)] for n in range(9)]
    scales = [min(1.0, (n + 1) / 6) for n in range(8)]
    np.testing.assert_allclose(
        trainer.optimizers[0].seen, [[a * s, b] for (a, b), s in zip(asked[:8], scales, strict=True)], rtol=1e-12
    )
    np.testing.assert_allclose(watch.last, asked[1:], rtol=1e-12)
    np.testing.assert_allclose(watch.groups, asked[1:], rtol=1e-12)
    for step in range(1, 9):
        saved = torch.load(tmp_path / "ckpt" / f"step={step}.ckpt", weights_only=True)
        rates = [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]]
        assert any(rates == pytest.approx(row, rel=1e-12) for row in asked[step - 1 : step + 1])
    # The logged scale is that of the step to come.
    assert watch.scales == pytest.approx([min(1.0, (n + 2) / 6) for n in range(8)])


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_warm_up_equals_a_run_with_the_ramp_written_as_a_scheduler(make_trainer, loader, make):
    task = TinyTask(lambda m: make(weights_and_rest(m), weight_decay=0.1))
    plain = copy.deepcopy(task)

    def configure(m):
        optimizer = make(weights_and_rest(m), weight_decay=0.1)
        return in_steps(optimizer, LambdaLR(optimizer, [lambda n: min(1.0, (n + 1) / 5), lambda _: 1.0]))

    plain.configure = configure
    require_plain_fit(make_trainer, loader, task, plain, compress(schedule={"warmup_steps": 5}), max_epochs=2)


class Delegating(SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_warm_up_scales_once_for_an_optimizer_that_calls_its_parents_step(make_trainer, loader):
    SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # torch runs step hooks in SGD.step too from here on
    tasks = [TinyTask(lambda m: SGD(weights_and_rest(m))), TinyTask(lambda m: Delegating(weights_and_rest(m)))]
    tasks[1].load_state_dict(tasks[0].state_dict())
    for task in tasks:
        trainer = make_trainer(compress(schedule={"warmup_steps": 6}), max_epochs=2)
        trainer.fit(task, loader)
        assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.3]
    require_same_state(*tasks)


def test_phases_scale_the_rate_of_a_step_and_nothing_else_sees_it(make_trainer, loader):
    def configure(task):
        weights, _ = optimizers.weights_and_rest(task)
        return Seen([{"params": weights, "lr": 1.0}, {"params": task.net.norm.parameters()}], lr=2.0)

    schedule = {"phases": [{"steps": 2, "lr_scale": 0.1}, {"steps": 2, "lr_scale": 0.5, "warmup_steps": 2}]}
    trainer = make_trainer(compress(schedule=schedule), max_epochs=2)
    trainer.fit(TinyTask(configure), loader)
    expected = [[0.1, 0.2], [0.1, 0.2], [0.25, 1.0], [0.5, 1.0], *[[1.0, 2.0]] * 4]
    np.testing.assert_allclose(trainer.optimizers[0].seen, expected)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1.0, 2.0]


# --- what is trained -----------------------------------------------------------------------------------


class Snapshots(Callback):
    def __init__(self) -> None:
        self.epochs: list[dict[str, torch.Tensor]] = []
        self.states: list[set[str]] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.epochs.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.states.append({names[id(p)] for o in trainer.optimizers for p, state in o.state.items() if state})


def decayed(make, **settings):
    return lambda: TinyTask(lambda m: make(m.parameters(), weight_decay=0.1, **settings))


OPTIMIZERS = {
    "sgd": decayed(SGD, lr=0.05, momentum=0.9),
    "adamw": decayed(AdamW, lr=1e-2),
    "lbfgs": lambda: TinyTask(optimizers.lbfgs),
    "two by hand": TwoManual,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in OPTIMIZERS),
        *((name, {"accumulate_grad_batches": 2}) for name in ("sgd", "adamw")),
        *((name, {"gradient_clip_val": 0.1}) for name in ("sgd", "adamw")),
    ],
)
def test_only_the_factors_and_the_statistics_of_norms_move_in_frozen_epochs(make_trainer, loader, name, settings):
    task, shots = OPTIMIZERS[name](), Snapshots()
    start = copy.deepcopy(task)
    kinds = ["svd", "channel_svd", "spatial_svd", "tucker2"]  # on CP, LBFGS takes steps lost in round-off
    callback = compress(kinds=kinds, schedule={"phases": [{"epochs": 2, "train": "factors"}]})
    make_trainer(callback, shots, max_epochs=4, **settings).fit(task, loader)
    apply_plan_(start, callback.plan)
    factors = set(factors_of(task))
    others = set(dict(task.named_parameters())) - factors
    assert {"net.norm.weight", "net.fc1.expand.bias"} <= others
    epochs = [dict(start.named_parameters()), *shots.epochs]
    for before, after, frozen in zip(epochs, epochs[1:], (True, True, False, False), strict=False):
        assert all(not torch.equal(before[factor], after[factor]) for factor in factors)
        for other in others:
            assert torch.equal(before[other], after[other]) == frozen, other
    if name != "lbfgs":  # LBFGS keeps one state for all its parameters, and looks at a batch several times
        assert shots.states[1] == factors
        assert shots.states[2] == factors | others
        assert task.net.norm.num_batches_tracked == 16 * len(task.optimizers() if name == "two by hand" else [1])
    assert all(p.requires_grad for p in task.parameters())


def test_freezing_equals_a_run_whose_other_parameters_have_no_gradient(make_trainer, loader):
    class Frozen(TinyTask):
        def on_before_optimizer_step(self, optimizer) -> None:
            for name, p in self.named_parameters():
                if self.current_epoch < 1 and name not in factors_of(self):
                    p.grad = None

    task, plain = TinyTask(momentum), Frozen(momentum)
    plain.load_state_dict(task.state_dict())
    require_plain_fit(
        make_trainer,
        loader,
        task,
        plain,
        compress(schedule={"phases": [{"epochs": 1, "train": "factors"}]}),
        max_epochs=3,
    )


class Moved(Callback):
    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        own = dict(pl_module.named_parameters())
        self.moved.append({name for name, p in self.before.items() if not torch.equal(p, own[name])})


def test_phases_say_what_is_trained(make_trainer, loader):
    schedule = {"phases": [{"steps": 2, "train": ["net.fc*"]}, {"steps": 1, "train": "factors"}]}
    task, moved = TinyTask(momentum), Moved()
    make_trainer(compress(schedule=schedule), moved).fit(task, loader)
    names = {name for name, _ in task.named_parameters()}
    head = {name for name in names if name.startswith("net.fc")}
    assert moved.moved == [head, head, set(factors_of(task)), names]


def test_globs_that_match_nothing_are_an_error(make_trainer, loader):
    schedule = {"phases": [{"steps": 2, "train": ["head.*"]}]}
    with pytest.raises(ConfigurationError, match=r"train=\['head\.\*'\] of a phase matches no parameter of TinyTask"):
        make_trainer(compress(schedule=schedule)).fit(TinyTask(), loader)


def test_phases_turn_distillation_on_and_off(make_trainer, loader):
    class Seen(Callback):
        def __init__(self) -> None:
            self.ratios: list[bool] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            own = trainer.callback_metrics["train_loss"]
            self.ratios.append(torch.equal(outputs["loss"], own))

    schedule = {"phases": [{"steps": 2, "distill": False}, {"steps": 1}, {"distill": False}]}
    seen = Seen()
    make_trainer(compress(schedule=schedule, distill={"weight": 0.4}), seen).fit(TinyTask(), loader)
    assert seen.ratios == [True, True, False, True]

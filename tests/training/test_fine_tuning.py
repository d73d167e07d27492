from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_compress import Compress, Distill, FactorisedLayer, Override, Schedule, apply_plan_
from lightning_compress.core.errors import ConfigurationError, DistillationError
from lightning_compress.training.distill import Teacher, distillation_loss, fingerprint
from tests.support.compressing import compress
from tests.support.nets import TinyTask

# TinyTask has a validation_step; most fits here need no validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader.")


def factors_of(module: nn.Module) -> list[nn.Parameter]:
    return [f for m in module.modules() if isinstance(m, FactorisedLayer) for f in m.factors().values()]


def require_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


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
    weights = [p for p in task.parameters() if p.ndim > 1]
    return [{"params": weights, "lr": 0.1}, {"params": [p for p in task.parameters() if p.ndim <= 1], "lr": 0.3}]


# --- warm-up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "accumulate"), [(0, 1), (1, 1), (3, 1), (5, 2), (100, 1)])
def test_rate_of_the_factors_rises_linearly_and_only_theirs(make_trainer, loader, steps, accumulate):
    task = TinyTask(lambda m: Seen(weights_and_rest(m), lr=0.7))
    callback = compress(schedule=Schedule(warmup_steps=steps))
    trainer = make_trainer(callback, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(task, loader)
    taken = 8 // accumulate
    scales = [min(1.0, (n + 1) / steps) if steps else 1.0 for n in range(taken)]
    assert trainer.optimizers[0].seen == [[0.1 * scale, 0.3] for scale in scales]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.3]


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
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
    callback = compress(schedule={"warmup_steps": 5})
    make_trainer(callback, max_epochs=2).fit(task, loader)

    def configure(m):
        optimizer = make(weights_and_rest(m), weight_decay=0.1)
        scheduler = LambdaLR(optimizer, [lambda n: min(1.0, (n + 1) / 5), lambda _: 1.0])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    plain.configure = configure
    apply_plan_(plain, callback.plan)
    make_trainer(max_epochs=2).fit(plain, loader)
    require_same_state(task, plain)


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


@pytest.mark.parametrize("fails_at", [None, 2])
def test_warm_up_ends_with_the_fit_and_after_an_exception(make_trainer, loader, fails_at):
    task = TinyTask(lambda m: Seen(weights_and_rest(m), lr=0.7, fails_at=fails_at))
    trainer = make_trainer(compress(schedule={"warmup_steps": 6}))
    if fails_at is None:
        trainer.fit(task, loader)
    else:
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(task, loader)
    optimizer = trainer.optimizers[0]
    assert len(optimizer.seen) == (fails_at or 4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# --- freezing ------------------------------------------------------------------------------------------


class Snapshots(Callback):
    def __init__(self) -> None:
        self.epochs: list[dict[str, torch.Tensor]] = []
        self.states: list[set[str]] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.epochs.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.states.append({names[id(p)] for o in trainer.optimizers for p, state in o.state.items() if state})


OPTIMIZERS = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda m: AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {}),
        ("sgd", {"accumulate_grad_batches": 2}),
        ("sgd", {"gradient_clip_val": 0.1}),
        ("adamw", {}),
        ("adamw", {"accumulate_grad_batches": 2}),
        ("adamw", {"gradient_clip_val": 0.1}),
        ("lbfgs", {}),
    ],
)
def test_only_the_factors_move_in_frozen_epochs(make_trainer, loader, name, settings):
    configure = OPTIMIZERS[name]
    task, shots = TinyTask(configure), Snapshots()
    start = copy.deepcopy(task)
    kinds = ["svd", "channel_svd", "spatial_svd", "tucker2"]  # on CP, LBFGS takes steps lost in round-off
    callback = compress(kinds=kinds, schedule={"freeze_epochs": 2})
    make_trainer(callback, shots, max_epochs=4, **settings).fit(task, loader)
    apply_plan_(start, callback.plan)
    factors = {name for name, p in task.named_parameters() if id(p) in {id(f) for f in factors_of(task)}}
    others = set(dict(task.named_parameters())) - factors
    assert {"net.norm.weight", "net.fc1.expand.bias"} <= others
    epochs = [dict(start.named_parameters()), *shots.epochs]
    for before, after, frozen in zip(epochs, epochs[1:], (True, True, False, False), strict=False):
        assert all(not torch.equal(before[factor], after[factor]) for factor in factors)
        for other in others:
            assert torch.equal(before[other], after[other]) == frozen, other
    if name != "lbfgs":  # LBFGS keeps one state for all its parameters
        assert shots.states[1] == factors
        assert shots.states[2] == factors | others
    assert all(p.requires_grad for p in task.parameters())


def test_freezing_equals_a_run_whose_other_parameters_have_no_gradient(make_trainer, loader):
    class Frozen(TinyTask):
        def on_before_optimizer_step(self, optimizer) -> None:
            for p in self.parameters():
                if self.current_epoch < 1 and id(p) not in self.kept:
                    p.grad = None

    plain = Frozen(OPTIMIZERS["sgd"])
    task = TinyTask(OPTIMIZERS["sgd"])
    task.load_state_dict(plain.state_dict())
    callback = compress(schedule={"freeze_epochs": 1})
    make_trainer(callback, max_epochs=3).fit(task, loader)
    apply_plan_(plain, callback.plan)
    plain.kept = {id(f) for f in factors_of(plain)}
    make_trainer(max_epochs=3).fit(plain, loader)
    require_same_state(task, plain)


def test_statistics_of_norm_layers_follow_the_data_while_frozen(make_trainer, loader):
    task = TinyTask()
    make_trainer(compress(schedule={"freeze_epochs": 5})).fit(task, loader)
    assert task.net.norm.num_batches_tracked == 4
    assert not torch.equal(task.net.norm.running_mean, torch.zeros(8))
    assert torch.equal(task.net.norm.weight, torch.ones(8))


def test_freezing_works_with_manual_optimization(make_trainer, loader):
    class Manual(TinyTask):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            body = [p for name, p in self.named_parameters() if "fc" not in name]
            head = [p for name, p in self.named_parameters() if "fc" in name]
            return [SGD(body, lr=0.05, momentum=0.9, weight_decay=0.1), Adam(head, lr=1e-2, weight_decay=0.1)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

    task, shots = Manual(), Snapshots()
    start = copy.deepcopy(task)
    callback = compress(schedule={"freeze_epochs": 1})
    make_trainer(callback, shots, max_epochs=2).fit(task, loader)
    apply_plan_(start, callback.plan)
    factors = {name for name, p in task.named_parameters() if id(p) in {id(f) for f in factors_of(task)}}
    for name, value in start.named_parameters():
        assert torch.equal(shots.epochs[0][name], value) == (name not in factors), name
        assert not torch.equal(shots.epochs[1][name], shots.epochs[0][name]), name


# --- the distillation loss ----------------------------------------------------------------------------


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    shifted = np.exp(values - values.max(axis=axis, keepdims=True))
    return shifted / shifted.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 7), 1), ((2, 3, 7), 2), ((2, 7, 3, 4), 1), ((2, 7, 2, 2, 2), 1)], ids=str
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_distillation_loss_is_the_scaled_divergence(shape, axis, temperature):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    p, q = (softmax(x.double().numpy() / temperature, axis) for x in (teacher, student))
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=axis).mean()
    student.requires_grad_(True)
    loss = distillation_loss(student, teacher, temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    loss.backward()
    gradient = temperature * (q - p) / (np.prod(shape) / shape[axis])
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-3, atol=1e-6)


def test_distillation_loss_of_equal_logits_is_zero():
    logits = torch.randn(4, 6)
    assert distillation_loss(logits, logits.clone(), 3.0).item() == 0.0


def test_distillation_loss_of_half_precision_is_computed_in_single():
    student, teacher = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    loss = distillation_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), 2.0))


# --- distillation inside a fit ---------------------------------------------------------------------------


class Student(TinyTask):
    # Returns its loss as a tensor or in a dict, and may skip a batch.
    returns = "tensor"

    def training_step(self, batch, batch_idx):
        return self.pack(self.loss(self(batch[0]), batch), batch_idx)

    def loss(self, logits, batch):
        return F.cross_entropy(logits, batch[1])

    def pack(self, loss, batch_idx):
        self.log("loss", loss)
        if self.returns == "dict":
            return {"loss": loss, "extra": batch_idx}
        return None if self.returns == "none" and batch_idx == 1 else loss


class Explicit(Student):
    weight, temperature = 0.3, 4.0

    def attach(self, teacher: nn.Module) -> None:
        self.__dict__["teacher"] = teacher.eval().requires_grad_(False)

    def loss(self, logits, batch):
        t = self.temperature
        with torch.no_grad():
            target = F.log_softmax(self.teacher(batch[0]) / t, dim=-1)
        kl = F.kl_div(F.log_softmax(logits / t, dim=-1), target, reduction="none", log_target=True).sum(-1).mean()
        return (1 - self.weight) * F.cross_entropy(logits, batch[1]) + self.weight * (kl * t**2)


class Outputs(Callback):
    def __init__(self) -> None:
        self.losses: list[float | None] = []
        self.extras: list = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item() if outputs else None)
        self.extras.append(outputs.get("extra") if outputs else None)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")  # the way to skip a batch, on purpose here
@pytest.mark.parametrize("returns", ["tensor", "dict", "none"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
@pytest.mark.parametrize("module", [None, "net"])
def test_distillation_equals_a_training_step_that_writes_it_out(make_trainer, loader, returns, settings, module):
    task, plain = Student(), Explicit()
    plain.load_state_dict(task.state_dict())
    plain.attach(copy.deepcopy(task.net))
    task.returns = plain.returns = returns
    outputs = Outputs(), Outputs()
    callback = compress(distill=Distill(weight=0.3, temperature=4.0, module=module))
    make_trainer(callback, outputs[0], max_epochs=2, **settings).fit(task, loader, loader)
    apply_plan_(plain, callback.plan)
    make_trainer(outputs[1], max_epochs=2, **settings).fit(plain, loader, loader)
    assert outputs[0].losses == outputs[1].losses
    assert outputs[0].extras == outputs[1].extras
    assert len({loss for loss in outputs[0].losses if loss is not None}) >= 6
    require_same_state(task, plain)


def test_distillation_reads_a_named_submodule(make_trainer, loader):
    class CallsTheNet(Student):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch)

    task, plain = CallsTheNet(), Explicit()
    plain.load_state_dict(task.state_dict())
    plain.attach(copy.deepcopy(task.net))
    callback = compress(distill={"weight": 0.3, "temperature": 4, "module": "net"})
    make_trainer(callback).fit(task, loader)
    apply_plan_(plain, callback.plan)
    make_trainer().fit(plain, loader)
    require_same_state(task, plain)


def test_several_calls_in_one_step_are_averaged(make_trainer, loader):
    class Twice(Student):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y) + F.cross_entropy(self(x=x.flip(-1)), y)

    class TwiceExplicit(Explicit):
        def training_step(self, batch, batch_idx):
            x, y = batch
            first, second = self(x), self(x.flip(-1))
            t, distances = self.temperature, []
            for logits, view in ((first, x), (second, x.flip(-1))):
                with torch.no_grad():
                    target = F.log_softmax(self.teacher(view) / t, dim=-1)
                kl = F.kl_div(F.log_softmax(logits / t, dim=-1), target, reduction="none", log_target=True)
                distances.append(kl.sum(-1).mean() * t**2)
            mean = torch.stack(distances).mean()
            return (1 - self.weight) * (F.cross_entropy(first, y) + F.cross_entropy(second, y)) + self.weight * mean

    task, plain = Twice(), TwiceExplicit()
    plain.load_state_dict(task.state_dict())
    plain.attach(copy.deepcopy(task.net))
    callback = compress(distill={"weight": 0.3, "temperature": 4.0})
    make_trainer(callback).fit(task, loader)
    apply_plan_(plain, callback.plan)
    make_trainer().fit(plain, loader)
    require_same_state(task, plain)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_distillation_runs_in_the_precision_of_the_trainer(make_trainer, loader, precision):
    task, plain = Student(), Explicit()
    plain.load_state_dict(task.state_dict())
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    task.example_input_array = None
    callback = compress(example_input=(1, 3, 8, 8), distill={"weight": 0.3, "temperature": 4.0})
    outputs = Outputs()
    make_trainer(callback, outputs, precision=precision).fit(task, loader)
    plain.attach(copy.deepcopy(plain.net).to(dtype))
    # The distance is worked out in single precision whatever the logits are in.
    batch = next(iter(loader))
    start = plain.to(dtype)
    apply_plan_(start, callback.plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = start.net.train()(batch[0].to(dtype))
        teacher = start.teacher(batch[0].to(dtype))
        hard = F.cross_entropy(logits, batch[1])
        loss = 0.7 * hard + 0.3 * distillation_loss(logits, teacher, 4.0)
    assert outputs.losses[0] == pytest.approx(loss.item(), rel=1e-6)


def test_distilled_and_logged_loss(make_trainer, loader):
    class Metrics(Callback):
        def __init__(self) -> None:
            self.pairs: list[tuple[float, float, float]] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            metrics = trainer.callback_metrics
            self.pairs.append((outputs["loss"].item(), metrics["loss"].item(), metrics["distill_loss"].item()))

    metrics = Metrics()
    make_trainer(compress(distill={"weight": 0.25}), metrics).fit(Student(), loader)
    assert len(metrics.pairs) == 4
    for total, own, distance in metrics.pairs:
        assert distance > 0
        assert total == pytest.approx(0.75 * own + 0.25 * distance, rel=1e-6)


class Inside(Callback):
    # What a checkpoint, an optimizer and the module itself hold in mid-fit.
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.state = list(pl_module.state_dict())
        self.modules = [name for name, _ in pl_module.named_modules()]
        self.held = sum(len(group["params"]) for o in trainer.optimizers for group in o.param_groups)
        self.wrapped = "training_step" in pl_module.__dict__
        self.hooks = len(pl_module._forward_hooks)


def test_teacher_is_no_part_of_module_optimizer_or_checkpoint(make_trainer, loader, tmp_path):
    seen, files = [], []
    start = Student()
    for distill in (None, {}):
        task, inside = copy.deepcopy(start), Inside()
        folder = tmp_path / str(distill is None)
        make_trainer(compress(distill=distill), inside, ModelCheckpoint(folder, filename="end")).fit(task, loader)
        seen.append((inside.state, inside.modules, inside.held))
        files.append(torch.load(folder / "end.ckpt", weights_only=True))
        assert inside.wrapped == (distill is not None)
        assert inside.hooks == (1 if distill is not None else 0)
    assert seen[0] == seen[1]
    plain, distilled = files
    assert list(plain) == list(distilled)
    assert list(plain["state_dict"]) == list(distilled["state_dict"])
    assert set(distilled["lightning_compress"]) - set(plain["lightning_compress"]) == {"teacher"}
    dense = {k.removeprefix("net."): v for k, v in start.state_dict().items()}
    assert distilled["lightning_compress"]["teacher"] == fingerprint(start)
    assert len(distilled["lightning_compress"]["teacher"]) == 64
    assert not any(torch.equal(v, dense["fc1.weight"]) for v in distilled["state_dict"].values())


def require_nothing_left(task: nn.Module) -> None:
    assert "training_step" not in task.__dict__
    assert task.training_step.__func__ is type(task).training_step
    assert not task._forward_hooks
    assert all(not m._forward_hooks for m in task.modules())


def test_training_step_and_hooks_are_back_after_the_fit(make_trainer, loader):
    task = Student()
    callback = compress(distill={}, schedule={"warmup_steps": 2})
    make_trainer(callback).fit(task, loader)
    require_nothing_left(task)
    start = copy.deepcopy(task)
    make_trainer().fit(task, loader)
    make_trainer().fit(start, loader)
    require_same_state(task, start)


@pytest.mark.parametrize("module", [None, "net"])
def test_training_step_and_hooks_are_back_after_an_exception(make_trainer, loader, module):
    class Failing(Student):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                msg = "out of luck"
                raise RuntimeError(msg)
            return super().training_step(batch, batch_idx)

    task = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(compress(distill={"module": module})).fit(task, loader)
    require_nothing_left(task)


def test_training_step_with_another_signature_keeps_it(make_trainer, loader):
    class BatchOnly(TinyTask):
        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    task, plain = BatchOnly(), Explicit()
    plain.load_state_dict(task.state_dict())
    plain.attach(copy.deepcopy(task.net))
    callback = compress(distill={"weight": 0.3, "temperature": 4.0})
    make_trainer(callback).fit(task, loader)
    apply_plan_(plain, callback.plan)
    make_trainer().fit(plain, loader)
    require_same_state(task, plain)


@pytest.mark.parametrize("module", [None, "net"])
def test_training_step_that_never_calls_the_logits_is_an_error(make_trainer, loader, module):
    class NeverCalls(TinyTask):
        def training_step(self, batch, batch_idx):
            net = self.net
            hidden = F.relu(net.conv2(F.relu(net.norm(net.conv1(batch[0])))))
            return F.cross_entropy(net.fc2(F.relu(net.fc1(F.relu(net.point(hidden)).mean(dim=(2, 3))))), batch[1])

    named = r"never called submodule 'net'" if module else r"never called the LightningModule itself, self\(\.\.\.\)"
    task = NeverCalls()
    with pytest.raises(DistillationError, match=rf"{named}.*as in Distill\(module='model'\)"):
        make_trainer(compress(distill={"module": module})).fit(task, loader)
    require_nothing_left(task)


def test_output_that_is_no_logits_is_an_error(make_trainer, loader):
    class Pair(TinyTask):
        def forward(self, x):
            return self.net(x), x

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])[0], batch[1])

    with pytest.raises(DistillationError, match=r"needs logits, a tensor \(batch, classes, …\); got tuple"):
        make_trainer(compress(distill={})).fit(Pair(), loader)


def test_submodule_that_is_not_there_is_an_error_and_the_module_stays_dense(make_trainer, loader, unchanged):
    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(ConfigurationError, match=r"Distill\(module='model'\): TinyTask has no such submodule.*: net"):
        make_trainer(compress(distill={"module": "model"})).fit(task, loader)
    before.check()


def test_teacher_is_a_frozen_copy_in_eval_mode():
    root = TinyTask()
    teacher = Teacher(root, Distill(module="net"))
    require_same_state(teacher.module, root.net)
    assert {id(p) for p in teacher.module.parameters()}.isdisjoint({id(p) for p in root.parameters()})
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not any(m.training for m in teacher.module.modules())
    assert all(p.requires_grad for p in root.parameters())
    assert all(m.training for m in root.modules())


def test_fingerprint_depends_on_every_name_and_value():
    net = TinyTask().net
    first = fingerprint(net)
    assert fingerprint(copy.deepcopy(net)) == first
    assert fingerprint(net.to(memory_format=torch.channels_last)) == first
    seen = {first}
    for name, value in net.state_dict().items():
        other = copy.deepcopy(net)
        other.state_dict()[name].add_(1)
        seen.add(fingerprint(other))
        assert value is not None
    assert len(seen) == 1 + len(net.state_dict())
    assert fingerprint(nn.Sequential(net)) not in seen


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["warmup_steps", "freeze_epochs"])
@pytest.mark.parametrize("value", [-1, 1.0, 2.5, True, "3", None, float("nan")])
def test_schedule_refuses_what_is_no_count(field, value):
    said = rf"Schedule\({field}={value!r}\): expected a whole number of at least 0\."
    with pytest.raises(ConfigurationError, match=said):
        Schedule(**{field: value})
    with pytest.raises(ConfigurationError, match=said):
        Compress({"params": 0.5}, schedule={field: value})


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5", None])
def test_distill_refuses_a_weight_outside_its_range(value):
    with pytest.raises(ConfigurationError, match=rf"Distill\(weight={value!r}\): expected the share .* in \(0, 1\]"):
        Distill(weight=value)


@pytest.mark.parametrize("value", [0, -2.0, float("nan"), float("inf"), True, "2", None])
def test_distill_refuses_a_temperature_not_above_zero(value):
    with pytest.raises(ConfigurationError, match=rf"Distill\(temperature={value!r}\): expected a number above 0"):
        Distill(temperature=value)


def test_distill_refuses_a_module_that_is_no_name():
    with pytest.raises(ConfigurationError, match=r"Distill\(module=3\): expected the name of a submodule"):
        Distill(module=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_rank": 0}, r"Override\(min_rank=0\): expected a whole number of at least 1"),
        ({"max_rank": 2.0}, r"Override\(max_rank=2\.0\): expected a whole number of at least 1"),
        ({"max_rank": True}, r"Override\(max_rank=True\): expected a whole number of at least 1"),
        ({"min_rank": 4, "max_rank": 3}, r"Override\(min_rank=4, max_rank=3\): min_rank must not exceed max_rank"),
        ({"dense": "yes"}, r"Override\(dense='yes'\): expected true or false"),
    ],
)
def test_override_refuses_bad_bounds(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        Override(**settings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Schedule.from_value(5),
            r"schedule=5: expected a Schedule or a mapping such as \{'warmup_steps'",
        ),
        (lambda: Schedule.from_value({"warm": 1}), r"schedule: unknown key 'warm'.*Known: warmup_steps, freeze_epochs"),
        (lambda: Distill.from_value(0.5), r"distill=0\.5: expected a Distill or a mapping such as \{'weight': 0\.5"),
        (lambda: Distill.from_value(True), r"distill=True: expected a Distill or a mapping"),
        (lambda: Distill.from_value({"T": 2}), r"distill: unknown key 'T'.*Known: weight, temperature, module"),
        (lambda: Override.from_value(8, "fc*"), r"overrides\['fc\*'\]=8: expected a mapping such as \{'max_rank': 8\}"),
        (lambda: Override.from_value({"rank": 8}, "fc*"), r"overrides\['fc\*'\]: unknown key 'rank'.*max_rank"),
    ],
)
def test_settings_from_values_say_what_they_expect(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


def test_settings_from_good_values():
    assert Schedule.from_value(None) == Schedule() == Schedule(0, 0)
    assert Schedule.from_value({"freeze_epochs": 2}) == Schedule(0, 2)
    assert Distill.from_value(None) is None
    assert Distill.from_value({}) == Distill(0.5, 2.0, None)
    assert Distill.from_value({"weight": 1, "temperature": 1, "module": "net"}) == Distill(1, 1, "net")
    assert Override.from_value("dense", "x") == Override(dense=True)
    assert Override.from_value({"kinds": ["svd"], "min_rank": 2}, "x") == Override(kinds=["svd"], min_rank=2)
    for made in (Schedule(1, 2), Distill(), Override(max_rank=2)):
        arguments = ("x",) if isinstance(made, Override) else ()
        assert type(made).from_value(made, *arguments) is made

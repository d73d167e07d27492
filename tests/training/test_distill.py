"""Distillation: its loss, the training step it enters, and what it leaves behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_compress import Distill, apply_plan_
from lightning_compress.core.errors import DistillationError
from lightning_compress.training.distill import Teacher, distillation_loss, fingerprint
from tests.support.compressing import compress
from tests.support.fitting import QUIET, require_plain_fit, require_same_state
from tests.support.nets import TinyTask

pytestmark = QUIET


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


# --- inside a fit ----------------------------------------------------------------------------------------


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

    @classmethod
    def of(cls, student):
        """The student with a step that writes the term out, beside a copy of its net as the teacher."""
        plain = cls()
        plain.load_state_dict(student.state_dict())
        plain.__dict__["teacher"] = copy.deepcopy(student.net).eval().requires_grad_(False)
        plain.returns = getattr(student, "returns", "tensor")
        return plain

    def distance(self, logits, x):
        t = self.temperature
        with torch.no_grad():
            target = F.log_softmax(self.teacher(x) / t, dim=-1)
        kl = F.kl_div(F.log_softmax(logits / t, dim=-1), target, reduction="none", log_target=True)
        return kl.sum(-1).mean() * t**2

    def loss(self, logits, batch):
        own = F.cross_entropy(logits, batch[1])
        return (1 - self.weight) * own + self.weight * self.distance(logits, batch[0])


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
    task = Student()
    task.returns = returns
    plain = Explicit.of(task)
    outputs = Outputs(), Outputs()
    callback = compress(distill=Distill(weight=0.3, temperature=4.0, module=module))
    make_trainer(callback, outputs[0], max_epochs=2, **settings).fit(task, loader, loader)
    apply_plan_(plain, callback.plan)
    make_trainer(outputs[1], max_epochs=2, **settings).fit(plain, loader, loader)
    assert outputs[0].losses == outputs[1].losses
    assert outputs[0].extras == outputs[1].extras
    assert len({loss for loss in outputs[0].losses if loss is not None}) >= 6
    require_same_state(task, plain)


class CallsTheNet(Student):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch)


class CallsForward(Student):
    # As the templates of Lightning and Hydra do.
    def training_step(self, batch, batch_idx):
        return self.loss(self.forward(batch[0]), batch)


class CallsForwardOfTheNet(Student):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net.forward(x=batch[0]), batch)


class BatchOnly(TinyTask):
    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class Twice(Student):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(x=x.flip(-1)), y)


class TwiceExplicit(Explicit):
    def training_step(self, batch, batch_idx):
        x, y = batch
        views = [x, x.flip(-1)]
        calls = [self(view) for view in views]
        mean = torch.stack([self.distance(logits, view) for logits, view in zip(calls, views, strict=True)]).mean()
        return (1 - self.weight) * sum(F.cross_entropy(logits, y) for logits in calls) + self.weight * mean


@pytest.mark.parametrize(
    ("cls", "explicit", "module"),
    [
        (CallsTheNet, Explicit, "net"),
        (CallsForward, Explicit, None),
        (CallsForwardOfTheNet, Explicit, "net"),
        (BatchOnly, Explicit, None),
        (Twice, TwiceExplicit, None),
    ],
    ids=["named submodule", "forward", "forward of a submodule", "another signature", "several calls are averaged"],
)
def test_every_training_step_that_calls_the_logits_is_distilled(make_trainer, loader, cls, explicit, module):
    task = cls()
    callback = compress(distill={"weight": 0.3, "temperature": 4, "module": module})
    require_plain_fit(make_trainer, loader, task, explicit.of(task), callback)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_distillation_runs_in_the_precision_of_the_trainer(make_trainer, loader, precision):
    task = Student()
    task.example_input_array = None
    start = Explicit.of(task)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    callback = compress(example_input=(1, 3, 8, 8), distill={"weight": 0.3, "temperature": 4.0})
    outputs = Outputs()
    make_trainer(callback, outputs, precision=precision).fit(task, loader)
    # The distance is worked out in single precision whatever the logits are in.
    x, y = next(iter(loader))
    teacher = start.teacher.to(dtype)
    apply_plan_(start.to(dtype), callback.plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = start.net.train()(x.to(dtype))
        loss = 0.7 * F.cross_entropy(logits, y) + 0.3 * distillation_loss(logits, teacher(x.to(dtype)), 4.0)
    assert outputs.losses[0] == pytest.approx(loss.item(), rel=1e-6)


def test_own_loss_and_distance_are_logged_and_their_sum_is_minimised(make_trainer, loader):
    seen = []

    class Metrics(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            own, distance = (trainer.callback_metrics[name].item() for name in ("loss", "distill_loss"))
            assert distance > 0
            assert outputs["loss"].item() == pytest.approx(0.75 * own + 0.25 * distance, rel=1e-6)
            seen.append(own)

    make_trainer(compress(distill={"weight": 0.25}), Metrics()).fit(Student(), loader)
    assert len(seen) == 4


class Inside(Callback):
    # What a checkpoint, an optimizer and the module itself hold in mid-fit.
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        held = sum(len(group["params"]) for o in trainer.optimizers for group in o.param_groups)
        self.seen = list(pl_module.state_dict()), [name for name, _ in pl_module.named_modules()], held
        self.wrapped = "training_step" in pl_module.__dict__
        self.hooks = len(pl_module._forward_hooks)


@pytest.mark.parametrize("distill", [{}, "layers"], ids=["logits", "layers"])
def test_teacher_is_no_part_of_module_optimizer_or_checkpoint(make_trainer, loader, tmp_path, distill):
    start, seen, files = Student(), [], []
    for number, chosen in enumerate((None, distill)):
        task, inside = copy.deepcopy(start), Inside()
        every = ModelCheckpoint(tmp_path, filename=str(number))
        make_trainer(compress(distill=chosen), inside, every).fit(task, loader)
        seen.append(inside.seen)
        files.append(torch.load(tmp_path / f"{number}.ckpt", weights_only=True))
        assert inside.wrapped == (chosen is not None)
        assert inside.hooks == (1 if chosen is not None else 0)
    assert seen[0] == seen[1]
    plain, distilled = files
    assert list(plain) == list(distilled)
    assert list(plain["state_dict"]) == list(distilled["state_dict"])
    states = [[list(state["state"]) for state in file["optimizer_states"]] for file in files]
    assert states[0] == states[1]
    assert set(distilled["lightning_compress"]) - set(plain["lightning_compress"]) == {"teacher"}
    assert distilled["lightning_compress"]["teacher"] == fingerprint(start)
    assert len(fingerprint(start)) == 64
    assert not any(torch.equal(v, start.net.fc1.weight) for v in distilled["state_dict"].values())


def require_nothing_left(task: nn.Module) -> None:
    assert "training_step" not in task.__dict__
    assert task.training_step.__func__ is type(task).training_step
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in task.modules())
    assert all("forward" not in vars(m) for m in task.modules())


class Failing(Student):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            msg = "out of luck"
            raise RuntimeError(msg)
        return super().training_step(batch, batch_idx)


class NeverCalls(TinyTask):
    def training_step(self, batch, batch_idx):
        net = self.net
        hidden = F.relu(net.conv2(F.relu(net.norm(net.conv1(batch[0])))))
        return F.cross_entropy(net.fc2(F.relu(net.fc1(F.relu(net.point(hidden)).mean(dim=(2, 3))))), batch[1])


class Pair(TinyTask):
    def forward(self, x):
        return self.net(x), x

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])


ADVICE = r".*as in Distill\(module='model'\)"
FAILURES = {
    "in the step": (Failing, None, RuntimeError, "out of luck"),
    "in the step, of a submodule": (Failing, "net", RuntimeError, "out of luck"),
    "no call": (NeverCalls, None, DistillationError, rf"never called the LightningModule.*, self\(\.\.\.\){ADVICE}"),
    "no call of a submodule": (NeverCalls, "net", DistillationError, f"never called submodule 'net'{ADVICE}"),
    "no logits": (Pair, None, DistillationError, r"needs logits, a tensor \(batch, classes, …\); got tuple"),
}


@pytest.mark.parametrize(("cls", "module", "error", "said"), FAILURES.values(), ids=FAILURES)
def test_training_step_and_hooks_are_back_after_an_exception(make_trainer, loader, cls, module, error, said):
    task = cls()
    with pytest.raises(error, match=said):
        make_trainer(compress(distill={"module": module})).fit(task, loader)
    require_nothing_left(task)


def test_training_step_and_hooks_are_back_after_the_fit(make_trainer, loader):
    task = Student()
    make_trainer(compress(distill={}, schedule={"warmup_steps": 2})).fit(task, loader)
    require_nothing_left(task)
    start = copy.deepcopy(task)
    for module in (task, start):
        make_trainer().fit(module, loader)
    require_same_state(task, start)


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

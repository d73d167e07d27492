"""Distillation of layers, blocks and functions of the user's own, and with manual optimization."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_compress import Distill, FactorisedLayer, apply_plan_
from lightning_compress.core.errors import DistillationError
from lightning_compress.training.distill import Teacher, distillation_loss, inner_distance
from tests.support.compressing import compress
from tests.support.fitting import QUIET, require_same_state
from tests.support.nets import TinyTask, TwoManual, squares

pytestmark = QUIET


def sgd(task):
    return SGD(task.parameters(), lr=0.05)


def evaluator_of(net, names, x):
    kept = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: kept.update({name: out.clone()}))
        for name in names
    ]
    result = net(x)
    for handle in handles:
        handle.remove()
    return result, kept


def by_hand(task, plan, loader, extra, *, every=1):
    # The same fit as a loop: `extra(student, teacher, x, batch)` is added to the loss.
    student, teacher = copy.deepcopy(task), copy.deepcopy(task).eval().requires_grad_(False)
    apply_plan_(student, plan)
    student.train()
    for index, batch in enumerate(loader):
        (extra(student, teacher, batch) / every).backward()
        if (index + 1) % every == 0:
            with torch.no_grad():
                for p in student.parameters():
                    p.sub_(0.05 * p.grad)
            student.zero_grad()
    return student


def of_features(names_of, weight):
    def extra(student, teacher, batch):
        names = names_of(student)
        logits, own = evaluator_of(student, names, batch[0])
        with torch.no_grad():
            _, targets = evaluator_of(teacher, names, batch[0])
        ratios = [(own[n] - targets[n]).square().mean() / targets[n].var(unbiased=False) for n in names]
        return F.cross_entropy(logits, batch[1]) + weight * torch.stack(ratios).mean()

    return extra


def layers(module):
    return [name for name, m in module.named_modules() if isinstance(m, FactorisedLayer)]


def of_squares(student, teacher, batch):
    logits = student(batch[0])
    return F.cross_entropy(logits, batch[1]) + 3.0 * (logits - teacher(batch[0])).square().mean()


BLOCKS = ["net.norm", "net.point"]
KINDS = {
    "layers": ({"kind": "layers"}, of_features(layers, 3.0)),
    "blocks": ({"blocks": BLOCKS}, of_features(lambda _: BLOCKS, 3.0)),
    "blocks of a submodule": ({"blocks": ["norm"], "module": "net"}, of_features(lambda _: ["net.norm"], 3.0)),
    "function": ({"function": squares}, of_squares),
    "function by its path": ({"function": "tests.support.nets.squares"}, of_squares),
}


@pytest.mark.parametrize(("distill", "extra"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("every", [1, 2])
def test_fit_is_the_loop_that_adds_the_distance_to_the_loss(make_trainer, loader, distill, extra, every):
    task = TinyTask(sgd)
    start = copy.deepcopy(task)
    callback = compress(distill={**distill, "weight": 3.0})
    make_trainer(callback, accumulate_grad_batches=every).fit(task, loader)
    expected = by_hand(start, callback.plan, loader, extra, every=every)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], value, rtol=2e-4, atol=2e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


class Manual(TinyTask):
    def __init__(self, configure=None) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize("distill", ["layers", {"weight": 0.3}], ids=["layers", "logits"])
def test_manual_optimization_gives_what_the_automatic_one_gives(make_trainer, loader, distill):
    manual, automatic = Manual(sgd), TinyTask(sgd)
    automatic.load_state_dict(manual.state_dict())
    for task in (manual, automatic):
        make_trainer(compress(distill=distill)).fit(task, loader)
    require_same_state(manual, automatic)
    assert "manual_backward" not in manual.__dict__
    assert "training_step" not in manual.__dict__


def test_every_manual_backward_gets_the_term_of_its_own_calls(make_trainer, loader, monkeypatch):
    class Both(TwoManual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.manual_backward((self.net.fc2.bias * 0).sum())  # nothing was called: no term

    terms = []

    def counted(*args):
        terms.append(distillation_loss(*args))
        return terms[-1]

    monkeypatch.setattr("lightning_compress.training.distill.distillation_loss", counted)
    make_trainer(compress(distill={})).fit(Both(), loader)
    assert len(terms) == 2 * 4


def test_manual_optimization_that_never_goes_backward_is_an_error(make_trainer, loader):
    class Forgets(Manual):
        def training_step(self, batch, batch_idx):
            F.cross_entropy(self(batch[0]), batch[1]).backward()

    with pytest.raises(DistillationError, match=r"pass it to self\.manual_backward\(loss\)"):
        make_trainer(compress(distill={})).fit(Forgets(), loader)


def test_teacher_in_half_precision(make_trainer, loader):
    task = TinyTask(sgd)
    teacher = Teacher(task, Distill(dtype="bfloat16", blocks=["net.norm"]))
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert teacher.fingerprint == Teacher(task, Distill()).fingerprint
    half, full = copy.deepcopy(task), copy.deepcopy(task)
    for module, dtype in ((half, "bfloat16"), (full, None)):
        make_trainer(compress(distill={"dtype": dtype})).fit(module, loader)
    differences = [(half.state_dict()[n] - v).float().abs().max().item() for n, v in full.state_dict().items()]
    assert 0 < max(differences) < 1e-2


def test_distance_of_outputs_is_relative_to_their_spread():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ({"a": [torch.randn(5, 3, generator=generator)]} for _ in range(2))
    s, t = student["a"][0].double().numpy(), teacher["a"][0].double().numpy()
    expected = ((s - t) ** 2).mean() / ((t - t.mean()) ** 2).mean()
    assert inner_distance(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    scaled = [{"a": [1e3 * each["a"][0]]} for each in (student, teacher)]
    assert inner_distance(*scaled).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DistillationError, match="cannot compare the outputs of 'a'"):
        inner_distance({}, teacher)
    with pytest.raises(DistillationError, match="never called them"):
        inner_distance({}, {})
    assert np.isfinite(inner_distance(student, {"a": [torch.zeros(5, 3)]}).item())


def test_layers_of_an_attention_layer_are_compared_too(make_trainer):
    class Attends(TinyTask):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.example_input_array = torch.zeros(1, 5, 16)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    task = Attends()
    data = torch.utils.data.DataLoader(torch.randn(16, 5, 16), batch_size=8)
    make_trainer(compress(0.4, distill="layers")).fit(task, data)
    assert any("self_attn" in name for name in layers(task))


@pytest.mark.parametrize("result", [None, 3.0, torch.zeros(2)])
def test_function_that_returns_no_number_is_an_error(make_trainer, loader, result):
    with pytest.raises(DistillationError, match="must return a tensor of one number; got"):
        make_trainer(compress(distill={"function": lambda *_: result})).fit(TinyTask(), loader)

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_compress import Compress, Distill, FactorisedLayer, apply_plan_
from lightning_compress.core.errors import ConfigurationError, DistillationError
from lightning_compress.training.distill import Teacher, distillation_loss, inner_distance
from tests.support.compressing import compress
from tests.support.nets import TinyTask, TwoManual
from tests.support.resuming import require_identical_resume, require_same_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


def sgd(task):
    return SGD(task.parameters(), lr=0.05)


def squares(student, teacher, batch):
    return (student - teacher).square().mean() + 0 * batch[1].sum()


def outputs_of(net, names, x):
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
        logits, own = outputs_of(student, names, batch[0])
        with torch.no_grad():
            _, targets = outputs_of(teacher, names, batch[0])
        ratios = [(own[n] - targets[n]).square().mean() / targets[n].var(unbiased=False) for n in names]
        return F.cross_entropy(logits, batch[1]) + weight * torch.stack(ratios).mean()

    return extra


def layers(module):
    return [name for name, m in module.named_modules() if isinstance(m, FactorisedLayer)]


FEATURES = {
    "layers": ({"kind": "layers", "weight": 3.0}, layers),
    "blocks": ({"blocks": ["net.norm", "net.point"], "weight": 3.0}, lambda m: ["net.norm", "net.point"]),
    "blocks of a submodule": (
        {"blocks": ["norm"], "module": "net", "weight": 3.0},
        lambda m: ["net.norm"],
    ),
}


@pytest.mark.parametrize(("distill", "names_of"), FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("every", [1, 2])
def test_outputs_of_layers_and_blocks_follow_the_teachers(make_trainer, loader, distill, names_of, every):
    task = TinyTask(sgd)
    start = copy.deepcopy(task)
    callback = compress(distill=distill)
    make_trainer(callback, accumulate_grad_batches=every).fit(task, loader)
    expected = by_hand(start, callback.plan, loader, of_features(names_of, 3.0), every=every)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], value, rtol=2e-4, atol=2e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


@pytest.mark.parametrize("function", [squares, "tests.training.test_distill_kinds.squares"])
def test_a_function_of_the_users_own(make_trainer, loader, function):
    task = TinyTask(sgd)
    start = copy.deepcopy(task)
    callback = compress(distill={"function": function, "weight": 2.0})
    make_trainer(callback).fit(task, loader)

    def extra(student, teacher, batch):
        logits = student(batch[0])
        return F.cross_entropy(logits, batch[1]) + 2.0 * (logits - teacher(batch[0])).square().mean()

    expected = by_hand(start, callback.plan, loader, extra)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], value, rtol=2e-4, atol=2e-6)


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


def test_every_manual_backward_gets_the_term_of_its_own_calls(make_trainer, loader):
    class Both(TwoManual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            noise = (self.net.fc2.bias * 0).sum()
            self.manual_backward(noise)  # nothing was called: no term

    terms = []

    task = Both()
    original = distillation_loss

    def counted(*args):
        terms.append(original(*args))
        return terms[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_compress.training.distill.distillation_loss", counted)
        make_trainer(compress(distill={})).fit(task, loader)
    assert len(terms) == 2 * 4


def test_manual_optimization_that_never_goes_backward_is_an_error(make_trainer, loader):
    class Forgets(Manual):
        def training_step(self, batch, batch_idx):
            F.cross_entropy(self(batch[0]), batch[1]).backward()

    with pytest.raises(DistillationError, match=r"pass it to self\.manual_backward\(loss\)"):
        make_trainer(compress(distill={})).fit(Forgets(), loader)


def test_teacher_in_half_precision(make_trainer, loader, tmp_path):
    task = TinyTask(sgd)
    teacher = Teacher(task, Distill(dtype="bfloat16", blocks=["net.norm"]))
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert teacher.fingerprint == Teacher(task, Distill()).fingerprint
    half, full = copy.deepcopy(task), copy.deepcopy(task)
    for module, dtype in ((half, "bfloat16"), (full, None)):
        make_trainer(compress(distill={"dtype": dtype})).fit(module, loader)
    differences = [(half.state_dict()[n] - v).float().abs().max().item() for n, v in full.state_dict().items()]
    assert 0 < max(differences) < 1e-2


@pytest.mark.parametrize(
    "distill",
    [
        "layers",
        pytest.param({"blocks": ["net.norm"], "dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"function": "tests.training.test_distill_kinds.squares"}, marks=pytest.mark.slow),
    ],
    ids=["layers", "blocks", "function"],
)
def test_every_kind_resumes_identically(make_trainer, loader, tmp_path, distill):
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(), {"distill": distill}, 1)


def test_teacher_of_layers_is_in_no_checkpoint_or_optimizer(make_trainer, loader, tmp_path):
    seen = []
    start = TinyTask()
    for distill in (None, "layers"):
        task = copy.deepcopy(start)
        folder = tmp_path / str(distill)
        trainer = make_trainer(compress(distill=distill), ModelCheckpoint(folder, filename="end"))
        trainer.fit(task, loader)
        checkpoint = torch.load(folder / "end.ckpt", weights_only=True)
        held = sum(len(group["params"]) for o in trainer.optimizers for group in o.param_groups)
        seen.append((list(checkpoint["state_dict"]), held, [len(s["state"]) for s in checkpoint["optimizer_states"]]))
    assert seen[0] == seen[1]


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


BAD = {
    "kind": ({"kind": "logit"}, r"Distill\(kind='logit'\): unknown\. Did you mean 'logits'"),
    "no blocks": ({"kind": "blocks"}, r"'blocks' needs blocks, other kinds have none"),
    "blocks of layers": ({"kind": "layers", "blocks": ["a"]}, r"'blocks' needs blocks, other kinds have none"),
    "a name": ({"blocks": "net"}, r"Distill\(blocks='net'\): expected a list of names"),
    "both": ({"kind": "layers", "function": squares}, r"give a kind or a function, not both"),
    "no function": ({"function": 3}, r"Distill\(function=3\): expected a function or its import path"),
    "no module": ({"function": "nowhere.at_all"}, r"Distill\(function='nowhere\.at_all'\) cannot be imported"),
    "no name": ({"function": "math.sinus"}, r"Distill\(function='math\.sinus'\) cannot be imported"),
    "no path": ({"function": "squares"}, r"Distill\(function='squares'\) cannot be imported"),
    "dtype": ({"dtype": "half"}, r"Distill\(dtype='half'\): no precision of the teacher\. Known: float16"),
    "weight": ({"kind": "layers", "weight": 0}, r"Distill\(weight=0\): expected the weight, above 0"),
}


@pytest.mark.parametrize(("settings", "said"), BAD.values(), ids=BAD)
def test_bad_distillations_are_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        Compress({"params": 0.4}, distill=settings)


def test_block_that_is_not_there_is_named_and_the_module_stays_dense(make_trainer, loader, unchanged):
    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(ConfigurationError, match=r"'net\.norms' is no submodule\. Did you mean 'net\.norm'"):
        make_trainer(compress(distill={"blocks": ["net.norms"]})).fit(task, loader)
    before.check()


@pytest.mark.parametrize("result", [None, 3.0, torch.zeros(2)])
def test_function_that_returns_no_number_is_an_error(make_trainer, loader, result):
    with pytest.raises(DistillationError, match="must return a tensor of one number; got"):
        make_trainer(compress(distill={"function": lambda *_: result})).fit(TinyTask(), loader)

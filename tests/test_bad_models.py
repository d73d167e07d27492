"""Models that are unlike the usual ones, with the default settings: they work, or fall back and say so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Budget, Compress, FactorisedLayer, compress_, search_ranks
from lightning_compress.core.errors import CompressionWarning
from tests.support.compressing import compressed_model
from tests.support.interruptions import failing_at, interrupting
from tests.support.nets import Conv, InMode, Mlp, TinyTask, run_in
from tests.support.unchanged import Unchanged

IMAGE = (1, 3, 5, 5)
VECTOR = (1, 8)


def normed(between: nn.Module | None = None, **settings) -> nn.Module:
    return run_in(Conv(nn.BatchNorm2d(10, **settings), between))


def remembered(model: nn.Module) -> Unchanged:
    """With gradients in some of the parameters."""
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 2.0) if index % 2 else None
    return Unchanged(model)


def check(model: nn.Module, example, *, keep: float = 0.7, source: str | None = None):
    """Compresses with the defaults and without a warning, and takes it back; returns what was done."""
    before = remembered(model)
    done = compressed_model(model, Budget(params=keep), example_input=example)
    plan = done.plan
    assert plan.objective == "moments"
    assert plan.kept["params"] <= keep
    assert source is None or plan.source == source
    assert done.healing.after <= done.healing.before
    assert any(isinstance(m, FactorisedLayer) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == plan.compressed.params
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())
    done.undo_(model)
    before.check()
    return done


def falls_back(model: nn.Module, example, message: str, *, objective: str = "weight", keep: float = 0.7) -> None:
    """Searches and compresses with the defaults; both say what they could not do, and why."""
    before = remembered(model)
    with pytest.warns(CompressionWarning, match=message):
        plan = search_ranks(model, Budget(params=keep), example_input=example)
    before.check()
    assert plan.objective == objective
    with pytest.warns(CompressionWarning, match=message):
        plan = compress_(model, Budget(params=keep), example_input=example)
    assert plan.objective == objective
    assert any(isinstance(m, FactorisedLayer) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) <= keep * plan.dense.params


def frozen_norms() -> nn.Module:
    model = normed().train()
    model.norm.eval().requires_grad_(False)
    return model


def without_variance(share: float) -> nn.Module:
    model = normed()
    with torch.no_grad():
        model.norm.running_var[: int(10 * share)] = 0
    return model


def dead_channels() -> nn.Module:
    model = Conv(nn.BatchNorm2d(10))
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.conv1.bias[:3] = -1
    run_in(model)
    assert bool((model.norm.running_var[:3] < 0.5).all())
    return model


class Keyword(Conv):
    """The layers get their inputs by keyword."""

    def forward(self, x):
        x = F.relu(self.norm(input=self.conv1(input=x)))
        return self.head(input=F.relu(self.conv2(input=x)).mean(dim=(2, 3)))


def with_uncalled_norm() -> nn.Module:
    """As in a head that is used in training alone."""
    model = Conv()
    model.auxiliary = nn.BatchNorm2d(10)
    return model


class Constant(Conv):
    """The batch norm sees a constant of the model, not the input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.randn(5, 3))

    def forward(self, x):
        return super().forward(x) + self.shift(self.table)[:1].mean()


class Depth(nn.Module):
    """Drops whole samples of its branch while training."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        if not self.training:
            return x + self.branch(x)
        return x + self.branch(x) * (torch.rand(len(x), *(1,) * (x.ndim - 1)) < 0.5)


def dropping() -> nn.Module:
    """Dropout and stochastic depth in train mode."""
    branch = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Dropout(0.5))
    return run_in(Conv(nn.BatchNorm2d(10), Depth(branch))).train()


NOISE, MATCHED = "noise", "batch norm"
QUICK = {
    "no norms": (Conv, NOISE),
    "untracked norm": (lambda: Conv(nn.BatchNorm2d(10, track_running_stats=False)), NOISE),
    "some variances of zero": (lambda: without_variance(0.3), MATCHED),
}
SLOW = {
    "group norm": (lambda: Conv(nn.GroupNorm(2, 10)), NOISE),
    "instance norm": (lambda: Conv(nn.InstanceNorm2d(10, affine=True)), NOISE),
    "norm without scale and shift": (lambda: normed(affine=False), MATCHED),
    "norm with a cumulative average": (lambda: normed(momentum=None), MATCHED),
    "frozen norms": (frozen_norms, MATCHED),
    "frozen model": (lambda: normed().requires_grad_(False), MATCHED),
    "all variances of zero": (lambda: without_variance(1.0), MATCHED),
    "dead channels": (dead_channels, MATCHED),
    "layers called by keyword": (lambda: run_in(Keyword(nn.BatchNorm2d(10))), MATCHED),
    "norm that is never called": (with_uncalled_norm, None),
    "norm before anything the input can change": (Constant, None),
    "dropout and stochastic depth": (dropping, MATCHED),
    "double precision": (lambda: normed().double(), None),
    "activations in place": (lambda: normed(nn.ReLU(inplace=True)), None),
}


@pytest.mark.parametrize("which", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_model_is_compressed_without_a_warning_and_taken_back(which):
    make, source = {**QUICK, **SLOW}[which]
    check(make(), IMAGE, source=source)


class Two(nn.Module):
    """Two inputs, a dict of outputs; one of the inputs may be of no use."""

    def __init__(self, norm: bool = True, uses_both: bool = True) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 20), nn.Linear(5, 20)
        self.norm = nn.BatchNorm1d(20) if norm else nn.Identity()
        self.head = nn.Linear(20, 6)
        self.uses_both = uses_both

    def forward(self, left, right, *, scale: float = 1.0):
        x = self.left(left) + (self.right(right) if self.uses_both else 0)
        x = torch.relu(self.norm(x)) * scale
        return {"logits": self.head(x), "index": x.argmax(dim=1), "hidden": (x,)}


@pytest.mark.parametrize("form", [pytest.param("tuple", marks=pytest.mark.slow), "dict", "one of no use"])
@pytest.mark.parametrize("norm", [True, False])
def test_several_inputs_and_outputs(form, norm):
    model = Two(norm, uses_both=form != "one of no use")
    for _ in range(10):
        model(torch.randn(32, 8), torch.randn(32, 5))
    left, right = torch.randn(3, 8), torch.randn(3, 5)
    example = {"left": left, "right": right, "scale": 0.5} if form == "dict" else (left, right)
    check(model, example, source=MATCHED if norm else NOISE)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.block = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, 13)

    def forward(self, tokens, mask=None):
        x = self.block(self.embedding(tokens))
        return self.head(x if mask is None else x * mask[..., None])


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tokens(masked):
    tokens = torch.randint(13, (1, 7))
    example = {"tokens": tokens, "mask": torch.ones(1, 7, dtype=torch.bool)} if masked else tokens
    check(Tokens().train(), example, keep=0.8, source="tokens")


@pytest.mark.parametrize(("dtype", "norm"), [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def test_half_precision(dtype, norm):
    done = check((normed() if norm else Conv()).to(dtype), IMAGE)
    assert done.healing.skipped == "the parameters are in half precision"
    assert done.healing.after == done.healing.regressed


def test_layer_under_two_names():
    model = Mlp()
    model.alias = model.first
    check(model, VECTOR)


class Map(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class One(nn.Module):
    """Takes one sample at a time."""

    def __init__(self, model: nn.Module, error: type[Exception] | None = None) -> None:
        super().__init__()
        self.model, self.error = model, error

    def forward(self, x):
        if self.error is not None and len(x) > 1:
            raise self.error("one at a time")
        return self.model(x.reshape(1, *x.shape[1:]))


class InPlace(Mlp):
    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        x.mul_(2)  # sigmoid needs its output for the gradient
        return self.second(x)


NOT_FINITE = "the inputs of layer '{}' are not finite on noise inputs"
FAILS = "the model fails on"
MOMENTS = "errors count alike in all outputs of a layer.*the model cannot be differentiated"
FALLS_BACK = {
    "nan": (lambda: Mlp(Map(torch.log)), NOT_FINITE.format("second")),
    "inf": (lambda: Mlp(Map(lambda x: x / 0)), NOT_FINITE.format("second")),
    "nan behind a norm": (lambda: Conv(nn.BatchNorm2d(10), Map(torch.log)), NOT_FINITE.format("conv2")),
    **{
        f"one at a time, {error}": (lambda error=error: One(Mlp(), error), FAILS)
        for error in (None, AssertionError, ValueError, IndexError)
    },
    "no_grad": (lambda: InMode(Mlp(), torch.no_grad), MOMENTS),
    "inference mode": (lambda: InMode(Mlp(), torch.inference_mode), MOMENTS),
    "no_grad and a norm": (lambda: InMode(normed(), torch.no_grad), MOMENTS),
    "inference mode and a norm": (lambda: InMode(normed(), torch.inference_mode), MOMENTS),
    "in place": (InPlace, MOMENTS),
}
SLOWLY = {
    f"one at a time with a norm, {error}": (lambda error=error: One(normed(), error), FAILS)
    for error in (None, AssertionError)
}


@pytest.mark.parametrize("which", [*FALLS_BACK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWLY)])
def test_model_without_outputs_or_gradients_to_go_by_falls_back_and_says_why(which):
    make, message = {**FALLS_BACK, **SLOWLY}[which]
    example = IMAGE if "norm" in which else VECTOR
    keep = 0.55 if which == "in place" else 0.7
    falls_back(make(), example, message, objective="moments" if message == MOMENTS else "weight", keep=keep)


@pytest.mark.parametrize("function", [torch.log, lambda x: x / 0], ids=["nan", "inf"])
def test_outputs_that_are_not_finite(function):
    """No layer is behind them, so that the moments are finite; the outputs say nothing, which is said."""
    model = Mlp(after=Map(function))
    before = remembered(model)
    with pytest.warns(CompressionWarning, match="not finite"):
        plan = search_ranks(model, Budget(params=0.7), example_input=VECTOR)
    before.check()
    assert plan.objective != "end_to_end"
    with pytest.warns(CompressionWarning, match="not finite"):
        plan = compress_(model, Budget(params=0.7), example_input=VECTOR)
    assert plan.kept["params"] <= 0.7
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("function", [lambda x: 0 * x, lambda x: x.argmax(dim=1)], ids=["constant", "no floats"])
def test_outputs_without_a_spread(function):
    model = Mlp(after=Map(function))
    before = remembered(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        plan = search_ranks(model, Budget(params=0.7), example_input=VECTOR)
        before.check()
        compress_(model, Budget(params=0.7), example_input=VECTOR)
    assert plan.kept["params"] <= 0.7


PHASES = [
    *("synthetic inputs", "moments", "decomposing layers", "timing the dense model", "timing layers"),
    *("measuring layers", "continuous rank search"),
    *("factorising layers", "healing: regression", "healing: distillation", "healing"),
]
LONG = ("synthetic inputs", "continuous rank search", "healing: distillation")


def interruptible() -> nn.Module:
    torch.manual_seed(0)
    model = run_in(Mlp(nn.Sequential(nn.BatchNorm1d(20), nn.Tanh(), nn.Dropout(0.1))), VECTOR).train()
    model.between[0].eval()
    model.first.weight.requires_grad_(False)
    return model


def test_phases_are_these():
    seen: list[str] = []
    compress_(interruptible(), Budget(params=0.7), example_input=VECTOR, progress=lambda what, _: seen.append(what))
    assert list(dict.fromkeys(seen)) == PHASES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "call"), [*((phase, 1) for phase in PHASES), *((phase, 3) for phase in PHASES if phase in LONG)]
)
def test_interruption_in_every_phase_leaves_the_dense_model(phase, call):
    model, calls = interruptible(), []
    before = remembered(model)

    def interrupt(what, done):
        calls.append(what)
        if calls.count(phase) == call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_(model, Budget(params=0.7), example_input=VECTOR, progress=interrupt)
    before.check()


def test_interruption_of_a_quality_target_leaves_the_model():
    model, settings = Mlp(), {"method": "exact", "objective": "moments", "example_input": VECTOR}
    before = remembered(model)
    with pytest.raises(KeyboardInterrupt):
        compress_(model, Budget(max_error=0.1), progress=interrupting("quality target", 0.1), **settings)
    before.check()


class VectorTask(TinyTask):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.example_input_array = torch.zeros(1, 8)


@pytest.fixture
def vectors() -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(16, 8) + 1, torch.randint(0, 4, (16,))), batch_size=8)


def fit(make_trainer, model: nn.Module, loader: DataLoader) -> tuple[VectorTask, Compress]:
    task, callback = VectorTask(model), Compress(Budget(params=0.7))
    make_trainer(callback).fit(task, loader, loader)
    assert any(isinstance(m, FactorisedLayer) for m in task.modules())
    assert callback.plan.kept["params"] <= 0.7
    return task, callback


def test_trainer_with_activations_that_are_not_finite_on_synthetic_inputs(make_trainer, vectors):
    model = Mlp(Map(lambda x: (x - 5).log()))
    with torch.no_grad():
        model.first.weight.fill_(1.0)  # positive data are fine
    with pytest.warns(CompressionWarning, match="the inputs of layer 'net.second' are not finite"):
        _, callback = fit(make_trainer, model, vectors)
    assert callback.plan.objective == "weight"


def test_trainer_that_is_interrupted_while_compressing_leaves_the_dense_module(make_trainer, vectors):
    task = VectorTask(Mlp())
    with task.net.second.register_forward_pre_hook(failing_at(30, ValueError("stop"))):
        before = remembered(task)
        with pytest.raises(ValueError, match="stop"):
            make_trainer(Compress(Budget(params=0.7))).fit(task, vectors, vectors)
    state = task.state_dict()
    assert list(state) == list(before.state)
    assert all(torch.equal(state[name], value) for name, value in before.state.items())
    assert all(p.grad is grad for p, (_, grad) in zip(task.parameters(), before.trained, strict=True))

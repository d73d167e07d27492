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
from tests.support.interruptions import interrupting
from tests.support.nets import InMode, TinyTask
from tests.support.unchanged import Unchanged

IMAGE = (1, 3, 5, 5)
VECTOR = (1, 8)


class Conv(nn.Module):
    """Two convolutions around a norm, then a linear layer; inputs (B, 3, 5, 5), outputs (B, 4)."""

    def __init__(self, norm: nn.Module | None = None, between: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.norm = norm or nn.Identity()
        self.between = between or nn.ReLU()
        self.conv2 = nn.Conv2d(10, 12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.between(self.norm(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).mean(dim=(2, 3)))


class Mlp(nn.Module):
    def __init__(self, between: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 20)
        self.between = between or nn.Tanh()
        self.second = nn.Linear(20, 16)
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(self.second(self.between(self.first(x))))


def run_in(model: nn.Module, shape=IMAGE) -> nn.Module:
    """Gives the norms running statistics of some inputs."""
    for _ in range(10):
        model(1 + 2 * torch.rand(32, *shape[1:]))
    return model


class Everything:
    """All of a model that must come back: state, structure, modes, hooks, gradients, random state."""

    def __init__(self, model: nn.Module) -> None:
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 2.0) if index % 2 else None
        self.model, self.unchanged = model, Unchanged(model)
        self.parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self.norms = [(m, m.momentum) for m in model.modules() if hasattr(m, "momentum")]

    def check(self) -> None:
        self.unchanged.check()
        assert [p.requires_grad for p in self.model.parameters()] == [required for _, required, _ in self.parameters]
        for parameter, _, grad in self.parameters:
            assert parameter.grad is grad
            assert grad is None or bool((grad == 2).all())
        assert all(norm.momentum == momentum for norm, momentum in self.norms)


def check(model: nn.Module, example, *, keep: float = 0.7, objective: str = "end_to_end", source: str | None = None):
    """Compresses with the defaults and without a warning, and takes it back; returns what was done."""
    before = Everything(model)
    done = compressed_model(model, Budget(params=keep), example_input=example)
    plan = done.plan
    assert plan.objective == objective
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
    before = Everything(model)
    with pytest.warns(CompressionWarning, match=message):
        plan = search_ranks(model, Budget(params=keep), example_input=example)
    before.check()
    assert plan.objective == objective
    with pytest.warns(CompressionWarning, match=message):
        plan = compress_(model, Budget(params=keep), example_input=example)
    assert plan.objective == objective
    assert any(isinstance(m, FactorisedLayer) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) <= keep * plan.dense.params


@pytest.mark.slow
def test_search_alone_leaves_the_model_as_it_was():
    model = run_in(Conv(nn.BatchNorm2d(10), nn.Dropout(0.1))).train()
    before = Everything(model)
    plan = search_ranks(model, Budget(params=0.7), example_input=IMAGE)
    before.check()
    done = compressed_model(model, Budget(params=0.7), example_input=IMAGE)
    assert [(p.kind, p.ranks) for p in done.plan.layers] == [(p.kind, p.ranks) for p in plan.layers]


# --- norms ------------------------------------------------------------------------------------------


def test_without_norms():
    check(Conv(), IMAGE, source="noise")


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(10, track_running_stats=False),
        pytest.param(nn.GroupNorm(2, 10), marks=pytest.mark.slow),
        pytest.param(nn.InstanceNorm2d(10, affine=True), marks=pytest.mark.slow),
    ],
    ids=["untracked", "group", "instance"],
)
def test_norms_without_running_statistics(norm):
    check(Conv(norm), IMAGE, source="noise")


@pytest.mark.slow
def test_norm_without_scale_and_shift():
    check(run_in(Conv(nn.BatchNorm2d(10, affine=False))), IMAGE, source="batch norm")


@pytest.mark.slow
def test_norm_with_a_cumulative_average():
    check(run_in(Conv(nn.BatchNorm2d(10, momentum=None))), IMAGE, source="batch norm")


@pytest.mark.slow
def test_frozen_norms():
    model = run_in(Conv(nn.BatchNorm2d(10))).train()
    model.norm.eval().requires_grad_(False)
    check(model, IMAGE, source="batch norm")


@pytest.mark.slow
def test_frozen_model():
    check(run_in(Conv(nn.BatchNorm2d(10))).requires_grad_(False), IMAGE, source="batch norm")


@pytest.mark.parametrize("share", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_running_variance_of_zero(share):
    model = run_in(Conv(nn.BatchNorm2d(10)))
    with torch.no_grad():
        model.norm.running_var[: int(10 * share)] = 0
    check(model, IMAGE, source="batch norm")


@pytest.mark.slow
def test_dead_channels():
    model = Conv(nn.BatchNorm2d(10))
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.conv1.bias[:3] = -1
    run_in(model)
    assert bool((model.norm.running_var[:3] < 0.5).all())
    check(model, IMAGE, source="batch norm")


@pytest.mark.slow
def test_norm_that_gets_its_input_by_keyword():
    class Keyword(Conv):
        def forward(self, x):
            x = F.relu(self.norm(input=self.conv1(input=x)))
            return self.head(input=F.relu(self.conv2(input=x)).mean(dim=(2, 3)))

    check(run_in(Keyword(nn.BatchNorm2d(10))), IMAGE, source="batch norm")


@pytest.mark.slow
def test_norm_that_is_never_called():
    """As in a head that is used in training alone."""
    model = Conv()
    model.auxiliary = nn.BatchNorm2d(10)
    check(model, IMAGE)


@pytest.mark.slow
def test_norm_before_anything_the_input_can_change():
    """The batch norm sees a constant of the model, not the input."""

    class Constant(Conv):
        def forward(self, x):
            return super().forward(x) + self.shift(self.table)[:1].mean()

    model = Constant()
    model.shift = nn.BatchNorm1d(3)
    model.register_buffer("table", torch.randn(5, 3))
    check(model, IMAGE)


# --- inputs and outputs -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("form", [pytest.param("tuple", marks=pytest.mark.slow), "dict"])
def test_several_inputs_and_outputs(form):
    model = Two()
    for _ in range(10):
        model(torch.randn(32, 8), torch.randn(32, 5))
    left, right = torch.randn(3, 8), torch.randn(3, 5)
    example = (left, right) if form == "tuple" else {"left": left, "right": right, "scale": 0.5}
    check(model, example, source="batch norm")


@pytest.mark.parametrize("norm", [True, False])
def test_input_that_is_of_no_use(norm):
    model = Two(norm, uses_both=False)
    for _ in range(10):
        model(torch.randn(32, 8), torch.randn(32, 5))
    check(model, (torch.randn(1, 8), torch.randn(1, 5)))


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


class Depth(nn.Module):
    """Drops whole samples of its branch while training."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        if not self.training:
            return x + self.branch(x)
        return x + self.branch(x) * (torch.rand(len(x), *(1,) * (x.ndim - 1)) < 0.5)


@pytest.mark.slow
def test_dropout_and_stochastic_depth_in_train_mode():
    branch = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1), nn.BatchNorm2d(10), nn.Dropout(0.5))
    model = run_in(Conv(nn.BatchNorm2d(10), Depth(branch))).train()
    done = check(model, IMAGE, source="batch norm")
    assert done.healing.before > 0


# --- precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "norm"), [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def test_half_precision(dtype, norm):
    model = run_in(Conv(nn.BatchNorm2d(10) if norm else None)).to(dtype)
    done = check(model, IMAGE)
    assert done.healing.skipped == "the parameters are in half precision"


@pytest.mark.slow
def test_double_precision():
    check(run_in(Conv(nn.BatchNorm2d(10))).double(), IMAGE)


# --- activations that are not finite ----------------------------------------------------------------


class Map(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [torch.log, lambda x: x / 0], ids=["nan", "inf"])
def test_activations_that_are_not_finite(function):
    falls_back(Mlp(Map(function)), VECTOR, "the inputs of layer 'second' are not finite on noise inputs")


def test_activations_that_are_not_finite_behind_a_norm():
    model = Conv(nn.BatchNorm2d(10), Map(torch.log))
    falls_back(model, IMAGE, "the inputs of layer 'conv2' are not finite on noise inputs")


@pytest.mark.parametrize("function", [torch.log, lambda x: x / 0], ids=["nan", "inf"])
def test_outputs_that_are_not_finite(function):
    """No layer is behind them, so that the moments are finite; the outputs say nothing, which is said."""
    model = Mlp(after=Map(function))
    before = Everything(model)
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
    before = Everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        plan = search_ranks(model, Budget(params=0.7), example_input=VECTOR)
        before.check()
        compress_(model, Budget(params=0.7), example_input=VECTOR)
    assert plan.kept["params"] <= 0.7


# --- batches and gradients --------------------------------------------------------------------------


class One(nn.Module):
    """Takes one sample at a time."""

    def __init__(self, model: nn.Module, error: type[Exception] | None = None) -> None:
        super().__init__()
        self.model, self.error = model, error

    def forward(self, x):
        if self.error is not None and len(x) > 1:
            raise self.error("one at a time")
        return self.model(x.reshape(1, *x.shape[1:]))


@pytest.mark.parametrize("error", [None, AssertionError, ValueError, IndexError])
def test_forward_that_fails_on_more_than_one_sample(error):
    falls_back(One(Mlp(), error), VECTOR, "the model fails on noise inputs")


@pytest.mark.slow
@pytest.mark.parametrize("error", [None, AssertionError])
def test_forward_with_norms_that_fails_on_more_than_one_sample(error):
    falls_back(One(run_in(Conv(nn.BatchNorm2d(10))), error), IMAGE, "the model fails on")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_without_gradient(mode):
    message = "falls back to objective='moments': the model cannot be differentiated"
    falls_back(InMode(Mlp(), mode), VECTOR, message, objective="moments")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_with_norms_without_gradient(mode):
    model = InMode(run_in(Conv(nn.BatchNorm2d(10))), mode)
    falls_back(model, IMAGE, "falls back to objective='moments'", objective="moments")


def test_in_place_updates_that_cannot_be_differentiated():
    class InPlace(Mlp):
        def forward(self, x):
            x = torch.sigmoid(self.first(x))
            x.mul_(2)  # sigmoid needs its output for the gradient
            return self.second(x)

    falls_back(InPlace(), VECTOR, "falls back to objective='moments'", objective="moments", keep=0.55)


@pytest.mark.slow
def test_in_place_activations_that_can():
    check(run_in(Conv(nn.BatchNorm2d(10), nn.ReLU(inplace=True))), IMAGE)


def test_layer_under_two_names():
    model = Mlp()
    model.alias = model.first
    check(model, VECTOR)


# --- Ctrl-C -----------------------------------------------------------------------------------------

PHASES = [
    "synthetic inputs",
    "moments",
    "decomposing layers",
    "measuring layers",
    "end-to-end search",
    "factorising layers",
    "healing: regression",
    "healing: distillation",
    "healing",
]
LONG = ("synthetic inputs", "end-to-end search", "healing: distillation")


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


@pytest.mark.parametrize(
    ("phase", "call"), [*((phase, 1) for phase in PHASES), *((phase, 3) for phase in PHASES if phase in LONG)]
)
def test_interruption_in_every_phase_leaves_the_dense_model(phase, call):
    model, calls = interruptible(), []
    before = Everything(model)

    def interrupt(what, done):
        calls.append(what)
        if calls.count(phase) == call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_(model, Budget(params=0.7), example_input=VECTOR, progress=interrupt)
    before.check()


@pytest.mark.parametrize("phase", PHASES[:4])
def test_interruption_of_the_search_leaves_the_model(phase):
    model = interruptible()
    before = Everything(model)
    with pytest.raises(KeyboardInterrupt):
        search_ranks(model, Budget(params=0.7), example_input=VECTOR, progress=interrupting(phase, 0.4))
    before.check()


def test_interruption_of_a_quality_target_leaves_the_model():
    model = Mlp()
    before = Everything(model)
    progress = interrupting("quality target", 0.1)
    with pytest.raises(KeyboardInterrupt):
        compress_(
            model, Budget(max_error=0.1), example_input=VECTOR, method="exact", objective="moments", progress=progress
        )
    before.check()


# --- inside a Trainer -------------------------------------------------------------------------------


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


def test_trainer_with_dropout(make_trainer, vectors):
    _, callback = fit(make_trainer, Mlp(nn.Sequential(nn.ReLU(), nn.Dropout(0.5))), vectors)
    assert callback.plan.objective == "end_to_end"


def test_trainer_with_activations_that_are_not_finite_on_synthetic_inputs(make_trainer, vectors):
    model = Mlp(Map(lambda x: (x - 5).log()))
    with torch.no_grad():
        model.first.weight.fill_(1.0)  # positive data are fine
    with pytest.warns(CompressionWarning, match="the inputs of layer 'net.second' are not finite"):
        _, callback = fit(make_trainer, model, vectors)
    assert callback.plan.objective == "weight"


def test_trainer_with_a_forward_that_fails_on_large_batches(make_trainer):
    loader = DataLoader(TensorDataset(torch.rand(4, 8), torch.randint(0, 4, (4,))), batch_size=1)
    with pytest.warns(CompressionWarning, match="the model fails on noise inputs"):
        _, callback = fit(make_trainer, One(Mlp(), ValueError), loader)
    assert callback.plan.objective == "weight"


def test_trainer_that_is_interrupted_while_compressing_leaves_the_dense_module(make_trainer, vectors):
    task = VectorTask(Mlp())
    calls = []

    def interrupt(_module, _args):
        calls.append(0)
        if len(calls) == 30:
            raise ValueError("stop")

    handle = task.net.second.register_forward_pre_hook(interrupt)
    before = Everything(task)
    with pytest.raises(ValueError, match="stop"):
        make_trainer(Compress(Budget(params=0.7))).fit(task, vectors, vectors)
    assert len(calls) == 30
    assert not any(isinstance(m, FactorisedLayer) for m in task.modules())
    state = task.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.unchanged.state.items())
    assert all(p.grad is grad for p, _, grad in before.parameters)
    handle.remove()

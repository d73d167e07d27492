from __future__ import annotations

import builtins
import copy

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Budget, Compress
from lightning_compress.analysis import synthetic as synthesis
from lightning_compress.compress import Compression, compress_model_
from lightning_compress.core.settings import SearchSettings
from lightning_compress.kinds import shrinkage
from lightning_compress.search import end_to_end
from lightning_compress.surgery import distillation

WEIGHTS_ALONE = {"objective": "weight", "heal": False}
"""No synthetic inputs: fast, and the factors are those of the weights, for tests of everything else."""
DEFAULTS = {"objective": "auto", "heal": True}
CLOSED_FORM = ("svd", "spatial_svd", "tucker2")
"""Kinds that need no iterative fit: of a tiny net CP takes longer than all else, and only its own tests need it."""


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed(monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of what a test starts: two workers share the cores
    torch.manual_seed(0)


BESIDE_SETTINGS = ("example_input", "calibration", "statistics", "heal", "progress")


def compressed_model(model: nn.Module, budget, **arguments) -> Compression:
    """All that `compress_` does, with its keywords."""
    beside = {name: arguments.pop(name) for name in BESIDE_SETTINGS if name in arguments}
    return compress_model_(model, budget, SearchSettings(**arguments), **beside)


def compress(params: float = 0.4, **settings) -> Compress:
    return Compress(Budget(params=params), **{"method": "exact", "kinds": CLOSED_FORM, **WEIGHTS_ALONE, **settings})


class TinyNet(nn.Module):
    """Conv, norm, conv, linear, linear: every kind applies somewhere. Inputs (B, 3, 8, 8), outputs (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(16, 16, 1)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.point(F.relu(self.conv2(x)))).mean(dim=(2, 3))
        return self.fc2(F.relu(self.fc1(x)))


class TinyTask(L.LightningModule):
    """Classifies with TinyNet; `configure` receives the module and returns what configure_optimizers returns."""

    def __init__(self, configure=None) -> None:
        super().__init__()
        self.net = TinyNet()
        self.configure = configure
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.configure(self) if self.configure else torch.optim.Adam(self.parameters(), lr=1e-2)


class InMode(nn.Module):
    """A model run in a mode of its own, such as torch.no_grad."""

    def __init__(self, model: nn.Module, mode) -> None:
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x):
        with self.mode():
            return self.model(x)


def interrupting(phase: str, after: float):
    """Ctrl-C as soon as more than a fraction of a phase is done, as a `progress`."""

    def interrupt(what: str, done: float) -> None:
        if what == phase and done > after:
            raise KeyboardInterrupt

    return interrupt


class TwoManual(TinyTask):
    """Two optimizers stepped by hand, one for the convolutions and one for the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        body = [p for name, p in self.named_parameters() if "fc" not in name]
        head = [p for name, p in self.named_parameters() if "fc" in name]
        return [torch.optim.SGD(body, lr=0.05, momentum=0.9), torch.optim.Adam(head, lr=1e-2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)


def error_in(metric, weight, new) -> float:
    """‖G^½ (W − Ŵ) S^½‖² / ‖G^½ W S^½‖² by its traces, G with its share of the identity; ‖W − Ŵ‖² / ‖W‖² in None."""
    weight, lost = weight.detach().double().flatten(1), (new - weight).detach().double().flatten(1)
    inputs, outputs = (torch.eye(n, dtype=torch.float64) for n in (weight.shape[1], len(weight)))
    if metric is not None:
        inputs = metric.inputs
    if metric is not None and metric.outputs is not None:
        outputs = 0.95 * metric.outputs * len(weight) / metric.outputs.trace() + 0.05 * outputs
    kept, whole = (torch.einsum("ij,ik,kl,jl->", m, outputs, m, inputs) for m in (lost, weight))
    return float(kept / whole)


def planned_error(metric, weight, new) -> float:
    """Returns what a plan says of a layer of one group: what unseen inputs show where the fit loses `error_in`."""
    error = error_in(metric, weight, new)
    unseen = metric.unseen() if metric is not None else None
    return error if unseen is None else float(unseen.at(np.array([error]))[0])


@pytest.fixture
def unshrunk(monkeypatch):
    """Second moments as the samples have them."""
    monkeypatch.setattr(shrinkage, "_shrinkage", lambda spread, *_: torch.zeros_like(spread))


def block_imports(monkeypatch, name):
    real = builtins.__import__

    def fails(module, *args, **kwargs):
        if module.split(".")[0] == name:
            msg = f"No module named {name!r}"
            raise ModuleNotFoundError(msg)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)


@pytest.fixture
def less_work(monkeypatch) -> None:
    """Fewer synthetic inputs and steps, as for a model that is too large for more."""
    for module in (synthesis, end_to_end, distillation):
        monkeypatch.setattr(module, "WORK", 10**10)


@pytest.fixture
def net() -> TinyNet:
    return TinyNet()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **settings) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})

    return make


class Unchanged:
    """Remembers a module and says whether it is still exactly the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = copy.deepcopy(module.state_dict())
        self.modules = [(name, m, m.training) for name, m in module.named_modules()]
        self.parameters = [(name, p) for name, p in module.named_parameters()]
        self.hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in module.named_modules()}
        self.rng = torch.get_rng_state()

    def check(self) -> None:
        now = self.module.state_dict()
        assert list(now) == list(self.state)
        assert all(torch.equal(now[name], value) for name, value in self.state.items())
        assert [(n, id(m), m.training) for n, m in self.module.named_modules()] == [
            (n, id(m), training) for n, m, training in self.modules
        ]
        assert [(n, id(p)) for n, p in self.module.named_parameters()] == [(n, id(p)) for n, p in self.parameters]
        assert {
            name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in self.module.named_modules()
        } == self.hooks
        assert torch.equal(torch.get_rng_state(), self.rng)


@pytest.fixture
def unchanged():
    return Unchanged

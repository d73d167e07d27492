from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.analysis.draws import LEAST_SIDE
from lightning_compress.analysis.latency.bench import TorchBench
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.core import store
from lightning_compress.core.effort import EFFORTS, trying
from lightning_compress.kinds import shrinkage
from tests.support.nets import TinyNet, pooled
from tests.support.stand_in import StandIn
from tests.support.unchanged import Unchanged

FIND, KEEP = store.find, store.keep
"""Before they are taken away, here and where benchmarks are imported."""


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed(monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of what a test starts: two workers share the cores
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _stand_in(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(store, "find", lambda _: None)  # each test makes its own inputs and fits
        patch.setattr(store, "keep", lambda *_: None)
        yield StandIn(patch)


@pytest.fixture
def stand_in(_stand_in, monkeypatch, tmp_path) -> StandIn:
    """The device in the place of the clock, with a cache of its own."""
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path))
    _stand_in.reset()
    yield _stand_in
    _stand_in.reset()


@pytest.fixture
def real_clock(stand_in, monkeypatch) -> None:
    """The clock after all."""
    for name, function in stand_in.real.items():
        monkeypatch.setattr(TorchBench, name, function)


@pytest.fixture
def real_store(monkeypatch, tmp_path) -> Path:
    """What is worked out is kept after all, in a folder of its own."""
    monkeypatch.setenv(store.CACHE, str(tmp_path))
    monkeypatch.setattr(store, "find", FIND)
    monkeypatch.setattr(store, "keep", KEEP)
    return tmp_path


@pytest.fixture
def unshrunk(monkeypatch):
    """Second moments as the samples have them."""
    monkeypatch.setattr(shrinkage, "_shrinkage", lambda spread, *_: torch.zeros_like(spread))


@pytest.fixture
def try_only():
    """Limits the effort of what names none, until the end of the test: `try_only(work=10**9)`."""
    with contextlib.ExitStack() as stack:
        yield lambda **fields: stack.enter_context(trying(replace(EFFORTS["balanced"], **fields)))


@pytest.fixture
def less_work(try_only) -> None:
    """Fewer synthetic inputs and steps, as for a model that is too large for more."""
    try_only(work=10**10)


@pytest.fixture
def scarce(try_only) -> tuple[nn.Module, Statistics]:
    """A network and what is known of it where few inputs can be afforded."""
    try_only(work=10**8)
    net = pooled()
    return net, gather_statistics(net, (1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE))


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


@pytest.fixture
def unchanged():
    return Unchanged

"""Single layers worked out by others: by stand-ins, and by a real Ray of two workers."""

from __future__ import annotations

import os
import pickle
import signal
import sys

import pytest
import torch
from torch import nn

from lightning_compress import Budget, compress_
from lightning_compress.core import workers
from lightning_compress.core.effort import current_effort, trying
from lightning_compress.core.errors import ConfigurationError, UnsupportedError, WorkersLostError
from lightning_compress.core.parallel import in_threads
from lightning_compress.core.workers import current_workers, outsourced, working_on
from lightning_compress.on_disk.api import compress_checkpoint
from lightning_compress.surgery.save import save_compressed
from tests.support.compressing import entrances
from tests.support.nets import trained_like

SHAPE = (1, 3, 16, 16)
SETTINGS = {"target": None, "kinds": ["cp3", "svd"], "example_input": SHAPE}


class Elsewhere:
    """Runs what it gets as another process would: on copies."""

    size = 3

    def __init__(self) -> None:
        self.called: list[str] = []

    def call(self, function, *args):
        self.called.append(getattr(getattr(function, "func", function), "__name__", "?"))
        function, args = pickle.loads(pickle.dumps((function, args)))
        return pickle.loads(pickle.dumps(function(*args)))


@pytest.fixture
def elsewhere():
    others = Elsewhere()
    token = workers._CURRENT.set(others)
    yield others
    workers._CURRENT.reset(token)


def compressed(**settings):
    model = trained_like()
    plan = compress_(model, Budget(params=0.4), heal=False, **SETTINGS, **settings)
    return model, plan


def test_workers_give_the_same_plan_and_the_same_factors_and_nothing_is_fitted_twice(less_work, request):
    model, plan = compressed()
    others = request.getfixturevalue("elsewhere")
    again, plan_again = compressed()
    assert plan_again.layers == plan.layers
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    assert others.called.count("tabulate") >= 3
    assert "_fitted" in others.called


def test_threads_wait_for_as_many_workers_as_there_are(elsewhere):
    torch.set_num_threads(1)
    with trying("fast"):
        found = in_threads(lambda item: (item, current_workers(), current_effort().inputs), range(4))
    assert found == [(item, elsewhere, 64) for item in range(4)]


def test_an_error_of_a_worker_is_that_of_the_function(elsewhere):
    with pytest.raises(ConfigurationError, match="not an Effort"):
        outsourced(_fail, "not an Effort")


def _fail(message):
    raise ConfigurationError(message)


@pytest.mark.parametrize("value", ["rays", 2, None, True, ["ray"]])
def test_unknown_workers_are_an_error_whatever_the_entrance(net, value):
    for call in entrances(net, parallel=value):
        with pytest.raises(ConfigurationError, match=r"parallel=.* is unknown"):
            call()


def test_without_ray_the_extra_is_named(net, unchanged, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    before = unchanged(net)
    with pytest.raises(UnsupportedError, match=r"pip install 'lightning_compress\[ray\]'"):
        compress_(net, Budget(params=0.5), parallel="ray")
    before.check()


@pytest.fixture
def ray():
    """A Ray of two workers on this machine."""
    found = pytest.importorskip("ray")
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield found
    found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own
@pytest.mark.usefixtures("less_work")
def test_ray_works_out_the_same_and_a_lost_workers_layers_are_done_again(ray, tmp_path):
    model, plan = compressed()
    again, plan_again = compressed(parallel="ray")
    assert ray.is_initialized()  # it was there before
    assert plan_again.layers == plan.layers
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    with working_on("ray"):
        assert current_workers().size == 2
        mark = tmp_path / "killed"
        assert in_threads(lambda item: outsourced(_dies_once, item, str(mark)), range(4)) == [0, 1, 4, 9]
        assert mark.exists()
        with pytest.raises(ConfigurationError, match="of the worker"):
            outsourced(_fail, "of the worker")
        with pytest.raises(WorkersLostError, match="Ray lost the workers of a layer 4 times"):
            outsourced(_dies)


def _dies_once(item, mark):
    if item == 2 and not os.path.exists(mark):  # noqa: PTH110
        with open(mark, "w", encoding="ascii"):  # noqa: PTH123
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def _dies():
    os.kill(os.getpid(), signal.SIGKILL)


class Net(nn.Module):
    """Some layers of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 24), nn.Linear(24, 40)

    def forward(self, tokens):
        return self.out(self.embed(tokens))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_are_compressed_by_ray(ray, tmp_path):
    torch.manual_seed(0)
    save_compressed(Net(), tmp_path / "in")
    (tmp_path / "in" / "plan.json").unlink(missing_ok=True)
    here = compress_checkpoint(tmp_path / "in", tmp_path / "here", Budget(params=0.5), model=Net)
    there = compress_checkpoint(tmp_path / "in", tmp_path / "there", Budget(params=0.5), model=Net, parallel="ray")
    assert there == here
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("here", "there")]
    assert files[0] == files[1]

"""A fit that is broken off and goes on is the fit that was not."""

from __future__ import annotations

import copy
import functools

import pytest
from torch.optim import SGD, Adam

from lightning_compress import apply_plan_, load_compressed_checkpoint
from lightning_compress.analysis.latency.bench import PRESERVED
from lightning_compress.layers.memory_format import CHANNELS_LAST, is_channels_last
from tests.support.compressing import DEFAULTS, compress
from tests.support.fitting import CUT_SHORT, QUIET, require_same_state
from tests.support.nets import TinyTask, TwoManual
from tests.support.optimizers import Prebuilt, adam, groups, lambdas, lbfgs, momentum, named, one_cycle, plateau
from tests.support.resuming import (
    BATCHES,
    EPOCHS,
    IN_STEPS,
    THREE,
    first_epoch,
    require_identical_resume,
    require_same_optimizers,
    run,
)

pytestmark = [*QUIET, *CUT_SHORT]
slow = pytest.mark.slow


class ReadsTheWeight(TinyTask):
    def configure_optimizers(self):
        weights = [self.net.fc1.weight, self.net.conv2.weight]
        return Adam([{"params": weights, "lr": 0.02}, {"params": self.net.fc2.parameters()}], lr=0.01)


def case(name, make, after=1, *, marks=(), trainer=None, **settings):
    make = make if isinstance(make, type) else functools.partial(TinyTask, make)
    return pytest.param(make, settings, after, trainer or {}, id=f"{name}, after {after}", marks=marks)


FITS = [
    *(
        case(configure.__name__, configure, after)
        for configure in (adam, momentum, groups, named, one_cycle, lambdas, lbfgs)
        for after in (0, 2)
    ),
    *(case(cls.__name__, cls) for cls in (Prebuilt, ReadsTheWeight, TwoManual)),
    *(case(f"kinds {kinds}", momentum, kinds=kinds) for kinds in ("auto", ("svd", "cp"), ("svd", "tt"))),
    *(
        case(f"{precision} {distill}", momentum, trainer={"precision": precision}, distill=distill, marks=marks,
             example_input=(1, 3, 8, 8))
        for precision, distill, marks in [
            ("bf16-true", None, slow), ("bf16-mixed", None, slow), ("bf16-true", {}, ()), ("bf16-mixed", {}, slow),
        ]
    ),
    case("healed, by the outputs", groups, method="continuous", kinds="auto", distill={}, marks=slow, **DEFAULTS),
]  # fmt: skip

ALL_AT_ONCE = {"schedule": {"warmup_steps": 7, "phases": [{"epochs": 2, "train": "factors"}]}, "distill": {}}
SCHEDULES = [
    *(
        case(f"{name} {configure.__name__}", configure, after, marks=slow, **settings)
        for configure in (groups, one_cycle)
        for name, after, settings in [
            ("warm-up across", 0, {"schedule": {"warmup_steps": 6}}),
            ("warm-up over", 0, {"schedule": {"warmup_steps": 3}}),
            ("frozen across", 0, {"schedule": {"phases": [{"epochs": 2, "train": "factors"}]}}),
            ("frozen until then", 1, {"schedule": {"phases": [{"epochs": 2, "train": "factors"}]}}),
            ("frozen before", 1, {"schedule": {"phases": [{"epochs": 1, "train": "factors"}]}}),
            ("distilled", 1, {"distill": {"weight": 0.4, "temperature": 3}}),
            ("distilled submodule", 1, {"distill": {"module": "net"}}),
            ("all at once", 0, ALL_AT_ONCE),
        ]
    ),
    case("layers distilled", adam, distill="layers"),
    case("blocks distilled", adam, marks=slow, distill={"blocks": ["net.norm"], "dtype": "bfloat16"}),
    case("distilled by a function", adam, marks=slow, distill={"function": "tests.support.nets.squares"}),
]

ROUNDS = [
    *(
        case(f"{name} {configure.__name__}", configure, after, params=params, schedule=schedule,
             marks=() if (name, configure) == ("steps", groups) else slow)
        for configure in (groups, named, lbfgs)
        for name, after, params, schedule in [
            ("epochs", 0, 0.4, THREE), ("last epochs", 1, 0.4, THREE), ("steps", 0, 0.5, IN_STEPS),
        ]
    ),
    case("healed and distilled", momentum, 0, marks=slow, params=0.5, schedule=IN_STEPS, distill="layers",
         heal=True, objective="auto"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "settings", "after", "trainer"), [*FITS, *SCHEDULES, *ROUNDS])
def test_resumed_run_is_identical(make_trainer, loader, tmp_path, make, settings, after, trainer):
    require_identical_resume(make_trainer, loader, tmp_path, make(), settings, after, **trainer)


INTO = [  # how it goes on, beside a fresh module with the last checkpoint of an epoch
    *(
        pytest.param(functools.partial(TinyTask, groups), "the first run's module", schedule, marks=slow)
        for schedule in (
            {},
            {"schedule": {"warmup_steps": 6}},
            {"schedule": {"phases": [{"epochs": 2, "train": "factors"}]}},
        )
    ),
    pytest.param(Prebuilt, "the first run's module, callback and optimizer", {}),
    *(pytest.param(make, "a module of another plan", {}, marks=slow) for make in (TinyTask, Prebuilt)),
    *(
        pytest.param(functools.partial(TinyTask, configure), "saved after the fit", {"distill": distill}, marks=slow)
        for configure in (momentum, plateau)
        for distill in (None, {})
    ),
]


@pytest.mark.parametrize(("make", "how", "settings"), INTO)
def test_resume_is_identical_whatever_it_goes_on_with(make_trainer, loader, tmp_path, make, how, settings):
    task, callback = make(), compress(**settings)
    first, fresh = copy.deepcopy(task), copy.deepcopy(task)
    whole, _ = run(make_trainer, loader, task, compress(**settings), tmp_path / "whole")
    trainer, _ = run(make_trainer, loader, first, callback, tmp_path / "first", epochs=2)
    path = tmp_path / "first" / "epoch=1.ckpt"
    if how == "saved after the fit":
        path = tmp_path / "end.ckpt"
        trainer.save_checkpoint(path)
    if how == "a module of another plan":
        make_trainer(compress(0.6)).fit(fresh, loader)
    module = first if "first" in how else fresh
    if "callback" not in how:
        callback = compress(**settings)
    again, _ = run(make_trainer, loader, module, callback, tmp_path / "again", ckpt_path=path)
    require_same_state(module, task)
    require_same_optimizers(whole, again)


def test_distilled_run_resumes_in_double_precision(make_trainer, loader, tmp_path):
    task, settings = TinyTask(), {"distill": {}, "example_input": (1, 3, 8, 8)}
    fresh = copy.deepcopy(task)
    path = first_epoch(make_trainer, loader, tmp_path, task, compress(**settings), precision="64-true")
    trainer, losses = run(
        make_trainer, loader, fresh, compress(**settings), tmp_path / "b", ckpt_path=path, precision="64-true"
    )
    assert trainer.global_step == EPOCHS * BATCHES
    assert len(set(losses)) == (EPOCHS - 1) * BATCHES


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("configure", "settings"), [(plateau, {}), (momentum, {"precision": "64-true"})], ids=["plateau", "64-true"]
)
def test_resumed_run_is_that_of_a_plain_trainer(make_trainer, loader, tmp_path, configure, settings, after):
    # Lightning's own resume is not exact here: it saves before ReduceLROnPlateau steps at the end of an
    # epoch, and loads double precision into a module that is still in single.
    task = TinyTask(configure)
    task.example_input_array = None
    first, resumed, plain = (copy.deepcopy(task) for _ in range(3))
    callback = compress(example_input=(1, 3, 8, 8))
    run(make_trainer, loader, first, callback, tmp_path / "first", epochs=after + 1, **settings)
    path = tmp_path / "first" / f"epoch={after}.ckpt"
    ours, losses = run(make_trainer, loader, resumed, compress(), tmp_path / "ours", ckpt_path=path, **settings)
    apply_plan_(plain, callback.plan)
    theirs, expected = run(make_trainer, loader, plain, None, tmp_path / "theirs", ckpt_path=path, **settings)
    assert len(losses) == (EPOCHS - 1 - after) * BATCHES
    assert losses == expected
    require_same_state(resumed, plain)
    require_same_optimizers(ours, theirs)


def test_resumed_fit_leaves_nothing_of_the_callback_on_the_module(make_trainer, loader, tmp_path):
    task = TinyTask()
    fresh = copy.deepcopy(task)
    path = first_epoch(make_trainer, loader, tmp_path, task, compress(distill={}))
    run(make_trainer, loader, fresh, compress(distill={}), tmp_path / "again", epochs=2, ckpt_path=path)
    assert set(fresh.__dict__) == set(task.__dict__)
    assert {"configure_optimizers", "training_step"}.isdisjoint(fresh.__dict__)


def test_configure_optimizers_of_the_instance_survives_a_resume(make_trainer, loader, tmp_path):
    task = TinyTask()
    fresh = copy.deepcopy(task)
    configure = functools.partial(momentum, fresh)
    task.configure_optimizers, fresh.configure_optimizers = functools.partial(momentum, task), configure
    path = first_epoch(make_trainer, loader, tmp_path, task, compress())
    trainer, _ = run(make_trainer, loader, fresh, compress(), tmp_path / "again", epochs=2, ckpt_path=path)
    assert isinstance(trainer.optimizers[0], SGD)
    assert fresh.__dict__.get("configure_optimizers") is configure


def test_fit_in_another_memory_format_resumes_in_it(make_trainer, loader, tmp_path, stand_in):
    stand_in.formats = {PRESERVED: 1.0, CHANNELS_LAST: 0.5}
    task = TinyTask(momentum)
    settings = {"example_input": (1, 3, 8, 8), "kinds": ("svd", "tucker2")}
    require_identical_resume(make_trainer, loader, tmp_path, task, settings, 0)
    assert is_channels_last(task)
    loaded = load_compressed_checkpoint(TinyTask, tmp_path / "whole" / "epoch=0.ckpt", configure=momentum)
    assert {p.stride() for p in loaded.parameters()} == {p.stride() for p in task.parameters()}

"""The result of a fit with Compress: that of a compression, and then of a plain fit."""

from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from lightning_compress import Budget, Compress, Distill, Override, Schedule, apply_plan_, search_ranks
from tests.support.compressing import WEIGHTS_ALONE, compress, compressed_model
from tests.support.fitting import (
    QUIET,
    count,
    factorised,
    factors_of,
    held_by,
    planned,
    require_plain_fit,
    require_same_state,
)
from tests.support.loggers import MemoryLogger
from tests.support.nets import DENSE_BYTES, DENSE_PARAMETERS, TinyTask, dense_macs

pytestmark = QUIET


@pytest.mark.parametrize("method", ["continuous", "exact"])
def test_fit_leaves_a_smaller_trained_module(make_trainer, loader, method):
    task = TinyTask()
    start = copy.deepcopy(task)
    biases = {name: p for name, p in task.named_parameters() if name.endswith("bias")}
    callback = compress(method=method)
    trainer = make_trainer(callback)
    trainer.fit(task, loader)
    plan = callback.plan

    assert count(start) == DENSE_PARAMETERS == plan.dense.params
    assert count(task) == plan.compressed.params <= 0.4 * DENSE_PARAMETERS
    stored = sum(v.numel() * v.element_size() for v in task.state_dict().values())
    assert (plan.dense.bytes, plan.compressed.bytes) == (DENSE_BYTES, stored)
    assert planned(callback) == factorised(task)
    assert len(factorised(task)) >= 2

    apply_plan_(start, plan)
    for name, factor in factors_of(task).items():
        assert not torch.equal(factor, start.get_parameter(name)), name
    after = {id(p) for p in task.parameters()}
    assert all(id(p) in after for p in biases.values())
    for name in factorised(task):
        if f"{name}.bias" in biases:
            assert task.get_submodule(name).bias is biases[f"{name}.bias"]
    assert set(held_by(trainer.optimizers)) == after


@pytest.mark.parametrize(
    ("method", "objective", "precision"),
    [
        pytest.param("continuous", "moments", "32-true", marks=pytest.mark.slow),
        pytest.param("exact", "moments", "32-true", marks=pytest.mark.slow),
        ("exact", "moments", "bf16-true"),
    ],
)
def test_defaults_are_compress_and_then_a_plain_fit(make_trainer, loader, method, objective, precision):
    task, logger, budget = TinyTask(), MemoryLogger(), Budget(params=0.4, macs=0.7)
    plain, dtype = copy.deepcopy(task), torch.bfloat16 if precision == "bf16-true" else torch.float32
    callback = Compress({"params": 0.4, "macs": 0.7}, method=method, seed=3)
    assert callback.plan is None
    make_trainer(callback, logger=logger, precision=precision, log_every_n_steps=1).fit(task, loader)
    example = torch.zeros(1, 3, 8, 8, dtype=dtype)
    done = compressed_model(plain.to(dtype), budget, example_input=example, method=method, seed=3)
    make_trainer(precision=precision).fit(plain, loader)
    require_same_state(task, plain)
    assert {p.dtype for p in task.parameters()} == {dtype}
    plan = callback.plan
    assert (plan.layers, plan.compressed) == (done.plan.layers, done.plan.compressed)
    assert plan.output_distance == done.plan.output_distance is not None
    assert (plan.budget, plan.method, plan.objective, plan.seed) == (budget, method, objective, 3)
    assert (plan.source, plan.data_free) == ("batch norm", True)
    (metrics,) = (m for _, m in logger.metrics if "compress/params" in m)
    assert metrics["compress/distance_before_healing"] == done.healing.before
    assert metrics["compress/distance_after_healing"] == done.healing.after < done.healing.before
    parts = ("synthetic inputs", "moments", "search", "swap", "regression", "distillation")
    seconds = {name: value for name, value in metrics.items() if name.startswith("compress/seconds/")}
    assert set(seconds) == {f"compress/seconds/{part}" for part in parts}
    assert all(value > 0 for value in seconds.values())


def test_settings_reach_the_search_from_plain_values_from_hydra_and_as_dataclasses(make_trainer, loader):
    search = {
        "kinds": ["svd", "spatial_svd", "tucker2"],
        "include": ["net.conv*", "Linear"],
        "exclude": ["net.conv1"],
        "overrides": {"net.fc1": {"kinds": ["svd"], "max_rank": 6}, "net.fc2": "dense"},
        "rank_multiple": 2,
    }
    plain = {
        "budget": {"ratio": "2x", "macs": 0.8},
        **search,
        "example_input": [1, 3, 8, 8],
        "schedule": {"warmup_steps": 2, "phases": [{"epochs": 1, "train": "factors"}]},
        "distill": {"weight": 0.25, "module": "net"},
    }
    made = {
        "budget": Budget(params=0.5, macs=0.8),
        "overrides": {"net.fc1": Override(kinds=["svd"], max_rank=6), "net.fc2": Override(dense=True)},
        "schedule": Schedule(2, [{"epochs": 1, "train": "factors"}]),
        "distill": Distill(0.25, module="net"),
    }
    tasks, hydra = [TinyTask()], OmegaConf.create(plain)
    planned_alone = search_ranks(
        tasks[0], made["budget"], example_input=(1, 3, 8, 8), method="exact", objective="weight", **search
    )
    ways = [plain, {name: hydra[name] for name in hydra}, {**plain, **made}]
    for settings in ways:
        callback = Compress(**settings, method="exact", **WEIGHTS_ALONE)
        assert all(getattr(callback, name) == made[name] for name in ("budget", "schedule", "distill"))
        if settings is not ways[-1]:
            held = [*(getattr(callback.settings, name) for name in search), callback.example_input]
            assert held == [*search.values(), [1, 3, 8, 8]]
            assert [type(value) for value in held] == [list, list, list, dict, int, list]
        tasks.append(copy.deepcopy(tasks[0]))
        make_trainer(callback).fit(tasks[-1], loader)
        assert callback.plan.layers == planned_alone.layers
        assert callback.plan.dense.macs == dense_macs(8)
        require_same_state(tasks[-1], tasks[1])


# --- ways of running ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"fast_dev_run": True}, 1), ({"accumulate_grad_batches": 2, "max_epochs": 2}, 4)],
    ids=["fast_dev_run", "accumulation"],
)
def test_fit_equals_a_plain_fit_of_the_factorised_module(make_trainer, loader, settings, steps):
    task, callback = TinyTask(), compress()
    trainer = require_plain_fit(make_trainer, loader, task, copy.deepcopy(task), callback, **settings)
    assert trainer.global_step == steps
    assert count(task) == callback.plan.compressed.params <= 0.4 * DENSE_PARAMETERS


@pytest.mark.parametrize("example", ["array", "shape", "batch"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_precision_of_the_factors_is_that_of_the_module(make_trainer, loader, precision, dtype, example):
    task = TinyTask()
    if example != "array":
        task.example_input_array = None
    plain = copy.deepcopy(task).to(dtype)
    callback = compress(example_input=(1, 3, 8, 8) if example == "shape" else None)
    require_plain_fit(make_trainer, loader, task, plain, callback, precision=precision)
    assert factors_of(task)
    assert {p.dtype for p in task.parameters()} == {dtype}
    assert callback.plan.dense.macs == dense_macs(8)


def test_frozen_layers_stay_frozen(make_trainer, loader):
    task = TinyTask()
    task.net.conv2.requires_grad_(False)
    task.net.fc1.weight.requires_grad_(False)
    callback = compress()
    start = copy.deepcopy(task)
    make_trainer(callback).fit(task, loader)
    apply_plan_(start, callback.plan)
    assert {"net.conv2", "net.fc1"} <= set(planned(callback))
    for name, parameter in task.named_parameters():
        still = name.startswith(("net.conv2.", "net.fc1.")) and not name.endswith("bias")
        assert parameter.requires_grad == (not still)
        assert torch.equal(parameter, start.get_parameter(name)) == still, name


def test_second_fit_only_fine_tunes(make_trainer, loader):
    task, callback, logger, fresh = TinyTask(), compress(), MemoryLogger(), compress()
    make_trainer(callback).fit(task, loader)
    plan, layers = callback.plan, [id(m) for m in task.modules()]
    plain = copy.deepcopy(task)
    make_trainer(fresh, logger=logger).fit(task, loader)
    make_trainer().fit(plain, loader)
    assert [id(m) for m in task.modules()] == layers
    require_same_state(task, plain)
    assert planned(fresh) == planned(callback)
    for name in ("params", "bytes"):
        assert getattr(fresh.plan.dense, name) == getattr(plan.dense, name)
        assert getattr(fresh.plan.compressed, name) == getattr(plan.compressed, name)
    make_trainer(callback).fit(task, loader)
    assert callback.plan is plan


def test_fit_leaves_the_users_own_instance_methods_alone(make_trainer, loader):
    task = TinyTask()
    calls = []

    def configure():
        calls.append("configure")
        return torch.optim.SGD(task.parameters(), lr=0.1)

    def step(batch, batch_idx):
        calls.append("step")
        return F.cross_entropy(task(batch[0]), batch[1])

    def on_save(checkpoint):
        checkpoint["mine"] = 7

    task.configure_optimizers, task.training_step, task.on_save_checkpoint = configure, step, on_save
    make_trainer(compress(distill={})).fit(task, loader)
    assert calls == ["configure", *["step"] * 4]
    assert task.__dict__.get("configure_optimizers") is configure
    assert task.__dict__.get("training_step") is step

from __future__ import annotations

import copy
import csv
import itertools
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    Callback,
    ModelPruning,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from lightning_compress import Budget, Compress, Distill, FactorisedLayer, Override, Schedule, apply_plan_, search_ranks
from lightning_compress.core.errors import (
    BudgetError,
    CompressionWarning,
    ConfigurationError,
    ExampleInputError,
    OrphanParameterError,
    UnsupportedError,
)
from tests.support.compressing import CLOSED_FORM, DEFAULTS, WEIGHTS_ALONE, compress, compressed_model
from tests.support.nets import TinyTask

# TinyTask has a validation_step; most fits here need no validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader.")

DENSE_PARAMETERS = 2340  # of TinyTask, counted by hand: 224 + 16 + 1152 + 272 + 544 + 132
DENSE_BYTES = 4 * (DENSE_PARAMETERS + 16) + 8  # the two running statistics and the batch counter of the norm


def dense_macs(size: int) -> int:
    half = (size // 2) ** 2
    return 8 * 27 * size**2 + 16 * 72 * half + 16 * 16 * half + 16 * 32 + 32 * 4


def without_example() -> TinyTask:
    task = TinyTask()
    task.example_input_array = None
    return task


def factors_of(module: nn.Module) -> list[nn.Parameter]:
    return [f for m in module.modules() if isinstance(m, FactorisedLayer) for f in m.factors().values()]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def held_by(optimizers) -> set[int]:
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


class MemoryLogger(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict]] = []
        self.hyperparameters: list[dict] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics, step=None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.hyperparameters.append(dict(params))


class Recorder(Callback):
    # What a callback behind Compress sees once on_fit_start is through, and the data of every batch.
    def __init__(self) -> None:
        self.rng = None
        self.batches: list[torch.Tensor] = []
        self.types: list[str] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        self.types = [type(m).__name__ for m in pl_module.modules()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch[0].clone())


# --- the result of a fit ---------------------------------------------------------------------


@pytest.mark.parametrize("search", ["continuous", "exact", "uniform", "energy"])
def test_fit_leaves_a_smaller_trained_module(make_trainer, loader, search):
    task = TinyTask()
    dense = copy.deepcopy(task)
    biases = {name: p for name, p in task.named_parameters() if name.endswith("bias")}
    callback = compress(method=search)
    trainer = make_trainer(callback)
    trainer.fit(task, loader)

    assert count(dense) == DENSE_PARAMETERS
    assert count(task) == callback.plan.compressed.params <= 0.4 * DENSE_PARAMETERS
    assert callback.plan.dense.params == DENSE_PARAMETERS
    stored = sum(v.numel() * v.element_size() for v in task.state_dict().values())
    assert (callback.plan.dense.bytes, callback.plan.compressed.bytes) == (DENSE_BYTES, stored)
    factorised = {name: m for name, m in task.named_modules() if isinstance(m, FactorisedLayer)}
    assert {p.name: (p.kind, p.ranks) for p in callback.plan.factorised} == {
        name: (m.kind, m.ranks) for name, m in factorised.items()
    }
    assert len(factorised) >= 2

    before = copy.deepcopy(dense)
    apply_plan_(before, callback.plan)
    for trained, start in zip(factors_of(task), factors_of(before), strict=True):
        assert not torch.equal(trained, start)
    after = {id(p) for p in task.parameters()}
    assert all(id(p) in after for p in biases.values())
    for name, module in factorised.items():
        if f"{name}.bias" in biases:
            assert module.bias is biases[f"{name}.bias"]
    assert held_by(trainer.optimizers) == after


@pytest.mark.parametrize(
    ("search", "objective"),
    [pytest.param("continuous", "end_to_end", marks=pytest.mark.slow), ("exact", "moments")],
)
def test_the_plan_on_the_callback_is_that_of_search_ranks(make_trainer, loader, search, objective):
    task = TinyTask()
    budget = Budget(params=0.5, macs=0.7)
    expected = search_ranks(copy.deepcopy(task), budget, example_input=torch.zeros(1, 3, 8, 8), method=search, seed=3)
    callback = Compress({"params": 0.5, "macs": 0.7}, method=search, seed=3)
    assert callback.plan is None
    make_trainer(callback).fit(task, loader)
    assert callback.plan.layers == expected.layers
    assert callback.plan.output_distance == expected.output_distance is not None
    assert (callback.plan.budget, callback.plan.method, callback.plan.seed) == (budget, search, 3)
    assert (callback.plan.objective, callback.plan.source) == (objective, "batch norm")
    assert callback.plan.compressed == expected.compressed


@pytest.mark.slow
def test_defaults_are_compress_and_then_a_plain_fit(make_trainer, loader):
    task, logger = TinyTask(), MemoryLogger()
    plain = copy.deepcopy(task)
    callback = Compress(Budget(params=0.4))
    make_trainer(callback, logger=logger, log_every_n_steps=1).fit(task, loader)
    done = compressed_model(plain, Budget(params=0.4), example_input=torch.zeros(1, 3, 8, 8))
    make_trainer().fit(plain, loader)
    assert same_state(task, plain)
    assert callback.plan.layers == done.plan.layers
    assert (callback.plan.method, callback.plan.objective, callback.plan.data_free) == (
        "continuous",
        "end_to_end",
        True,
    )
    (metrics,) = (m for _, m in logger.metrics if "compress/params" in m)
    assert metrics["compress/distance_before_healing"] == done.healing.before
    assert metrics["compress/distance_after_healing"] == done.healing.after < done.healing.before
    parts = ("synthetic inputs", "moments", "search", "swap", "regression", "distillation")
    seconds = {f"compress/seconds/{part}" for part in parts}
    assert {name for name in metrics if name.startswith("compress/seconds/")} == seconds
    assert all(metrics[name] > 0 for name in seconds)


def test_defaults_work_in_half_precision(make_trainer, loader):
    task, callback = TinyTask(), compress(kinds="auto", **DEFAULTS)
    plain = copy.deepcopy(task)
    make_trainer(callback, precision="bf16-true").fit(task, loader)
    example = torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)
    done = compressed_model(plain.to(torch.bfloat16), Budget(params=0.4), example_input=example, method="exact")
    make_trainer(precision="bf16-true").fit(plain, loader)
    assert {p.dtype for p in task.parameters()} == {torch.bfloat16}
    assert (callback.plan.objective, callback.plan.layers) == ("moments", done.plan.layers)
    assert done.healing.after < done.healing.before
    assert same_state(task, plain)


def test_include_exclude_overrides_and_rank_multiple_reach_the_search(make_trainer, loader):
    task = TinyTask()
    callback = compress(
        0.7,
        include=["net.conv*", "Linear"],
        exclude="net.conv1",
        overrides={"net.fc2": "dense", "net.fc1": {"max_rank": 6}},
        kinds=["svd", "tucker2"],
        rank_multiple=2,
    )
    make_trainer(callback).fit(task, loader)
    reasons = {p.name: p.reason for p in callback.plan.layers}
    assert reasons["net.conv1"] == "matched by exclude"
    assert reasons["net.point"] == "not matched by include"
    assert reasons["net.fc2"] == "kept dense by overrides"
    planned = {p.name: p for p in callback.plan.factorised}
    assert set(planned) <= {"net.conv2", "net.fc1"}
    assert planned
    assert {p.kind for p in planned.values()} <= {"svd", "tucker2"}
    for plan in planned.values():
        assert all(rank % 2 == 0 for rank in plan.ranks)
    assert "net.fc1" not in planned or planned["net.fc1"].ranks[0] <= 6


# --- loggers and the progress bar --------------------------------------------------------------


def expected_metrics(plan) -> dict[str, float]:
    return {
        "compress/params": float(plan.compressed.params),
        "compress/params_dense": float(DENSE_PARAMETERS),
        "compress/params_kept": plan.compressed.params / DENSE_PARAMETERS,
        "compress/macs": float(plan.compressed.macs),
        "compress/macs_dense": float(dense_macs(8)),
        "compress/macs_kept": plan.compressed.macs / dense_macs(8),
        "compress/bytes": float(plan.compressed.bytes),
        "compress/bytes_dense": float(DENSE_BYTES),
        "compress/bytes_kept": plan.compressed.bytes / DENSE_BYTES,
        "compress/round": 1.0,
        "compress/seconds/search": plan.timings["search"],
        "compress/search_seconds": plan.seconds,
        "compress/optimality_gap": plan.optimality_gap,
    }


def expected_hyperparameters(plan) -> dict:
    layers = {p.name: p.kind if p.kind == "dense" else f"{p.kind} {p.ranks}, error {p.error:.4f}" for p in plan.layers}
    return {"budget": "params <= 40 %", "method": "exact", "layers": layers}


def test_sizes_and_plan_go_to_the_csv_logger(make_trainer, loader, tmp_path):
    callback = compress()
    logger = CSVLogger(tmp_path, name="run")
    make_trainer(callback, logger=logger, log_every_n_steps=1).fit(TinyTask(), loader)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    # The sizes belong to step 0; the logger merges what else is logged there into the same row.
    assert [row["step"] for row in rows if row["compress/params"]] == ["0"]
    row = next(row for row in rows if row["compress/params"])
    assert {name: float(row[name]) for name in expected_metrics(callback.plan)} == expected_metrics(callback.plan)
    hyperparameters = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert hyperparameters["compress"] == expected_hyperparameters(callback.plan)


def test_sizes_and_plan_go_to_every_logger_once(make_trainer, loader):
    callback, loggers = compress(), [MemoryLogger(), MemoryLogger()]
    make_trainer(callback, logger=loggers, log_every_n_steps=1).fit(TinyTask(), loader)
    for logger in loggers:
        sizes = [(step, metrics) for step, metrics in logger.metrics if "compress/params" in metrics]
        assert [step for step, _ in sizes] == [0]
        assert 0 < sizes[0][1].pop("compress/seconds/swap") < 60
        assert sizes[0][1] == expected_metrics(callback.plan)
        logged = [h["compress"] for h in logger.hyperparameters if "compress" in h]
        assert logged == [expected_hyperparameters(callback.plan)]


def test_macs_are_not_logged_where_they_are_unknown(make_trainer, loader):
    class NoForward(TinyTask):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0].float()), batch[1])

    task, logger = NoForward(), MemoryLogger()
    task.example_input_array = None
    whole = DataLoader(TensorDataset(torch.ones(8, 3, 8, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)))
    callback = compress()
    make_trainer(callback, logger=logger).fit(task, whole)
    assert callback.plan.compressed.macs is None
    assert {name for _, m in logger.metrics for name in m if "macs" in name} == set()


OLD = Version(L.__version__) < Version("2.5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "bar",
    [
        "tqdm",
        pytest.param("rich", marks=pytest.mark.skipif(OLD, reason="it fails without Compress too")),
    ],
)
def test_a_progress_bar_changes_nothing(make_trainer, loader, bar, capsys):
    task = TinyTask()
    tasks = [task, copy.deepcopy(task)]
    callbacks = [compress(method="continuous"), compress(method="continuous")]
    bars = [RichProgressBar()] if bar == "rich" else []
    make_trainer(callbacks[0]).fit(tasks[0], loader)
    assert "Compress" not in capsys.readouterr().out
    make_trainer(callbacks[1], *bars, enable_progress_bar=True).fit(tasks[1], loader)
    assert callbacks[0].plan.layers == callbacks[1].plan.layers
    assert same_state(*tasks)


# --- what the callback must not disturb --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "example", "objective"),
    [
        *itertools.product(("continuous", "exact"), ("array", "batch", "argument"), (WEIGHTS_ALONE,)),
        ("continuous", "batch", DEFAULTS),
    ],
)
def test_random_state_after_fit_start_is_that_of_a_plain_run(make_trainer, loader, search, example, objective):
    shuffled = DataLoader(loader.dataset, batch_size=8, shuffle=True)
    recorders = []
    for compressed in (False, True):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        task = TinyTask() if example == "array" else without_example()
        settings = {"example_input": (1, 3, 8, 8)} if example == "argument" else {}
        recorder = Recorder()
        settings |= {"method": search, "distill": {}, **objective}
        callbacks = [compress(**settings), recorder] if compressed else [recorder]
        make_trainer(*callbacks).fit(task, shuffled)
        recorders.append((recorder, torch.get_rng_state()))
    (plain, plain_end), (ours, ours_end) = recorders
    assert torch.equal(plain.rng[0], ours.rng[0])
    assert plain.rng[1:] == ours.rng[1:]
    assert torch.equal(plain_end, ours_end)
    assert "FactorisedLayer" in ours.types
    assert all(torch.equal(a, b) for a, b in zip(plain.batches, ours.batches, strict=True))


class PythonShuffle(Sampler):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = list(range(self.length))
        random.shuffle(order)
        return iter(order)


class NoisyData(Dataset):
    # Augments with numpy's global generator, as many image pipelines do.
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        return x + float(np.random.normal()), y


def loader_of(kind: str, data: Dataset) -> DataLoader:
    generator = torch.Generator().manual_seed(9)
    if kind == "global generator":
        return DataLoader(data, batch_size=8, shuffle=True)
    if kind == "own generator":
        return DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    if kind == "sampler with its own generator":
        sampler = torch.utils.data.RandomSampler(data, generator=generator)
        return DataLoader(data, batch_size=8, sampler=sampler)
    if kind == "python's random":
        return DataLoader(data, batch_size=8, sampler=PythonShuffle(len(data)))
    return DataLoader(NoisyData(data), batch_size=8)


class TinyData(L.LightningDataModule):
    def __init__(self, kind: str, data: Dataset) -> None:
        super().__init__()
        self.kind, self.data = kind, data

    def setup(self, stage: str) -> None:
        self.loader = loader_of(self.kind, self.data)

    def train_dataloader(self) -> DataLoader:
        return self.loader


KINDS = [
    "global generator",
    "own generator",
    "sampler with its own generator",
    "python's random",
    "numpy augmentation",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["dataloader", "datamodule"])
def test_reading_the_shape_of_a_batch_does_not_move_the_users_data(make_trainer, loader, kind, source):
    seen, plans = [], []
    for compressed in (False, True):
        random.seed(6)
        np.random.seed(6)
        torch.manual_seed(6)
        task, recorder, callback = without_example(), Recorder(), compress()
        data = {"datamodule": TinyData(kind, loader.dataset)}
        if source == "dataloader":
            data = {"train_dataloaders": loader_of(kind, loader.dataset)}
        make_trainer(*([callback] if compressed else []), recorder).fit(task, **data)
        seen.append(torch.stack(recorder.batches))
        plans.append(callback.plan)
    assert plans[1].dense.macs == dense_macs(8)
    assert torch.equal(*seen)


class Stream(IterableDataset):
    # One pass over data that cannot be read twice, such as a socket.
    def __init__(self, data: Dataset) -> None:
        self.items = iter([data[i] for i in range(len(data))])

    def __iter__(self):
        return self.items


def test_a_stream_loses_no_batch_to_the_search(make_trainer, loader):
    recorder = Recorder()
    make_trainer(compress(), recorder).fit(without_example(), DataLoader(Stream(loader.dataset), batch_size=8))
    assert torch.equal(torch.cat(recorder.batches), loader.dataset.tensors[0])


# --- where the example input comes from ----------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        (1, 3, 16, 16),
        [2, 3, 16, 16],
        torch.zeros(4, 3, 16, 16),
        (torch.zeros(1, 3, 16, 16),),
        {"x": torch.ones(1, 3, 16, 16)},
    ],
    ids=["shape", "list", "tensor", "tuple", "dict"],
)
def test_example_input_of_the_callback_comes_first(make_trainer, loader, value):
    callback = compress(example_input=value)
    make_trainer(callback).fit(TinyTask(), loader)
    assert callback.plan.dense.macs == dense_macs(16)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2, 3, 12, 12), (torch.zeros(2, 3, 12, 12),), {"x": torch.zeros(2, 3, 12, 12)}],
    ids=["tensor", "tuple", "dict"],
)
def test_example_input_array_of_the_module_comes_second(make_trainer, loader, value):
    task, callback = TinyTask(), compress()
    task.example_input_array = value
    make_trainer(callback).fit(task, loader)
    assert callback.plan.dense.macs == dense_macs(12)


def test_shape_of_the_first_training_batch_comes_last(make_trainer, loader):
    callback = Compress(Budget(macs=0.5), method="exact", **WEIGHTS_ALONE)
    make_trainer(callback).fit(without_example(), loader)
    assert callback.plan.dense.macs == dense_macs(8)
    assert callback.plan.compressed.macs <= 0.5 * dense_macs(8)


def test_training_data_of_the_modules_own_dataloader_hook_is_used(make_trainer, loader):
    class WithData(TinyTask):
        def train_dataloader(self):
            return loader

    task, callback = WithData(), compress()
    task.example_input_array = None
    make_trainer(callback).fit(task)
    assert callback.plan.dense.macs == dense_macs(8)


class Tokens(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.fc = nn.Linear(16, 16)

    def forward(self, ids):
        return self.fc(self.embed(ids)).mean(dim=1)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def token_loader() -> DataLoader:
    ids = torch.arange(40).reshape(8, 5) % 10
    return DataLoader(TensorDataset(ids, ids[:, 0]), batch_size=4)


def test_macs_budget_without_any_example_input_says_what_to_give(make_trainer, unchanged):
    task = Tokens()
    before = unchanged(task.fc)
    with pytest.raises(ExampleInputError, match=r"macs <= 50 %.*needs example_input: a tensor, or a shape such as"):
        make_trainer(Compress(Budget(macs=0.5), **WEIGHTS_ALONE)).fit(task, token_loader())
    before.check()
    assert type(task.fc) is nn.Linear


def test_params_budget_works_without_any_example_input(make_trainer):
    task, callback = Tokens(), compress(0.7)
    make_trainer(callback).fit(task, token_loader())
    assert callback.plan.dense.macs is None
    assert count(task) == callback.plan.compressed.params <= 0.7 * (160 + 272)


def test_without_any_example_input_a_warning_says_there_is_no_healing(make_trainer):
    task, callback = Tokens(), Compress(Budget(params=0.7))
    plain = copy.deepcopy(task)
    with pytest.warns(CompressionWarning, match=r"the factors are not healed\. Pass an example_input, or heal=False"):
        make_trainer(callback).fit(task, token_loader())
    assert (callback.plan.objective, callback.plan.source) == ("weight", "weight")
    apply_plan_(plain, callback.plan)
    make_trainer().fit(plain, token_loader())
    assert same_state(task, plain)


def test_params_budget_works_for_a_module_without_forward(make_trainer, loader):
    # Many LightningModules call a submodule in training_step and define no forward at all.
    class NoForward(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyTask().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task, callback = NoForward(), compress()
    make_trainer(callback).fit(task, loader)
    assert count(task) == callback.plan.compressed.params <= 0.4 * DENSE_PARAMETERS


def test_example_input_the_model_fails_on_leaves_the_module_dense(make_trainer, loader, unchanged):
    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(ExampleInputError, match=r"fails on example_input \(1, 4, 8, 8\).*Shapes include the batch"):
        make_trainer(compress(example_input=(1, 4, 8, 8))).fit(task, loader)
    task.net.train()  # the trainer itself has set no mode yet
    before.check()


def test_unreachable_budget_leaves_the_module_dense(make_trainer, loader, unchanged):
    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(BudgetError, match=r"no plan keeps params <= 1 %: the smallest reachable is params=0\.\d+"):
        make_trainer(compress(0.01)).fit(task, loader)
    before.check()


# --- ways of running ------------------------------------------------------------------------------


def test_fast_dev_run_compresses_and_takes_one_step(make_trainer, loader):
    task, callback = TinyTask(), compress()
    dense = copy.deepcopy(task)
    trainer = make_trainer(callback, fast_dev_run=True)
    trainer.fit(task, loader)
    assert trainer.global_step == 1
    assert count(task) == callback.plan.compressed.params <= 0.4 * DENSE_PARAMETERS
    apply_plan_(dense, callback.plan)
    assert all(not torch.equal(a, b) for a, b in zip(factors_of(task), factors_of(dense), strict=True))


def test_gradient_accumulation_equals_a_plain_run_of_the_factorised_module(make_trainer, loader):
    task, callback = TinyTask(), compress()
    plain = copy.deepcopy(task)
    trainer = make_trainer(callback, accumulate_grad_batches=2, max_epochs=2)
    trainer.fit(task, loader)
    assert trainer.global_step == 4
    apply_plan_(plain, callback.plan)
    make_trainer(accumulate_grad_batches=2, max_epochs=2).fit(plain, loader)
    assert same_state(task, plain)


@pytest.mark.parametrize("example", ["array", "shape", "batch"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("bf16-mixed", torch.float32)]
)
def test_precision_of_the_factors_is_that_of_the_module(make_trainer, loader, precision, dtype, example):
    task = TinyTask() if example == "array" else without_example()
    plain = copy.deepcopy(task)
    callback = compress(example_input=(1, 3, 8, 8) if example == "shape" else None)
    make_trainer(callback, precision=precision).fit(task, loader)
    assert factors_of(task)
    assert {p.dtype for p in task.parameters()} == {dtype}
    assert callback.plan.dense.macs == dense_macs(8)
    apply_plan_(plain.to(dtype), callback.plan)
    make_trainer(precision=precision).fit(plain, loader)
    assert same_state(task, plain)


def test_frozen_layers_stay_frozen(make_trainer, loader):
    task = TinyTask()
    task.net.conv2.requires_grad_(False)
    task.net.fc1.weight.requires_grad_(False)
    callback = compress()
    start = copy.deepcopy(task)
    make_trainer(callback).fit(task, loader)
    apply_plan_(start, callback.plan)
    frozen = {"net.conv2", "net.fc1"}
    assert frozen <= {p.name for p in callback.plan.factorised}
    then = dict(start.named_parameters())
    for name, parameter in task.named_parameters():
        still = any(name.startswith(f"{layer}.") for layer in frozen) and not name.endswith("bias")
        assert parameter.requires_grad == (not still)
        assert torch.equal(parameter, then[name]) == still, name


def test_second_fit_only_fine_tunes(make_trainer, loader):
    task, callback = TinyTask(), compress()
    make_trainer(callback).fit(task, loader)
    plan, layers = callback.plan, [id(m) for m in task.modules()]
    plain = copy.deepcopy(task)
    logger, fresh = MemoryLogger(), compress()
    make_trainer(fresh, logger=logger).fit(task, loader)
    make_trainer().fit(plain, loader)
    assert [id(m) for m in task.modules()] == layers
    assert same_state(task, plain)
    assert {(p.name, p.kind, p.ranks) for p in fresh.plan.factorised} == {
        (p.name, p.kind, p.ranks) for p in plan.factorised
    }
    assert (fresh.plan.dense.params, fresh.plan.compressed.params) == (DENSE_PARAMETERS, plan.compressed.params)
    assert (fresh.plan.dense.bytes, fresh.plan.compressed.bytes) == (DENSE_BYTES, plan.compressed.bytes)
    make_trainer(callback).fit(task, loader)
    assert callback.plan is plan


@pytest.mark.parametrize(
    ("budget", "said"), [({"params": 0.1}, r"40\.0 %.*params <= 10 %"), ({"bytes": 0.1}, r"bytes <= 10 %")]
)
def test_factorised_module_over_the_budget_is_refused(make_trainer, loader, unchanged, budget, said):
    task = TinyTask()
    make_trainer(compress()).fit(task, loader)
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=rf"already factorised.*{said}.*start from the dense module"):
        make_trainer(Compress(budget)).fit(task, loader)
    before.check()


def test_distillation_of_a_factorised_module_is_refused(make_trainer, loader, unchanged):
    task = TinyTask()
    make_trainer(compress()).fit(task, loader)
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=r"distill= needs the dense module as its teacher.*already factorised"):
        make_trainer(compress(distill=Distill())).fit(task, loader)
    before.check()


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


def test_checkpoint_hooks_set_on_the_instance_still_run(make_trainer, loader, tmp_path):
    task = TinyTask()
    loaded = []
    task.on_save_checkpoint = lambda checkpoint: checkpoint.update(mine=7)
    task.on_load_checkpoint = lambda checkpoint: loaded.append(checkpoint["mine"])
    trainer = make_trainer(compress())
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.test(task, loader, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert loaded == [7]


# --- arguments ------------------------------------------------------------------------------------


def test_omegaconf_arguments_are_plain_afterwards(make_trainer, loader):
    settings = OmegaConf.create(
        {
            "budget": {"params": 0.5, "macs": 0.8},
            "kinds": ["svd", "spatial_svd"],
            "include": ["net.*"],
            "exclude": ["net.fc2"],
            "overrides": {"net.fc1": {"kinds": ["svd"], "max_rank": 4}, "net.conv1": "dense"},
            "schedule": {"warmup_steps": 2, "freeze_epochs": 1},
            "distill": {"weight": 0.25, "temperature": 3, "module": "net"},
            "example_input": [1, 3, 8, 8],
        }
    )
    plain = OmegaConf.to_container(settings)
    ours = Compress(**{name: settings[name] for name in settings}, method="exact", **WEIGHTS_ALONE)
    theirs = Compress(**plain, method="exact", **WEIGHTS_ALONE)
    assert (ours.budget, ours.schedule, ours.distill) == (
        Budget(params=0.5, macs=0.8),
        Schedule(2, 1),
        Distill(0.25, 3, "net"),
    )
    for name in ("kinds", "include", "exclude", "overrides"):
        assert getattr(ours.settings, name) == plain[name]
        assert type(getattr(ours.settings, name)) is type(plain[name])
    assert (ours.example_input, type(ours.example_input)) == (plain["example_input"], list)
    first = TinyTask()
    second = copy.deepcopy(first)
    make_trainer(ours).fit(first, loader)
    make_trainer(theirs).fit(second, loader)
    assert ours.plan.layers == theirs.plan.layers
    assert ours.plan.dense.macs == dense_macs(8)
    assert same_state(first, second)


def test_dataclass_arguments_equal_their_mappings(make_trainer, loader):
    first = TinyTask()
    second = copy.deepcopy(first)
    ours = compress(
        0.5, overrides={"net.fc1": Override(max_rank=3)}, schedule=Schedule(warmup_steps=3), distill=Distill(weight=0.2)
    )
    theirs = Compress(
        {"ratio": "2x"},
        method="exact",
        overrides={"net.fc1": {"max_rank": 3}},
        schedule={"warmup_steps": 3},
        distill={"weight": 0.2},
        kinds=CLOSED_FORM,
        **WEIGHTS_ALONE,
    )
    make_trainer(ours).fit(first, loader)
    make_trainer(theirs).fit(second, loader)
    assert ours.plan.layers == theirs.plan.layers
    assert same_state(first, second)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"budget": 0.2}, BudgetError, r"budget=0\.2: expected a Budget or a mapping, as in Budget\(params=0\.2\)"),
        ({"budget": {"parameters": 0.2}}, ConfigurationError, r"unknown key 'parameters'.*Did you mean 'params'"),
        ({"kinds": "svdd"}, ConfigurationError, r"'svdd'.*Did you mean.*svd"),
        ({"method": "exactly"}, ConfigurationError, r"'exactly' is unknown\. Did you mean 'exact'\?"),
        (
            {"objective": "end_to_end", "method": "exact"},
            ConfigurationError,
            r"objective='end_to_end' is nothing for method='exact'.*that take it: 'continuous'",
        ),
        ({"objective": "weights"}, ConfigurationError, r"objective='weights' is unknown\. Did you mean 'weight'\?"),
        ({"rank_multiple": 0}, ConfigurationError, r"rank_multiple=0: expected a whole number of at least 1"),
        ({"seed": -1}, ConfigurationError, r"seed=-1: expected a whole number of at least 0"),
        ({"schedule": {"warmup": 3}}, ConfigurationError, r"schedule: unknown key 'warmup'.*'warmup_steps'"),
        ({"distill": {"weights": 1}}, ConfigurationError, r"distill: unknown key 'weights'.*'weight'"),
    ],
)
def test_wrong_argument_is_refused_when_the_callback_is_made(settings, error, said):
    with pytest.raises(error, match=said):
        Compress(**{"budget": Budget(params=0.5), **settings})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"include": "net.convolution1"}, r"include: 'net\.convolution1' matches no layer.*'net\.conv1'"),
        ({"exclude": ["net.fc9"]}, r"exclude: 'net\.fc9' matches no layer"),
        ({"overrides": {"net.fc9": "dense"}}, r"overrides: 'net\.fc9' matches no layer"),
        ({"overrides": {"net.fc1": {"rank": 3}}}, r"overrides\['net\.fc1'\]: unknown key 'rank'.*max_rank"),
        ({"overrides": ["net.fc1"]}, r"overrides=\['net\.fc1'\]: expected a mapping"),
        ({"include": 3}, r"include=3: expected a name, a glob, a layer type, or a list"),
    ],
)
def test_wrong_selection_leaves_the_module_dense(make_trainer, loader, unchanged, settings, said):
    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(ConfigurationError, match=said):
        make_trainer(compress(**settings)).fit(task, loader)
    before.check()


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_pruning_beside_it_is_refused(make_trainer, loader, unchanged, first):
    task, other = TinyTask(), ModelPruning("l1_unstructured", amount=0.5)
    before = unchanged(task.net)
    callbacks = [compress(), other] if first else [other, compress()]
    with pytest.raises(UnsupportedError, match=r"does not support ModelPruning in the same fit.*in a later fit"):
        make_trainer(*callbacks).fit(task, loader)
    before.check()


def test_two_compress_callbacks_are_refused(make_trainer, loader, unchanged):
    class OtherCompress(Compress):
        @property
        def state_key(self) -> str:  # Lightning itself refuses two callbacks of one state key
            return "other"

    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(UnsupportedError, match=r"more than one Compress callback: use one, its budget may"):
        make_trainer(compress(), OtherCompress(Budget(macs=0.5))).fit(task, loader)
    before.check()


# --- the first-batch check ---------------------------------------------------------------------------------


class Listed(L.LightningModule):
    def __init__(self, container=list) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.layers = container([self.first, self.second])
        self.batches = 0

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def rows() -> DataLoader:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(16, 24, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


@pytest.mark.parametrize("settings", [{}, {"distill": {}, "schedule": {"warmup_steps": 3}}])
def test_layers_held_in_a_plain_list_are_an_error_after_the_first_batch(make_trainer, rows, settings):
    task = Listed()
    first, second = task.first, task.second
    named = r"still runs the dense module of 'first', 'second'.*\(nn\.ModuleList\) or exclude it"
    with pytest.raises(OrphanParameterError, match=named):
        make_trainer(compress(0.5, overrides={"head": "dense"}, **settings)).fit(task, rows)
    assert task.batches == 1
    assert not first._forward_pre_hooks
    assert not second._forward_pre_hooks
    assert not task._forward_hooks
    assert "training_step" not in task.__dict__


def test_only_the_layers_that_the_list_holds_are_named(make_trainer, rows):
    class OneListed(Listed):
        def forward(self, x):
            return self.head(F.relu(self.second(F.relu(self.layers[0](x)))))

    with pytest.raises(OrphanParameterError, match=r"dense module of 'first': something outside"):
        make_trainer(compress(0.5, overrides={"head": "dense"})).fit(OneListed(), rows)


def test_listed_layers_in_a_module_list_or_excluded_are_fine(make_trainer, rows):
    registered, callback = Listed(nn.ModuleList), compress(0.6)
    make_trainer(callback).fit(registered, rows)
    assert {p.name for p in callback.plan.factorised} >= {"first", "second"}
    assert registered.layers[0] is registered.first
    excluded, callback = Listed(), compress(0.95, include="head")
    make_trainer(callback).fit(excluded, rows)
    assert [p.name for p in callback.plan.factorised] == ["head"]
    assert excluded.batches == 4


def test_forward_hooks_of_replaced_layers_keep_working(make_trainer, loader):
    task = TinyTask()
    seen = []
    handle = task.net.fc1.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    callback = compress()
    make_trainer(callback).fit(task, loader)
    assert "net.fc1" in {p.name for p in callback.plan.factorised}
    assert seen[-4:] == ["FactorisedLayer"] * 4
    handle.remove()
    calls = len(seen)
    task(torch.zeros(1, 3, 8, 8))
    assert len(seen) == calls

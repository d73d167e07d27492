"""Where the example input comes from, and that looking for it and searching disturb neither data nor random numbers."""

from __future__ import annotations

import copy
import itertools
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from lightning_compress import Budget, Compress
from lightning_compress.core.errors import CompressionWarning, ExampleInputError
from tests.support.compressing import DEFAULTS, WEIGHTS_ALONE, compress
from tests.support.fitting import QUIET, count, require_plain_fit
from tests.support.loggers import MemoryLogger
from tests.support.nets import DENSE_PARAMETERS, TinyTask, dense_macs

pytestmark = QUIET


def without_example() -> TinyTask:
    task = TinyTask()
    task.example_input_array = None
    return task


def image(size: int) -> torch.Tensor:
    return torch.zeros(2, 3, size, size)


# --- where it comes from -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "own", "size"),
    [
        *((shape, image(12), 16) for shape in ((1, 3, 16, 16), [2, 3, 16, 16])),
        *((value, image(12), 16) for value in (image(16), (image(16),), {"x": image(16)})),
        *((None, value, 12) for value in (image(12), (image(12),), {"x": image(12)})),
        (None, None, 8),
    ],
)
def test_example_input_is_the_callbacks_else_the_modules_else_of_the_shape_of_a_batch(
    make_trainer, loader, given, own, size
):
    task = TinyTask()
    task.example_input_array = own
    callback = Compress(Budget(macs=0.5), method="exact", example_input=given, **WEIGHTS_ALONE)
    make_trainer(callback).fit(task, loader)
    assert callback.plan.dense.macs == dense_macs(size)
    assert callback.plan.compressed.macs <= 0.5 * dense_macs(size)


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


def test_macs_budget_without_any_example_input_says_what_to_give(make_trainer, loader, unchanged):
    task = NoForward()
    before = unchanged(task.net)
    with pytest.raises(ExampleInputError, match=r"no example input could be made .* pass Compress\(example_input=…\)"):
        make_trainer(Compress(Budget(macs=0.5), **WEIGHTS_ALONE)).fit(task, loader)
    before.check()


def test_tokens_are_zeros_of_the_shape_of_a_batch(make_trainer):
    callback = compress(0.8)
    make_trainer(callback).fit(Tokens(), token_loader())
    assert callback.plan.dense.macs == 5 * 16 * 16


class NoForward(L.LightningModule):
    # Many LightningModules call a submodule in training_step and define no forward at all.
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyTask().net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_params_budget_works_without_any_example_input(make_trainer, loader):
    task, callback, logger = NoForward(), compress(0.4), MemoryLogger()
    make_trainer(callback, logger=logger).fit(task, loader)
    assert count(task) == callback.plan.compressed.params <= 0.4 * DENSE_PARAMETERS
    assert callback.plan.dense.macs is None
    assert {name for _, m in logger.metrics for name in m if "macs" in name} == set()


def test_without_any_example_input_a_warning_says_there_is_no_healing(make_trainer, loader):
    task, callback = NoForward(), Compress(Budget(params=0.7))
    with pytest.warns(CompressionWarning, match=r"the factors are not healed\. Pass an example_input, or heal=False"):
        require_plain_fit(make_trainer, loader, task, copy.deepcopy(task), callback)
    assert (callback.plan.objective, callback.plan.source) == ("weight", "weight")


# --- what it must not disturb --------------------------------------------------------------------------


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


KINDS = ["global generator", "own generator", "sampler with its own generator", "python's random", "numpy augmentation"]


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


# --- a batch is looked at in a process of its own --------------------------------------------------------


class Watched(Dataset):
    # Notes which items this process asks for, and opens something when it is first asked, as lazy data sets do.
    def __init__(self, data: Dataset) -> None:
        self.data, self.handle, self.asked = data, None, []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        self.handle = self.handle or object()
        self.asked.append(index)
        return self.data[index]


class CountedData(L.LightningDataModule):
    def __init__(self, data: Dataset) -> None:
        super().__init__()
        self.data, self.calls = data, 0

    def train_dataloader(self) -> DataLoader:
        self.calls += 1
        return DataLoader(self.data, batch_size=8, collate_fn=self.collate)

    def collate(self, samples):
        self.batches = getattr(self, "batches", 0) + 1
        return torch.utils.data.default_collate(samples)


def test_data_of_this_process_are_touched_by_lightning_alone(make_trainer, loader):
    counted = []
    for callbacks in ([], [compress()]):
        data = CountedData(Watched(loader.dataset))

        class AtStart(Callback):
            def on_fit_start(self, trainer, pl_module, data=data) -> None:
                assert data.data.handle is None
                assert data.data.asked == []

        make_trainer(*callbacks, AtStart(), max_epochs=3, reload_dataloaders_every_n_epochs=2).fit(
            without_example(), datamodule=data
        )
        counted.append((data.calls, data.batches, data.data.asked))
    assert counted[0] == counted[1]
    assert counted[0][0] == 2


def even(samples):
    assert len(samples) % 2 == 0, "an even number, please"
    return torch.utils.data.default_collate(samples)


def without_none(samples):
    return torch.utils.data.default_collate([sample for sample in samples if sample is not None])


class Keyed(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.items = {f"key {i}": data[i] for i in range(len(data))}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: str):
        return self.items[key]


class WithAHole(NoisyData):
    def __getitem__(self, index: int):
        return None if index == 0 else self.data[index]


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, batch_size=8, collate_fn=even),
        lambda data: DataLoader(Keyed(data), batch_size=8, sampler=[f"key {i}" for i in range(len(data))]),
        lambda data: DataLoader(WithAHole(data), batch_size=8, collate_fn=without_none),
        lambda data: DataLoader(data, batch_size=8, num_workers=1, persistent_workers=True, prefetch_factor=1),
    ],
    ids=["even batches alone", "keys in the place of numbers", "samples that are left out", "workers"],
)
def test_a_batch_is_fetched_as_the_loader_does_it(make_trainer, loader, make):
    callback = compress()
    make_trainer(callback).fit(without_example(), make(loader.dataset))
    assert callback.plan.dense.macs == dense_macs(8)


class Entries(Dataset):
    # What tokenizers make: whole numbers under names, one of which says what is to be read.
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        return {"ids": torch.arange(5), "attention_mask": torch.ones(5).long(), "labels": torch.tensor(index % 2)}


class ByName(Tokens):
    def __init__(self, taking: str) -> None:
        super().__init__()
        self.forward = {"names": self.by_names, "anything": self.by_anything, "a batch": self.by_batch}[taking]

    def by_names(self, ids, attention_mask, labels=None):
        assert labels is None or int(labels.max()) < 2
        assert (attention_mask == 1).all()
        return self.fc(self.embed(ids)).mean(dim=1)

    def by_anything(self, **inputs):
        return self.by_names(**inputs)

    def by_batch(self, batch):
        return self.by_names(batch["ids"], batch["attention_mask"])

    def training_step(self, batch, batch_idx):
        outputs = self(batch) if self.forward == self.by_batch else self(**batch)
        return F.cross_entropy(outputs, batch["labels"])


@pytest.mark.parametrize("taking", ["names", "anything", "a batch"])
def test_entries_of_a_batch_are_arguments_by_name(make_trainer, taking):
    callback = compress(0.8)
    make_trainer(callback).fit(ByName(taking), DataLoader(Entries(), batch_size=4))
    assert callback.plan.dense.macs == 5 * 16 * 16


def test_each_guess_that_failed_is_named_once_with_what_to_do(make_trainer, caplog):
    class Picky(ByName):
        def by_names(self, ids, attention_mask, labels=None):
            if labels is None:
                raise ValueError("labels, please")
            return super().by_names(ids, attention_mask).unflatten(1, (3, 5)) if not self.training else ids

    data, task = DataLoader(Entries(), batch_size=4), Picky("names")
    with pytest.raises(ExampleInputError) as error:
        make_trainer(Compress(Budget(macs=0.5), **WEIGHTS_ALONE)).fit(task, data)
    message = str(error.value)
    assert "with the entries ids, attention_mask, the model fails" in message
    assert "labels, please" in message
    assert "with the entries ids, attention_mask, labels, the model fails" in message
    assert "self.example_input_array" in message
    assert message.count("labels, please") == 1
    with pytest.raises(ExampleInputError, match="the training data are a list, no DataLoader"):
        make_trainer(Compress(Budget(macs=0.5), **WEIGHTS_ALONE)).fit(task, [data])


class Failing(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        raise OSError("no such disk")


def test_data_that_cannot_be_read_are_read_by_lightning_first(make_trainer):
    with pytest.raises(ExampleInputError, match="fetching a batch by itself failed: OSError: no such disk"):
        make_trainer(Compress(Budget(macs=0.5), **WEIGHTS_ALONE)).fit(without_example(), DataLoader(Failing()))

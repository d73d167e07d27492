"""The data modules: splits, limits, augmentation, and files that are damaged or missing."""

from __future__ import annotations

import gzip
import itertools
import struct

import lightning as L
import numpy as np
import pytest
import torch

from lightning_compress.cli.demo import data as demo_data
from lightning_compress.cli.demo.data import DigitsDataModule, FashionMNISTDataModule
from lightning_compress.core.errors import ConfigurationError, DataNotFoundError
from tests.support.interruptions import block_imports

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def splits(module):
    module.setup("fit")
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    return [loader.dataset.tensors for loader in loaders]


def rows(images, labels):
    table = np.column_stack([images.flatten(1).numpy(), labels.numpy()])
    return table[np.lexsort(table.T)]


# --- digits ----------------------------------------------------------------------------------


def test_digits_splits_hold_every_image_once_normalised():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    normalised = ((pixels - pixels.mean()) / pixels.std()).astype(np.float32)
    parts = splits(DigitsDataModule())
    assert [len(y) for _, y in parts] == [1078, 120, 599]
    images, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    whole = torch.bincount(targets)
    for _, own in parts:  # stratified
        assert (torch.bincount(own, minlength=10) - whole * len(own) / whole.sum()).abs().max() <= 1
    assert images.shape == (1797, 1, 8, 8)
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(rows(images, targets), rows(torch.from_numpy(normalised), torch.from_numpy(labels)))
    assert abs(float(images.double().mean())) < 1e-6
    assert abs(float(images.double().std(correction=0)) - 1) < 1e-6


def test_digits_splits_depend_on_their_seed_alone():
    torch.manual_seed(1)
    first = splits(DigitsDataModule(seed=3))
    torch.manual_seed(2)
    again, other = splits(DigitsDataModule(seed=3)), splits(DigitsDataModule(seed=4))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[2][0], other[2][0])


@pytest.mark.parametrize("limit", [1, 100, 500, 5000])
def test_limit_keeps_the_first_images_of_each_split(limit):
    for (images, labels), (all_images, all_labels) in zip(
        splits(DigitsDataModule(limit=limit)), splits(DigitsDataModule()), strict=True
    ):
        assert torch.equal(images, all_images[:limit])
        assert torch.equal(labels, all_labels[:limit])


def test_loaders_batch_as_documented_and_shuffle_training_batches_alone():
    module = DigitsDataModule(batch_size=50, limit=230)
    (train, _), (val, _), (test, _) = splits(module)
    assert [len(y) for _, y in module.train_dataloader()] == [50, 50, 50, 50]
    assert [len(y) for _, y in module.val_dataloader()] == [120]
    assert [len(y) for _, y in module.test_dataloader()] == [200, 30]
    module.setup("test")  # loads once
    assert module.train_dataloader().dataset.tensors[0] is train
    torch.manual_seed(0)
    assert not torch.equal(next(iter(module.train_dataloader()))[0], train[:50])
    for loader, images in ((module.val_dataloader(), val), (module.test_dataloader(), test)):
        assert torch.equal(torch.cat([x for x, _ in loader]), images)


@pytest.mark.parametrize("make", [DigitsDataModule, FashionMNISTDataModule])
@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", v) for v in (0, -1, 2.5, "64", True, None)] + [("limit", v) for v in (0, -3, 1.5, "10", True)],
)
def test_sizes_are_whole_numbers_of_at_least_one(make, name, value):
    with pytest.raises(ConfigurationError) as caught:
        make(**{name: value})
    assert str(caught.value) == f"{make.__name__}({name}={value!r}): expected a whole number of at least 1."


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch):
    block_imports(monkeypatch, "sklearn")
    module = DigitsDataModule()
    with pytest.raises(DataNotFoundError, match=r"scikit-learn.*pip install 'lightning_compress\[demo\]'"):
        module.setup("fit")


# --- augmentation ----------------------------------------------------------------------------


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_and_test(module, make_trainer, epochs):
    recorder, trainer = Recorder(), make_trainer(max_epochs=epochs)
    trainer.fit(recorder, datamodule=module)
    trainer.test(recorder, datamodule=module, verbose=False)
    return recorder.seen


def transforms(images, reach, *, flips):
    """(flip, rows, columns) and the images so shifted, for all of them."""
    steps = range(-reach, reach + 1)
    for flip, dy, dx in itertools.product((False, True) if flips else (False,), steps, steps):
        yield (flip, dy, dx), torch.roll(images.flip(3) if flip else images, (dy, dx), dims=(2, 3))


class FakeFashion(FashionMNISTDataModule):
    """Random images instead of files; every image is different and unsymmetric."""

    def load(self):
        generator = torch.Generator().manual_seed(0)
        return {
            name: (torch.randn(64, 1, 28, 28, generator=generator), torch.arange(64))
            for name in ("train", "val", "test")
        }


@pytest.mark.parametrize(
    ("module", "reach", "flips", "batch", "epochs"),
    [
        (DigitsDataModule(batch_size=77), 1, False, 77, 5),
        (FakeFashion(batch_size=1), 2, True, 1, 4),
    ],
)
def test_training_batches_are_shifted_and_only_clothes_flipped(make_trainer, module, reach, flips, batch, epochs):
    seen = fit_and_test(module, make_trainer, epochs)
    train = module.train_dataloader().dataset.tensors
    originals = {}
    for variant, images in transforms(train[0], reach, flips=flips):
        for image in images:
            originals.setdefault(image.numpy().tobytes(), set()).add(variant)
    used = set()
    for images, labels in seen["train"]:
        assert len(labels) == batch
        # one flip and one shift for the whole batch: some variant explains every image
        common = set.intersection(*(originals[image.numpy().tobytes()] for image in images))
        assert common
        used |= common
    shifts = {(dy, dx) for _, dy, dx in used}
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == set(range(-reach, reach + 1))
    assert {flip for flip, _, _ in used} == ({False, True} if flips else {False})


@pytest.mark.parametrize("augment", [True, False])
def test_validation_and_test_batches_are_left_alone_and_those_of_training_without_augment(make_trainer, augment):
    module = FakeFashion(batch_size=16, augment=augment)
    seen, (given, _) = fit_and_test(module, make_trainer, 1), module.train_dataloader().dataset.tensors
    for name, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        images, labels = (torch.cat(tensors) for tensors in zip(*seen[name], strict=True))
        assert torch.equal(images, loader.dataset.tensors[0])
        assert torch.equal(labels, loader.dataset.tensors[1])
    assert all(torch.equal(images, given[labels]) for images, labels in seen["train"]) is not augment


# --- Fashion-MNIST ---------------------------------------------------------------------------


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_data, "_DEBIAN", tmp_path / "debian")


@pytest.fixture
def idx_folder(tmp_path):
    """Four IDX files of random images: 5,006 to train (6 after the split), 7 to test."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    raw = {}
    for split, count in (("train", 5006), ("t10k", 7)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        write(folder / f"{split}-images-idx3-ubyte.gz", header + images.tobytes())
        write(folder / f"{split}-labels-idx1-ubyte.gz", struct.pack(">II", 0x801, count) + labels.tobytes())
        raw[split] = images, labels
    return folder, raw


def write(path, content):
    path.write_bytes(gzip.compress(content, compresslevel=1))


@pytest.mark.usefixtures("no_debian")
def test_idx_files_are_read_split_and_normalised(idx_folder):
    folder, raw = idx_folder
    parts = splits(FashionMNISTDataModule(folder=str(folder), download=False))
    images, labels = raw["train"]
    expected = [(images[:6], labels[:6]), (images[6:], labels[6:]), raw["t10k"]]
    for (x, y), (pixels, classes) in zip(parts, expected, strict=True):
        assert x.shape == (len(pixels), 1, 28, 28)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        reference = (pixels.astype(np.float64) / 255 - 0.2860) / 0.3530
        np.testing.assert_allclose(x[:, 0].numpy(), reference, atol=1e-6)
        np.testing.assert_array_equal(y.numpy(), classes)


def test_the_given_folder_comes_before_debians(idx_folder, monkeypatch, tmp_path):
    folder, raw = idx_folder
    other = tmp_path / "other"
    other.mkdir()
    for name in FILES:
        write(other / f"{name}.gz", b"\0" * 16)
    monkeypatch.setattr(demo_data, "_DEBIAN", other)
    test = splits(FashionMNISTDataModule(folder=folder, download=False))[2]
    np.testing.assert_array_equal(test[1].numpy(), raw["t10k"][1])


def test_debians_files_serve_when_no_folder_or_an_incomplete_one_is_given(idx_folder, monkeypatch, tmp_path):
    folder, raw = idx_folder
    monkeypatch.setattr(demo_data, "_DEBIAN", folder)
    for given in (None, tmp_path / "nowhere"):
        test = splits(FashionMNISTDataModule(folder=given, download=False))[2]
        np.testing.assert_array_equal(test[1].numpy(), raw["t10k"][1])


def middle_flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 64]) + content[middle + 64 :]


@pytest.mark.usefixtures("no_debian")
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not gzip at all",
        lambda content: content[: len(content) // 2],
        middle_flipped,
        lambda content: content[:10] + b"\xff" * 20 + content[30:],
        lambda content: gzip.compress(b"\0" * 4),
        lambda content: gzip.compress(gzip.decompress(content)[:-1]),
    ],
    ids=["empty", "foreign", "truncated", "middle", "deflate", "no-header", "one-byte-short"],
)
def test_damaged_file_is_named(idx_folder, name, damage):
    folder, _ = idx_folder
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    module = FashionMNISTDataModule(folder=folder, download=False)
    with pytest.raises(DataNotFoundError) as caught:
        module.setup("fit")
    assert repr(str(path)) in str(caught.value)
    assert "Get the file again" in str(caught.value)


@pytest.mark.usefixtures("no_debian")
@pytest.mark.parametrize("missing", FILES)
def test_one_missing_file_is_enough_to_refuse(idx_folder, missing):
    folder, _ = idx_folder
    (folder / f"{missing}.gz").unlink()
    with pytest.raises(DataNotFoundError) as caught:
        FashionMNISTDataModule(folder=folder, download=False).setup("fit")
    words = (repr(str(folder)), "download=false", "dataset-fashion-mnist", "data.module.folder=PATH")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.usefixtures("no_debian")
def test_without_a_folder_nothing_is_downloaded(tmp_path):
    with pytest.raises(DataNotFoundError, match="no folder was given to download it to") as caught:
        FashionMNISTDataModule().setup("fit")
    assert repr(str(tmp_path / "debian")) in str(caught.value)


@pytest.mark.usefixtures("no_debian")
def test_download_without_torchvision_says_why_it_failed(monkeypatch, tmp_path):
    block_imports(monkeypatch, "torchvision")
    folder = tmp_path / "new"
    with pytest.raises(
        DataNotFoundError, match=r"download failed \(ModuleNotFoundError: No module named 'torchvision'"
    ):
        FashionMNISTDataModule(folder=folder).setup("fit")
    assert not folder.exists()


@pytest.mark.skipif(not (demo_data._DEBIAN / f"{FILES[0]}.gz").is_file(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist():
    (train, train_y), (val, val_y), (test, test_y) = splits(FashionMNISTDataModule(download=False))
    assert [len(x) for x in (train, val, test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(torch.cat([train_y, val_y])).tolist() == [6_000] * 10
    assert torch.bincount(test_y).tolist() == [1_000] * 10
    whole = torch.cat([train, val])
    assert abs(float(whole.mean(dtype=torch.float64))) < 1e-3
    assert abs(float((whole - whole.mean()).square().mean(dtype=torch.float64).sqrt()) - 1) < 1e-3
    assert test_y[:5].tolist() == [9, 2, 1, 1, 6]

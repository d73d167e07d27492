"""Data of the user's own without a line of code: folders of images, and tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import override

from lightning_compress.core.errors import DataNotFoundError, UnsupportedError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_SHARES = (0.8, 0.9)


class ImageFolderDataModule(LightningDataModule):
    """Images in a folder for each class, below `train`, `val` and `test`, or in one tree that is split 80:10:10.

    Args:
        root: The folder.
        size: Height and width.
        channels: 3, or 1 for grey images.
        batch_size: Images per batch.
        augment: Whether training images are cropped and flipped at random.
        num_workers: Processes that read images.
        seed: Of the split.

    Raises:
        UnsupportedError: In `setup`, if torchvision is not installed.
        DataNotFoundError: In `setup`, if the folder has no images in folders.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 224,
        *,
        channels: int = 3,
        batch_size: int = 64,
        augment: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.size, self.channels, self.augment = Path(root), size, channels, augment
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._parts: dict[str, Dataset[Any]] = {}

    @override
    def setup(self, stage: str) -> None:
        """Lists the images once."""
        if self._parts:
            return
        train, test = self._transform(training=True), self._transform(training=False)
        if (self.root / "train").is_dir():
            val = "val" if (self.root / "val").is_dir() else "test"
            names = {"train": "train", "val": val, "test": "test" if (self.root / "test").is_dir() else val}
            self._parts = {
                part: self._folder(self.root / name, train if part == "train" else test) for part, name in names.items()
            }
            return
        augmented, plain = self._folder(self.root, train), self._folder(self.root, test)
        order = np.random.default_rng(self.seed).permutation(len(augmented))
        cuts = np.split(order, [int(share * len(order)) for share in _SHARES])
        self._parts = {
            part: Subset(augmented if part == "train" else plain, index.tolist())
            for part, index in zip(("train", "val", "test"), cuts, strict=True)
        }

    def _folder(self, folder: Path, transform: Any) -> Any:
        from torchvision.datasets import ImageFolder  # noqa: PLC0415

        try:
            return ImageFolder(str(folder), transform)
        except (OSError, ValueError) as error:
            msg = (
                f"no images in a folder for each class are in {str(folder)!r}: {error}. Give it with data.root=FOLDER."
            )
            raise DataNotFoundError(msg) from error

    def _transform(self, *, training: bool) -> Any:
        try:
            from torchvision import transforms as t  # noqa: PLC0415
        except ImportError as error:
            msg = "data=image_folder needs torchvision: pip install 'lightning_compress[vision]'."
            raise UnsupportedError(msg) from error
        if training and self.augment:
            steps: list[Any] = [t.RandomResizedCrop(self.size, scale=(0.5, 1.0)), t.RandomHorizontalFlip()]
        else:
            steps = [t.Resize(self.size), t.CenterCrop(self.size)]
        grey = [t.Grayscale()] if self.channels == 1 else []
        return t.Compose([*steps, *grey, t.ToTensor(), t.Normalize(_MEAN[: self.channels], _STD[: self.channels])])

    def _loader(self, part: str) -> DataLoader[Any]:
        data: Any = self._parts[part]
        size = min(self.batch_size, len(data))
        training = part == "train"
        return DataLoader(data, size, shuffle=training, drop_last=training, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns shuffled training batches."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns test batches."""
        return self._loader("test")


class TableDataModule(LightningDataModule):
    """Rows of numbers in a CSV file with a head; split 80:10:10 and standardised by the training rows.

    Args:
        path: The file.
        target: Name of the column to predict; the others are inputs.
        classes: Whether the target is a class (a whole number from 0) and no quantity.
        batch_size: Rows per batch.
        seed: Of the split.

    Raises:
        DataNotFoundError: In `setup`, if the file cannot be read, or has no such column.
    """

    def __init__(
        self, path: str | Path, target: str, *, classes: bool = False, batch_size: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        self.path, self.target, self.classes = Path(path), target, classes
        self.batch_size, self.seed = batch_size, seed
        self._parts: dict[str, TensorDataset] = {}

    @override
    def setup(self, stage: str) -> None:
        """Reads the file once."""
        if self._parts:
            return
        inputs, targets = read_table(self.path, self.target)
        order = np.random.default_rng(self.seed).permutation(len(inputs))
        cuts = np.split(order, [int(share * len(order)) for share in _SHARES])
        mean, std = inputs[cuts[0]].mean(0), inputs[cuts[0]].std(0)
        inputs = (inputs - mean) / np.where(std > 0, std, 1)
        if not self.classes:
            targets = (targets - targets[cuts[0]].mean()) / max(targets[cuts[0]].std(), 1e-12)
        x, y = torch.from_numpy(inputs).float(), torch.from_numpy(targets)
        y = y.long() if self.classes else y.float()
        self._parts = {
            name: TensorDataset(x[index], y[index]) for name, index in zip(("train", "val", "test"), cuts, strict=True)
        }

    def _loader(self, part: str) -> DataLoader[tuple[torch.Tensor, ...]]:
        rows, training = self._parts[part], part == "train"
        return DataLoader(rows, min(self.batch_size, len(rows)), shuffle=training, drop_last=training)

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns shuffled training batches."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns test batches."""
        return self._loader("test")


def read_table(path: str | Path, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs (N, columns) and targets (N,) of a CSV file.

    Raises:
        DataNotFoundError: If it cannot be read, or has no such column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        head, values = rows[0], np.array(rows[1:], dtype=np.float64)
        column = head.index(target)
    except (OSError, IndexError, ValueError) as error:
        msg = (
            f"no table of numbers with column {target!r} is in {str(path)!r}: {error}. Give a CSV file with a head by "
            "data.path=FILE, and the column to predict by data.target=NAME."
        )
        raise DataNotFoundError(msg) from error
    return np.delete(values, column, axis=1), values[:, column]


def classes_in(root: str) -> int:
    """Returns the number of classes in a folder of images, which are its folders, or those below `train`.

    Raises:
        DataNotFoundError: If there are none.
    """
    folder = Path(root) / "train" if (Path(root) / "train").is_dir() else Path(root)
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    if not found:
        msg = f"no folder for each class is in {root!r}: give the folder of the images with data.root=FOLDER."
        raise DataNotFoundError(msg)
    return len(found)


def columns_in(path: str, target: str) -> int:
    """Returns the number of inputs in a table."""
    return int(cast(Any, read_table(path, target)[0]).shape[1])


OmegaConf.register_new_resolver("lightning_compress.classes_in", classes_in, replace=True)
OmegaConf.register_new_resolver("lightning_compress.columns_in", columns_in, replace=True)

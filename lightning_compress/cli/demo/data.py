"""Two image data sets that need no account: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_compress.core.checks import require_count
from lightning_compress.core.errors import DataNotFoundError

Batch = tuple[Tensor, Tensor]

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_IMAGES = "{split}-images-idx3-ubyte.gz"
_LABELS = "{split}-labels-idx1-ubyte.gz"
_MEAN, _STD = 0.2860, 0.3530  # of the training images, in [0, 1]
_VALIDATION_IMAGES = 5_000


class ImageDataModule(LightningDataModule):
    """Images held in memory, in three splits.

    Args:
        batch_size: Images per training batch; evaluation uses four times as many.
        augment: Flip (only where that keeps the class) and shift each training batch at random.
        limit: Keep only the first images of each split, for a quick look; None for all.
    """

    flips = False

    def __init__(self, batch_size: int = 64, *, augment: bool = True, limit: int | None = None) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if name == "batch_size" or value is not None:
                require_count(f"{type(self).__name__}({name}={value!r})", value, 1)
        self.batch_size, self.augment, self.limit = batch_size, augment, limit
        self._splits: dict[str, TensorDataset] = {}

    @abstractmethod
    def load(self) -> dict[str, Batch]:
        """Returns images (N, C, H, W) and labels (N,) of "train", "val" and "test"."""

    @override
    def setup(self, stage: str) -> None:
        """Loads the data once."""
        if not self._splits:
            splits = self.load()
            self._splits = {name: TensorDataset(x[: self.limit], y[: self.limit]) for name, (x, y) in splits.items()}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Returns shuffled training batches."""
        images = self._splits["train"]  # a last batch of one image would break batch norm, hence drop_last
        return DataLoader(images, min(self.batch_size, len(images)), shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Returns validation batches."""
        return DataLoader(self._splits["val"], 4 * self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Returns test batches."""
        return DataLoader(self._splits["test"], 4 * self.batch_size)

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments training batches: one flip and one shift of up to a tenth for the whole batch."""
        if not (self.augment and self.trainer is not None and self.trainer.training):
            return batch
        if isinstance(cast(Any, batch), torch.Tensor):  # the model summary sends its example input through here too
            return batch
        images, labels = batch
        if self.flips and torch.rand(()) < 0.5:  # noqa: PLR2004
            images = images.flip(3)
        reach = max(1, images.shape[-1] // 14)
        shift = torch.randint(-reach, reach + 1, (2,)).tolist()
        return torch.roll(images, shift, dims=(2, 3)), labels


class DigitsDataModule(ImageDataModule):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a third is for the test.

    Args:
        seed: Of the stratified split.
        batch_size: See `ImageDataModule`, as the other arguments.
        augment: Likewise.
        limit: Likewise.

    Raises:
        DataNotFoundError: In `setup`, if scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 64, *, augment: bool = True, limit: int | None = None, seed: int = 0) -> None:
        super().__init__(batch_size, augment=augment, limit=limit)
        self.seed = seed

    def load(self) -> dict[str, Batch]:
        """Returns the splits; pixels are scaled from 0..16 to mean 0 and deviation 1."""
        try:
            from sklearn.datasets import load_digits  # noqa: PLC0415
            from sklearn.model_selection import train_test_split  # noqa: PLC0415
        except ImportError as error:
            msg = "the digits come with scikit-learn, which is not installed: pip install 'lightning_compress[demo]'."
            raise DataNotFoundError(msg) from error
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy((pixels - pixels.mean()) / pixels.std()).float().view(-1, 1, 8, 8)
        targets = torch.from_numpy(labels).long()
        rest, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=self.seed)
        train, val = train_test_split(rest, test_size=0.1, stratify=labels[rest], random_state=self.seed)
        return {
            name: (images[index], targets[index]) for name, index in (("train", train), ("val", val), ("test", test))
        }


class FashionMNISTDataModule(ImageDataModule):
    """70,000 images of clothes, 28x28 (Xiao et al. 2017); the last 5,000 training images validate.

    Looked for in this order: the four gzipped IDX files in `folder`; those of Debian's package
    dataset-fashion-mnist; torchvision's download into `folder` (needs the network).

    Args:
        folder: Where the files are, or are downloaded to.
        download: Whether torchvision may download them.
        batch_size: See `ImageDataModule`, as the other arguments.
        augment: Likewise.
        limit: Likewise.

    Raises:
        DataNotFoundError: In `setup`, if the files are in none of these places.
    """

    flips = True

    def __init__(
        self,
        batch_size: int = 128,
        *,
        folder: str | Path | None = None,
        download: bool = True,
        augment: bool = True,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size, augment=augment, limit=limit)
        self.folder = Path(folder) if folder is not None else None
        self.download = download

    def load(self) -> dict[str, Batch]:
        """Returns the splits, normalised."""
        train, test = self._read()
        return {
            "train": (train[0][:-_VALIDATION_IMAGES], train[1][:-_VALIDATION_IMAGES]),
            "val": (train[0][-_VALIDATION_IMAGES:], train[1][-_VALIDATION_IMAGES:]),
            "test": test,
        }

    def _read(self) -> tuple[Batch, Batch]:
        places = [place for place in (self.folder, _DEBIAN) if place is not None]
        for place in places:
            if all((place / name.format(split=s)).is_file() for name in (_IMAGES, _LABELS) for s in ("train", "t10k")):
                return _read_idx(place, "train"), _read_idx(place, "t10k")
        if self.folder is None or not self.download:
            why = "no folder was given to download it to" if self.folder is None else "download=false"
        else:
            try:
                return _download(self.folder)
            except (ImportError, RuntimeError, OSError) as error:
                why = f"torchvision's download failed ({type(error).__name__}: {error})"
        msg = (
            f"Fashion-MNIST is not in {' or '.join(repr(str(p)) for p in places)}, and {why}. Install Debian's package "
            "dataset-fashion-mnist, or give the folder of the four gzipped IDX files with data.module.folder=PATH."
        )
        raise DataNotFoundError(msg)


def _normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255 - _MEAN) / _STD).view(-1, 1, 28, 28)


def _read_idx(folder: Path, split: str) -> Batch:
    """Returns images and labels from gzipped IDX files."""
    images = _read_idx_file(folder / _IMAGES.format(split=split), (28, 28))
    labels = _read_idx_file(folder / _LABELS.format(split=split), ())
    if len(images) != len(labels):
        msg = f"{str(folder)!r} holds {len(images)} {split} images but {len(labels)} labels. Get the files again."
        raise DataNotFoundError(msg)
    return _normalised(images), labels.long()


def _read_idx_file(path: Path, item: tuple[int, ...]) -> Tensor:
    """Returns the items of one file: two zero bytes, type, dimensions, big-endian sizes, then uint8."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = struct.unpack_from(f">{1 + len(item)}I", content, offset=4)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 * (2 + len(item)))
        if sizes[1:] != item:
            msg = f"its items are of size {sizes[1:]}, not {item}"
            raise ValueError(msg)
        return values.view(sizes)
    except (OSError, EOFError, zlib.error, struct.error, ValueError, RuntimeError) as error:
        msg = f"cannot read {str(path)!r}: {error}. Get the file again."
        raise DataNotFoundError(msg) from error


def _download(folder: Path) -> tuple[Batch, Batch]:
    from torchvision.datasets import FashionMNIST  # noqa: PLC0415

    splits = [FashionMNIST(str(folder), train=train, download=True) for train in (True, False)]
    return tuple((_normalised(s.data), s.targets.long()) for s in splits)  # type: ignore[return-value]

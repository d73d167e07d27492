"""Safetensors files piece by piece: what they hold, one tensor of them, new files of pieces of others.

The format is eight bytes with the length of a header, that header in JSON, and the tensors one after the other, so a
file can be written without ever holding more of it than a few megabytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_compress.core.errors import OutputFolderError, WeightsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in headers to dtypes; files with others are refused."""
PIECE = 2**24
"""Bytes that are read or written at once."""
LENGTH = 8
"""Bytes of the header's length; headers are padded to a multiple of it."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        path: Of the file.
        name: Of the tensor, in the file.
        dtype: Of its values, a key of `DTYPES`.
        shape: Of the tensor.
        start: Where its bytes begin, counted from the beginning of the file.
        size: Their number.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def load(self, rows: int | None = None) -> Tensor:
        """Returns the tensor, or its first rows along the first dimension, in memory of its own.

        Raises:
            WeightsError: If the file cannot be read.
        """
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        tensor = torch.empty(shape, dtype=DTYPES[self.dtype])
        values = memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
        with _reading(self), self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(values) != values.nbytes:
                msg = "the file is shorter than its header says"
                raise OSError(msg)
        return tensor

    def pieces(self) -> Iterator[bytes]:
        """Yields the bytes in pieces.

        Raises:
            WeightsError: If the file cannot be read.
        """
        with _reading(self), self.path.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    msg = "the file is shorter than its header says"
                    raise OSError(msg)
                left -= len(piece)
                yield piece

    def not_finite(self) -> int:
        """Returns how many values are NaN or infinite."""
        dtype = DTYPES[self.dtype]
        return sum(not_finite(torch.frombuffer(bytearray(piece), dtype=dtype)) for piece in self.pieces())


def not_finite(values: Tensor) -> int:
    """Returns how many values are NaN or infinite."""
    flat, bad = values.reshape(-1), 0
    for start in range(0, len(flat), PIECE) if values.is_floating_point() else ():
        part = flat[start : start + PIECE]
        wide = part.float() if part.element_size() == 1 else part
        bad += int((~torch.isfinite(wide)).sum())
    return bad


def read_header(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a file by name.

    Raises:
        WeightsError: If the file is missing, damaged, or holds values of an unknown dtype.
    """
    try:
        with safe_open(str(path), framework="pt"):  # checks lengths and offsets
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        msg = f"cannot read the weights {str(path)!r}: {error}. Expected a safetensors file."
        raise WeightsError(msg) from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            msg = f"{name!r} in {str(path)!r} is of dtype {entry['dtype']}, of which nothing is known."
            raise WeightsError(msg)
        begin, end = entry["data_offsets"]
        found[name] = Stored(path, name, entry["dtype"], tuple(entry["shape"]), LENGTH + length + begin, end - begin)
    return found


def write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes a file of tensors that lie in others, a piece at a time.

    The widest dtypes come first, so that every tensor begins at a multiple of its values' size.

    Raises:
        WeightsError: If one of them cannot be read.
        OutputFolderError: If the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        one = tensors[name]
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [place, place + one.size]}
        place += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)
    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH, "little"))
        file.write(text)
        for name in order:
            for piece in tensors[name].pieces():
                file.write(piece)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name to write to, and puts what was written in the place of a file once all of it is there.

    Raises:
        OutputFolderError: If it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        msg = f"cannot write {str(path)!r}: {error}."
        raise OutputFolderError(msg) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _reading(tensor: Stored) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"cannot read {tensor.name!r} in {str(tensor.path)!r}: {error}."
        raise WeightsError(msg) from error

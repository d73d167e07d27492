"""Which files hold the weights of a folder: one, or several shards and an index that says what is where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_compress.core.errors import WeightsError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Names as Hugging Face's libraries have them."""


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder: `model.safetensors`, else the shards that the index names.

    Args:
        folder: With either of the two; without both the single file is returned, and reading it fails.

    Raises:
        WeightsError: If the index is damaged, or names a file that is not there.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():
        return [single]
    names = sorted(set(read_index(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        msg = f"{str(index)!r} names {', '.join(missing[:5])}, which the folder does not hold: it is incomplete."
        raise WeightsError(msg)
    return [folder / name for name in names]


def read_index(path: Path) -> dict[str, str]:
    """Returns an index as tensor to file name.

    Raises:
        WeightsError: If it is unreadable or no index.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found = content["weight_map"]
        usable = isinstance(found, dict) and bool(found) and all(map(_is_file_name, found.values()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"cannot read the index {str(path)!r}: {type(error).__name__}: {error}."
        raise WeightsError(msg) from error
    if not usable:
        msg = f"{str(path)!r} is no index of weights: 'weight_map' has to map tensors to names of files in the folder."
        raise WeightsError(msg)
    return dict(found)


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value == Path(value).name and value not in {"", "."}

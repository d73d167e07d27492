"""What a compression has worked out, kept on disk under a digest of all that it depends on.

Searches of the same model with other budgets, the jobs of a sweep and a run that goes on after it was interrupted find
it there again. An entry is a safetensors file; it is written whole or not at all, and one that cannot be read is worked
out again. The oldest entries go where the folder would get larger than `LIMIT`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_compress.core.copies import digest_of
from lightning_compress.core.whole_files import make_room, whole_file

CACHE = "LIGHTNING_COMPRESS_CACHE"
"""Environment variable with the folder of the cache; "off" for none."""
LIMIT = 2**30
"""Bytes of all entries together."""
LARGEST = 2**26
"""Bytes of one entry."""
_PACKAGE = Path(__file__).resolve().parent.parent


def cache_folder() -> Path:
    """Returns where things are kept: the folder in LIGHTNING_COMPRESS_CACHE, else that of the user's caches."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning_compress"


def is_kept() -> bool:
    """Returns whether anything is kept."""
    return os.environ.get(CACHE) != "off"


def key_of(what: str, *parts: object) -> str:
    """Returns the name of an entry.

    Args:
        what: A word for its kind.
        parts: All that it depends on: tensors by their values, everything else by its text. The code of this library
            and the version of torch are among them.
    """
    described = [
        (f"{part.dtype} {tuple(part.shape)}", part) if isinstance(part, Tensor) else (f"{part!r};", None)
        for part in parts
    ]
    return f"{what}-{digest_of([(f'{_code()} {torch.__version__}', None), *described])}"


def find(key: str) -> dict[str, Tensor] | None:
    """Returns the tensors of an entry, None if there is none, or it is damaged."""
    path = cache_folder() / f"{key}.safetensors"
    if not is_kept() or not path.is_file():
        return None
    try:
        found = load_file(path)
        os.utime(path)  # the least recently used go first
    except (OSError, SafetensorError):
        return None
    return found


def keep(key: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes an entry, unless it is too large; a folder that cannot be written keeps nothing."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if not is_kept() or size > LARGEST:
        return
    folder = cache_folder()
    with contextlib.suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        make_room(folder.glob("*.safetensors"), size, LIMIT)
        own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        with whole_file(folder / f"{key}.safetensors") as part:
            save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}, part)


@functools.cache
def _code() -> str:
    """Returns a digest of this library's code: what another version worked out is not found."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

"""Files that others read while they are written: whole or as before, and a folder of them that stays small enough."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name of its own beside a file to write to, and puts what was written in its place at the end.

    Raises:
        OSError: If it cannot be written; the file is then as it was.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        pass
    part = Path(file.name)
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def make_room(files: Iterable[Path], size: int, limit: int) -> None:
    """Removes those files that were not used for the longest time until so many bytes fit in below a limit."""
    entries = sorted(_stated(files))
    total = size + sum(length for _, length, _ in entries)
    for _, length, path in entries:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= length


def _stated(paths: Iterable[Path]) -> Iterable[tuple[float, int, Path]]:
    for path in paths:
        with contextlib.suppress(OSError):  # another process removed it
            state = path.stat()
            yield state.st_mtime, state.st_size, path

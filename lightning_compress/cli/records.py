"""What a job of a sweep leaves in its folder: job.json, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.core.whole_files import whole_file

RECORD = "job.json"
RUNNING, FINISHED, FAILED, KILLED = "running", "finished", "failed", "killed"


@dataclass(frozen=True)
class JobRecord:
    """One job of a sweep.

    Attributes:
        status: "running", "finished", "failed" (with an error) or "killed" (by a signal).
        key: Digest of the configuration, the code and the data; a finished job of the same key is not run again.
        overrides: What the sweep set for it.
        config: The whole configuration, resolved.
        reason: Why it did not finish.
        values: What a sweeper gets.
        seconds: How long it took.
        disturbed: Whether its search measured times beside other jobs of the sweep.
        process: Its process, while it runs.
    """

    status: str
    key: str
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    values: tuple[float, ...] | None = None
    seconds: float | None = None
    disturbed: bool = False
    process: int | None = None

    def save(self, folder: str | Path) -> None:
        """Writes job.json into an existing folder."""
        write_whole(Path(folder) / RECORD, json.dumps(asdict(self), indent=2, default=str))

    @classmethod
    def load(cls, folder: str | Path) -> JobRecord | None:
        """Returns the record of a folder; None if there is none that can be read."""
        try:
            content = json.loads((Path(folder) / RECORD).read_text("utf-8"))
            values = content.pop("values", None)
            overrides = tuple(content.pop("overrides", ()))
            return cls(**content, overrides=overrides, values=None if values is None else tuple(values))
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a text; whoever reads it meanwhile finds the old one or the new one."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
        with contextlib.suppress(OSError):  # temporary files are private, results are not
            part.chmod(0o666 & ~_UMASK)


_UMASK = os.umask(0)
os.umask(_UMASK)

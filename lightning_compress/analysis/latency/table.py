"""Measured times, kept on disk: a search that finds them again chooses the same again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

from lightning_compress.core.checks import path_of, readable
from lightning_compress.core.errors import CompressionWarning, TargetError
from lightning_compress.core.plan import Plan
from lightning_compress.core.store import CACHE, cache_folder, is_kept
from lightning_compress.core.whole_files import whole_file

FORMAT = "lightning_compress/latency"
SCHEMA = 1
STEP = 0.02
"""Times are rounded to powers of 1 + STEP: smaller differences are noise."""


@dataclass
class LatencyTable:
    """Times of layers and models on one target.

    Attributes:
        identity: What tells this target from others: device, library versions, batch, threads, dtype.
        entries: Description of what was measured to seconds, one for each part of it.
        path: Where it is kept, None for nowhere.
        measures: Whether what it lacks can be measured; a table that was measured elsewhere is only read.
        used: Keys that were asked for.
    """

    identity: Mapping[str, Any]
    entries: dict[str, list[float]] = field(default_factory=dict)
    path: Path | None = None
    measures: bool = True
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> LatencyTable:
        """Returns the table of a target from the cache; an empty one if there is none, or it is damaged or foreign."""
        named = {"processor": processor(), "system": platform.system(), **identity}
        name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
        path = cache_folder() / f"latency-{name}.json" if is_kept() else None
        table = cls(named, path=path)
        if path is not None and path.exists():
            try:
                stored = cls.load(path)
            except TargetError as error:
                warn(f"{error} It is measured again.", CompressionWarning, stacklevel=2)
                return table
            if stored.identity == named:
                table.entries = stored.entries
        return table

    @classmethod
    def of_plan(cls, plan: Plan) -> LatencyTable:
        """Returns the table that a plan was found with, from the cache: `save` it to search elsewhere with it.

        Raises:
            TargetError: If the plan was found without times, or they are not in the cache.
        """
        if plan.target is None:
            msg = "the plan was found without times: search with an example_input and a target."
            raise TargetError(msg)
        table = cls.of({key: value for key, value in plan.target.items() if key != "table"})
        if not table.entries:
            msg = f"the times of this plan's target are not in the cache, {str(table.path)!r} is missing."
            raise TargetError(msg)
        return table

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Returns the table in a file that `save` wrote; it is only read.

        Raises:
            ConfigurationError: If `path` is no path.
            TargetError: If the file is missing, damaged, or no such table.
        """
        path = path_of("path", path)
        try:
            content = json.loads(readable(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            msg = f"cannot read the table of latencies {str(path)!r}: {error}."
            raise TargetError(msg) from error
        known = isinstance(content, dict) and content.get("format") == FORMAT and content.get("schema") == SCHEMA
        if not known or not isinstance(content.get("identity"), dict) or not isinstance(content.get("entries"), dict):
            msg = f"{str(path)!r} is no table of latencies of this version: it starts with {str(content)[:60]!r}."
            raise TargetError(msg)
        if content.get("digest") != _digest(content["entries"]):
            msg = f"the table of latencies {str(path)!r} is damaged: its content is not what was written."
            raise TargetError(msg)
        return cls(content["identity"], content["entries"], path, measures=False)

    def save(self, path: str | Path | None = None) -> None:
        """Writes the table, whole or not at all.

        Args:
            path: A file to make; None for where the table is kept.

        Raises:
            ConfigurationError: If `path` is no path.
            TargetError: If it cannot be written.
        """
        path = path_of("path", path) if path is not None else self.path
        if path is None:
            return
        head = {"format": FORMAT, "schema": SCHEMA, "identity": dict(self.identity)}
        content = {**head, "digest": _digest(self.entries), "entries": self.entries}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:
            msg = (
                f"cannot write the table of latencies {str(path)!r}: {error}. Set {CACHE} to a folder that can be "
                "written."
            )
            raise TargetError(msg) from error

    def keep(self) -> None:
        """Writes the table to where it is kept; where that cannot be written, a `CompressionWarning` says so."""
        if not self.measures:
            return
        if self.path is not None and self.path.exists():  # what another process has measured meanwhile
            with contextlib.suppress(TargetError):
                stored = LatencyTable.load(self.path)
                if stored.identity == self.identity:
                    self.entries = {**stored.entries, **self.entries}
        try:
            self.save()
        except TargetError as error:
            warn(f"{error} What was measured is forgotten after this search.", CompressionWarning, stacklevel=2)
            self.path = None

    def times(self, keys: Sequence[str], measure: Callable[[], Sequence[Sequence[float]]]) -> list[list[float]]:
        """Returns the times of some entries, which are measured together if one is missing; the known ones stay.

        Raises:
            TargetError: If one is missing in a table that was measured elsewhere.
        """
        self.used.update(keys)
        missing = [key for key in keys if key not in self.entries]
        if missing:
            if not self.measures:
                msg = (
                    f"the table of latencies {str(self.path)!r} lacks {missing[0]!r} and {len(missing) - 1} more: it "
                    "was measured for another model, other kinds or another input. Measure it again on its device."
                )
                raise TargetError(msg)
            for key, times in zip(keys, measure(), strict=True):
                self.entries.setdefault(key, [_rounded(seconds) for seconds in times])
        return [self.entries[key] for key in keys]

    @property
    def fingerprint(self) -> str:
        """Of the target and the entries that were asked for: the same for the same times."""
        used = {key: self.entries[key] for key in sorted(self.used)}
        return hashlib.sha256(json.dumps([dict(self.identity), used], sort_keys=True).encode()).hexdigest()[:16]


def processor() -> str:
    """Returns the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rounded(seconds: float) -> float:
    step = math.log1p(STEP)
    return float(f"{math.exp(round(math.log(max(seconds, 1e-12)) / step) * step):.6g}")


def _digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

"""The folder of what is done so far, by what it was made from: an interrupted run goes on where it was.

Every file is written under another name and then renamed, so one that is there is whole. Its name is a digest of all
it depends on, so one that is there is right.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_compress.core.errors import OutputFolderError
from lightning_compress.core.plan import Plan
from lightning_compress.on_disk.files import Stored, read_header, replacing
from lightning_compress.search.candidates import Candidates

NAME = ".work"
"""Of the folder, inside the output folder."""
FORMAT = 1
"""Of the files in it; others are worked out anew."""
VECTORS = "vectors"


@dataclass(frozen=True)
class WorkFolder:
    """What is done so far.

    Attributes:
        path: Of the folder.
    """

    path: Path

    def make(self) -> None:
        """Makes the folder, and the one it lies in.

        Raises:
            OutputFolderError: If it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / "probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            msg = f"cannot write to {str(self.path.parent)!r}: {error}. Choose a folder you can write."
            raise OutputFolderError(msg) from error

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def table(self, key: str) -> Candidates | None:
        """Returns the candidates of a layer, None if they are not known yet."""
        path = self.path / f"{key}.table.json"
        if not path.is_file():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        return Candidates(
            name=data["name"],
            kinds=tuple(data["kinds"]),
            ranks=tuple(tuple(row) for row in data["ranks"]),
            errors=np.array(data["errors"], dtype=np.float64),
            energy=data["energy"],
            costs=np.array(data["costs"], dtype=np.float64),
        )

    def keep_table(self, key: str, table: Candidates) -> None:
        """Keeps the candidates of a layer."""
        data = {
            "name": table.name,
            "kinds": table.kinds,
            "ranks": table.ranks,
            "errors": table.errors.tolist(),
            "energy": table.energy,
            "costs": table.costs.tolist(),
        }
        self._write(f"{key}.table.json", json.dumps(data))

    def vectors(self, key: str, rank: int) -> Tensor | None:
        """Returns the first so many eigenvectors of a layer, (rank, n), None if they are not kept."""
        path = self.path / f"{key}.vectors.safetensors"
        return read_header(path)[VECTORS].load(rank) if path.is_file() else None

    def keep_vectors(self, key: str, vectors: Tensor) -> None:
        """Keeps the eigenvectors of a layer."""
        self._save(f"{key}.vectors.safetensors", {VECTORS: vectors})

    def drop_vectors(self, key: str) -> None:
        """Removes the eigenvectors of a layer."""
        (self.path / f"{key}.vectors.safetensors").unlink(missing_ok=True)

    def factors(self, key: str) -> dict[str, Stored] | None:
        """Returns where the factors of a layer lie, by their names in it, None if they are not known yet."""
        path = self.path / f"{key}.factors.safetensors"
        return read_header(path) if path.is_file() else None

    def keep_factors(self, key: str, factors: Mapping[str, Tensor]) -> None:
        """Keeps the factors of a layer."""
        self._save(f"{key}.factors.safetensors", factors)

    def plan(self, key: str) -> Plan | None:
        """Returns a plan, None if it is not known yet."""
        path = self.path / f"{key}.plan.json"
        return Plan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_plan(self, key: str, plan: Plan) -> None:
        """Keeps a plan."""
        self._write(f"{key}.plan.json", plan.to_json())

    def final(self, key: str) -> Path:
        """Returns the folder in which the files of the output are made, under their final names."""
        folder = self.path / f"{key}.final"
        folder.mkdir(exist_ok=True)
        return folder

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as part:
            part.write_text(text, encoding="utf-8")

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with replacing(self.path / name) as part:
            try:
                save_file({key: value.contiguous() for key, value in tensors.items()}, str(part))
            except SafetensorError as error:
                raise OSError(str(error)) from error


def digest(**content: Any) -> str:
    """Returns a name for what is made from something.

    Args:
        **content: All that it is made from, as JSON has it; versions of the format and of the packages are added.
    """
    version = importlib.import_module("lightning_compress").__version__  # the package above knows everything
    versions = {"format": FORMAT, "version": version, "torch": torch.__version__}
    text = json.dumps({**versions, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]

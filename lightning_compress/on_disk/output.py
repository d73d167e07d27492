"""The folder that is written: what lies in which shard, and how all of it comes into place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError, OutputFolderError
from lightning_compress.core.plan import Plan
from lightning_compress.on_disk.files import Stored, replacing, write_file
from lightning_compress.on_disk.source import Source, copy_file
from lightning_compress.on_disk.work import NAME, WorkFolder
from lightning_compress.surgery.save import PLAN_FILE
from lightning_compress.surgery.shards import INDEX_FILE, WEIGHTS_FILE
from lightning_compress.surgery.swap import apply_shells_, uninstall

_OWN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""Names of files with weights that are written here."""


def require_usable(folder_in: Path, folder_out: Path) -> None:
    """Checks that an output folder is another one than the input folder and holds no model.

    What an interrupted run has left there is no obstacle.

    Raises:
        ConfigurationError: If both are the same folder.
        OutputFolderError: If there is a file in its place, or it holds weights or a plan.
    """
    if folder_out.resolve() == folder_in.resolve():
        msg = f"folder_out={str(folder_out)!r} is the input folder: choose another one."
        raise ConfigurationError(msg)
    if folder_out.exists() and not folder_out.is_dir():
        msg = f"cannot write to {str(folder_out)!r}: it is no folder."
        raise OutputFolderError(msg)
    if not folder_out.is_dir() or (folder_out / NAME).is_dir():
        return
    held = [path.name for path in _weights_in(folder_out)] + [PLAN_FILE] * (folder_out / PLAN_FILE).exists()
    if held:
        msg = f"{str(folder_out)!r} holds a model already ({held[0]}): choose another folder, or delete it."
        raise OutputFolderError(msg)


def origins(
    model: nn.Module, plan: Plan, source: Source, factors: Mapping[str, Mapping[str, Stored]]
) -> dict[str, Stored]:
    """Returns where each tensor of the compressed model's state dict lies now; of tied ones the first name.

    Args:
        model: The dense model on the meta device; it is as it was afterwards.
        plan: What becomes of it.
        source: The checkpoint.
        factors: Of each factorised layer, by their names in it.
    """
    with torch.device("meta"):
        replacements = apply_shells_(model, plan)
    try:
        known = dict(source.stored)
        for name, own in factors.items():
            tensors = model.get_submodule(name).state_dict(keep_vars=True)
            known.update({id(tensors[key]): stored for key, stored in own.items()})
        found: dict[str, Stored] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = known[id(tensor)]
    finally:
        uninstall(model, replacements)
    return found


def write_staged(
    folder: Path,
    tensors: Mapping[str, Stored],
    source: Source,
    plan: Plan,
    *,
    most: int,
    report: Callable[[float], None],
) -> None:
    """Writes all files of the output into a folder, as they will be called; those that are there are left alone.

    Args:
        folder: Inside the work folder, of this output alone.
        tensors: Where each tensor lies, see `origins`.
        source: Whose other files are copied.
        plan: Written as well.
        most: Bytes of a shard.
        report: Called with the fraction of the shards that is written.
    """
    shards = in_shards(tensors, most)
    for index, (name, own) in enumerate(shards.items()):
        report(index / len(shards))
        if not (folder / name).exists():
            write_file(folder / name, own)
    if len(shards) > 1:
        where = {name: shard for shard, own in shards.items() for name in own}
        size = sum(one.size for one in tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        _write(folder / INDEX_FILE, json.dumps(content, indent=2) + "\n")
    for path in source.other_files():
        copy_file(path, folder / path.name)
    _write(folder / PLAN_FILE, plan.to_json())


def in_shards(tensors: Mapping[str, Stored], most: int) -> dict[str, dict[str, Stored]]:
    """Returns the tensors of each file by its name, in order; a tensor larger than a shard has one of its own."""
    parts: list[dict[str, Stored]] = [{}]
    size = 0
    for name, one in tensors.items():
        if parts[-1] and size + one.size > most:
            parts.append({})
            size = 0
        parts[-1][name] = one
        size += one.size
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def publish(staged: Path, folder: Path, work: WorkFolder) -> None:
    """Puts what is staged into the output folder, the plan last, and removes the work folder.

    Weights that an interrupted run had put there already are removed first.
    """
    names = sorted(path.name for path in staged.iterdir() if path.name != PLAN_FILE)
    try:
        (folder / PLAN_FILE).unlink(missing_ok=True)
        for path in _weights_in(folder):
            path.unlink()
        for name in (*names, PLAN_FILE):
            (staged / name).replace(folder / name)
    except OSError as error:
        msg = f"cannot write the compressed model to {str(folder)!r}: {error}."
        raise OutputFolderError(msg) from error
    work.remove()


def _weights_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _OWN.fullmatch(path.name))


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")

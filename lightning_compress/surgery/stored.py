"""Tensors in files: written whole or not at all, read whole and checked, copied into a model all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_compress.core.checks import readable
from lightning_compress.core.compat import is_wrapped
from lightning_compress.core.copies import digest_of
from lightning_compress.core.errors import WeightsError

CHECKSUM = "lightning_compress/sha256"
"""Key of a file's metadata: `checksum_of` its tensors and its plan."""
PLAN = "lightning_compress/plan"
"""Key of a file's metadata: the plan as JSON."""

_MOST_NAMED = 5
_LENGTH = 8  # bytes in front of the header of a safetensors file


@dataclass(frozen=True)
class StoredTensors:
    """What a file holds.

    Attributes:
        path: Of the file.
        tensors: By name, on the CPU.
        metadata: Texts by name, none in files of `torch.save`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def require_undamaged(self) -> None:
        """Checks that the content is what was written, where the file says so; those of other writers need not.

        Raises:
            WeightsError: If it is not.
        """
        written = self.metadata.get(CHECKSUM)
        if written is not None and written != checksum_of(self.tensors, self.metadata.get(PLAN, "")):
            msg = (
                f"the weights {str(self.path)!r} are damaged: the content is not what was written (its checksum "
                "differs). Copy the file again, or save the model again."
            )
            raise WeightsError(msg)


def checksum_of(tensors: Mapping[str, Tensor], plan: str) -> str:
    """Returns a SHA-256 over the tensors with their names, dtypes and shapes, and over a plan's text."""
    named = [(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}", tensors[name]) for name in sorted(tensors)]
    return digest_of([(plan, None), *named])


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns a model's state as it is written: each tensor once, and of tied ones under which name.

    Raises:
        WeightsError: If the state dict holds something else than tensors with values.
    """
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    memory: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            msg = f"the state dict holds {name!r}, no tensor (get_extra_state?): safetensors holds tensors only."
            raise WeightsError(msg)
        if is_wrapped(value):
            msg = (
                f"the state dict holds {name!r}, a quantised or otherwise wrapped {type(value).__name__}: safetensors "
                "holds plain tensors only. Save the model before it is quantised, and quantise it again after "
                "load_compressed; or write the 8-bit model by export_model(model, path, format=..., int8=True)."
            )
            raise WeightsError(msg)
        if value.is_meta or value.layout != torch.strided:
            what = "is on the meta device" if value.is_meta else f"is of layout {value.layout}"
            msg = f"the state dict holds {name!r}, which {what}: safetensors holds dense tensors with values only."
            raise WeightsError(msg)
        first = names.setdefault(id(value), name)
        if first != name:
            same[name] = first
            continue
        own = value.detach().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.nbytes or storage.data_ptr() in memory:  # a view, of which the file knows nothing
            own = own.clone()
        memory.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    return tensors, same


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the texts in a safetensors file by name; none where it cannot be read."""
    try:
        with safe_open(str(readable(path)), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def read_tensors(path: Path, expected: str) -> StoredTensors:
    """Returns all of a safetensors file.

    Args:
        path: Of the file.
        expected: What it should have been, for the message.

    Raises:
        WeightsError: If it is missing, unreadable or damaged.
    """
    try:
        with safe_open(str(readable(path)), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = StoredTensors(path, tensors, dict(file.metadata() or {}))
    except (OSError, SafetensorError) as error:
        msg = f"cannot read the weights {str(path)!r}: {error}. Expected {expected}."
        raise WeightsError(msg) from error
    stored.require_undamaged()
    return stored


def copy_into_(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies tensors of the right names and shapes into a model; all or nothing.

    What the model holds is kept in memory meanwhile.

    Args:
        model: The model.
        tensors: By the names of its state dict; of tied ones one is enough.
        path: Where they come from, for messages.

    Raises:
        WeightsError: If a value is none that the model can hold, or one cannot be copied; the model is as it was.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    problems = [f"{name} {problem}" for name in tensors if (problem := _problem(tensors[name], own[name])) is not None]
    if problems:
        named = "; ".join(problems[:_MOST_NAMED]) + (" …" if len(problems) > _MOST_NAMED else "")
        msg = f"the tensors in {str(path)!r} do not fit the model ({type(model).__name__}): {named}."
        raise WeightsError(msg)
    before = {name: own[name].detach().clone() for name in tensors}
    spread = {name: own[name] for name in tensors if _repeats(own[name])}
    try:
        for name in spread:
            _set_buffer_(model, name, own[name].clone(memory_format=torch.contiguous_format))
        model.load_state_dict(dict(tensors), strict=False)  # of tied tensors one is enough
    except BaseException as error:
        for name, value in spread.items():
            _set_buffer_(model, name, value)
        with torch.no_grad():
            for name, value in before.items():
                if not torch.equal(own[name], value):
                    own[name].copy_(value)
        if not isinstance(error, Exception):
            raise
        msg = f"the tensors in {str(path)!r} cannot be copied into the model ({type(model).__name__}): {error}"
        raise WeightsError(msg) from error


def _repeats(tensor: Tensor) -> bool:
    """Returns whether some of a buffer's values share their memory, as those of `expand` do: nothing can be written."""
    expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return expanded and not isinstance(tensor, nn.Parameter)


def _set_buffer_(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._buffers[leaf] = value


def _problem(stored: Tensor, own: Tensor) -> str | None:
    """Returns why a stored tensor's values are none for a tensor of the model, None if they are."""
    if own.is_meta:
        return "is on the meta device in the model, give it memory with model.to_empty(device='cpu')"
    if _class_of(stored) != _class_of(own) or stored.layout != own.layout:
        return f"{_class_of(stored)} ({stored.dtype}) in the file, {_class_of(own)} ({own.dtype}) in the model"
    if stored.layout != torch.strided:
        return None
    value = stored.to(own.dtype)
    if own.is_floating_point():
        mask = not (isinstance(own, nn.Parameter) and own.requires_grad)  # it may hold infinities on purpose
        return _not_finite(_wide(value), _wide(stored), mask=mask)
    return None if torch.equal(value.to(stored.dtype), stored) else f"has values beyond those of {own.dtype}"


def _not_finite(value: Tensor, stored: Tensor, *, mask: bool) -> str | None:
    finite = value.isfinite()
    if bool(finite.all()) or (mask and not bool(value.isnan().any()) and torch.equal(finite, stored.isfinite())):
        return None
    return f"holds {int((~finite).sum())} NaN or infinite values of {value.numel()}"


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.element_size() == 1 else value  # of few bits torch cannot tell


def _class_of(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating-point numbers"
    if tensor.is_complex():
        return "complex numbers"
    return "truth values" if tensor.dtype == torch.bool else "whole numbers"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, the same bytes for the same content.

    Raises:
        OSError: If it cannot be written; SafetensorError likewise.
    """
    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:  # the library writes the metadata in another order each time
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(_LENGTH)
            file.write(text.ljust(length))


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files into a folder and replaces those there, once all are written, in this order.

    A process that is killed leaves of each name the old or the new file, and perhaps hidden ones that end in ".part".

    Args:
        folder: Which exists.
        writers: By the name of a file, what writes it to a path.

    Raises:
        OSError: If a file cannot be written; what was there is as it was unless it was that one's turn.
    """
    mark = uuid.uuid4().hex[:12]  # several processes may write the same
    parts = {name: folder / f".{name}.{mark}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(parts[name])
            _sync(parts[name])
        for name, part in parts.items():
            part.replace(folder / name)
    except BaseException:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Waits until a file is on the disk, so that it is not replaced by one that is not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())

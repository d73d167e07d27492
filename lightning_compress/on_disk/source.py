"""The folder that is read: its tensors, checked against a model on the meta device."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_compress.analysis.inventory import Layer
from lightning_compress.core.errors import ModelError, NonFiniteWeightError, WeightsError
from lightning_compress.layers.families import template_of
from lightning_compress.on_disk.files import DTYPES, Stored, not_finite, read_header, replacing
from lightning_compress.surgery.save import PLAN_FILE, require_fitting
from lightning_compress.surgery.shards import INDEX_FILE, WEIGHTS_FILE, read_index, weight_files

OTHER_FILES = 100 * 2**20
"""Bytes up to which a file that holds no weights is copied along."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".part")
"""Endings of files that hold weights, or say where they are."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk and the model it belongs to.

    Attributes:
        folder: That holds it.
        stored: Where each tensor of the model lies, by the id of the tensor on the meta device; several names of one
            tensor have one entry.
    """

    folder: Path
    stored: Mapping[int, Stored]

    def of(self, tensor: Tensor) -> Stored:
        """Returns where a tensor of the model lies.

        Raises:
            ModelError: If the model's state dict does not hold it.
        """
        found = self.stored.get(id(tensor))
        if found is None:
            msg = f"a weight of shape {tuple(tensor.shape)} is not in the model's state dict: it cannot be read."
            raise ModelError(msg)
        return found

    def filled(self, layer: Layer) -> Layer:
        """Returns a layer with its weight in memory, without bias.

        Raises:
            NonFiniteWeightError: If the weight holds NaN or infinite values.
        """
        stored = self.of(layer.weight)
        weight = stored.load()
        _require_finite(stored, not_finite(weight))
        module = template_of(layer.module)
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return replace(layer, module=module)

    def require_finite(self, model: nn.Module, but: Iterable[Tensor]) -> None:
        """Checks the parameters of a model for NaN and infinite values, a piece at a time.

        Args:
            model: The model.
            but: Weights that are checked when they are loaded.

        Raises:
            NonFiniteWeightError: If a parameter holds such values.
        """
        left_out = {id(tensor) for tensor in but}
        for parameter in model.parameters():
            if id(parameter) not in left_out:
                _require_finite(self.of(parameter), self.of(parameter).not_finite())

    def other_files(self) -> list[Path]:
        """Returns the files that are copied along: small ones that hold no weights, such as config.json."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and path.name != PLAN_FILE
            and not path.name.endswith(WEIGHTS)
            and path.stat().st_size <= OTHER_FILES
        ]


def open_source(folder: Path, model: nn.Module) -> Source:
    """Returns a checkpoint whose tensors are exactly those of a model.

    Args:
        folder: With `model.safetensors`, or shards and `model.safetensors.index.json`.
        model: On the meta device.

    Raises:
        WeightsError: If a file is missing or damaged, or names, shapes or dtypes differ from the model's.
    """
    if not folder.is_dir():
        msg = f"folder_in={str(folder)!r} is no folder."
        raise WeightsError(msg)
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        msg = f"{str(folder)!r} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: expected a checkpoint in safetensors."
        raise WeightsError(msg)
    tensors = _tensors_of(folder)
    others = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        msg = f"the state dict holds {others[0]!r}, no tensor (get_extra_state?): safetensors holds tensors only."
        raise WeightsError(msg)
    require_fitting(model, {name: one.shape for name, one in tensors.items()}, folder)
    own = model.state_dict(keep_vars=True)
    _require_dtypes(own, tensors, folder)
    return Source(folder, _by_tensor(own, tensors))


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file.

    Raises:
        OutputFolderError: If it cannot be read or written.
    """
    with replacing(target) as part:
        shutil.copyfile(source, part)


def _tensors_of(folder: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for name, one in read_header(path).items():
            if name in found:
                msg = f"{name!r} is in {found[name].path.name} and in {path.name} of {str(folder)!r}."
                raise WeightsError(msg)
            found[name] = one
    if not (folder / WEIGHTS_FILE).is_file():
        for name, file in read_index(folder / INDEX_FILE).items():
            if name not in found or found[name].path.name != file:
                msg = f"{str(folder / INDEX_FILE)!r} says that {name!r} is in {file}, where it is not."
                raise WeightsError(msg)
    return found


def _require_dtypes(own: Mapping[str, Tensor], tensors: Mapping[str, Stored], folder: Path) -> None:
    differing = [
        f"{name} {_name_of(DTYPES[one.dtype])} in the file, {_name_of(own[name].dtype)} in the model"
        for name, one in tensors.items()
        if DTYPES[one.dtype] != own[name].dtype
    ]
    if differing:
        more = f" … ({len(differing)} in all)" if len(differing) > 5 else ""  # noqa: PLR2004
        msg = (
            f"tensors in {str(folder)!r} are of another dtype than the model's: {', '.join(differing[:5])}{more}. Make "
            "the model in the dtype of the checkpoint, as in model.to(torch.bfloat16): tensors stay in theirs."
        )
        raise WeightsError(msg)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_tensor(own: Mapping[str, Tensor], tensors: Mapping[str, Stored]) -> dict[int, Stored]:
    """Returns where each tensor of the model lies, by its id."""
    found: dict[int, Stored] = {}
    for name, tensor in own.items():
        one, before = tensors.get(name), found.get(id(tensor))
        if one is None:
            continue
        if before is not None and any(a != b for a, b in zip(before.pieces(), one.pieces(), strict=True)):
            msg = f"{before.name!r} and {name!r} are one tensor in the model and hold different values in the files."
            raise WeightsError(msg)
        found.setdefault(id(tensor), one)
    return found


def _require_finite(stored: Stored, bad: int) -> None:
    if bad:
        count = torch.Size(stored.shape).numel()
        msg = (
            f"parameter {stored.name!r} holds {bad} NaN or infinite values of {count}: load weights of a run that "
            "converged before compressing."
        )
        raise NonFiniteWeightError(msg)

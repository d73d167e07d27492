"""Saving and loading a compressed model: safetensors and JSON, never pickle."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_compress.analysis.usable import require_module
from lightning_compress.core.checks import path_of, readable
from lightning_compress.core.compiled_names import plan_as_named, renaming_for, state_as_named
from lightning_compress.core.errors import OutputFolderError, PlanFormatError, WeightsError
from lightning_compress.core.plan import Plan
from lightning_compress.layers.factorised import HINT, FactorisedLayer
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.shards import WEIGHTS_FILE, weight_files
from lightning_compress.surgery.stored import (
    CHECKSUM,
    PLAN,
    checksum_of,
    copy_into_,
    read_metadata,
    read_tensors,
    tensors_of,
    write_tensors,
    write_together,
)
from lightning_compress.surgery.swap import apply_shells_, uninstall

PLAN_FILE = "plan.json"
_STATE_DICT = "a state dict (.safetensors or torch.save)"


def save_compressed(model: nn.Module, folder: str | Path) -> None:
    """Writes `model.safetensors` and `plan.json` into a folder, which is made if needed.

    The weights' file holds the plan too, and a checksum of both, so that it is a whole save of its own: a process that
    is killed on the way leaves the old save or the new one. `plan.json` is for people and other programs.

    Args:
        model: A model after `apply_plan_`, `compress_` or a fit with `Compress`.
        folder: Where to write; existing files of these two names are replaced.

    Raises:
        ConfigurationError: If `model` is no module or `folder` no path.
        OutputFolderError: If the folder cannot be made or written.
        WeightsError: If the state dict holds something else than tensors.
        UnsupportedError: If an adapter or another wrapper was put in the place of a factor.
    """
    require_module(model)
    folder = path_of("folder", folder)
    for module in model.modules():
        if isinstance(module, FactorisedLayer):
            module.factors()
    text = embodied_plan(model).to_json()
    tensors, same = tensors_of(model)
    metadata = {"format": "pt", **same, PLAN: text, CHECKSUM: checksum_of(tensors, text)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together(
            folder,
            {
                WEIGHTS_FILE: lambda part: write_tensors(part, tensors, metadata),
                PLAN_FILE: lambda part: part.write_text(text, encoding="utf-8"),
            },
        )
    except (OSError, SafetensorError) as error:
        msg = f"cannot write the compressed model to {str(folder)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error


def load_compressed(model: nn.Module, folder: str | Path) -> Plan:
    """Turns a dense model into the compressed one that `save_compressed` or `compress_checkpoint` wrote, in place.

    Everything is read and checked before the model is touched: names, shapes, dtypes, values that are not finite, and
    the checksum where the file has one. `plan.json` is read where the weights' file holds no plan itself.

    Args:
        model: A model of the architecture before compression; its weights do not matter.
        folder: The folder they wrote: `plan.json`, and `model.safetensors` or shards with
            `model.safetensors.index.json`.

    Returns:
        The plan.

    Raises:
        ConfigurationError: If `model` is no module or `folder` no path.
        WeightsError: If a file is missing, unreadable or damaged, or its tensors do not fit the model.
        PlanFormatError: If the plan is damaged, foreign or newer; PlanMismatchError if it does
            not fit the model. In every case the model is left as it was.
    """
    require_module(model)
    folder = path_of("folder", folder)
    files = weight_files(folder)
    own = read_metadata(files[0]).get(PLAN)
    plan = read_plan(folder / PLAN_FILE) if own is None else _plan_of(own, files[0])
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file, "a folder that save_compressed wrote").tensors
    where = files[0] if len(files) == 1 else folder
    rename = renaming_for(model)
    plan, named = plan_as_named(plan, rename), state_as_named(tensors, rename)
    replacements = apply_shells_(model, plan)
    try:
        require_fitting(model, _shapes_of(named), where)
        copy_into_(model, named, where)
    except BaseException:
        uninstall(model, replacements)
        raise
    return plan


def load_weights_(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict of exactly the model's tensors, in place.

    Args:
        model: Any module.
        path: A `.safetensors` file, or a file that `torch.save` wrote: a state dict, or a
            checkpoint with one under "state_dict". Loaded without running any pickled code.

    Raises:
        ConfigurationError: If `model` is no module or `path` no path.
        WeightsError: If the file is missing, unreadable or damaged, or its tensors do not fit, by names, shapes,
            dtypes or values that are not finite; the model is then as it was.
    """
    require_module(model)
    path = path_of("path", path)
    pickled = path.suffix != ".safetensors"
    state = _unpickled(path) if pickled else read_tensors(path, _STATE_DICT).tensors
    state = state_as_named(state, renaming_for(model))
    require_fitting(model, _shapes_of(state), path)
    copy_into_(model, state, path)


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    """Returns the tensors in a file of `torch.save` by name, without running any pickled code."""
    try:
        content = torch.load(readable(path), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways
        pickled = isinstance(error, pickle.UnpicklingError)
        why = "it is damaged, or holds pickled objects, which are not loaded" if pickled else str(error)
        msg = f"cannot read the weights {str(path)!r}: {why}. Expected {_STATE_DICT}."
        raise WeightsError(msg) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        msg = f"{str(path)!r} holds no tensors by name: expected a state dict, or a checkpoint with a 'state_dict'."
        raise WeightsError(msg)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and HINT not in name}


def read_plan(path: str | Path) -> Plan:
    """Returns the plan in a file.

    Raises:
        ConfigurationError: If `path` is no path.
        WeightsError: If the file is missing or unreadable.
        PlanFormatError: If it holds no plan this version can read.
    """
    path = path_of("path", path)
    try:
        text = readable(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the plan {str(path)!r}: {error}. Expected a folder that save_compressed wrote."
        raise WeightsError(msg) from error
    return _plan_of(text, path)


def _plan_of(text: str, path: Path) -> Plan:
    try:
        return Plan.from_json(text)
    except PlanFormatError as error:
        msg = f"{str(path)!r}: {error}"
        raise PlanFormatError(msg) from error


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def require_fitting(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Checks that names and shapes are those of the model's state dict; of tied tensors one name is enough.

    Raises:
        WeightsError: If they are not.
    """
    own = model.state_dict(keep_vars=True)
    stored = {id(own[name]) for name in shapes if name in own}  # of tied tensors only one is stored
    missing = [name for name, tensor in own.items() if name not in shapes and id(tensor) not in stored]
    unexpected = [name for name in shapes if name not in own]
    differing = [
        f"{name} {shape} in the file, {tuple(own[name].shape)} in the model"
        for name, shape in shapes.items()
        if name in own and tuple(own[name].shape) != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"  # noqa: PLR2004
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if names
    ]
    if problems:
        msg = f"the tensors in {str(path)!r} do not fit the model ({type(model).__name__}): {'; '.join(problems)}."
        raise WeightsError(msg)

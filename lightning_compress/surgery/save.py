"""Saving and loading a compressed model: safetensors and JSON, never pickle."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from lightning_compress.core.errors import OutputFolderError, PlanFormatError, WeightsError
from lightning_compress.core.plan import Plan
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.shards import WEIGHTS_FILE, weight_files
from lightning_compress.surgery.swap import apply_shells_, uninstall

PLAN_FILE = "plan.json"


def save_compressed(model: nn.Module, folder: str | Path) -> None:
    """Writes `model.safetensors` and `plan.json` into a folder, which is made if needed.

    Args:
        model: A model after `apply_plan_`, `compress_` or a fit with `Compress`.
        folder: Where to write; existing files of these two names are replaced.

    Raises:
        OutputFolderError: If the folder cannot be made or written.
        WeightsError: If the state dict holds something else than tensors.
    """
    folder = Path(folder)
    plan = embodied_plan(model)
    others = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        msg = f"the state dict holds {others[0]!r}, no tensor (get_extra_state?): safetensors holds tensors only."
        raise WeightsError(msg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(folder / WEIGHTS_FILE))
        (folder / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        msg = f"cannot write the compressed model to {str(folder)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error


def load_compressed(model: nn.Module, folder: str | Path) -> Plan:
    """Turns a dense model into the compressed one that `save_compressed` or `compress_checkpoint` wrote, in place.

    Args:
        model: A model of the architecture before compression; its weights do not matter.
        folder: The folder they wrote: `plan.json`, and `model.safetensors` or shards with
            `model.safetensors.index.json`.

    Returns:
        The plan.

    Raises:
        WeightsError: If a file is missing or unreadable, or its tensors do not fit the model.
        PlanFormatError: If the plan is damaged, foreign or newer; PlanMismatchError if it does
            not fit the model. In every case the model is left as it was.
    """
    folder = Path(folder)
    plan = read_plan(folder / PLAN_FILE)
    files = weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= _stored_shapes(file, "a folder that save_compressed wrote")
    replacements = apply_shells_(model, plan)
    try:
        require_fitting(model, shapes, files[0] if len(files) == 1 else folder)
        for file in files:  # what one of them lacks is in the others
            model.load_state_dict(load_file(str(file)), strict=False)
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
        WeightsError: If the file is missing or unreadable, or its tensors do not fit; the
            model is then as it was.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        require_fitting(model, _stored_shapes(path, "a state dict (.safetensors or torch.save)"), path)
        load_model(model, str(path))
        return
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways
        pickled = isinstance(error, pickle.UnpicklingError)
        why = "it is damaged, or holds pickled objects, which are not loaded" if pickled else str(error)
        msg = f"cannot read the weights {str(path)!r}: {why}. Expected a state dict (.safetensors or torch.save)."
        raise WeightsError(msg) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        msg = f"{str(path)!r} holds no tensors by name: expected a state dict, or a checkpoint with a 'state_dict'."
        raise WeightsError(msg)
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    require_fitting(model, {name: tuple(value.shape) for name, value in state.items()}, path)
    model.load_state_dict(state, strict=False)  # of tied tensors one is enough


def read_plan(path: str | Path) -> Plan:
    """Returns the plan in a file.

    Raises:
        WeightsError: If the file is missing or unreadable.
        PlanFormatError: If it holds no plan this version can read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the plan {str(path)!r}: {error}. Expected a folder that save_compressed wrote."
        raise WeightsError(msg) from error
    try:
        return Plan.from_json(text)
    except PlanFormatError as error:
        msg = f"{str(path)!r}: {error}"
        raise PlanFormatError(msg) from error


def _stored_shapes(path: Path, expected: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        msg = f"cannot read the weights {str(path)!r}: {error}. Expected {expected}."
        raise WeightsError(msg) from error


def require_fitting(model: nn.Module, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
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

"""A folder that needs torch and safetensors alone: model.py, a module of torch's own layers, and model.safetensors.

The code is written from a symbolic trace (`torch.fx`). A model that has none, because its code asks for values or
sizes, becomes a torch.export archive beside a model.py that loads it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_compress.core.compat import tree_leaves
from lightning_compress.core.copies import detached_copy
from lightning_compress.export import torch_export
from lightning_compress.export.int8 import WEIGHTS_ALONE, channels_of, is_worth_it, rounded
from lightning_compress.export.plain_source import ARCHIVE, LOADER, SCALE, NotPlainError, source_of
from lightning_compress.export.subject import Subject, quiet, refusing
from lightning_compress.layers.interpolation import Interpolation

CODE, WEIGHTS = "model.py", "model.safetensors"
TOLERANCE = 1e-3
"""Relative difference of outputs above which written code does not do what the model does."""


def write(subject: Subject) -> str:
    """Writes the folder; returns how the model was quantised, "" for not at all."""
    subject.path.mkdir(parents=True, exist_ok=True)
    for name in (CODE, WEIGHTS, ARCHIVE):
        (subject.path / name).unlink(missing_ok=True)
    try:
        return _write_source(subject)
    except NotPlainError:
        for name in (CODE, WEIGHTS):
            (subject.path / name).unlink(missing_ok=True)
    program, how = torch_export.program_of(subject)
    with quiet(), refusing("torch.export.save"):
        torch.export.save(program, subject.path / ARCHIVE)
    (subject.path / CODE).write_text(LOADER, encoding="utf-8")
    return how


def _write_source(subject: Subject) -> str:
    """Writes code and weights.

    Raises:
        NotPlainError: If the model cannot be written as code that does the same.
    """
    twin = _with_plain_layers(subject.model)
    source, used, same = source_of(twin)
    state = {name: value.detach().contiguous().clone() for name, value in used.items() if name not in same}
    if subject.int8:
        state = _quantised(twin, state)
    save_file(state, subject.path / WEIGHTS)
    (subject.path / CODE).write_text(source, encoding="utf-8")
    if not _does_the_same(subject, exact=not subject.int8):
        msg = "the code written from a symbolic trace does something else"
        raise NotPlainError(msg)
    return WEIGHTS_ALONE if subject.int8 else ""


def _does_the_same(subject: Subject, *, exact: bool) -> bool:
    try:
        found = [leaf for leaf in tree_leaves(PlainRunner(subject.path)(*subject.inputs)) if isinstance(leaf, Tensor)]
    except Exception:  # of whatever the code does
        return False
    with torch.no_grad():
        expected = [leaf for leaf in tree_leaves(subject.model(*subject.inputs)) if isinstance(leaf, Tensor)]
    if [leaf.shape for leaf in found] != [leaf.shape for leaf in expected]:
        return False
    pairs = zip(found, expected, strict=True)
    return not exact or all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp_min(1)) for a, b in pairs)


def _quantised(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state with weights as integers, each with its scales under a name of its own."""
    dims = {f"{name}.weight": channels_of(layer) for name, layer in model.named_modules()}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in dims and is_worth_it(value):
            found[name], found[name + SCALE] = rounded(value, dims[name])
        else:
            found[name] = value
    return found


def _with_plain_layers(model: nn.Module) -> nn.Module:
    """Returns a copy whose interpolative layers are traceable ones of plain torch layers."""
    twin = detached_copy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Interpolation):
                parent._modules[name] = PlainInterpolation(child)
    return twin.eval()


class PlainInterpolation(nn.Module):
    """The same as an `Interpolation`, by a plain torch layer and an index.

    Args:
        layer: What it is the same as; they share the weight.
    """

    order: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: Interpolation) -> None:
        super().__init__()
        self.axis = -1 - layer.dims
        if not layer.is_square:
            outputs, rank = layer.weight.shape[:2]
            kinds: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
            kernel = (1,) if layer.dims else ()
            self.others = kinds[layer.dims](rank, outputs, *kernel, bias=False, device="meta")
            self.others.weight = layer.weight
        self.register_buffer("order", layer.places().clone())
        shape = (-1, *(1 for _ in range(layer.dims)))
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().reshape(shape))
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the outputs."""
        joined = torch.cat([input, self.others(input)], self.axis) if hasattr(self, "others") else input
        output = joined.index_select(self.axis, self.order)
        return output if self.bias is None else output + self.bias


class PlainRunner:
    """A folder of format `plain`: the code in it is run.

    Args:
        path: Of the folder.
    """

    def __init__(self, path: Path) -> None:
        with quiet(), refusing(f"loading {str(path / CODE)!r}"):
            spec = importlib.util.spec_from_file_location("lightning_compress_plain_model", path / CODE)
            module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
            self.module = module.load()

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs."""
        with torch.no_grad():
            return self.module(*inputs)

"""`export_model`: a compressed (or dense) model as a file that runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.analysis.usable import require_module
from lightning_compress.core.checks import did_you_mean, is_number, path_of, require_flag, shown
from lightning_compress.core.errors import ConfigurationError, OutputFolderError, UnsupportedError
from lightning_compress.export import executorch, onnx, openvino, plain, torch_export, torchscript
from lightning_compress.export.running import load_exported, size_of
from lightning_compress.export.subject import Inputs, Subject, refusing, subject_of, tensors_in, with_batch

Format = Literal["onnx", "torch_export", "aot_inductor", "torchscript", "openvino", "executorch", "plain"]


class Writer(NamedTuple):
    """How a format is written.

    Attributes:
        write: Writes it; returns how the model was quantised.
        ending: Of the file's name, "" for a folder.
    """

    write: Callable[[Subject], str]
    ending: str


FORMATS: dict[str, Writer] = {
    "onnx": Writer(onnx.write, ".onnx"),
    "torch_export": Writer(torch_export.write, ".pt2"),
    "aot_inductor": Writer(torch_export.write_compiled, ".aoti.pt2"),
    "torchscript": Writer(torchscript.write, ".pt"),
    "openvino": Writer(openvino.write, ".xml"),
    "executorch": Writer(executorch.write, ".pte"),
    "plain": Writer(plain.write, ""),
}


@dataclass(frozen=True)
class Exported:
    """What `export_model` wrote.

    Attributes:
        path: The file, or the folder of format `plain`.
        format: A key of `FORMATS`.
        bytes: Size, with that of files that belong to it.
        difference: Largest difference of its outputs from the model's on the example input, relative to the largest
            output where that is above 1.
        int8: How it was quantised, "" for not at all.
        dynamic_batch: Whether it takes batches of any size.
    """

    path: Path
    format: str
    bytes: int
    difference: float
    int8: str
    dynamic_batch: bool


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format,
    example_input: ExampleInput,
    int8: bool = False,
    calibration: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Writes a model as a file that runs without this library, and compares what it computes with the model.

    The model, compressed or not, is not changed: a copy is exported in eval mode on the CPU. Factorised layers are
    exported as their factors, those that run multiplied out too.

    Formats: `onnx` (by torch's exporter, runs in ONNX Runtime), `torch_export` (an archive that runs where torch is),
    `aot_inductor` (compiled for this kind of machine, needs a C++ compiler), `torchscript` (traced), `openvino` (needs
    the package openvino), `executorch` (needs executorch; takes one sample at a time), `plain` (a folder with a module
    of torch's own layers as Python code, and safetensors).

    With `int8` the file holds 8-bit integers. With calibration inputs weights and activations are quantised: by ONNX
    Runtime (`onnx`, `openvino`) or torchao (the others). Without, ONNX Runtime scales activations as they come, and of
    `torch_export` and `aot_inductor` the weights alone are quantised, as of `torchscript` and `plain` always.

    Args:
        model: A module.
        path: Of the file; the format's ending is added where it has none of it. `plain` makes a folder of that name.
        format: One of the above.
        example_input: A tensor, a tuple or dict of arguments of `forward`, or a shape with its batch dimension.
        int8: Whether to quantise.
        calibration: Batches of real inputs, some hundred samples in all, each a tensor, a tuple or a dict.
        dynamic_batch: Whether the file takes batches of any size.
        tolerance: Largest `Exported.difference` that is no error, without `int8`.

    Returns:
        Where it is, its size, and how far its outputs are from the model's.

    Raises:
        ConfigurationError: If an argument has a wrong type or value.
        ExampleInputError: If the model fails on the example input, or a batch of the calibration is none.
        UnsupportedError: If the format cannot hold the model, what it needs is not installed, or the file computes
            something else than the model.
        OutputFolderError: If the file cannot be written.
    """
    require_module(model)
    writer = _checked(format, int8=int8, dynamic_batch=dynamic_batch, tolerance=tolerance)
    path = path_of("path", path)
    if not path.name.endswith(writer.ending):
        path = path.with_name(path.name + writer.ending)
    if calibration is not None and not int8:
        msg = "calibration= is for int8=True: without it nothing is quantised."
        raise ConfigurationError(msg)
    subject = subject_of(model, path, example_input, dynamic=dynamic_batch, int8=int8, calibration=calibration)
    if format == "executorch":
        subject = executorch.one_sample(subject)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        how = writer.write(subject)
    except OSError as error:
        msg = f"cannot write the model to {str(path)!r}: {error}. Choose a folder you can write."
        raise OutputFolderError(msg) from error
    difference = _difference(subject)
    if not int8 and not difference <= tolerance:
        msg = (
            f"{str(path)!r} computes something else than the model: its outputs differ by {difference:.3g}, more than "
            f"tolerance={tolerance}. What is random in eval mode, or depends on the values of the inputs, cannot be "
            "exported; in half precision a larger tolerance may be right."
        )
        raise UnsupportedError(msg)
    return Exported(path, format, size_of(path), difference, how, subject.dynamic)


def _checked(format: object, *, int8: object, dynamic_batch: object, tolerance: object) -> Writer:
    """Returns the writer of a format.

    Raises:
        ConfigurationError: If an argument has a wrong type or value.
    """
    if not isinstance(format, str) or format not in FORMATS:
        msg = f"format={shown(format)}: no such format.{did_you_mean(format, FORMATS)}"
        raise ConfigurationError(msg)
    require_flag("int8", int8)
    require_flag("dynamic_batch", dynamic_batch)
    if not is_number(tolerance) or not tolerance >= 0:  # type: ignore[operator]
        msg = f"tolerance={shown(tolerance)}: expected a number of at least 0."
        raise ConfigurationError(msg)
    return FORMATS[format]


def _difference(subject: Subject) -> float:
    """Returns how far the outputs of a file are from the model's, on a batch of another size too where it takes any."""
    run = load_exported(subject.path)
    batches: list[Inputs] = [subject.inputs]
    if subject.dynamic:
        batches.append(with_batch(subject.inputs, len(tensors_in(subject.inputs)[0]) + 2))
    worst = 0.0
    for inputs in batches:
        with torch.no_grad():
            expected = tensors_in(subject.model(*inputs))
        with refusing(f"running {str(subject.path)!r}", subject.dynamic):
            found = tensors_in(run(*inputs))
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
            return float("inf")
        for a, b in zip(found, expected, strict=True):
            if b.numel():
                scale = max(1.0, float(b.double().abs().max()))
                worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst

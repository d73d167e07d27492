"""ONNX by torch's exporter, quantised by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.analysis.distance import NEGLIGIBLE, OutputDistance
from lightning_compress.core.compat import tree_leaves
from lightning_compress.export.onnx_slim import shorten_, slim_
from lightning_compress.export.subject import Inputs, Subject, optional, quiet, refusing, tensors_in

EXTRA = "onnx"
LARGEST = 2**31 - 2**20
"""Bytes that one file of ONNX can hold; above it the weights lie beside it."""
CLOSE = 1.25
"""How many times the distance of the outputs one scale per tensor may have for its smaller file, where that distance is
not negligible anyway."""


def write(subject: Subject) -> str:
    """Writes the file; returns how it was quantised, "" for not at all."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        optional(module, EXTRA, "format='onnx'")
    if not subject.int8:
        save_(float_model(subject), subject.path)
        return ""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "float.onnx"
        save_(float_model(subject), dense)
        return _quantise(subject, dense)


def float_model(subject: Subject) -> Any:
    """Returns the model as an ONNX protobuf without what the exporter notes of the code it came from."""
    program: Any
    given: dict[str, Any] = {"dynamic_shapes": subject.shapes} if subject.dynamic else {}
    with quiet(), torch.no_grad(), refusing(f"the ONNX export of {type(subject.model).__name__}", subject.dynamic):
        program = torch.onnx.export(subject.model, subject.inputs, None, dynamo=True, verbose=False, **given)
    return slim_(program.model_proto)


def save_(model: Any, path: Path) -> None:
    """Writes a protobuf, the weights beside it where it is too large for one file."""
    onnx = optional("onnx", EXTRA, "format='onnx'")
    beside = {"save_as_external_data": True, "location": f"{path.name}.data"} if model.ByteSize() > LARGEST else {}
    onnx.save(model, str(path), **beside)


def _quantise(subject: Subject, dense: Path) -> str:
    """Writes the quantised model; of one scale per tensor and one per channel the smaller that is close."""
    onnx = optional("onnx", EXTRA, "format='onnx'")
    tools = optional("onnxruntime.quantization", EXTRA, "int8=True")
    if not subject.calibration:
        with quiet(), refusing("ONNX Runtime's dynamic quantisation"):
            tools.quantize_dynamic(str(dense), str(subject.path))
        onnx.save(shorten_(slim_(onnx.load(str(subject.path)))), str(subject.path))
        return "dynamic, by onnxruntime"
    target = OnnxRunner(dense)
    expected = [target(*inputs) for inputs in subject.calibration]
    found: dict[bool, tuple[float, bytes]] = {}
    for per_channel in (True, False):
        quantise_static(subject, dense, subject.path, per_channel=per_channel, operators=True)
        model = shorten_(slim_(onnx.load(str(subject.path))))
        onnx.save(model, str(subject.path))
        runner, distance = OnnxRunner(subject.path), OutputDistance()
        for inputs, outputs in zip(subject.calibration, expected, strict=True):
            distance.add(_floats(runner(*inputs)), _floats(outputs))
        found[per_channel] = distance.value, subject.path.read_bytes()
    per_tensor = found[False][0] <= max(NEGLIGIBLE, CLOSE * found[True][0])
    subject.path.write_bytes(found[not per_tensor][1])
    what = "one scale per tensor" if per_tensor else "one scale per channel"
    return f"static, by onnxruntime on {_samples(subject.calibration)} inputs, {what}"


def quantise_static(subject: Subject, dense: Path, path: Path, *, per_channel: bool, operators: bool) -> None:
    """Quantises a file with the calibration inputs.

    Args:
        subject: Has them.
        dense: The file of floating-point numbers.
        path: The file that is written.
        per_channel: Whether weights have a scale per channel.
        operators: Whether as quantised operators, which make the smaller file for ONNX Runtime's own kernels, or as
            operators between quantising and dequantising, which others read.
    """
    tools = optional("onnxruntime.quantization", EXTRA, "int8=True")
    layout = tools.QuantFormat.QOperator if operators else tools.QuantFormat.QDQ
    with quiet(), refusing("ONNX Runtime's static quantisation"):
        tools.quantize_static(
            str(dense),
            str(path),
            reader_of(subject.calibration, OnnxRunner(dense).names, tools),
            quant_format=layout,
            per_channel=per_channel,
            weight_type=tools.QuantType.QInt8,
            activation_type=tools.QuantType.QUInt8,
        )


def reader_of(batches: Sequence[Inputs], names: Sequence[str], tools: Any) -> Any:
    """Returns the batches as ONNX Runtime reads them."""

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Any]] = (feeds_of(inputs, names) for inputs in batches)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    return Reader()


def feeds_of(inputs: Inputs, names: Sequence[str]) -> dict[str, Any]:
    """Returns inputs by their names in the file."""
    return {name: tensor.detach().numpy() for name, tensor in zip(names, tensors_in(inputs), strict=True)}


class OnnxRunner:
    """A file in ONNX Runtime on the CPU.

    Args:
        path: Of the file.
        threads: Intra-op threads, None for those of the process.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        runtime = optional("onnxruntime", EXTRA, "an .onnx file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or torch.get_num_threads(), 1
        options.log_severity_level = 3
        with refusing(f"ONNX Runtime's loading of {str(path)!r}"):
            self._session = runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.names = tuple(own.name for own in self._session.get_inputs())

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs, a tensor or a tuple of them."""
        found = [torch.from_numpy(value) for value in self._session.run(None, feeds_of(inputs, self.names))]
        return found[0] if len(found) == 1 else tuple(found)


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if leaf.is_floating_point()]


def _samples(batches: Sequence[Inputs]) -> int:
    return sum(len(tensors_in(batch)[0]) for batch in batches)

"""OpenVINO's intermediate representation: an .xml file and a .bin file beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_compress.core.errors import UnsupportedError
from lightning_compress.export.onnx import float_model, quantise_static, save_
from lightning_compress.export.onnx_slim import slim_
from lightning_compress.export.subject import Subject, optional, quiet, refusing, tensors_in

EXTRA = "openvino"


def write(subject: Subject) -> str:
    """Writes both files; returns how the model was quantised, "" for not at all.

    Raises:
        UnsupportedError: If OpenVINO is not installed, or int8 is asked for without calibration inputs.
    """
    openvino = optional("openvino", EXTRA, "format='openvino'")
    if not subject.int8:
        with quiet(), refusing("OpenVINO's conversion", subject.dynamic):
            model = openvino.convert_model(subject.exported())
        _save(openvino, model, subject.path)
        return ""
    if not subject.calibration:
        msg = "format='openvino' with int8=True is quantised statically: pass calibration=, batches of real inputs."
        raise UnsupportedError(msg)
    onnx = optional("onnx", "onnx", "format='openvino' with int8=True")
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        save_(float_model(subject), dense)
        quantise_static(subject, dense, small, per_channel=True, operators=False)
        onnx.save(slim_(onnx.load(str(small))), str(small))
        with quiet(), refusing("OpenVINO's conversion", subject.dynamic):
            model = openvino.convert_model(str(small))
        _save(openvino, model, subject.path)
    samples = sum(len(tensors_in(batch)[0]) for batch in subject.calibration)
    return f"static, by onnxruntime on {samples} inputs, one scale per channel"


def _save(openvino: Any, model: Any, path: Path) -> None:
    with quiet(), refusing("OpenVINO's saving"):
        openvino.save_model(model, str(path), compress_to_fp16=False)


class OpenVinoRunner:
    """A model of OpenVINO on the CPU, in single precision where it holds floating-point numbers.

    Args:
        path: Of the .xml file.
        threads: For inference, None for those of the process.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino = optional("openvino", EXTRA, "an .xml file")
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "CACHE_DIR": "",
        }
        with quiet(), refusing(f"OpenVINO's loading of {str(path)!r}"):
            self._model = openvino.Core().compile_model(str(path), "CPU", settings)

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs, a tensor or a tuple of them."""
        values = self._model([tensor.numpy() for tensor in tensors_in(inputs)])
        found = [torch.from_numpy(value.copy()) for value in values.values()]
        return found[0] if len(found) == 1 else tuple(found)

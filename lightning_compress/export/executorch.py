"""ExecuTorch programs for phones, by the XNNPACK backend; they take one sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.errors import UnsupportedError
from lightning_compress.export.int8 import calibrated
from lightning_compress.export.subject import Inputs, Subject, optional, quiet, refusing, tensors_in, with_batch

EXTRA = "executorch"


def write(subject: Subject) -> str:
    """Writes the file; returns how it was quantised, "" for not at all.

    Raises:
        UnsupportedError: If ExecuTorch is not installed or does not work with this torch, or int8 is asked for without
            calibration inputs.
    """
    exir = optional("executorch.exir", EXTRA, "format='executorch'")
    xnnpack = optional("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA, "format='executorch'")
    program, how = subject.exported(), ""
    if subject.int8:
        if not subject.calibration:
            msg = "format='executorch' with int8=True is quantised statically: pass calibration=, real inputs."
            raise UnsupportedError(msg)
        tools = optional("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", EXTRA, "int8=True")
        quantizer = tools.XNNPACKQuantizer()
        quantizer.set_global(tools.get_symmetric_quantization_config(is_per_channel=True))
        program = subject.exported(calibrated(subject, quantizer))
        samples = len(subject.calibration)
        how = f"static, by torchao's pt2e for XNNPACK on {samples} inputs, one scale per channel"
    with quiet(), torch.no_grad(), refusing("ExecuTorch's lowering"):
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        subject.path.write_bytes(lowered.to_executorch().buffer)
    return how


class ExecuTorchRunner:
    """An ExecuTorch program; a batch is run sample by sample.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        runtime = optional("executorch.runtime", EXTRA, "a .pte file")
        with quiet(), refusing(f"ExecuTorch's loading of {str(path)!r}"):
            self._program = runtime.Runtime.get().load_program(path)
            self._method = self._program.load_method("forward")

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs, a tensor or a tuple of them."""
        batch = len(tensors_in(inputs)[0])
        samples = (_sample(inputs, index) for index in range(batch))
        rows = [[tensor.clone() for tensor in self._method.execute(one)] for one in samples]
        found = [torch.cat(own) for own in zip(*rows, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)


def _sample(inputs: Inputs, index: int) -> Inputs:
    return tuple(t[index : index + 1].contiguous() if isinstance(t, Tensor) and t.ndim else t for t in inputs)


def one_sample(subject: Subject) -> Subject:
    """Returns the subject with every size fixed, at one sample, and the calibration inputs one by one."""
    singles = []
    for inputs in subject.calibration:
        singles += [_sample(inputs, index) for index in range(len(tensors_in(inputs)[0]))]
    shaped = with_batch(subject.inputs, 1) if subject.dynamic else subject.inputs
    return Subject(subject.model, shaped, subject.path, False, subject.int8, singles, subject.names)

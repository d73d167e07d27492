"""TorchScript by tracing, for runtimes that have nothing newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_compress.export.int8 import WEIGHTS_ALONE, with_int8_weights
from lightning_compress.export.subject import Subject, quiet, refusing


def write(subject: Subject) -> str:
    """Writes the file; returns how it was quantised, "" for not at all."""
    model = with_int8_weights(subject.model) if subject.int8 else subject.model
    with quiet(), torch.no_grad(), refusing(f"torch.jit.trace of {type(subject.model).__name__}", subject.dynamic):
        trace: Any = torch.jit.trace
        traced = trace(model, subject.inputs, strict=False, check_trace=False)
        torch.jit.save(traced, str(subject.path))
    return WEIGHTS_ALONE if subject.int8 else ""


class ScriptRunner:
    """A TorchScript file on the CPU.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        with quiet(), refusing(f"torch.jit.load of {str(path)!r}"):
            self._module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs."""
        with torch.no_grad():
            return self._module(*inputs)

"""ONNX Runtime on this machine as a device that times modules."""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.latency.clock import Clock
from lightning_compress.analysis.latency.turns import in_turns
from lightning_compress.core.effort import current_effort
from lightning_compress.core.errors import TargetError


class OnnxRuntime:
    """Exports a module and times it on the CPU.

    Args:
        threads: Intra-op threads, None for those of the process.

    Raises:
        TargetError: If the extra `onnx` is not installed.
    """

    def __init__(self, threads: int | None = None) -> None:
        try:
            import onnx  # noqa: F401, PLC0415 (an extra)
            import onnxruntime  # noqa: PLC0415 (an extra)
        except ImportError as error:
            msg = f"target='onnxruntime' needs {error.name!r}: pip install 'lightning_compress[onnx]'."
            raise TargetError(msg) from error
        self._runtime: Any = onnxruntime
        self._threads = threads or torch.get_num_threads()
        self.name = f"onnxruntime {onnxruntime.__version__}, {self._threads} threads"

    def seconds(self, module: nn.Module, example: tuple[Any, ...]) -> float:
        """See `Stopwatch`."""
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.log_severity_level = 3
        session = self._runtime.InferenceSession(exported(module, example), options, ["CPUExecutionProvider"])
        tensors = [value for value in example if isinstance(value, Tensor)]
        feeds = {own.name: t.numpy() for own, t in zip(session.get_inputs(), tensors, strict=True)}
        clock = Clock(torch.device("cpu"))
        (turns,) = in_turns([lambda: clock.seconds(lambda: session.run(None, feeds))], current_effort().timing_seconds)
        return statistics.median(turns)


def exported(module: nn.Module, example: tuple[Any, ...]) -> bytes:
    """Returns a module as an ONNX model; what the exporters print is left out.

    Torch's exporter by scripting takes a fiftieth of the time of the other one, and does not know all operators.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        try:
            file = io.BytesIO()
            torch.onnx.export(module, example, cast(Any, file), dynamo=False)
        except Exception:
            file = io.BytesIO()
            torch.onnx.export(module, example, cast(Any, file), dynamo=True)
    return file.getvalue()


@contextlib.contextmanager
def _quiet(name: str) -> Any:
    logger = logging.getLogger(name)
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)

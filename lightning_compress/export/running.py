"""Exported files as functions again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_compress.analysis.latency.clock import Clock
from lightning_compress.analysis.latency.turns import in_turns
from lightning_compress.core.checks import path_of
from lightning_compress.core.errors import WeightsError
from lightning_compress.core.memory import freed_memory_kept
from lightning_compress.export.executorch import ExecuTorchRunner
from lightning_compress.export.onnx import OnnxRunner
from lightning_compress.export.openvino import OpenVinoRunner
from lightning_compress.export.plain import CODE, PlainRunner
from lightning_compress.export.torch_export import CompiledRunner, ProgramRunner
from lightning_compress.export.torchscript import ScriptRunner

Runner = Callable[..., Any]

_RUNNERS: dict[str, Callable[[Path], Runner]] = {
    ".aoti.pt2": CompiledRunner,
    ".onnx": OnnxRunner,
    ".pt2": ProgramRunner,
    ".pt": ScriptRunner,
    ".xml": OpenVinoRunner,
    ".pte": ExecuTorchRunner,
}


def load_exported(path: str | Path) -> Runner:
    """Returns a file that `export_model` wrote as a function of the model's positional inputs, on the CPU.

    Of format `plain` the code in the folder is run, as importing it would.

    Args:
        path: Of the file, or of the folder of format `plain`; its ending says what it is.

    Raises:
        ConfigurationError: If `path` is no path.
        WeightsError: If there is nothing, or nothing with such an ending.
        UnsupportedError: If what runs it is not installed, or refuses it.
    """
    path = path_of("path", path)
    known = f"{', '.join(_RUNNERS)}, or a folder with a {CODE}"
    if not path.exists():
        msg = f"there is no {str(path)!r}: expected a file that export_model wrote, {known}."
        raise WeightsError(msg)
    if path.is_dir() and (path / CODE).is_file():
        return PlainRunner(path)
    for ending, runner in _RUNNERS.items():
        if path.is_file() and path.name.endswith(ending):
            return runner(path)
    msg = f"{str(path)!r} is nothing that export_model wrote: expected {known}."
    raise WeightsError(msg)


def size_of(path: Path) -> int:
    """Returns the bytes of a file or folder that was exported, with those of the files that belong to it."""
    if path.is_dir():
        own = (file for file in path.rglob("*") if "__pycache__" not in file.parts)
        return sum(file.stat().st_size for file in own if file.is_file())
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(f"{path.name}.data")]
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file())


def seconds_of(runners: Sequence[Runner], inputs: tuple[Any, ...], seconds: float = 1.0) -> list[list[float]]:
    """Returns the median seconds of each turn for each of some runners that take turns, on one thread of torch's."""
    clock, threads = Clock(torch.device("cpu")), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with freed_memory_kept(), torch.inference_mode():
            return in_turns([lambda run=run: clock.seconds(lambda: run(*inputs)) for run in runners], seconds)  # type: ignore[misc]
    finally:
        torch.set_num_threads(threads)

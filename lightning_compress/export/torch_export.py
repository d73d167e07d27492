"""torch.export archives, which run where torch is, and AOTInductor's packages, compiled for this kind of machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lightning_compress.core.compat import tree_leaves
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.export.int8 import quantised
from lightning_compress.export.subject import Subject, quiet, refusing

_NOTES = ("stack_trace", "from_node", "source_fn_stack", "torch_fn")
_COMPILERS = ("c++", "g++", "clang++")


def write(subject: Subject) -> str:
    """Writes the archive; returns how it was quantised, "" for not at all."""
    program, how = program_of(subject)
    with quiet(), refusing("torch.export.save"):
        torch.export.save(program, subject.path)
    return how


def write_compiled(subject: Subject) -> str:
    """Writes the package of AOTInductor; returns how it was quantised, "" for not at all.

    Raises:
        UnsupportedError: If there is no C++ compiler.
    """
    if compiler() is None:
        msg = (
            "format='aot_inductor' compiles C++, and there is no compiler: install g++ or clang++, or set CXX. "
            "format='torch_export' needs none."
        )
        raise UnsupportedError(msg)
    program, how = program_of(subject)
    with quiet(), torch.no_grad(), refusing("AOTInductor"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(subject.path))
    return how


def compiler() -> str | None:
    """Returns the C++ compiler that AOTInductor would take, None if there is none."""
    named = os.environ.get("CXX")
    return next((found for name in (named, *_COMPILERS) if name and (found := shutil.which(name))), None)


def program_of(subject: Subject) -> tuple[torch.export.ExportedProgram, str]:
    """Returns the exported program without notes on the code it came from, and how it was quantised."""
    program, how = quantised(subject) if subject.int8 else (subject.exported(), "")
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)
    return program, how


class ProgramRunner:
    """A torch.export archive.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        with quiet(), refusing(f"torch.export.load of {str(path)!r}"):
            self._module = torch.export.load(path).module()

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs."""
        with torch.no_grad():
            return self._module(*inputs)


class CompiledRunner:
    """A package of AOTInductor.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        with quiet(), refusing(f"AOTInductor's loading of {str(path)!r}"):
            self._run = torch._inductor.aoti_load_package(str(path))

    def __call__(self, *inputs: Any) -> Any:
        """Returns the outputs, a tensor or a tuple of them."""
        found = tree_leaves(self._run(*inputs))
        return found[0] if len(found) == 1 else tuple(found)

"""Factorised layers in TorchScript, which compiles Python code of a few forms and no loop over named children."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import UnsupportedError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def scriptable(function: _Function) -> _Function:
    """Gives a method or class its annotations as types: TorchScript does not read those of `from __future__`."""
    types = typing.get_type_hints(function)
    function.__annotations__ = {name: types[name] for name in function.__annotations__}
    return function


class Unscriptable:
    """A module that TorchScript cannot compile, and says so before it tries."""

    def __prepare_scriptable__(self) -> nn.Module:
        msg = (
            f"torch.jit.script cannot compile a {type(self).__name__}: trace the model (torch.jit.trace, or "
            "method='trace' of to_torchscript), export it, or merge_ a copy of it first."
        )
        raise UnsupportedError(msg)


ORDER = ("reduce", "kernel", "axis0", "axis1", "axis2", "core", "expand")
"""Names of the stages of our own kinds, in the order in which they are called."""


class InOrder(nn.Module):
    """A module that calls its children one after the other, in TorchScript too if their names are those of `ORDER`."""

    __jit_unused_properties__: typing.ClassVar = ["template", "weight", "bias", "memory_format", "error"]
    __jit_ignored_attributes__: typing.ClassVar = __jit_unused_properties__

    def __init__(self, children: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.is_in_order = [name for name in ORDER if name in children] == list(children)

    @scriptable
    def scripted(self, input: Tensor) -> Tensor:
        """Returns the output in TorchScript, where `hasattr` is decided when the module is compiled."""
        assert self.is_in_order, "TorchScript runs the kinds of lightning_compress alone: call merge_ first"
        output = input
        if hasattr(self, "reduce"):
            output = self.reduce(output)  # type: ignore[operator]
        if hasattr(self, "kernel"):
            output = self.kernel(output)  # type: ignore[operator]
        if hasattr(self, "axis0"):
            output = self.axis0(output)  # type: ignore[operator]
        if hasattr(self, "axis1"):
            output = self.axis1(output)  # type: ignore[operator]
        if hasattr(self, "axis2"):
            output = self.axis2(output)  # type: ignore[operator]
        if hasattr(self, "core"):
            output = self.core(output)  # type: ignore[operator]
        if hasattr(self, "expand"):
            output = self.expand(output)  # type: ignore[operator]
        return output

    @torch.jit.unused
    def as_written(self, input: Tensor) -> Tensor:
        """Returns the output outside TorchScript."""
        raise NotImplementedError

"""Writes a model as Python code of torch's own layers, from a symbolic trace."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_compress.export.subject import quiet

SCALE = "::scale"
"""End of the name of a quantised weight's scales."""
ARCHIVE = "model.pt2"

LOADER = '''\
"""A compressed model, as an archive of torch.export: `load()` returns it. It needs torch alone.

The model could not be written as code of plain layers, because its own code asks for values or sizes.
"""

from pathlib import Path

import torch


def load(path=Path(__file__).with_name("model.pt2")):
    """Returns the model in eval mode."""
    return torch.export.load(path).module()
'''

_HEAD = '''\
"""A compressed {name} in torch's own layers: `load()` returns it in eval mode. It needs torch and safetensors alone."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
{imports}
SAME = {same}  # tensors that are another one


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
{layers}
        for name, first in SAME.items():
            put(self, name, self.get_parameter(first))
{dtype}
{forward}

def put(module, path, value):
    """Puts a layer, a parameter or a buffer under a path of names."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]
    if isinstance(value, nn.Module):
        module.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def load(path=Path(__file__).with_name("model.safetensors")):
    """Returns the model in eval mode, with the weights in a file; quantised ones are multiplied by their scales."""
    state = load_file(path)
    for name in [name for name in state if name.endswith("{scale}")]:
        scale = state.pop(name)
        weight = name.removesuffix("{scale}")
        state[weight] = state[weight].to(scale.dtype) * scale
    model = {name}()
    model.load_state_dict({{**state, **{{name: state[first] for name, first in SAME.items()}}}})
    return model.eval()
'''


class NotPlainError(Exception):
    """The model has no symbolic trace, or one that plain torch cannot run."""


class _Tracer(fx.Tracer):
    """Traces down to layers of torch that can be written as a call of their class."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Returns whether a module is called, and not looked into."""
        own = all(type(module).__module__.startswith("torch.nn.") for module in m.modules())
        return own and not isinstance(m, nn.Sequential) and constructor(m) is not None


def source_of(model: nn.Module) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """Returns the code of a model, the tensors that it needs by name, and which of them are another one.

    Raises:
        NotPlainError: If it cannot be written as such.
    """
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        msg = "hooks are no part of a trace"
        raise NotPlainError(msg)
    try:
        with quiet():
            tracer = _Tracer()
            graph = tracer.trace(model)
            for node in reversed(graph.nodes):
                node.type = None  # names of annotations, which the code would have to import
                if node.op == "get_attr" and not node.users:  # read while `constructor` looked at the layers
                    graph.erase_node(node)
            code = graph.python_code("self")
    except Exception as error:  # whatever the model's code does with what is no tensor
        msg = f"{type(error).__name__}: {error}"
        raise NotPlainError(msg) from error
    root = tracer.root
    lines, state = _layers(root, graph)
    same = _ties(state)
    text = _HEAD.format(
        name=_class_name(model),
        imports="".join(f"{line}\n" for line in _imports(code.globals)),
        same=repr(same),
        layers="\n".join(f"        {line}" for line in lines) or "        pass",
        dtype=_conversion(state.values()),
        forward="\n".join(f"    {line}" if line else "" for line in code.src.strip().split("\n")) + "\n",
        scale=SCALE,
    )
    return text, state, same


def constructor(layer: nn.Module) -> str | None:
    """Returns the call that makes a layer of torch like this one, None if no call with plain arguments does."""
    cls = type(layer)
    if not hasattr(nn, cls.__name__) or getattr(nn, cls.__name__) is not cls:
        return None
    arguments: list[str] = []
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found, value = _setting(layer, name)
        if not found and parameter.default is parameter.empty:
            return None
        usual = (parameter.default,) * len(value) if isinstance(value, tuple) else parameter.default
        if found and (parameter.default is parameter.empty or value not in (usual, parameter.default)):
            arguments.append(f"{name}={value!r}")
    text = f"nn.{cls.__name__}({', '.join(arguments)})"
    try:
        with torch.device("meta"):
            made = eval(text, {"nn": nn})
    except Exception:  # values whose repr is no code, or that the class does not take
        return None
    alike = _form(made) == _form(layer) and made.extra_repr() == layer.extra_repr()
    return text if alike else None


def _setting(layer: nn.Module, name: str) -> tuple[bool, Any]:
    """Returns whether a layer knows the value of an argument of its class, and that value."""
    if name == "bias":
        own = layer._parameters.get("bias", layer._parameters.get("in_proj_bias"))
        return (True, layer.__dict__["bias"]) if "bias" in layer.__dict__ else (True, own is not None)
    if name == "add_bias_kv":
        return True, layer._parameters.get("bias_k") is not None
    if name not in layer.__dict__:
        return False, None
    value = layer.__dict__[name]
    return True, tuple(value) if isinstance(value, (torch.Size, list)) else value


def _form(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in layer.state_dict().items()}


def _layers(root: Any, graph: fx.Graph) -> tuple[list[str], dict[str, Tensor]]:
    """Returns the lines that make the layers of a graph, and their state."""
    lines: list[str] = []
    state: dict[str, Tensor] = {}
    modules = dict.fromkeys(node.target for node in graph.nodes if node.op == "call_module")
    for name in modules:
        layer = root.get_submodule(name)
        lines.append(f"put(self, {name!r}, {constructor(layer)})")
        state |= {f"{name}.{key}": value for key, value in layer.state_dict(keep_vars=True).items()}
    for name in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        if name in state:
            continue
        owner, _, last = name.rpartition(".")
        value = getattr(root.get_submodule(owner), last)
        if not isinstance(value, Tensor):
            msg = f"the trace reads {name}, which is no tensor"
            raise NotPlainError(msg)
        empty = f"torch.empty({tuple(value.shape)}, dtype={value.dtype})"
        lines.append(f"put(self, {name!r}, {f'nn.Parameter({empty})' if isinstance(value, nn.Parameter) else empty})")
        state[name] = value
    return lines, state


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the names of parameters that are another one, with the name of that."""
    first: dict[int, str] = {}
    return {name: own for name, value in state.items() if (own := first.setdefault(id(value), name)) != name}


def _conversion(tensors: Iterable[Tensor]) -> str:
    """Returns the line that gives the layers their dtype, if that is not the usual one."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) > 1:
        msg = "its parameters are of several dtypes"
        raise NotPlainError(msg)
    return "" if dtypes <= {torch.float32} else f"        self.to({dtypes.pop()})\n"


def _imports(names: Mapping[str, Any]) -> list[str]:
    """Returns the lines that import what the code of a graph names."""
    lines: list[str] = []
    for name, value in names.items():
        if value is torch:
            continue
        of_torch = getattr(torch, str(getattr(value, "__name__", "")), None) is value
        home = "torch" if of_torch else getattr(value, "__module__", None)
        if name in ("inf", "nan"):
            lines.append(f"from math import {name}")
        elif name == "NoneType":
            lines.append("NoneType = type(None)")
        elif isinstance(value, type(torch)) and value.__name__.partition(".")[0] in ("torch", "math"):
            lines.append(f"import {value.__name__} as {name}")
        elif home is not None and home.partition(".")[0] in ("torch", "_operator", "math", "builtins"):
            lines.append(f"from {home.lstrip('_') if home == '_operator' else home} import {value.__name__} as {name}")
        elif name != "fx_pytree":
            msg = f"the trace calls {name} of {home}, which is not torch's"
            raise NotPlainError(msg)
    return lines


def _class_name(model: nn.Module) -> str:
    name = type(model).__name__
    return name if name.isidentifier() and not keyword.iskeyword(name) and name not in ("put", "load") else "Model"

"""Names of torch and Lightning without a promise of stability that the rooms below training use, in one place.

Everything here works from torch 2.5, the oldest that is supported, to 2.14. Names of Lightning that only training needs
are in `training/compat.py`.

Not here, because torch's own documentation and the code built on it take them for granted, and a function around each
would hide what happens: the dictionaries of a module (`_parameters`, `_buffers`, `_modules`, and the hooks such as
`_forward_hooks`), which replacing a layer in place is all about; and what makes `nn.RNN`, `nn.LSTM` and `nn.GRU` run
on fused kernels (`torch._VF`, `_flat_weights`), which `layers/unfused/` alone knows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import checkpoint
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "TRAINER_ATTRIBUTE",
    "activations_kept",
    "caches_parameter_count",
    "forget_parameter_count_",
    "has_gradient_hooks",
    "held_parameters",
    "is_compiled",
    "is_quantised",
    "is_recorded",
    "is_wrapped",
    "tree_flatten",  # torch has no public name for containers nested as the user likes
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "uncompiled",
]

TRAINER_ATTRIBUTE = "_trainer"
"""Where a LightningModule keeps its trainer; its property `trainer` raises without one. Lightning 2.4 to 2.6."""


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Returns whether functions are called with a tensor's gradient: torch only tells how to add and remove them."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def held_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Returns the parameters that a module itself holds; TorchScript's modules have no dictionary of them."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return dict(module.named_parameters(recurse=False)) if scripted else module._parameters


def is_wrapped(tensor: Tensor) -> bool:
    """Returns whether a tensor is of a class of its own around others, such as a quantised or a sharded one."""
    return hasattr(tensor, "__tensor_flatten__")


def is_quantised(tensor: Tensor) -> bool:
    """Returns whether a tensor is of a class of its own that stands for other numbers than it holds."""
    return is_wrapped(tensor) and type(tensor).dequantize is not Tensor.dequantize


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module itself is run through `torch.compile`, as a wrapper of it or in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs the compiled parts of a model as they were written: compiled code does not look for hooks that came later.

    `torch.compile(module)` is a wrapper whose `forward` is the compiled call of `_orig_mod`, `module.compile()` keeps
    it in `_compiled_call_impl`. Torch 2.5 to 2.14.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        name = "forward" if "_orig_mod" in module._modules else "_compiled_call_impl"
        if name == "forward" or module._compiled_call_impl is not None:
            before.append((module, name, module.__dict__.get(name)))
    try:
        for module, name, _ in before:
            module.__dict__[name] = module._modules["_orig_mod"] if name == "forward" else None
        yield
    finally:
        for module, name, value in before:
            module.__dict__[name] = value


_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)
_LOCK = threading.Lock()
_torch_own: dict[str, Any] = {}
_users = 0


@contextlib.contextmanager
def activations_kept() -> Iterator[None]:
    """Lets `torch.utils.checkpoint` keep activations in the place of computing them again during the backward pass.

    By then our hooks, the mode and the weights are no longer those of the forward pass, so that the second one would
    differ from the first. Other threads go on as they were. Names of torch 2.5 to 2.14.
    """
    global _users  # noqa: PLW0603
    with _LOCK:
        _users += 1
        if _users == 1:
            _torch_own.update(hook=checkpoint._checkpoint_hook, function=checkpoint.CheckpointFunction)
            checkpoint._checkpoint_hook = _hook  # type: ignore[assignment, misc]
            checkpoint.CheckpointFunction = _Function  # type: ignore[assignment, misc]
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)
        with _LOCK:
            _users -= 1
            if not _users:
                checkpoint._checkpoint_hook = _torch_own["hook"]  # type: ignore[misc]
                checkpoint.CheckpointFunction = _torch_own["function"]  # type: ignore[misc]


def _hook(frame: Any) -> Any:
    return contextlib.nullcontext() if _KEEPING.get() else _torch_own["hook"](frame)


class _Function:
    @staticmethod
    def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return run(*args) if _KEEPING.get() else _torch_own["function"].apply(run, preserve, *args)


def is_recorded() -> bool:
    """Returns whether what is run is compiled, exported, traced, or transformed by `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def caches_parameter_count(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer counts its parameters once and for all, as LBFGS does.

    Its state is then one for all parameters together.
    """
    return hasattr(optimizer, "_numel_cache")


def forget_parameter_count_(optimizer: Optimizer) -> None:
    """Makes such an optimizer count again, and drops its state."""
    optimizer._numel_cache = None  # type: ignore[attr-defined]
    optimizer.state.clear()

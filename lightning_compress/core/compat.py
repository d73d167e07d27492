"""Names of torch and Lightning without a promise of stability that the rooms below training use, in one place.

Everything here works from torch 2.5, the oldest that is supported, to 2.14. Names of Lightning that only training needs
are in `training/compat.py`.

Not here, because torch's own documentation and the code built on it take them for granted, and a function around each
would hide what happens: the dictionaries of a module (`_parameters`, `_buffers`, `_modules`, and the hooks such as
`_forward_hooks`), which replacing a layer in place is all about; and what makes `nn.RNN`, `nn.LSTM` and `nn.GRU` run
on fused kernels (`torch._VF`, `_flat_weights`), which `layers/unfused/` alone knows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "TRAINER_ATTRIBUTE",
    "caches_parameter_count",
    "forget_parameter_count_",
    "has_gradient_hooks",
    "is_compiled",
    "is_recorded",
    "tree_flatten",  # torch has no public name for containers nested as the user likes
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]

TRAINER_ATTRIBUTE = "_trainer"
"""Where a LightningModule keeps its trainer; its property `trainer` raises without one. Lightning 2.4 to 2.6."""


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Returns whether functions are called with a tensor's gradient: torch only tells how to add and remove them."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module itself is run through `torch.compile`, as a wrapper of it or in place."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


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

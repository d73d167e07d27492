"""Why a layer cannot be factorised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.analysis.trace import Trace
from lightning_compress.core.compat import has_gradient_hooks, held_parameters, is_quantised
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import family_of, known_types, layer_type
from lightning_compress.layers.folding import type_name, why_adapter_unfit
from lightning_compress.layers.hooks import STATE_DICT_HOOKS
from lightning_compress.layers.unfused import UnfusedModule

NEEDS_ADAPTER = ": say how with register_layer_adapter"
"""End of the reason of layers that stay dense because of their class."""
_PARAMETRISED = (
    "it is parametrised ({}): remove_parametrizations of torch.nn.utils.parametrize makes its weight a plain one"
)


def why_dense(module: nn.Module, shared: set[int], trace: Trace | None, name: str) -> str | None:
    """Returns why a module cannot be factorised, None if it can.

    Args:
        module: Any module with parameters; of one with a computed weight the plain layer that it is.
        shared: Ids of the parameters that several modules hold.
        trace: What a forward pass showed, if one was possible.
        name: Of the module.
    """
    if isinstance(module, FactorisedLayer):
        return f"already factorised ({module.kind}, ranks {module.ranks})"
    if layer_type(module) is None or parametrize.is_parametrized(module):
        return _why_unknown(module)
    return _why_replaced(module, name) or _why_weight_dense(module, shared) or _why_use_dense(trace, name)


def _why_replaced(module: nn.Module, name: str) -> str | None:
    """Returns what speaks against another module in the place of this one."""
    if not name:
        return "it is the model itself, which has no parent to swap it in; wrap it, as in nn.Sequential(layer)"
    if "forward" in module.__dict__:
        return "its forward method was replaced on the instance"
    if any(getattr(module, hooks, None) for hooks in STATE_DICT_HOOKS):
        return "it carries state-dict hooks, which expect a dense weight"
    return why_adapter_unfit(module)


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, UnfusedModule):
        return "its projections are layers of their own, and it holds nothing but their biases"
    if parametrize.is_parametrized(module):
        lists = cast("Iterable[Iterable[nn.Module]]", cast(nn.ModuleDict, module.parametrizations).values())
        return _PARAMETRISED.format(", ".join(type(each).__name__ for own in lists for each in own))
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript: compress the module before torch.jit.script or torch.jit.trace"
    parent = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in known_types()), None)
    if parent is not None:
        return f"{type_name(module)} is a subclass of {parent} and may use its weight in its own way{NEEDS_ADAPTER}"
    known = f"no kind factorises {type(module).__name__}"
    weight = held_parameters(module).get("weight")
    foreign = weight is not None and weight.ndim > 1 and not type(module).__module__.startswith("torch.")
    return f"{known}{NEEDS_ADAPTER}" if foreign else known


def _why_weight_dense(module: nn.Module, shared: set[int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (weight_norm, spectral_norm, pruning or the like)"
    if is_quantised(weight):
        return f"its weight is a {type(weight).__name__}: compress the model before it is quantised"
    if not weight.is_floating_point() or not weight.numel():
        what = (
            "empty, of shape " + str(tuple(weight.shape)) if weight.is_floating_point() else f"of dtype {weight.dtype}"
        )
        return f"its weight is {what}"
    if (refusal := family_of(module).refusal(module)) is not None:
        return refusal
    if id(weight) in shared:
        return "its weight is tied to another module's, factorising would untie it"
    return "its weight carries a gradient hook, which factors would lose" if has_gradient_hooks(weight) else None


def _why_use_dense(trace: Trace | None, name: str) -> str | None:
    if trace is None:
        return None
    if name in trace.read_elsewhere:
        return "its weight is used outside its own forward"
    if not trace.calls[name]:
        return "it is not called in the forward pass on the example input"
    return trace.refused.get(name)

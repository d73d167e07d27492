"""Finds the layers that can be unfused, puts their twins in, and takes them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.compat import held_parameters
from lightning_compress.core.errors import ConfigurationError, ModelError
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.folding import foldings
from lightning_compress.layers.hooks import STATE_DICT_HOOKS, share_hooks
from lightning_compress.layers.unfused.attention import UnfusedAttention
from lightning_compress.layers.unfused.base import UnfusedModule
from lightning_compress.layers.unfused.recurrent import UnfusedRecurrent

_KEPT: ContextVar[bool] = ContextVar("kept", default=False)

_UNFUSABLE = (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN)


class Unfusing(NamedTuple):
    """One module that was unfused.

    Attributes:
        aliases: Every name it is registered under.
        fused: The torch module that was there.
        twin: The module that takes its place; both hold the same Parameters.
    """

    aliases: tuple[str, ...]
    fused: nn.Module
    twin: UnfusedModule


def unfusable(model: nn.Module) -> dict[str, str | None]:
    """Returns every attention and recurrent layer of torch by its first name, with the reason why it cannot be unfused.

    The reason is None for those that can.
    """
    return {names[0]: reason for names, _, reason in _found(model)}


def unfuse_(model: nn.Module, names: Iterable[str]) -> tuple[Unfusing, ...]:
    """Replaces attention and recurrent layers by their unfused twins, in place and under every name.

    Modes and hooks move along with their handles.

    Args:
        model: Any module.
        names: Of the layers, any alias; those already unfused are left alone.

    Returns:
        What was replaced by what, for `undo_`.

    Raises:
        ConfigurationError: If a name is none of such a layer.
        ModelError: If a layer cannot be unfused; the message says why. Nothing is changed then.
    """
    wanted, found = set(names), _found(model)
    known = {alias for aliases, *_ in found for alias in aliases}
    for name in wanted - known - {name for name, m in model.named_modules() if isinstance(m, UnfusedModule)}:
        msg = f"{name!r} is no attention or recurrent layer of the model.{did_you_mean(name, known)}"
        raise ConfigurationError(msg)
    unfusings = []
    for aliases, module, reason in found:
        if wanted.isdisjoint(aliases):
            continue
        if reason is not None:
            msg = f"{aliases[0]!r} ({type(module).__name__}) cannot be unfused: {reason}."
            raise ModelError(msg)
        twin = (UnfusedAttention if isinstance(module, nn.MultiheadAttention) else UnfusedRecurrent)(cast(Any, module))
        share_hooks(module, twin)
        unfusings.append(Unfusing(aliases, module, twin))
    try:
        redo_(model, unfusings)
    except BaseException:
        undo_(model, unfusings)
        raise
    return tuple(unfusings)


def undo_(model: nn.Module, unfusings: Iterable[Unfusing]) -> None:
    """Puts the torch modules back, in the mode their twins are in."""
    for unfusing in unfusings:
        share_hooks(unfusing.twin, unfusing.fused)
        put_(model, unfusing.aliases, unfusing.fused.train(unfusing.twin.training))


def redo_(model: nn.Module, unfusings: Iterable[Unfusing]) -> None:
    """Puts the twins in, in the mode the torch modules are in."""
    for unfusing in unfusings:
        share_hooks(unfusing.fused, unfusing.twin)
        put_(model, unfusing.aliases, unfusing.twin.train(unfusing.fused.training))


def fuse_(model: nn.Module) -> tuple[Unfusing, ...]:
    """Turns every unfused layer whose projections are all plain nn.Linear into torch's module, in place.

    Returns:
        What was replaced, with the new torch modules.
    """
    fusings = [
        Unfusing(aliases, module.fused(), module)
        for aliases, module in _aliases(model)
        if isinstance(module, UnfusedModule) and all(type(child) is nn.Linear for child in module.children())
    ]
    undo_(model, fusings)
    return tuple(fusings)


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Unfuses every layer that can be and puts the torch modules back afterwards, also after an exception.

    Layers with a computed weight are folded for as long, see `layers.folding`. Does nothing for what is no module, so
    that the code inside can say so.
    """
    if not isinstance(cast(Any, model), nn.Module):
        yield
        return
    with _folded(model):
        unfusings = unfuse_(model, [name for name, reason in unfusable(model).items() if reason is None])
        for unfusing in unfusings:
            if isinstance(unfusing.twin, UnfusedRecurrent):  # cuDNN's kernels cannot be differentiated in eval mode
                unfusing.twin.stepwise = any(parameter.is_cuda for parameter in unfusing.twin.parameters())
        try:
            yield
        finally:
            undo_(model, unfusings)


@contextlib.contextmanager
def _folded(model: nn.Module) -> Iterator[None]:
    """Puts plain layers in the place of those with a computed weight that can be folded, for a while."""
    found = [(f.aliases, f.layer, f.plain) for f in foldings(model, inside_factorised(model)).values() if f.plain]
    try:
        for aliases, _, plain in found:
            put_(model, aliases, plain)
        yield
    finally:
        for aliases, layer, plain in found:
            put_(model, aliases, layer.train(plain.training))


def inside_factorised(model: nn.Module) -> set[int]:
    """Returns the ids of all modules inside factorised layers."""
    layers = [module for module in model.modules() if isinstance(module, FactorisedLayer)]
    return {id(part) for layer in layers for part in layer.modules() if part is not layer}


@contextlib.contextmanager
def kept_fused() -> Iterator[None]:
    """Lets no layer be unfused in this context: the model's code asks for their class."""
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)


def put_(model: nn.Module, aliases: Iterable[str], module: nn.Module) -> None:
    """Puts a module in, under every name."""
    for alias in aliases:
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def _aliases(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Returns every module with all its names, the first one first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(tuple(found), module) for module, found in names.items()]


def _found(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module, str | None]]:
    modules = _aliases(model)
    candidates = [(names, m) for names, m in modules if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))]
    holders: dict[int, int] = {}
    if candidates:
        for _, module in modules:
            for key in {id(p) for p in held_parameters(module).values() if p is not None}:
                holders[key] = holders.get(key, 0) + 1
    return [(names, module, _why_fused(names, module, holders)) for names, module in candidates]


def _why_fused(names: tuple[str, ...], module: nn.Module, holders: dict[int, int]) -> str | None:
    """Returns why a layer cannot be unfused, None if it can."""
    parts = list(module.modules())
    checks = {
        "the model's code asks for its class": _KEPT.get(),
        "it is of a subclass, which may use its weights in its own way": type(module) not in _UNFUSABLE,
        "it is the model itself, which has no parent to swap it in; wrap it, as in nn.Sequential(layer)": "" in names,
        "its forward method was replaced on the instance": any("forward" in part.__dict__ for part in parts),
        "it carries state-dict hooks, which expect its own parameter names": any(
            getattr(part, hooks, None) for part in parts for hooks in STATE_DICT_HOOKS
        ),
        "its weights are computed from other parameters (weight_norm, spectral_norm, pruning or the like)": (
            not _has_its_own_parameters(module)
        ),
        "its weights are tied to another module's": any(holders[id(p)] > 1 for p in module.parameters()),
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def _has_its_own_parameters(module: nn.Module) -> bool:
    """Returns whether all weights are where the class puts them, and nothing else is there."""
    if list(module.buffers()):
        return False
    if isinstance(module, nn.RNNBase):
        return not module._modules and list(module._parameters) == module._flat_weights_names
    out = module._modules.get("out_proj")
    expected = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}
    return (
        list(module._modules) == ["out_proj"]
        and type(out) in (NonDynamicallyQuantizableLinear, nn.Linear)
        and set(cast(nn.Module, out)._parameters) == {"weight", "bias"}
        and set(module._parameters) - {"bias_k", "bias_v"} == expected
    )

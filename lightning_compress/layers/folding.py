"""Layers with a computed weight as plain ones of the same name that hold it, for a while or to be factorised.

A model is folded while it is looked at, as attention and recurrent layers are unfused for it (`unfused`); the swap
puts factors of the folded weight in the place of the layer itself. What an adapter says is tried here, once per layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_compress.core.compat import held_parameters
from lightning_compress.layers.adapter import LayerAdapter
from lightning_compress.layers.adapters import OWN, adapter_of, full_name
from lightning_compress.layers.families import state_of
from lightning_compress.layers.hooks import STATE_DICT_HOOKS, share_hooks
from lightning_compress.layers.known_adapters import norm_hook, normed, own_class
from lightning_compress.layers.memory_format import in_channels_last, is_channels_last

TOLERANCE = 1e-3
"""Relative difference of outputs up to which an adapter does what its layer does."""
SPARED = "spared"
_FROM = "folded_from"


class Folded:
    """A plain layer with something before or after its operation."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output."""
        return run_adapted(cast(nn.Module, self), self.__dict__[OWN], args, kwargs)


class FoldedLinear(Folded, nn.Linear):
    """A linear layer with something around it."""


class FoldedConv1d(Folded, nn.Conv1d):
    """A 1-d convolution with something around it."""


class FoldedConv2d(Folded, nn.Conv2d):
    """A 2-d convolution with something around it."""


class FoldedConv3d(Folded, nn.Conv3d):
    """A 3-d convolution with something around it."""


class FoldedEmbedding(Folded, nn.Embedding):
    """An embedding with something around it."""


_SURROUNDED: dict[type[nn.Module], Any] = {
    nn.Linear: FoldedLinear,
    nn.Conv1d: FoldedConv1d,
    nn.Conv2d: FoldedConv2d,
    nn.Conv3d: FoldedConv3d,
    nn.Embedding: FoldedEmbedding,
}


class Folding(NamedTuple):
    """A layer with a computed weight.

    Attributes:
        aliases: Every name it is registered under.
        layer: The layer.
        plain: The plain layer that does the same, None if the layer cannot be folded.
        reason: Why it cannot.
    """

    aliases: tuple[str, ...]
    layer: nn.Module
    plain: nn.Module | None
    reason: str | None


def foldings(model: nn.Module, but: Collection[int] = ()) -> dict[int, Folding]:
    """Returns every layer with a computed weight that an adapter is known for, by its id; the model is not changed.

    Args:
        model: Any module.
        but: Ids of modules to leave out.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    computed = [m for m in names if id(m) not in but and (adapter := adapter_of(m)) is not None and adapter.weight]
    holders: dict[int, int] = {}
    for module in names if computed else ():
        for parameter in held_parameters(module).values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {id(layer): _folding(layer, tuple(names[layer]), holders) for layer in computed}


def _folding(layer: nn.Module, aliases: tuple[str, ...], holders: Mapping[int, int]) -> Folding:
    reason = _why_not(layer, aliases, holders)
    if reason is None:
        try:
            return Folding(aliases, layer, folded(layer), None)
        except Exception as error:  # an adapter of the user's may raise anything
            reason = f"its adapter fails: {type(error).__name__}: {error}"
    return Folding(aliases, layer, None, reason)


def _why_not(layer: nn.Module, aliases: tuple[str, ...], holders: Mapping[int, int]) -> str | None:
    own = [hook for hooks in STATE_DICT_HOOKS for hook in getattr(layer, hooks, {}).values() if not _is_torchs(hook)]
    checks = {
        "it is the model itself, which has no parent to swap it in; wrap it, as in nn.Sequential(layer)": "" in aliases,
        "its forward method was replaced on the instance": "forward" in layer.__dict__,
        "it carries state-dict hooks, which expect a dense weight": bool(own),
        "its weight is tied to another module's, factorising would untie it": any(
            holders[id(p)] > 1 for name, p in layer.named_parameters() if name != "bias"
        ),
        "its weight is computed from values, and it is on the meta device": any(p.is_meta for p in layer.parameters()),
        "its bias is computed": "bias" in vars(layer),
    }
    return next((reason for reason, applies in checks.items() if applies), None) or why_adapter_unfit(layer)


def _is_torchs(hook: Any) -> bool:
    """Returns whether a state-dict hook is one by which torch's norms translate the names of their parameters."""
    hook = getattr(hook, "hook", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.") or type(hook).__module__.startswith(
        "torch.nn.utils."
    )


def folded(layer: nn.Module) -> nn.Module:
    """Returns the plain layer that a layer with a computed weight is now: with that weight, and its bias and hooks.

    A layer whose weight is not computed is returned itself.
    """
    adapter = adapter_of(layer)
    if adapter is None or adapter.weight is None:
        return layer
    with torch.inference_mode(mode=False), torch.no_grad():
        weight = adapter.weight(layer).detach().clone()
    plain = _bare(layer, adapter)
    required = any(p.requires_grad for _, p in weight_parameters(layer))
    weight = in_channels_last(weight) if is_channels_last(layer) else weight.contiguous()
    plain._parameters["weight"] = nn.Parameter(weight, requires_grad=required)
    if "bias" in state_of(adapter.plain)[1]:
        plain._parameters["bias"] = layer._parameters.get("bias")
    share_hooks(layer, plain)
    if (norm := norm_hook(layer)) is not None:  # what computes the weight is no hook of the user's
        hooks = [(key, hook) for key, hook in layer._forward_pre_hooks.items() if hook is not norm]
        plain._forward_pre_hooks = OrderedDict(hooks)
    counts = [_counted(each) for each in (layer, plain)]
    plain.__dict__[SPARED] = (counts[0][0] - counts[1][0], counts[0][1] - counts[1][1])
    return plain.train(layer.training)


def _bare(layer: nn.Module, adapter: LayerAdapter) -> nn.Module:
    """Returns a plain layer with the settings of another one, without its parameters."""
    cls: Any = _SURROUNDED[adapter.plain] if adapter.surrounds else adapter.plain
    plain: nn.Module = cls.__new__(cls)
    nn.Module.__init__(plain)
    attributes, parameters = state_of(adapter.plain)
    names = attributes - parameters - set(vars(plain))
    plain.__dict__.update({name: getattr(layer, name) for name in names})
    if adapter.surrounds:
        plain.__dict__[OWN] = replace(adapter, weight=None)
        for name in adapter.settings:
            setattr(plain, name, copy.deepcopy(getattr(layer, name)))
    if own_class(layer) is not adapter.plain:
        plain.__dict__[_FROM] = tuple(full_name(c) for c in own_class(layer).__mro__)
    return plain


def _counted(layer: nn.Module) -> tuple[int, int]:
    """Returns parameters and stored bytes of a layer."""
    stored = {id(t): t for t in layer.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(p.numel() for p in layer.parameters()), sum(t.numel() * t.element_size() for t in stored.values())


def spared_by(module: nn.Module) -> tuple[int, int]:
    """Returns how many parameters and bytes the layer that a plain one stands for has beside them."""
    found: tuple[int, int] = module.__dict__.get(SPARED, (0, 0))
    return found


def weight_parameters(layer: nn.Module) -> tuple[tuple[str, nn.Parameter], ...]:
    """Returns the Parameters that the weight of a layer is, or is computed from, with their names."""
    adapter = adapter_of(layer)
    if adapter is None or adapter.weight is None:
        return (("weight", cast(nn.Parameter, layer.weight)),)
    return tuple((name, p) for name, p in layer.named_parameters() if name != "bias")


def type_name(layer: nn.Module) -> str:
    """Returns the name of the class of a layer, or of the one that it was folded from; before torch parametrized it."""
    names: tuple[str, ...] = layer.__dict__.get(_FROM, ())
    return names[0].rpartition(".")[2] if names else own_class(layer).__name__


def is_of(layer: nn.Module, cls: type) -> bool:
    """Returns whether a layer, or the one it was folded from, is an instance of a class."""
    return isinstance(layer, cls) or full_name(cls) in layer.__dict__.get(_FROM, ())


def run_adapted(layer: nn.Module, adapter: LayerAdapter, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns what a layer puts out by its adapter."""
    plain: Any = adapter.plain
    return adapter.leaving(layer, plain.forward(layer, adapter.entering(layer, args, kwargs)))


_TRIED: WeakKeyDictionary[nn.Module, tuple[LayerAdapter, str | None]] = WeakKeyDictionary()


def why_adapter_unfit(layer: nn.Module) -> str | None:
    """Returns why what a layer's adapter says is not what the layer does on random values, None if it is."""
    adapter = adapter_of(layer)
    if adapter is None or layer.__dict__.get(OWN) is not None or any(p.is_meta for p in layer.parameters()):
        return None
    if adapter.plain is own_class(layer) and normed(layer):  # torch's own
        return None
    known = _TRIED.get(layer)
    if known is None or known[0] is not adapter:
        try:
            reason = _more_parameters(layer, adapter) or _difference(layer, adapter)
        except Exception as error:  # both are code of somebody else
            reason = f"its adapter fails on random values: {type(error).__name__}: {error}"
        known = _TRIED[layer] = (adapter, reason)
    return known[1]


def _more_parameters(layer: nn.Module, adapter: LayerAdapter) -> str | None:
    if adapter.weight is not None:
        return None
    more = [name for name, _ in layer.named_parameters() if name not in state_of(adapter.plain)[1]]
    return f"it holds parameters ({', '.join(more)}) that its adapter says nothing of" if more else None


def _difference(layer: nn.Module, adapter: LayerAdapter) -> str | None:
    """Returns in what a layer and its adapter differ, in eval mode and in training."""
    args = _random_arguments(layer, adapter) if adapter.example is None else adapter.example(layer)
    plain = folded(layer)
    for training in (False, True):
        with torch.no_grad(), _copied(layer, training=training) as copied:
            expected = cast(Any, copied).forward(*args)
            expected = expected.detach() if isinstance(expected, Tensor) else expected
        with torch.no_grad():
            found = run_adapted(plain, adapter, args, {})
        if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (found.shape, found.dtype):
            given = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (found, expected)]
            return f"its adapter returns {given[0]} on random values where the layer returns {given[1]}"
        size = float(expected.double().norm())
        worst = float((found.double() - expected.double()).norm()) / max(size, torch.finfo(torch.float32).tiny)
        if not worst <= max(TOLERANCE, torch.finfo(expected.dtype).eps ** 0.5):
            mode = "in training" if training else "in eval mode"
            return f"its adapter does something else than the layer: on random values they differ by {worst:.1%} {mode}"
    return None


@contextlib.contextmanager
def _copied(layer: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """Yields a layer that may change its attributes in forward without changing the one it is a copy of."""
    twin = copy.copy(layer)
    twin.__dict__ = {name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(layer).items()}
    modes = [(module, module.training) for module in layer.modules()]
    try:
        yield twin.train(training)
    finally:
        for module, mode in modes:
            module.training = mode


def _random_arguments(layer: Any, adapter: LayerAdapter) -> tuple[Tensor]:
    """Returns an input of a small size, odd where it can be."""
    like: Tensor = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    if adapter.plain is nn.Embedding:
        return (torch.randint(layer.num_embeddings, (1, 3), generator=generator).to(like.device),)
    if adapter.plain is nn.Linear:
        shape: tuple[int, ...] = (2, layer.in_features)
    else:
        sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        shape = (1, layer.in_channels, *((kernel - 1) * gap + 2 * step + 3 for kernel, gap, step in sizes))
    return (torch.randn(shape, generator=generator).to(like),)

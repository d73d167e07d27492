"""Which adapter a layer has: one that was registered for its class, or one that comes with the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.layers.adapter import PLAIN, LayerAdapter
from lightning_compress.layers.known_adapters import known_adapter, normed, normed_weight, own_class

OWN = "_adapter"
"""Attribute of a layer that brings its adapter along."""
_REGISTERED: dict[str, LayerAdapter] = {}


def register_layer_adapter(layer: type[nn.Module] | str, adapter: LayerAdapter) -> None:
    """Says how layers of a class are factorised that compute their weight or do something around their operation.

    Without an adapter such layers stay dense. What an adapter says is compared with what the layer does, on random
    values; where the two differ the layer stays dense, with that as its reason in the plan.

    A convolution that pads by its own rule and standardises its weight:

        def weight(layer):
            return layer.weight / layer.weight.norm()

        def before(layer, input):
            return F.pad(input, (layer.reach, 0, layer.reach, 0))

        register_layer_adapter(MyConv2d, LayerAdapter(nn.Conv2d, weight=weight, before=before, settings=("reach",)))

    Args:
        layer: The class, or its full name, as in "package.module.Class", which then need not be installed. Subclasses
            need an adapter of their own. One that was registered before is replaced.
        adapter: What it does. Without a `weight` the class has to be a subclass of the plain one.

    Raises:
        ConfigurationError: If an argument is none of that.
    """
    if not isinstance(cast(Any, adapter), LayerAdapter):
        msg = f"register_layer_adapter(…, {adapter!r}): expected a LayerAdapter."
        raise ConfigurationError(msg)
    if isinstance(layer, str) and "." in layer:
        _REGISTERED[layer] = adapter
        return
    if not isinstance(layer, type) or not issubclass(layer, nn.Module):
        msg = f"register_layer_adapter({layer!r}, …): expected a class of modules, or 'package.module.Class'."
        raise ConfigurationError(msg)
    if layer in PLAIN:
        msg = f"register_layer_adapter(nn.{layer.__name__}, …): a layer of torch's own needs no adapter."
        raise ConfigurationError(msg)
    if adapter.weight is None and not issubclass(layer, adapter.plain):
        msg = (
            f"register_layer_adapter({layer.__name__}, …): it is no subclass of nn.{adapter.plain.__name__}; say what "
            "its weight is as LayerAdapter(weight=…)."
        )
        raise ConfigurationError(msg)
    _REGISTERED[full_name(layer)] = adapter


def adapter_of(layer: nn.Module) -> LayerAdapter | None:
    """Returns the adapter of a layer, None for those of torch's own classes and those nobody knows."""
    if (own := layer.__dict__.get(OWN)) is not None:
        return cast(LayerAdapter, own)
    if isinstance(layer, torch.jit.ScriptModule):
        return None
    cls = own_class(layer)
    found = _REGISTERED.get(full_name(cls)) or known_adapter(layer)
    if found is not None and found.weight is None and not issubclass(cls, found.plain):
        found = None  # registered by name
    if not normed(layer):
        return found if type(layer) is cls else None  # of another parametrization the weight is not known
    if found is None:
        return LayerAdapter(cls, normed_weight) if cls in PLAIN else None
    return replace(found, weight=normed_weight) if found.weight is None else None


def entering(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns what enters the plain operation of a layer that was called with these arguments."""
    adapter = adapter_of(layer)
    if adapter is not None and adapter.weight is None:
        return adapter.entering(layer, args, kwargs)
    return cast(Tensor, args[0] if args else kwargs["input"])


def full_name(cls: type) -> str:
    """Returns the name of a class with that of its module."""
    return f"{cls.__module__}.{cls.__qualname__}"

"""What the unfused twins have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.scripted import Unscriptable

_NO_SETTINGS = (*vars(nn.Module()), "_flat_weights", "_flat_weight_refs", "_compiled_call_impl")
_OWN_SETTINGS = ("fused_type", "stepwise", "_places")


class UnfusedModule(Unscriptable, nn.Module):
    """An attention or recurrent layer with its projections as children.

    All public attributes of the torch module are kept, and its Parameters can be read by their own
    names too (`weight_hh_l0`, `q_proj_weight`, …); of a factorised projection that is the weight
    multiplied out.

    Attributes:
        fused_type: Class of the torch module.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(fused).items() if name not in _NO_SETTINGS})
        self.fused_type = type(fused)
        self._places: dict[str, tuple[str, str] | None] = dict.fromkeys(fused._parameters)

    def __getattr__(self, name: str) -> Any:
        places = self.__dict__.get("_places", {})
        if name not in places or name in self.__dict__["_parameters"]:
            return super().__getattr__(name)
        place = places[name]
        return getattr(self._modules[place[0]], place[1]) if place is not None else None

    def __setattr__(self, name: str, value: Any) -> None:
        place = self.__dict__.get("_places", {}).get(name)
        if place is None:
            super().__setattr__(name, value)
        else:  # the projection's own; a factorised one says that it has no weight to set
            setattr(self._modules[place[0]], place[1], value)

    def _keep(self, fused: nn.Module, name: str) -> None:
        """Keeps a Parameter that is no projection's."""
        self._parameters[name] = fused._parameters[name]

    def _add(self, name: str, fused: nn.Module, weight: str, bias: str | None = None) -> None:
        """Adds a projection with the Parameters of these names as weight and bias."""
        self.add_module(name, linear_of(nn.Linear, fused._parameters[weight], fused._parameters.get(bias or "")))
        self._places[weight] = (name, "weight")
        if bias in self._places and fused._parameters[bias] is not None:
            self._places[bias] = (name, "bias")

    def fused(self) -> nn.Module:
        """Returns the torch module with the same Parameters, all projections being plain nn.Linear."""
        fused = self.fused_type.__new__(self.fused_type)
        nn.Module.__init__(fused)
        settings = {name: v for name, v in vars(self).items() if name not in (*_NO_SETTINGS, *_OWN_SETTINGS)}
        fused.__dict__.update(settings)
        for name, place in self._places.items():
            own = self._parameters.get(name)
            parameter = getattr(self._modules[place[0]], place[1]) if place is not None else own
            fused.register_parameter(name, parameter)
        return fused


def linear_of(kind: type[nn.Linear], weight: Any, bias: Any) -> nn.Linear:
    """Returns a linear layer that holds these Parameters."""
    layer = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer


def split_factors(projection: Any) -> tuple[list[nn.Module], nn.Linear | None]:
    """Returns the factors before the last one and that, or nothing and None where it is no plain nn.Linear."""
    if type(projection) is nn.Linear:
        return [], projection
    if isinstance(projection, FactorisedLayer) and type(projection[-1]) is nn.Linear:
        return list(projection)[:-1], projection[-1]
    return [], None


def watched(module: nn.Module) -> bool:
    """Returns whether a hook is on a module or a part of it."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )

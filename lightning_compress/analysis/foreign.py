"""Networks inside a model that are not the model: those of metrics, and frozen ones that a fit does not train."""

from __future__ import annotations

from torch import nn

from lightning_compress.core.compat import held_parameters

_COUNTS = "it counts in the budget"


def in_metrics(model: nn.Module) -> dict[int, str]:
    """Returns why the modules of metrics, as of one of image quality by a network, are left alone, by their id."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if id(module) not in found and _is_metric(module):
            reason = f"it is part of the metric {name!r} ({type(module).__name__}), which is no part of the model"
            found.update(dict.fromkeys(map(id, module.modules()), f"{reason}; {_COUNTS}"))
    return found


def frozen(model: nn.Module) -> dict[int, str]:
    """Returns why the modules of frozen networks inside a model that is trained are left alone, by their id.

    A network is more than one layer: a single frozen one is part of the model. Where the whole model is frozen, nothing
    is left alone.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if id(module) not in found and name and _is_frozen_network(module):
            reason = f"no parameter of {name!r} is trained, as of a teacher or a frozen backbone: name it in include"
            found.update(dict.fromkeys(map(id, module.modules()), f"{reason}; {_COUNTS}"))
    return found if any(parameter.requires_grad for parameter in model.parameters()) else {}


def _is_metric(module: nn.Module) -> bool:
    """Returns whether a module is one of torchmetrics, which is not imported for that."""
    classes = type(module).__mro__
    return any(cls.__name__ == "Metric" and cls.__module__.startswith("torchmetrics.") for cls in classes)


def _is_frozen_network(module: nn.Module) -> bool:
    layers = sum(bool(held_parameters(part)) for part in module.modules())
    return layers > 1 and not any(parameter.requires_grad for parameter in module.parameters())

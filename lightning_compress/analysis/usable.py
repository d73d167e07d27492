"""Checks that a model can be looked at: it is a module, and its weights have shapes and finite values."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_compress.core.compat import is_quantised
from lightning_compress.core.errors import (
    ConfigurationError,
    ModelError,
    NonFiniteWeightError,
)
from lightning_compress.layers.families import layer_type


def require_module(model: object) -> None:
    """Checks that a model is a module whose parameters all have a shape.

    Raises:
        ConfigurationError: If it is no module.
        ModelError: If a lazy parameter has no shape yet.
    """
    if not isinstance(model, nn.Module):
        msg = f"model={model!r}: expected a torch.nn.Module."
        raise ConfigurationError(msg)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            msg = f"parameter {name!r} has no shape yet: run one batch through the model first."
            raise ModelError(msg)


def require_usable_weights(model: nn.Module) -> None:
    """Checks that every parameter has a shape and finite values; frozen ones outside layers may be infinite, as masks.

    Raises:
        ConfigurationError: If the model is no module.
        ModelError: If a lazy parameter has no shape yet, or a parameter on the meta device no values.
        NonFiniteWeightError: If a parameter holds NaN or infinite values.
    """
    require_module(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            msg = f"parameter {name!r} is on the meta device and has no values: load weights before compressing."
            raise ModelError(msg)
        if is_quantised(parameter):  # its values are those of another format
            continue
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            if _is_mask(model, name, parameter):
                continue
            bad = int((~torch.isfinite(parameter)).sum())
            msg = (
                f"parameter {name!r} holds {bad} NaN or infinite values of {parameter.numel()}: "
                "load weights of a run that converged before compressing."
            )
            raise NonFiniteWeightError(msg)


def _is_mask(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is no weight: infinite where something is hidden, and not trained."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return not parameter.requires_grad and layer_type(owner) is None and not bool(parameter.isnan().any())

"""Back to the dense architecture: the factors multiplied out, in place; all or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_compress.analysis.inventory import list_layers
from lightning_compress.analysis.usable import require_module
from lightning_compress.core.errors import ModelError
from lightning_compress.core.interrupts import uninterrupted
from lightning_compress.core.progress import Progress, reporting
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.unfused import Unfusing, fuse_, redo_, share_hooks
from lightning_compress.surgery.embodied import owners_of
from lightning_compress.surgery.swap import Replacement, install, uninstall


def merge_(model: nn.Module, *, progress: Progress | None = None) -> tuple[str, ...]:
    """Replaces every factorised layer by the dense one that computes the same, in place.

    The model then has the architecture it had before compression, whose code and state dict it fits,
    and the outputs of the compressed one; it is no longer small. Every weight is computed before the
    first layer is touched. Biases stay the same Parameters, layers of the same factors (an embedding
    and an output layer) get one weight, and hooks move along with their handles; dtype, device, memory
    format, mode and `requires_grad` (of a weight: where all its factors have it) are inherited. An
    optimizer of the factors has to be built again.

    Args:
        model: A model after `apply_plan_`, `compress_`, `load_compressed` or a fit with `Compress`.
        progress: Called with what is being done and the fraction done.

    Returns:
        The names of the layers.

    Raises:
        ConfigurationError: If the model is no module.
        ModelError: If it holds no factorised layer, or is one itself.
    """
    return tuple(replacement.aliases[0] for replacement in merge_layers_(model, progress=progress).replacements)


@dataclass(frozen=True)
class Merged:
    """What `merge_layers_` did.

    Attributes:
        replacements: The factorised layers that were there, each with the dense one there is now.
        fusings: The attention and recurrent layers that became torch's again.
    """

    replacements: tuple[Replacement, ...]
    fusings: tuple[Unfusing, ...]

    def undo_(self, model: nn.Module) -> None:
        """Puts the factorised layers back."""
        with uninterrupted():
            redo_(model, self.fusings)
            install(model, self.replacements)


def merge_layers_(model: nn.Module, *, progress: Progress | None = None) -> Merged:
    """Like `merge_`, and returns all that was done.

    Raises:
        ConfigurationError: As `merge_`.
        ModelError: Likewise.
    """
    require_module(model)
    report = reporting(progress)
    layers = list_layers(model)
    found = [(layer, layer.module) for layer in layers if isinstance(layer.module, FactorisedLayer)]
    if not found:
        msg = (
            f"{type(model).__name__} holds no factorised layer: merge_ takes a model after compress_, apply_plan_, "
            "load_compressed or a fit with Compress."
        )
        raise ModelError(msg)
    if not found[0][0].name:
        msg = "the model itself is a factorised layer, which has no parent to swap it in: call its to_dense()."
        raise ModelError(msg)
    owners, dense = owners_of(layers), {}
    for index, (layer, module) in enumerate(found):
        report("merging layers", index / len(found))
        with torch.inference_mode(mode=False):  # parameters made in inference mode could never be trained
            dense[layer.name] = module.to_dense()
    report("merging layers", 1.0)
    for layer, module in found:
        dense[layer.name].register_parameter("weight", dense[owners[layer.name]]._parameters["weight"])
        share_hooks(module, dense[layer.name])
    replacements = tuple(Replacement(layer.aliases, dense[layer.name], module) for layer, module in found)
    with uninterrupted():
        uninstall(model, replacements)
        return Merged(replacements, fuse_(model))

"""What a compressed checkpoint says to a class that does not know what it is: in the name of one of its weights.

Lightning calls nothing of ours when such a class loads a checkpoint; torch then names the entries it does not expect.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_compress.layers.factorised import HINT, FactorisedLayer
from lightning_compress.layers.unfused import UnfusedModule

_TEXT = (
    HINT + "this is a compressed {name}, whose own class has other layers: load it with load_compressed_checkpoint"
    "({name}, path) or with CompressedCheckpointMixin as the first base of {name} (and weights_only=False where it "
    "holds hyper-parameters of other classes that you trust)"
)


def add_hint(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds an empty tensor with the hint as its name below a factorised layer, which takes no notice of it."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or (layer := _first_layer(pl_module, state)) is None:
        return
    name = f"{layer}.{_TEXT.format(name=type(pl_module).__name__)}"
    if isinstance(state, OrderedDict):
        state[name] = torch.empty(0)
        state.move_to_end(name, last=False)  # torch lists what it does not expect in this order
    else:
        checkpoint["state_dict"] = {name: torch.empty(0), **state}


def forget_hints(checkpoint: Mapping[str, Any]) -> None:
    """Removes it."""
    state = checkpoint.get("state_dict")
    if isinstance(state, dict):
        for name in [name for name in state if HINT in str(name)]:
            del state[name]


def _first_layer(pl_module: LightningModule, state: Mapping[str, Any]) -> str | None:
    """Returns the name of a factorised layer under which its weights are in the state dict, None if there is none."""
    unfused = [name for name, module in pl_module.named_modules() if isinstance(module, UnfusedModule)]
    found = [
        name
        for name, module in pl_module.named_modules()
        if isinstance(module, FactorisedLayer)
        and all(f"{name}.{child}.weight" in state for child, _ in module.named_children())
    ]
    whole = [name for name in found if not any(name.startswith(f"{other}.") for other in unfused)]
    return next(iter([*whole, *found]), None)

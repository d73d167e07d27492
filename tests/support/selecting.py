"""What an inventory says of a model's layers."""

from __future__ import annotations

from torch import nn

from lightning_compress.analysis.inventory import take_inventory


class With(nn.Module):
    """One factorisable layer besides the one under test."""

    def __init__(self, layer):
        super().__init__()
        self.other = nn.Linear(8, 8)
        self.layer = layer

    def forward(self, x):
        return self.layer(self.other(x))


def layers_of(model, **settings):
    return {layer.name: layer for layer in take_inventory(model, **settings)}


def reasons_of(model, **settings):
    return {name: layer.reason for name, layer in layers_of(model, **settings).items()}


def chosen_in(model, **settings):
    return [name for name, reason in reasons_of(model, **settings).items() if reason is None]

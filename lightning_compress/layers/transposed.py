"""A linear layer that holds its weight the other way round."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.layers.scripted import scriptable


class TransposedLinear(nn.Module):
    """x ↦ x W for the weight W, (in, out), of another layer that uses it as x Wᵀ.

    Args:
        in_features: Size of the inputs.
        out_features: Size of the outputs.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device="meta"))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    @scriptable
    def forward(self, input: Tensor) -> Tensor:
        """Returns (…, out) for (…, in)."""
        return F.linear(input, self.weight.T, self.bias)

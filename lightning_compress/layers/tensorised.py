"""The modules of an embedding of two tensor-train cores: each looks up its own part of the index."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_compress.kinds.tensorised import modes_of


class _Core(nn.Module):
    """A core with an uninitialised weight."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))

    @override
    def extra_repr(self) -> str:
        """Returns the weight's shape for `print(model)`."""
        return " x ".join(map(str, self.weight.shape))


class InnerLookup(_Core):
    """Looks rows up by the index modulo in_2: (…) to (…, r · out_2); its weight is (r, out_2, in_2)."""

    def forward(self, index: Tensor, _: Tensor | None) -> Tensor:
        """Returns the rows."""
        return F.embedding(index % self.weight.shape[2], self.weight.flatten(0, 1).T)


class OuterLookup(_Core):
    """Looks rows up by the index divided by in_2 and multiplies: to (…, out_1 · out_2); its weight is (out_1, in_1, r).

    Args:
        shape: Of the weight.
        inner_size: in_2.
    """

    def __init__(self, *shape: int, inner_size: int) -> None:
        super().__init__(*shape)
        self.inner_size = inner_size

    def forward(self, index: Tensor, inner: Tensor) -> Tensor:
        """Returns the embedding's rows from those of the inner core."""
        out_1, _, rank = self.weight.shape
        rows = F.embedding(index // self.inner_size, self.weight.transpose(0, 1).flatten(1))
        product = rows.reshape(*index.shape, out_1, rank) @ inner.reshape(*index.shape, rank, -1)
        return product.flatten(-2)


def lookup_cores(shape: tuple[int, ...], ranks: tuple[int, ...]) -> dict[str, nn.Module]:
    """Returns the cores of a table (out, rows), in forward order, on the meta device."""
    out_1, out_2, in_1, in_2 = modes_of(shape)
    return {"inner": InnerLookup(*ranks, out_2, in_2), "outer": OuterLookup(out_1, in_1, *ranks, inner_size=in_2)}

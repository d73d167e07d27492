"""What the repair of a model changes: kept, judged, and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.surgery.swap import Replacement

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def shared_state(model: nn.Module, replacements: Sequence[Replacement]) -> list[tuple[Tensor, Tensor]]:
    """Returns what the repair may change besides the factors, each tensor with a copy of its value.

    That is the biases of the factorised layers and the parameters and buffers of the norms.
    """
    biases = [r.factorised.bias for r in replacements if r.factorised.bias is not None]
    norms = [t for m in model.modules() if isinstance(m, NORMS) for t in (*m.parameters(), *m.buffers())]
    return [(tensor, tensor.detach().clone()) for tensor in (*biases, *norms)]


@torch.no_grad()
def restore_(state: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts the values of `shared_state` back."""
    for tensor, value in state:
        tensor.copy_(value)


class BestState:
    """The state a model came with, and the best one met.

    Args:
        model: The model.
        measure: Returns the distance by which its present state is judged.

    Attributes:
        best: The smallest distance so far.
    """

    def __init__(self, model: nn.Module, measure: Callable[[], float]) -> None:
        self._model, self._measure = model, measure
        self._first = self._best = self._copy()
        self.best = measure()

    def _copy(self) -> dict[str, Tensor]:
        state = self._model.state_dict()
        return {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def judge(self) -> float:
        """Keeps the present state if it is the best so far; returns its distance."""
        distance = self._measure()
        if distance < self.best:
            self.best, self._best = distance, self._copy()
        return distance

    def restore(self) -> None:
        """Goes back to the best state."""
        self._model.load_state_dict(self._best, strict=False)

    def undo(self) -> None:
        """Goes back to the first state."""
        self._model.load_state_dict(self._first, strict=False)

"""Learning-rate warm-up of the factors and freezing of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class WarmUp:
    """Scales the learning rate of every group that holds a factor, only while a step runs.

    The scaling is undone right after the step, so schedulers and checkpoints never see it and
    a resumed run continues it exactly.

    Args:
        optimizers: Already patched optimizers.
        factors: The factors' Parameters.
        steps: Length of the linear rise in optimizer steps.
        step: Returns the number of optimizer steps done so far.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], factors: Iterable[nn.Parameter], steps: int, step: Callable[[], int]
    ) -> None:
        self._ids = {id(factor) for factor in factors}
        self._steps = steps
        self._step = step
        self._saved: dict[int, list[tuple[dict[str, Any], Any]]] = {}  # by optimizer
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    @property
    def scale(self) -> float:
        """Factor on the learning rate of the next step, 1 once the warm-up is over."""
        return min(1.0, (self._step() + 1) / self._steps)

    def detach(self) -> None:
        """Removes the hooks and undoes a scaling that an exception left behind."""
        for key in list(self._saved):
            self._undo(key)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        scale = self.scale
        if scale == 1.0 or id(optimizer) in self._saved:  # an optimizer may call its base class's step
            return
        groups = [group for group in optimizer.param_groups if any(id(p) in self._ids for p in group["params"])]
        self._saved[id(optimizer)] = [(group, group["lr"]) for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * scale

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        self._undo(id(optimizer))

    def _undo(self, key: int) -> None:
        for group, lr in self._saved.pop(key, []):
            group["lr"] = lr


def drop_gradients(parameters: Iterable[nn.Parameter], keep: Iterable[nn.Parameter]) -> None:
    """Freezes all parameters but some for the coming step: no gradient, no update, no decay.

    `requires_grad` stays as it is, so nothing that was built on it (gradient buckets, compiled
    graphs) is invalidated, and unfreezing needs no action.
    """
    kept = {id(p) for p in keep}
    for parameter in parameters:
        if id(parameter) not in kept:
            parameter.grad = None

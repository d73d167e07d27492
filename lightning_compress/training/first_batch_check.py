"""Checks on the first batch that the factorised layers are those that the model really runs and trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.errors import OrphanParameterError
from lightning_compress.surgery.swap import Replacement


def _note(calls: list[str], name: str, *_: Any) -> None:
    calls.append(name)


class FirstBatchCheck:
    """Watches the forward calls of the replaced layers and the gradients of the factors.

    A dense layer that is called although it was replaced is held by something else than the
    module tree, such as a plain Python list: its factors would never be trained. Nor would a
    factor that no loss depends on.

    Args:
        replacements: What was replaced.
        factors: The Parameters that must get a gradient, by name.
    """

    def __init__(self, replacements: Sequence[Replacement], factors: Mapping[str, nn.Parameter]) -> None:
        self._dense_calls: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._waiting = dict(factors)
        self._some = not factors
        self._over = False
        for replacement in replacements:
            note = functools.partial(_note, self._dense_calls, replacement.aliases[0])  # pickled with the module
            # The dense module's hook dicts moved to the new one: it gets its own again.
            for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                replacement.dense.__dict__[hooks] = type(replacement.dense.__dict__[hooks])()
            self._handles.append(replacement.dense.register_forward_pre_hook(note))

    def look(self, *, backward: bool = False) -> None:
        """Notes which factors have a gradient.

        Args:
            backward: Whether there was a backward pass just now.
        """
        if self._over:
            return
        arrived = [name for name, factor in self._waiting.items() if factor.grad is not None]
        self._some = self._some or backward or bool(arrived)
        for name in arrived:
            del self._waiting[name]

    def stop(self) -> None:
        """Ends the watch."""
        self._over = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check(self) -> bool:
        """Judges a batch, and ends the watch unless nothing went backward (a skipped batch).

        Returns:
            Whether the watch is over; it then stays so.

        Raises:
            OrphanParameterError: If a replaced layer's dense module was called, or a factor got no gradient.
        """
        if self._over:
            return True
        if self._dense_calls:
            self.stop()
            names = ", ".join(map(repr, dict.fromkeys(self._dense_calls)))
            msg = (
                f"the model still runs the dense module of {names}: something outside the module tree holds it "
                "(a plain Python list?), so its factors would never be trained. Register it properly "
                "(nn.ModuleList) or exclude it."
            )
            raise OrphanParameterError(msg)
        self.look()
        if not self._some:
            return False
        self.stop()
        if self._waiting:
            msg = (
                f"no gradient reached {', '.join(map(repr, self._waiting))} in the first batch: the training step does "
                "not use these layers, or cuts their gradients off, and they would never be trained. Exclude them, or, "
                "if other batches use them, set require_used=False."
            )
            raise OrphanParameterError(msg)
        return True

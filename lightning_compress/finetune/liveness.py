"""Checks, on the first batch, that the factorised layers are the ones the model really runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle

from lightning_compress.errors import OrphanParameterError
from lightning_compress.swap import Replacement


class Liveness:
    """Watches the forward calls of the replaced layers, old and new.

    A dense layer that is called although it was replaced is held by something else than the
    module tree, such as a plain Python list: its factors would never be trained.
    """

    def __init__(self, replacements: Sequence[Replacement]) -> None:
        self._dense_calls: list[str] = []
        self._handles: list[RemovableHandle] = []
        for replacement in replacements:
            name = replacement.aliases[0]

            def note(*_: Any, name: str = name) -> None:
                self._dense_calls.append(name)

            # The dense module's hook dicts moved to the new one: it gets its own again.
            for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                replacement.dense.__dict__[hooks] = type(replacement.dense.__dict__[hooks])()
            self._handles.append(replacement.dense.register_forward_pre_hook(note))

    def check(self) -> None:
        """Ends the watch.

        Raises:
            OrphanParameterError: If a replaced layer's dense module was called.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._dense_calls:
            names = ", ".join(map(repr, dict.fromkeys(self._dense_calls)))
            msg = (
                f"the model still runs the dense module of {names}: something outside the module tree holds it "
                "(a plain Python list?), so its factors would never be trained. Register it properly "
                "(nn.ModuleList) or exclude it."
            )
            raise OrphanParameterError(msg)

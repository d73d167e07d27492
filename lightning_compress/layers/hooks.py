"""Hooks of a module that another one takes over, and those of its state dict."""

from __future__ import annotations

from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""What moves from a module to the one that takes its place."""

STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives a module the hooks of another, as the same dict objects: their handles keep working."""
    for hooks in HOOKS:
        target.__dict__[hooks] = source.__dict__[hooks]

"""Attention and recurrent layers with their projections as layers of their own, so that those can be factorised.

nn.MultiheadAttention, nn.LSTM, nn.GRU and nn.RNN hand their weights to one fused function, so no hook, no
call count and no replaced child ever reaches a single projection. Their unfused twins hold the same Parameters in
nn.Linear children and compute the same.

A model is unfused for a while to look at it (`unfused`) and for good where a projection is factorised (`unfuse_`).
"""

from lightning_compress.layers.hooks import STATE_DICT_HOOKS, share_hooks
from lightning_compress.layers.unfused.attention import UnfusedAttention
from lightning_compress.layers.unfused.base import UnfusedModule
from lightning_compress.layers.unfused.recurrent import UnfusedRecurrent
from lightning_compress.layers.unfused.swap import (
    Unfusing,
    fuse_,
    inside_factorised,
    kept_fused,
    put_,
    redo_,
    undo_,
    unfusable,
    unfuse_,
    unfused,
)

__all__ = [
    "STATE_DICT_HOOKS",
    "UnfusedAttention",
    "UnfusedModule",
    "UnfusedRecurrent",
    "Unfusing",
    "fuse_",
    "inside_factorised",
    "kept_fused",
    "put_",
    "redo_",
    "share_hooks",
    "undo_",
    "unfusable",
    "unfuse_",
    "unfused",
]

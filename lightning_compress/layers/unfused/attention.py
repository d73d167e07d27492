"""Attention with its projections as layers of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_compress.core.compat import tree_map
from lightning_compress.core.errors import ModelError
from lightning_compress.layers.unfused.base import UnfusedModule, linear_of, split_factors, watched


class UnfusedAttention(UnfusedModule):
    """nn.MultiheadAttention with its projections as children.

    Same arguments, results, and use of the global random state; nested tensors, which torch accepts on
    its fast path alone, are refused. Children are `in_proj`, (E, 3 E), or, where keys or values have another
    size, `q_proj`, `k_proj` and `v_proj` without bias, and `out_proj`.

    Where queries, keys and values differ, of a joint `in_proj` only the needed thirds are computed, by slicing
    its weight or that of its last factor. In two cases all three thirds are computed for all of them: while a
    hook is on the projection, and where its last factor is no nn.Linear. MACs are counted with hooks on, so of
    such a cross-attention they are counted above what runs.

    In eval mode nn.TransformerEncoder and nn.TransformerEncoderLayer do not take their fast path with it. With a
    padding mask that path fills the outputs at padding with zeros; here they are as in training.

    Args:
        fused: Shares its Parameters.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    batch_first: bool
    dropout: float
    add_zero_attn: bool
    _qkv_same_embed_dim: bool

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__(fused)
        for name in ("bias_k", "bias_v"):
            if name in fused._parameters:
                self._keep(fused, name)
        if self._qkv_same_embed_dim:
            self._add("in_proj", fused, "in_proj_weight", "in_proj_bias")
        else:
            self._keep(fused, "in_proj_bias")
            for name in ("q_proj", "k_proj", "v_proj"):
                self._add(name, fused, f"{name}_weight")
        out = fused.out_proj
        self.out_proj = linear_of(nn.Linear, out.weight, out.bias)
        self.train(fused.training)

    @property
    def in_proj_weight(self) -> Any:
        """The joint weight, multiplied out only if it is used."""
        return _OnDemand(self.in_proj) if self._qkv_same_embed_dim else None

    @override
    def fused(self) -> nn.Module:
        fused = super().fused()
        out = self.out_proj
        fused.add_module("out_proj", linear_of(NonDynamicallyQuantizableLinear, out.weight, out.bias))
        return fused.train(self.training)

    def forward(  # noqa: PLR0917
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output and the attention weights or None; see nn.MultiheadAttention."""
        if query.is_nested or key.is_nested or value.is_nested:
            msg = "a nested tensor was given to an unfused attention layer: pass a padded one with key_padding_mask."
            raise ModelError(msg)
        batched = cast(Any, F)._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            msg = "is_causal=True is a hint about attn_mask: pass the mask too (torch's own rule)."
            raise RuntimeError(msg)
        padding = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
        )
        is_causal = is_causal and padding is None and not need_weights
        allowed = None
        if not is_causal:
            allowed = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, check_other=False)
        projected = self._project(query, key, value)
        if not batched:
            projected = [x.unsqueeze(0) for x in projected]
            padding = padding.unsqueeze(0) if padding is not None else None
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        heads = self._heads(projected, padding, allowed)
        output, weights = self._attend(*heads, need_weights=need_weights, is_causal=is_causal)
        weights = weights.mean(dim=1) if weights is not None and average_attn_weights else weights
        output = self.out_proj(output.permute(2, 0, 1, 3).flatten(2))  # (L, N, E), as torch has it in memory
        if not batched:
            return output.squeeze(1), weights.squeeze(0) if weights is not None else None
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what each head attends to, (N, heads, L, head_dim), and the weights, (N, heads, L, S), or None."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = (scores + mask if mask is not None else scores).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout > 0 else weights
        return weights @ v, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Returns queries, keys and values, each (…, E)."""
        if not self._qkv_same_embed_dim:
            projected = [self.q_proj(query), self.k_proj(key), self.v_proj(value)]
            if self.in_proj_bias is not None:
                biases = self.in_proj_bias.chunk(3)
                projected = [x + bias for x, bias in zip(projected, biases, strict=True)]
            return projected
        if query is key and key is value:
            return list(self.in_proj(query).chunk(3, dim=-1))
        inputs = [query, key] if key is value else [query, key, value]
        before, last = split_factors(self.in_proj)
        if last is None or watched(self.in_proj):  # one call, so that whoever watches sees all that enters
            dim = 1 if self.batch_first and query.ndim == 3 else 0  # noqa: PLR2004
            parts = self.in_proj(torch.cat(inputs, dim)).split([x.shape[dim] for x in inputs], dim)
            return [part.chunk(3, dim=-1)[i] for i, part in enumerate((*parts, parts[-1])[:3])]
        for factor in before:
            inputs = [factor(x) for x in inputs]
        ends = [self.embed_dim, 3 * self.embed_dim] if key is value else [(i + 1) * self.embed_dim for i in range(3)]
        found, start = [], 0
        for x, end in zip(inputs, ends, strict=True):
            bias = last.bias[start:end] if last.bias is not None else None
            found.append(F.linear(x, last.weight[start:end], bias))
            start = end
        return [found[0], *found[1].chunk(2, dim=-1)] if key is value else found

    def _heads(
        self, projected: Sequence[Tensor], padding: Tensor | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns q, k, v of each head, (N, heads, L or S, head_dim), and the merged mask to be added, (…, L, S)."""
        q, k, v = projected
        size, targets, sources = q.shape[0], q.shape[1], k.shape[1]  # len() would be a constant of an export
        if allowed is not None:
            heads = () if allowed.ndim == 2 else (size, self.num_heads)  # noqa: PLR2004
            expected = (*([size * self.num_heads] if heads else []), targets, sources)
            if allowed.shape != expected:
                msg = f"attn_mask has the shape {tuple(allowed.shape)}, expected {expected}."
                raise RuntimeError(msg)
            allowed = allowed.reshape(*(heads or (1, 1)), targets, sources)
        if padding is not None:
            if padding.shape != (size, sources):
                msg = f"key_padding_mask has the shape {tuple(padding.shape)}, expected {(size, sources)}."
                raise RuntimeError(msg)
            padding = padding[:, None, None]
            allowed = allowed + padding if allowed is not None else padding
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(size, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(size, 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if allowed is not None:
            allowed = F.pad(allowed, (0, k.shape[1] - sources))
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        return q, k, v, allowed


class _OnDemand:
    """Stands for a projection's weight, multiplied out when something is done with it.

    torch's encoder layers read the weight in eval mode only to see whether they may take their fast path,
    which they leave to anything with torch functions of its own.
    """

    def __init__(self, projection: nn.Module) -> None:
        self._projection = projection

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda leaf: leaf._projection.weight if isinstance(leaf, _OnDemand) else leaf, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_projection":
            raise AttributeError(name)
        return getattr(self._projection.weight, name)

    def __getitem__(self, index: Any) -> Tensor:
        return cast(Tensor, self._projection.weight)[index]

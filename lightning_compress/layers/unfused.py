"""Attention and recurrent layers with their projections as layers of their own, so that those can be factorised.

nn.MultiheadAttention, nn.LSTM, nn.GRU and nn.RNN hand their weights to one fused function, so no hook, no
call count and no replaced child ever reaches a single projection. Their open twins hold the same Parameters in
nn.Linear children and compute the same.

A model is opened for a while to look at it (`opened`) and for good where a projection is factorised (`open_`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.compat import tree_map
from lightning_compress.core.errors import ConfigurationError, ModelError
from lightning_compress.layers.factorised import FactorisedLayer

P = ParamSpec("P")
R = TypeVar("R")

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

_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
_OPENABLE = (nn.MultiheadAttention, *_RECURRENT)
_CALLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}
_NO_SETTINGS = (*vars(nn.Module()), "_flat_weights", "_flat_weight_refs", "_compiled_call_impl")
_OWN_SETTINGS = ("closed_type", "stepwise", "_places")


class OpenModule(nn.Module):
    """What both twins have in common.

    All public attributes of the torch module are kept, and its Parameters can be read by their own
    names too (`weight_hh_l0`, `q_proj_weight`, …); of a factorised projection that is the weight
    multiplied out.

    Attributes:
        closed_type: Class of the torch module.
    """

    def __init__(self, closed: nn.Module) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(closed).items() if name not in _NO_SETTINGS})
        self.closed_type = type(closed)
        self._places: dict[str, tuple[str, str] | None] = dict.fromkeys(closed._parameters)

    def __getattr__(self, name: str) -> Any:
        places = self.__dict__.get("_places", {})
        if name not in places or name in self.__dict__["_parameters"]:
            return super().__getattr__(name)
        place = places[name]
        return getattr(self._modules[place[0]], place[1]) if place is not None else None

    def _keep(self, closed: nn.Module, name: str) -> None:
        """Keeps a Parameter that is no projection's."""
        self._parameters[name] = closed._parameters[name]

    def _add(self, name: str, closed: nn.Module, weight: str, bias: str | None = None) -> None:
        """Adds a projection with the Parameters of these names as weight and bias."""
        self.add_module(name, _linear(nn.Linear, closed._parameters[weight], closed._parameters.get(bias or "")))
        self._places[weight] = (name, "weight")
        if bias in self._places and closed._parameters[bias] is not None:
            self._places[bias] = (name, "bias")

    def closed(self) -> nn.Module:
        """Returns the torch module with the same Parameters, all projections being plain nn.Linear."""
        closed = self.closed_type.__new__(self.closed_type)
        nn.Module.__init__(closed)
        settings = {name: v for name, v in vars(self).items() if name not in (*_NO_SETTINGS, *_OWN_SETTINGS)}
        closed.__dict__.update(settings)
        for name, place in self._places.items():
            own = self._parameters.get(name)
            parameter = getattr(self._modules[place[0]], place[1]) if place is not None else own
            closed.register_parameter(name, parameter)
        return closed


class OpenAttention(OpenModule):
    """nn.MultiheadAttention with its projections as children.

    Same arguments, results, and use of the global random state; nested tensors, which torch accepts on
    its fast path alone, are refused. Children are `in_proj`, (E, 3 E), or, where keys or values have another
    size, `q_proj`, `k_proj` and `v_proj` without bias, and `out_proj`.

    Where queries, keys and values differ, of a fused `in_proj` only the needed thirds are computed, by slicing
    its weight or that of its last factor. In two cases all three thirds are computed for all of them: while a
    hook is on the projection, and where its last factor is no nn.Linear. MACs are counted with hooks on, so of
    such a cross-attention they are counted above what runs.

    In eval mode nn.TransformerEncoder and nn.TransformerEncoderLayer do not take their fast path with it. With a
    padding mask that path fills the outputs at padding with zeros; here they are as in training.

    Args:
        closed: Shares its Parameters.
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

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__(closed)
        for name in ("bias_k", "bias_v"):
            if name in closed._parameters:
                self._keep(closed, name)
        if self._qkv_same_embed_dim:
            self._add("in_proj", closed, "in_proj_weight", "in_proj_bias")
        else:
            self._keep(closed, "in_proj_bias")
            for name in ("q_proj", "k_proj", "v_proj"):
                self._add(name, closed, f"{name}_weight")
        out = closed.out_proj
        self.out_proj = _linear(nn.Linear, out.weight, out.bias)
        self.train(closed.training)

    @property
    def in_proj_weight(self) -> Any:
        """The fused weight, multiplied out only if it is used."""
        return _OnDemand(self.in_proj) if self._qkv_same_embed_dim else None

    @override
    def closed(self) -> nn.Module:
        closed = super().closed()
        out = self.out_proj
        closed.add_module("out_proj", _linear(NonDynamicallyQuantizableLinear, out.weight, out.bias))
        return closed.train(self.training)

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
            msg = "a nested tensor was given to an opened attention layer: pass a padded one with key_padding_mask."
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
        q, k, v, mask = self._heads(projected, padding, allowed)  # (N, heads, L or S, head_dim), (N, heads, L, S)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores + mask if mask is not None else scores).softmax(dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            output = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = self.out_proj(output.permute(2, 0, 1, 3).flatten(2))  # (L, N, E), as torch has it in memory
        if not batched:
            return output.squeeze(1), weights.squeeze(0) if weights is not None else None
        return output.transpose(0, 1) if self.batch_first else output, weights

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
        before, last = _split(self.in_proj)
        if last is None or _watched(self.in_proj):  # one call, so that whoever watches sees all that enters
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
        """Returns what each head attends to, (N, heads, L or S, head_dim), and the merged mask to be added."""
        q, k, v = projected
        size, targets, sources = len(q), q.shape[1], k.shape[1]
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


class OpenRecurrent(OpenModule):
    """nn.LSTM, nn.GRU or nn.RNN with its projections as children `ih_l0`, `hh_l0`, `ih_l0_reverse`, …, `hr_l0`.

    Same arguments and results. It runs torch's fused kernels, whatever the projections are: of a factorised
    `ih` all factors but the last are applied to the whole sequence beforehand and the last is the kernel's input
    weight; other factors are multiplied out once per call. So a factorised `hh` or `hr` saves parameters but
    no MACs there.

    While a hook is on a projection, or `stepwise` is set, an explicit loop over time calls the children
    instead: `ih` once for the whole sequence, `hh` at every step.

    Args:
        closed: Shares its Parameters.

    Attributes:
        stepwise: Whether to loop even without hooks.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def __init__(self, closed: nn.RNNBase) -> None:
        super().__init__(closed)
        self.stepwise = False
        for suffix in self._suffixes():
            self._add(f"ih_{suffix}", closed, f"weight_ih_{suffix}", f"bias_ih_{suffix}")
            self._add(f"hh_{suffix}", closed, f"weight_hh_{suffix}", f"bias_hh_{suffix}")
            if self.proj_size:
                self._add(f"hr_{suffix}", closed, f"weight_hr_{suffix}")
        self.train(closed.training)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat memory of the weights."""

    @override
    def closed(self) -> nn.Module:
        closed = cast(nn.RNNBase, super().closed())
        closed._init_flat_weights()
        return closed.train(self.training)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Returns the outputs and the last state; see nn.LSTM, nn.GRU or nn.RNN."""
        if isinstance(input, PackedSequence):
            data, sizes, order, original = input
            states = self._states(data, int(sizes[0]), hx, order)
            output, states = self._run(data, sizes, states)
            return PackedSequence(output, sizes, order, original), self._returned(states, original)
        if input.ndim not in (2, 3):
            msg = f"{self.closed_type.__name__}: expected an input of 2 or 3 dimensions, got {tuple(input.shape)}."
            raise ValueError(msg)
        batched = input.ndim == 3  # noqa: PLR2004
        data = input if batched else input.unsqueeze(1)
        data = data.transpose(0, 1) if self.batch_first and batched else data  # (T, B, input_size)
        if not batched and hx is not None:
            hx = tree_map(lambda state: state.unsqueeze(1), hx)
        output, states = self._run(data, None, self._states(data, data.shape[1], hx, None))
        if not batched:
            return output.squeeze(1), self._returned([state.squeeze(1) for state in states], None)
        return output.transpose(0, 1) if self.batch_first else output, self._returned(states, None)

    def _suffixes(self) -> list[str]:
        return [f"l{layer}{end}" for layer in range(self.num_layers) for end in ("", "_reverse")[: self._directions]]

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _states(self, data: Tensor, batch: int, hx: Any, order: Tensor | None) -> list[Tensor]:
        """Returns h, or h and c, each (layers · directions, batch, size), zeros where none are given."""
        if data.shape[-1] != self.input_size:
            msg = f"the input has {data.shape[-1]} features, {self.closed_type.__name__} expects {self.input_size}."
            raise RuntimeError(msg)
        rows = self.num_layers * self._directions
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        if hx is None:
            return [data.new_zeros(rows, batch, size) for size in sizes]
        given = list(hx) if self.mode == "LSTM" else [hx]
        for state, size in zip(given, sizes, strict=True):
            if tuple(state.shape) != (rows, batch, size):
                msg = f"the initial state has the shape {tuple(state.shape)}, expected {(rows, batch, size)}."
                raise RuntimeError(msg)
        return given if order is None else [state.index_select(1, order) for state in given]

    def _returned(self, states: Sequence[Tensor], order: Tensor | None) -> Any:
        states = states if order is None else [state.index_select(1, order) for state in states]
        return tuple(states) if self.mode == "LSTM" else states[0]

    def _run(self, data: Tensor, sizes: Tensor | None, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns the outputs, (T, B, directions · size) or packed, and the last states."""
        suffixes = self._suffixes()
        stepwise = self.stepwise or any(_watched(child) for child in self.children())
        if not stepwise and not any(self._is_split(suffix) for suffix in suffixes):
            return self._fused(data, sizes, states, suffixes)
        finals = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                data = F.dropout(data, self.dropout)
            rows = slice(layer * self._directions, (layer + 1) * self._directions)
            own, here = [state[rows] for state in states], suffixes[rows]
            if stepwise or any(self._is_split(suffix) for suffix in here):
                ends = [
                    (self._looped if stepwise else self._reduced)(data, sizes, [s[[d]] for s in own], suffix)
                    for d, suffix in enumerate(here)
                ]
                data, last = torch.cat([end[0] for end in ends], dim=-1), [end[1] for end in ends]
                finals.append([torch.cat(parts) for parts in zip(*last, strict=True)])
            else:
                data, last_states = self._fused(data, sizes, own, here)
                finals.append(last_states)
        return data, [torch.cat(parts) for parts in zip(*finals, strict=True)]

    def _is_split(self, suffix: str) -> bool:
        """Returns whether something comes before the kernel's input weight."""
        return bool(_split(self._modules[f"ih_{suffix}"])[0])

    def _weights(self, suffix: str, ih: Any = None) -> list[Tensor]:
        """Returns the weights of one layer and direction in the order of torch's kernels."""
        ih, hh = ih if ih is not None else self._modules[f"ih_{suffix}"], cast(Any, self._modules[f"hh_{suffix}"])
        biases = [ih.bias, hh.bias] if self.bias else []
        return [ih.weight, hh.weight, *biases, *([getattr(self, f"hr_{suffix}").weight] if self.proj_size else [])]

    def _fused(
        self,
        data: Tensor,
        sizes: Tensor | None,
        states: Sequence[Tensor],
        suffixes: Sequence[str],
        weights: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        weights = weights or [weight for suffix in suffixes for weight in self._weights(suffix)]
        both = len(suffixes) > 1 and suffixes[1].endswith("_reverse")
        layers = len(suffixes) // (2 if both else 1)
        hidden = tuple(states) if self.mode == "LSTM" else states[0]
        settings = (list(weights), self.bias, layers, self.dropout, self.training, both)
        call = _CALLS[self.mode]
        if sizes is None:
            output, *last = call(data, hidden, *settings, False)
        else:
            output, *last = call(data, sizes, hidden, *settings)
        return output, last

    def _reduced(
        self, data: Tensor, sizes: Tensor | None, states: Sequence[Tensor], suffix: str
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one layer in one direction with the first factors of `ih` outside of the kernel."""
        before, last = _split(self._modules[f"ih_{suffix}"])
        for factor in before:
            data = factor(data)
        weights = self._weights(suffix, last)
        if not suffix.endswith("_reverse"):
            return self._fused(data, sizes, states, [suffix], weights)
        output, finals = self._fused(_reversed(data, sizes), sizes, states, [suffix], weights)
        return _reversed(output, sizes), finals

    def _looped(
        self, data: Tensor, sizes: Tensor | None, states: Sequence[Tensor], suffix: str
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one layer in one direction step by step."""
        inputs = self.get_submodule(f"ih_{suffix}")(data)
        steps = list(inputs.unbind(0) if sizes is None else inputs.split(sizes.tolist()))
        order = range(len(steps))[:: -1 if suffix.endswith("_reverse") else 1]
        now = [state[0] for state in states]
        for t in order:
            count = len(steps[t])
            new = self._cell(steps[t], [state[:count] for state in now], suffix)
            steps[t] = new[0]
            now = [
                torch.cat([n, state[count:]]) if count < len(state) else n for n, state in zip(new, now, strict=True)
            ]
        return torch.stack(steps) if sizes is None else torch.cat(steps), [state[None] for state in now]

    def _cell(self, inputs: Tensor, states: Sequence[Tensor], suffix: str) -> list[Tensor]:
        """Returns the next states from the projected inputs, (B, gates · hidden)."""
        hidden = states[0]
        recurrent = self.get_submodule(f"hh_{suffix}")(hidden)
        if self.mode == "LSTM":
            i, f, g, o = (inputs + recurrent).chunk(4, dim=-1)
            cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
            output = o.sigmoid() * cell.tanh()
            return [self.get_submodule(f"hr_{suffix}")(output) if self.proj_size else output, cell]
        if self.mode == "GRU":
            (r, z, n), (r_h, z_h, n_h) = inputs.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
            new = (n + (r + r_h).sigmoid() * n_h).tanh()
            return [new + (z + z_h).sigmoid() * (hidden - new)]
        total = inputs + recurrent
        return [total.tanh() if self.mode == "RNN_TANH" else total.relu()]

    @override
    def extra_repr(self) -> str:
        return f"{self.closed_type.__name__}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class Opening(NamedTuple):
    """One module that was opened.

    Attributes:
        aliases: Every name it is registered under.
        closed: The torch module that was there.
        twin: The module that takes its place; both hold the same Parameters.
    """

    aliases: tuple[str, ...]
    closed: nn.Module
    twin: OpenModule


def openable(model: nn.Module) -> dict[str, str | None]:
    """Returns every attention and recurrent layer of torch by its first name, with the reason why it cannot be opened.

    The reason is None for those that can.
    """
    return {names[0]: reason for names, _, reason in _found(model)}


def open_(model: nn.Module, names: Iterable[str]) -> tuple[Opening, ...]:
    """Replaces attention and recurrent layers by their open twins, in place and under every name.

    Modes and hooks move along with their handles.

    Args:
        model: Any module.
        names: Of the layers, any alias; open ones are left alone.

    Returns:
        What was replaced by what, for `undo_`.

    Raises:
        ConfigurationError: If a name is none of such a layer.
        ModelError: If a layer cannot be opened; the message says why. Nothing is changed then.
    """
    wanted, found = set(names), _found(model)
    known = {alias for aliases, *_ in found for alias in aliases}
    for name in wanted - known - {name for name, m in model.named_modules() if isinstance(m, OpenModule)}:
        msg = f"{name!r} is no attention or recurrent layer of the model.{did_you_mean(name, known)}"
        raise ConfigurationError(msg)
    openings = []
    for aliases, module, reason in found:
        if wanted.isdisjoint(aliases):
            continue
        if reason is not None:
            msg = f"{aliases[0]!r} ({type(module).__name__}) cannot be opened: {reason}."
            raise ModelError(msg)
        twin = (OpenAttention if isinstance(module, nn.MultiheadAttention) else OpenRecurrent)(cast(Any, module))
        share_hooks(module, twin)
        openings.append(Opening(aliases, module, twin))
    try:
        redo_(model, openings)
    except BaseException:
        undo_(model, openings)
        raise
    return tuple(openings)


def undo_(model: nn.Module, openings: Iterable[Opening]) -> None:
    """Puts the torch modules back, in the mode their twins are in."""
    for opening in openings:
        share_hooks(opening.twin, opening.closed)
        put_(model, opening.aliases, opening.closed.train(opening.twin.training))


def redo_(model: nn.Module, openings: Iterable[Opening]) -> None:
    """Puts the twins in, in the mode the torch modules are in."""
    for opening in openings:
        share_hooks(opening.closed, opening.twin)
        put_(model, opening.aliases, opening.twin.train(opening.closed.training))


def close_(model: nn.Module) -> tuple[Opening, ...]:
    """Turns every open layer whose projections are all plain nn.Linear into torch's module, in place.

    Returns:
        What was replaced, with the new torch modules.
    """
    closings = [
        Opening(aliases, module.closed(), module)
        for aliases, module in _aliases(model)
        if isinstance(module, OpenModule) and all(type(child) is nn.Linear for child in module.children())
    ]
    undo_(model, closings)
    return tuple(closings)


@contextlib.contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Opens every layer that can be opened and puts the torch modules back afterwards, also after an exception."""
    openings = open_(model, [name for name, reason in openable(model).items() if reason is None])
    for opening in openings:
        if isinstance(opening.twin, OpenRecurrent):  # cuDNN's kernels cannot be differentiated in eval mode
            opening.twin.stepwise = any(parameter.is_cuda for parameter in opening.twin.parameters())
    try:
        yield
    finally:
        undo_(model, openings)


def with_opened(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function whose first argument is a model: it runs on the opened model."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else next(iter(kwargs.values()), None)
        with opened(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
            return function(*args, **kwargs)

    return wrapped


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


def _linear(kind: type[nn.Linear], weight: Any, bias: Any) -> nn.Linear:
    """Returns a linear layer that holds these Parameters."""
    layer = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer


def _split(projection: Any) -> tuple[list[nn.Module], nn.Linear | None]:
    """Returns the factors before the last one and that, or nothing and None where it is no plain nn.Linear."""
    if type(projection) is nn.Linear:
        return [], projection
    if isinstance(projection, FactorisedLayer) and type(projection[-1]) is nn.Linear:
        return list(projection)[:-1], projection[-1]
    return [], None


def _watched(module: nn.Module) -> bool:
    """Returns whether a hook is on a module or a part of it."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )


def _reversed(data: Tensor, sizes: Tensor | None) -> Tensor:
    """Returns sequences backwards, each within its own length where they are packed."""
    if sizes is None:
        return data.flip(0)
    starts = sizes.cumsum(0) - sizes
    step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    sequence = torch.arange(len(step)) - starts[step]
    lengths = (sizes[:, None] > torch.arange(int(sizes[0]))).sum(dim=0)
    index = starts[lengths[sequence] - 1 - step] + sequence
    return data[index.to(data.device)]


def _aliases(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Returns every module with all its names, the first one first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(tuple(found), module) for module, found in names.items()]


def _found(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module, str | None]]:
    modules = _aliases(model)
    candidates = [(names, m) for names, m in modules if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))]
    holders: dict[int, int] = {}
    if candidates:
        for _, module in modules:
            for key in {id(p) for p in module._parameters.values() if p is not None}:
                holders[key] = holders.get(key, 0) + 1
    return [(names, module, _why_closed(names, module, holders)) for names, module in candidates]


def _why_closed(names: tuple[str, ...], module: nn.Module, holders: dict[int, int]) -> str | None:
    """Returns why a layer cannot be opened, None if it can."""
    parts = list(module.modules())
    checks = {
        "it is of a subclass, which may use its weights in its own way": type(module) not in _OPENABLE,
        "it is the model itself, which has no parent to swap it in; wrap it, as in nn.Sequential(layer)": "" in names,
        "its forward method was replaced on the instance": any("forward" in part.__dict__ for part in parts),
        "it carries state-dict hooks, which expect its own parameter names": any(
            getattr(part, hooks, None) for part in parts for hooks in STATE_DICT_HOOKS
        ),
        "its weights are computed from other parameters (weight_norm, spectral_norm, pruning or the like)": (
            not _has_its_own_parameters(module)
        ),
        "its weights are tied to another module's": any(holders[id(p)] > 1 for p in module.parameters()),
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def _has_its_own_parameters(module: nn.Module) -> bool:
    """Returns whether all weights are where the class puts them, and nothing else is there."""
    if list(module.buffers()):
        return False
    if isinstance(module, nn.RNNBase):
        return not module._modules and list(module._parameters) == module._flat_weights_names
    out = module._modules.get("out_proj")
    expected = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}
    return (
        list(module._modules) == ["out_proj"]
        and type(out) in (NonDynamicallyQuantizableLinear, nn.Linear)
        and set(cast(nn.Module, out)._parameters) == {"weight", "bias"}
        and set(module._parameters) - {"bias_k", "bias_v"} == expected
    )


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives a module the hooks of another, as the same dict objects: their handles keep working."""
    for hooks in HOOKS:
        target.__dict__[hooks] = source.__dict__[hooks]


def put_(model: nn.Module, aliases: Iterable[str], module: nn.Module) -> None:
    """Puts a module in, under every name."""
    for alias in aliases:
        parent, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

"""Recurrent layers with their projections as layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from lightning_compress.core.compat import tree_map
from lightning_compress.layers.unfused.base import UnfusedModule, split_factors, watched

_CALLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,
    "GRU": torch._VF.gru,
    "RNN_TANH": torch._VF.rnn_tanh,
    "RNN_RELU": torch._VF.rnn_relu,
}


class UnfusedRecurrent(UnfusedModule):
    """nn.LSTM, nn.GRU or nn.RNN with its projections as children `ih_l0`, `hh_l0`, `ih_l0_reverse`, …, `hr_l0`.

    Same arguments and results. It runs torch's fused kernels, whatever the projections are: of a factorised
    `ih` all factors but the last are applied to the whole sequence beforehand and the last is the kernel's input
    weight; other factors are multiplied out once per call. So a factorised `hh` or `hr` saves parameters but
    no MACs there.

    While a hook is on a projection, or `stepwise` is set, an explicit loop over time calls the children
    instead: `ih` once for the whole sequence, `hh` at every step.

    Args:
        fused: Shares its Parameters.

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

    def __init__(self, fused: nn.RNNBase) -> None:
        super().__init__(fused)
        self.stepwise = False
        for suffix in self._suffixes():
            self._add(f"ih_{suffix}", fused, f"weight_ih_{suffix}", f"bias_ih_{suffix}")
            self._add(f"hh_{suffix}", fused, f"weight_hh_{suffix}", f"bias_hh_{suffix}")
            if self.proj_size:
                self._add(f"hr_{suffix}", fused, f"weight_hr_{suffix}")
        self.train(fused.training)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat memory of the weights."""

    @override
    def fused(self) -> nn.Module:
        fused = cast(nn.RNNBase, super().fused())
        fused._init_flat_weights()
        return fused.train(self.training)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Returns the outputs and the last state; see nn.LSTM, nn.GRU or nn.RNN."""
        if isinstance(input, PackedSequence):
            data, sizes, order, original = input
            states = self._states(data, int(sizes[0]), hx, order)
            output, states = self._run(data, sizes, states)
            return PackedSequence(output, sizes, order, original), self._returned(states, original)
        if input.ndim not in (2, 3):
            msg = f"{self.fused_type.__name__}: expected an input of 2 or 3 dimensions, got {tuple(input.shape)}."
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
            msg = f"the input has {data.shape[-1]} features, {self.fused_type.__name__} expects {self.input_size}."
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
        stepwise = self.stepwise or any(watched(child) for child in self.children())
        if not stepwise and not any(self._is_split(suffix) for suffix in suffixes):
            return self._kernel(data, sizes, states, suffixes)
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
                data, last_states = self._kernel(data, sizes, own, here)
                finals.append(last_states)
        return data, [torch.cat(parts) for parts in zip(*finals, strict=True)]

    def _is_split(self, suffix: str) -> bool:
        """Returns whether something comes before the kernel's input weight."""
        return bool(split_factors(self._modules[f"ih_{suffix}"])[0])

    def _weights(self, suffix: str, ih: Any = None) -> list[Tensor]:
        """Returns the weights of one layer and direction in the order of torch's kernels."""
        ih, hh = ih if ih is not None else self._modules[f"ih_{suffix}"], cast(Any, self._modules[f"hh_{suffix}"])
        biases = [ih.bias, hh.bias] if self.bias else []
        return [ih.weight, hh.weight, *biases, *([getattr(self, f"hr_{suffix}").weight] if self.proj_size else [])]

    def _kernel(
        self,
        data: Tensor,
        sizes: Tensor | None,
        states: Sequence[Tensor],
        suffixes: Sequence[str],
        weights: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs layers in torch's fused kernel."""
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
        before, last = split_factors(self._modules[f"ih_{suffix}"])
        for factor in before:
            data = factor(data)
        weights = self._weights(suffix, last)
        if not suffix.endswith("_reverse"):
            return self._kernel(data, sizes, states, [suffix], weights)
        output, finals = self._kernel(_reversed(data, sizes), sizes, states, [suffix], weights)
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
        return f"{self.fused_type.__name__}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


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

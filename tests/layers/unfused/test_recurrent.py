"""Unfused recurrent layers: the same function as torch's, in its fused kernel or step by step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

from lightning_compress import FactorisedLayer, apply_plan_
from lightning_compress.layers.unfused import UnfusedRecurrent
from tests.support.unfusing import NO_ONEDNN, RECURRENT, normal, plan_for, results_and_gradients, same

SLOW = pytest.mark.slow


def sequences(batch_first):
    plain = normal(3, 6, 4) if batch_first else normal(6, 3, 4)
    lengths = torch.tensor([2, 6, 4])
    return {
        "batch": plain,
        "unbatched": normal(6, 4),
        "packed": rnn.pack_padded_sequence(plain, lengths, batch_first=batch_first, enforce_sorted=False),
        "packed, sorted": rnn.pack_padded_sequence(plain, lengths.sort(descending=True)[0], batch_first=batch_first),
    }


def initial(layer, unbatched):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    states = [normal(*((rows, n) if unbatched else (rows, 3, n)), seed=5 + i) for i, n in enumerate(sizes)]
    return tuple(states) if layer.mode == "LSTM" else states[0]


@NO_ONEDNN
@pytest.mark.parametrize(
    ("layers", "bidirectional"),
    [(2, True), (1, False), pytest.param(3, True, marks=SLOW), pytest.param(3, False, marks=SLOW)],
)
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_is_torchs_fused_and_stepwise_with_gradients_and_dropout(kind, layers, bidirectional):
    make, more = RECURRENT[kind]
    for index, (name, given) in enumerate(itertools.product(sequences(False), (False, True))):
        settings = {**more, "bidirectional": bidirectional, "batch_first": index % 2 == 0, "bias": index % 3 > 0}
        fused = make(4, 5, layers, dropout=0.4 if layers > 1 else 0.0, **settings)
        twin, parameters = UnfusedRecurrent(fused), list(fused.parameters())
        assert {id(p) for p in twin.parameters()} == {id(p) for p in parameters}
        x = sequences(fused.batch_first)[name]
        args = (x, initial(fused, name == "unbatched")) if given else (x,)
        expected = results_and_gradients(fused, [], parameters, *args)
        for twin.stepwise in (False, True):
            found = results_and_gradients(twin, [], parameters, *args)
            same(found, expected)
            assert type(found[0][0]) is type(expected[0][0])
        if layers > 1:
            fused.eval()
            twin.eval()
            same(twin(*args), fused(*args))


@NO_ONEDNN
@pytest.mark.parametrize(
    "chosen", ["ih_l1_reverse", "h", *(pytest.param(c, marks=SLOW) for c in ("ih_l0", "hh", "ih"))]
)
@pytest.mark.parametrize("kind", RECURRENT)
def test_factorised_recurrent_fused_is_stepwise_and_dense_at_full_rank(kind, chosen):
    make, more = RECURRENT[kind]
    for name, rank in itertools.product(sequences(False), (None, 2)):
        model = nn.ModuleDict({"layer": make(4, 5, 2, dropout=0.4, bidirectional=True, **more)})
        x, dense = sequences(False)[name], model["layer"]
        torch.manual_seed(0)
        expected = dense(x)
        apply_plan_(model, plan_for(model, rank, chosen=lambda n: chosen in n))
        twin = model["layer"]
        assert isinstance(twin, UnfusedRecurrent)
        assert any(isinstance(m, FactorisedLayer) for m in twin.children())
        fused = results_and_gradients(twin, [], list(twin.parameters()), x)
        twin.stepwise = True
        same(fused, results_and_gradients(twin, [], list(twin.parameters()), x))
        if rank is None:
            same(fused[0], expected)


def test_a_hook_makes_a_recurrent_layer_call_its_projections():
    twin = UnfusedRecurrent(nn.LSTM(4, 5, batch_first=True))
    expected, calls = twin(normal(3, 6, 4)), []
    hook = twin.hh_l0.register_forward_hook(lambda _, args, output: calls.append(args[0].shape))
    same(twin(normal(3, 6, 4)), expected)
    assert calls == [(3, 5)] * 6
    hook.remove()
    twin(normal(3, 6, 4))
    assert len(calls) == 6


def test_recurrent_keeps_the_attributes_and_refuses_wrong_shapes():
    fused = nn.LSTM(4, 5, 2, batch_first=True, dropout=0.1, bidirectional=True)
    twin = UnfusedRecurrent(fused)
    names = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size mode"
    assert all(getattr(twin, name) == getattr(fused, name) for name in names.split())
    assert twin.weight_hh_l1_reverse is fused.weight_hh_l1_reverse is twin.hh_l1_reverse.weight
    assert twin.flatten_parameters() is None
    assert "LSTM, 4, 5" in repr(twin)
    x = normal(3, 6, 4)
    wrong = [(x[..., :3],), (x[None],), (x, (x, x))]
    for args in wrong:
        for layer in (fused, twin):
            with pytest.raises((RuntimeError, ValueError)):
                layer(*args)

"""Unfusing modules of a model and fusing them again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_compress import apply_plan_
from lightning_compress.analysis.inventory import list_layers
from lightning_compress.analysis.usable import require_module
from lightning_compress.core.errors import ConfigurationError, ModelError
from lightning_compress.layers.unfused import (
    UnfusedAttention,
    UnfusedRecurrent,
    fuse_,
    undo_,
    unfusable,
    unfuse_,
    unfused,
)
from tests.support.unfusing import HEADS, NO_ONEDNN, RECURRENT, E, normal, plan_for, randomised, same


def nested():
    """An attention layer under two names and a GRU inside of other modules."""
    model = nn.ModuleDict({"a": nn.Sequential(nn.MultiheadAttention(E, HEADS), nn.GRU(4, 5)), "other": nn.Linear(2, 2)})
    model["again"] = model["a"][0]
    return model


def test_unfused_gives_everything_back(unchanged):
    model = nested()
    model["a"][1].eval()
    model["a"][0].out_proj.bias.requires_grad_(False)
    before, attention = unchanged(model), model["a"][0]
    hook = attention.register_forward_hook(lambda *_: calls.append(0))
    calls = []
    with unfused(model):
        assert isinstance(model["again"], UnfusedAttention)
        assert model["again"] is model["a"][0]
        assert isinstance(model["a"][1], UnfusedRecurrent)
        assert [m.training for m in (model["again"], model["a"][1], model["a"][1].ih_l0)] == [True, False, False]
        twin = model["again"]
        with unfused(model):
            assert model["again"] is twin
        assert model["again"] is twin
        model["again"](*[normal(3, 1, E)] * 3)
        assert len(calls) == 1
        hook.remove()
        model["again"](*[normal(3, 1, E)] * 3)
        assert len(calls) == 1
        late = twin.register_full_backward_hook(lambda *_: calls.append(1))
    before.check()
    assert model["again"] is attention
    attention(normal(3, 1, E).requires_grad_(), *[normal(3, 1, E)] * 2)[0].sum().backward()
    late.remove()
    assert calls == [0, 1]


def test_unfused_gives_everything_back_after_an_error(unchanged):
    model = nested()
    before = unchanged(model)

    def fail():
        with unfused(model):
            model.eval()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    before.modules = [(name, m, False) for name, m, _ in before.modules]  # the mode it was left in is kept
    before.check()


def test_unfused_leaves_what_is_no_module_to_the_code_inside():
    for model in (None, 3, nn.LSTM):
        with pytest.raises(ConfigurationError, match=r"nn\.Module"), unfused(model):
            require_module(model)


def test_a_failing_parent_leaves_everything_as_it_was(unchanged):
    class Strict(nn.Module):
        def __setattr__(self, name, value):
            if isinstance(value, UnfusedRecurrent):
                msg = "no"
                raise TypeError(msg)
            super().__setattr__(name, value)

    model = nn.Sequential(nn.MultiheadAttention(E, HEADS), Strict())
    model[1].gru = nn.GRU(4, 5)
    before = unchanged(model)
    with pytest.raises(TypeError, match="no"):
        unfuse_(model, ["0", "1.gru"])
    before.check()


def test_unfuse_by_any_name_undo_and_fuse():
    model = nested()
    attention, gru = model["a"]
    names = [(name, id(p)) for name, p in model.named_parameters()]
    (unfusing,) = unfuse_(model, ["again"])
    assert unfusing == (("a.0", "again"), attention, model["a"][0])
    assert model["a"][1] is gru
    assert unfuse_(model, ["a.0"]) == ()
    undo_(model, [unfusing])
    assert model["a"][0] is model["again"] is attention
    unfuse_(model, ["again", "a.1"])
    model.eval()
    apply_plan_(model, plan_for(model, rank=1, chosen=lambda name: name == "a.1.hh_l0"))
    (fusing,) = fuse_(model)
    fused = model["again"]
    assert fusing.fused is fused is model["a"][0]
    assert type(fused) is nn.MultiheadAttention
    assert fused.state_dict().keys() == attention.state_dict().keys()
    assert {id(p) for p in fused.parameters()} == {id(p) for p in attention.parameters()}
    assert not fused.training
    assert isinstance(model["a"][1], UnfusedRecurrent)
    assert [pair for pair in names if "a.0" in pair[0]] == [
        (name, id(p)) for name, p in model.named_parameters() if "a.0" in name
    ]


@NO_ONEDNN
@pytest.mark.parametrize("kind", [*RECURRENT, "attention", "attention of other sizes", "attention without biases"])
def test_fused_again_is_the_torch_module(kind):
    if kind in RECURRENT:
        make, more = RECURRENT[kind]
        layer, args = make(4, 5, 2, bidirectional=True, batch_first=True, **more), (normal(3, 6, 4),)
    else:
        settings = {"attention": {"add_bias_kv": True}, "attention without biases": {"bias": False}}.get(
            kind, {"kdim": 5}
        )
        layer, args = nn.MultiheadAttention(E, HEADS, add_zero_attn=True, **settings), [normal(3, 2, E)] * 3
        args[1] = normal(4, 2, layer.kdim)
        args[2] = normal(4, 2, layer.vdim)
    model = nn.ModuleDict({"layer": randomised(layer)})
    model["layer"].note = "kept"
    expected, state = layer(*args), {k: id(v) for k, v in layer.state_dict(keep_vars=True).items()}
    unfuse_(model, ["layer"])
    for twin in (model["layer"], copy.deepcopy(model["layer"]), pickle.loads(pickle.dumps(model["layer"]))):
        same(twin(*args), expected)
    fuse_(model)
    assert type(model["layer"]) is type(layer)
    assert {k: id(v) for k, v in model["layer"].state_dict(keep_vars=True).items()} == state
    assert list(model["layer"].state_dict()) == list(layer.state_dict())
    assert model["layer"].note == "kept"
    assert repr(model["layer"]) == repr(layer)
    same(model["layer"](*args), expected)
    doubled = [value.double() for value in tree_leaves(expected)]
    same(copy.deepcopy(model["layer"]).double()(*[x.double() for x in args]), doubled)


REASONS = {
    "subclass": "subclass",
    "patched": "forward method was replaced",
    "hooks": "state-dict hooks",
    "normed": "computed from other parameters",
    "tied": "tied to another",
    "twin": "tied to another",
    "pruned": "computed from other parameters",
    "parametrised": "subclass",
}


def stubborn():
    """A model of which only "fine" can be unfused."""

    class Mine(nn.LSTM):
        pass

    model = nn.ModuleDict({name: nn.RNN(2, 2) for name in ("tied", "twin")})
    model.update({name: nn.MultiheadAttention(E, HEADS) for name in ("patched", "pruned")})
    model.update({name: nn.GRU(2, 2) for name in ("hooks", "parametrised")})
    model.update({"fine": nn.LSTM(2, 2), "subclass": Mine(2, 2)})
    model["normed"] = torch.nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0")
    model["patched"].forward = lambda *args: args
    model["hooks"].register_state_dict_pre_hook(lambda *_: None)
    model["twin"].weight_hh_l0 = model["tied"].weight_hh_l0
    torch.nn.utils.prune.l1_unstructured(model["pruned"].out_proj, "weight", 0.5)
    torch.nn.utils.parametrize.register_parametrization(model["parametrised"], "weight_hh_l0", nn.Identity())
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_what_cannot_be_unfused_says_why(unchanged):
    model = stubborn()
    reasons = unfusable(model)
    assert reasons["fine"] is None
    assert all(text in reasons[name] for name, text in REASONS.items())
    assert "the model itself" in unfusable(nn.GRU(2, 2))[""]
    before = unchanged(model)
    with unfused(model):
        layers = {layer.name: layer for layer in list_layers(model)}
        assert isinstance(model["fine"], UnfusedRecurrent)
        assert [name for name in REASONS if isinstance(model[name], (UnfusedAttention, UnfusedRecurrent))] == []
    assert layers["tied"].reason == "it cannot be unfused: its weights are tied to another module's"
    with pytest.raises(ModelError, match=r"'tied' \(RNN\) cannot be unfused: its weights are tied"):
        unfuse_(model, ["fine", "tied"])
    with pytest.raises(ConfigurationError, match=r"'fines' is no attention or recurrent layer.*'fine'"):
        unfuse_(model, ["fines"])
    before.check()


def test_weights_tied_inside_of_a_recurrent_layer_stay_tied_and_dense():
    model = nn.ModuleDict({"layer": nn.LSTM(5, 5, 2)})
    model["layer"].weight_hh_l1 = model["layer"].weight_hh_l0
    with unfused(model):
        reasons = {layer.name: layer.reason for layer in list_layers(model)}
        assert model["layer"].hh_l0.weight is model["layer"].hh_l1.weight
    assert "tied" in reasons["layer.hh_l0"]
    assert reasons["layer.ih_l0"] is None

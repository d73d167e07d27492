"""Attention and recurrent layers unfused into nn.Linear projections: the same function, factorisable."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, Compress, apply_plan_, compress_, load_compressed, save_compressed, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import list_layers, take_inventory
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.analysis.usable import require_module
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError, ModelError, PlanMismatchError
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.unfused import (
    UnfusedAttention,
    UnfusedRecurrent,
    fuse_,
    undo_,
    unfusable,
    unfuse_,
    unfused,
)
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.repair import heal_
from lightning_compress.surgery.swap import apply_shells_, install, uninstall
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.unchanged import Unchanged

E, HEADS = 8, 2
RECURRENT = {
    "LSTM": (nn.LSTM, {}),
    "LSTM with projections": (nn.LSTM, {"proj_size": 3}),
    "GRU": (nn.GRU, {}),
    "RNN tanh": (nn.RNN, {}),
    "RNN relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SLOW = pytest.mark.slow
NO_ONEDNN = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Wrapped(nn.Module):
    """One layer, which a plan can replace, and only its first output."""

    def __init__(self, layer, **kwargs) -> None:
        super().__init__()
        self.layer, self.kwargs = layer, kwargs

    def forward(self, *args):
        args = (
            args * 3 if isinstance(self.layer, (nn.MultiheadAttention, UnfusedAttention)) and len(args) == 1 else args
        )
        return self.layer(*args, **self.kwargs)[0]


class Encoder(nn.Module):
    """Inputs (B, T, 12), outputs (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


class Sequences(L.LightningModule):
    """Inputs (B, T, 12), outputs (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)
        self.example_input_array = torch.zeros(1, 6, 12)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


MODELS = {"encoder": Encoder, "LSTM": Sequences}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found, expected, atol=1e-5):
    found, expected = ([leaf for leaf in tree_leaves(v) if isinstance(leaf, torch.Tensor)] for v in (found, expected))
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in expected]
    assert len(found) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


def randomised(layer):
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=index))
    return layer


def results_and_gradients(layer, inputs, parameters, *args, seed=0, **kwargs):
    """What a layer returns, and the gradients of a random combination of it by inputs and parameters."""
    torch.manual_seed(seed)
    results = layer(*args, **kwargs)
    tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    total = sum((t * normal(*t.shape, seed=7 + i)).sum() for i, t in enumerate(tensors))
    return results, torch.autograd.grad(total, [*inputs, *parameters], allow_unused=True)


def plan_for(model, rank=None, kind="svd", chosen=lambda name: True):
    """A plan that factorises the chosen projections, at full rank by default."""
    with unfused(model):
        planned = tuple(
            LayerPlan(layer.name, "Linear", kind, (rank or min(layer.weight_shape),), layer.weight_shape, 0.0, 1, 1)
            for layer in list_layers(model)
            if layer.type == "Linear" and chosen(layer.name)
        )
    return Plan(planned, Costs(1, None, 4), Costs(1, None, 4))


# --- attention


def attention_cases():
    shapes = itertools.product(("self", "key is value", "different", "sizes"), ("first", "second", "none"))
    for index, (inputs, batch) in enumerate(shapes):
        for number, mask in enumerate(("no", "bool", "float", "bool 3", "float 3", "padding", "both", "causal")):
            bits = index * 8 + number
            yield (
                inputs,
                batch,
                mask,
                {"bias": bits % 3 > 0, "add_bias_kv": bits % 4 == 1, "add_zero_attn": bits % 5 == 2},
            )


def attention_arguments(inputs, batch, mask, sizes, targets=4, sources=5, count=3):
    sources = targets if inputs == "self" else sources

    def shaped(length, size, seed):
        x = normal(count, length, size, seed=seed)
        x = {"first": x, "second": x.transpose(0, 1), "none": x[0]}[batch]
        return x.clone().requires_grad_()

    query = shaped(targets, E, 1)
    key = query if inputs == "self" else shaped(sources, sizes[0], 2)
    value = key if inputs in ("self", "key is value") else shaped(sources, sizes[1], 3)
    rows = 1 if batch == "none" else count
    allowed, padding = normal(rows * HEADS, targets, sources, seed=4) > 1, torch.arange(sources) >= sources - 2
    padding = padding if batch == "none" else padding & (torch.arange(rows) > 0)[:, None]
    masks = {
        "no": {},
        "bool": {"attn_mask": allowed[0]},
        "float": {"attn_mask": normal(targets, sources, seed=5)},
        "bool 3": {"attn_mask": allowed},
        "float 3": {"attn_mask": normal(rows * HEADS, targets, sources, seed=5)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": allowed & ~allowed.all(-1, keepdim=True), "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(targets, sources).triu(1).bool(), "is_causal": True},
    }
    if mask == "both":
        masks[mask]["attn_mask"][..., 0] = False  # some position is left to attend to
    return (query, key, value), masks[mask]


@pytest.mark.parametrize(("inputs", "batch", "mask", "settings"), list(attention_cases()))
def test_attention_is_torchs_with_gradients_and_dropout(inputs, batch, mask, settings):
    sizes = (6, 7) if inputs == "sizes" else (E, E)
    settings = {**settings, "kdim": sizes[0], "vdim": sizes[1], "batch_first": batch == "first", "dropout": 0.3}
    fused = randomised(nn.MultiheadAttention(E, HEADS, **settings))
    twin = UnfusedAttention(fused)
    parameters = list(fused.parameters())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in parameters}
    args, masks = attention_arguments(inputs, batch, mask, sizes)
    for training, (need, average) in itertools.product((True, False), ((True, True), (True, False), (False, True))):
        fused.train(training)
        twin.train(training)
        options = {**masks, "need_weights": need, "average_attn_weights": average}
        expected = results_and_gradients(fused, args, parameters, *args, **options)
        same(results_and_gradients(twin, args, parameters, *args, **options), expected)
        assert (twin(*args, **options)[1] is None) == (not need)
        with torch.no_grad():
            torch.manual_seed(1)
            expected = fused(*args, **options)
            torch.manual_seed(1)
            same(twin(*args, **options), expected)


def test_attention_keeps_the_attributes_and_reads_like_the_torch_module():
    fused = nn.MultiheadAttention(E, HEADS, dropout=0.1, batch_first=True)
    twin = UnfusedAttention(fused)
    for name in ("embed_dim", "num_heads", "head_dim", "batch_first", "dropout", "kdim", "vdim", "_qkv_same_embed_dim"):
        assert getattr(twin, name) == getattr(fused, name)
    assert twin.in_proj_bias is fused.in_proj_bias is twin.in_proj.bias
    assert twin.in_proj.weight is fused.in_proj_weight
    assert torch.equal(F.linear(normal(2, E), twin.in_proj_weight), F.linear(normal(2, E), fused.in_proj_weight))
    assert torch.equal(twin.in_proj_weight[:3].T, fused.in_proj_weight[:3].T)
    assert twin.in_proj_weight.shape == (3 * E, E)
    assert list(twin.state_dict()) == ["in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"]
    assert twin.q_proj_weight is None
    with pytest.raises(AttributeError, match="nonsense"):
        twin.nonsense  # noqa: B018
    with pytest.raises(AttributeError):
        copy.copy(twin.in_proj_weight).nonsense  # noqa: B018
    assert UnfusedAttention(nn.MultiheadAttention(E, HEADS, bias=False)).in_proj_bias is None
    separate = nn.MultiheadAttention(E, HEADS, kdim=5)
    twin = UnfusedAttention(separate)
    assert twin.in_proj_weight is None
    assert twin.in_proj_bias is separate.in_proj_bias
    assert twin.k_proj_weight is separate.k_proj_weight is twin.k_proj.weight
    assert twin.k_proj.bias is None


def test_attention_refuses_what_torch_refuses():
    fused, x = nn.MultiheadAttention(E, HEADS, batch_first=True), normal(2, 4, E)
    twin = UnfusedAttention(fused)
    nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
    with pytest.raises(ModelError, match="nested tensor"):
        twin(nested, nested, nested)
    for wrong, error in (
        ({"is_causal": True}, RuntimeError),
        ({"attn_mask": torch.zeros(3, 4)}, RuntimeError),
        ({"attn_mask": torch.zeros(2, 4, 4)}, RuntimeError),
        ({"attn_mask": torch.zeros(4)}, AssertionError),
        ({"attn_mask": torch.zeros(4, 4).long()}, AssertionError),
        ({"key_padding_mask": torch.zeros(3, 4)}, (RuntimeError, AssertionError)),
    ):
        for layer in (fused, twin):
            with pytest.raises(error):
                layer(x, x, x, **wrong)


@pytest.mark.parametrize("batch", ["first", "second", "none"])
@pytest.mark.parametrize("inputs", ["self", "key is value", "different"])
@pytest.mark.parametrize("kind", ["svd", "dense"])
def test_watched_attention_computes_the_same_in_one_call_of_the_projection(inputs, batch, kind):
    model = Wrapped(randomised(nn.MultiheadAttention(E, HEADS, batch_first=batch == "first")))
    args, _ = attention_arguments(inputs, batch, "no", (E, E))
    expected = model.layer(*args)
    unfuse_(model, ["layer"])
    if kind == "svd":
        apply_plan_(model, plan_for(model))
    same(model.layer(*args), expected)
    seen = []
    model.layer.in_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    same(model.layer(*args), expected)
    assert len(seen) == 1
    assert {id(x) for x in args} == {id(seen[0])} or seen[0].numel() == sum(x.numel() for x in dict.fromkeys(args))


def test_cross_attention_computes_only_the_thirds_it_needs():
    fused = nn.MultiheadAttention(E, HEADS)
    twin, query, key = UnfusedAttention(fused), normal(4, 1, E), normal(5, 1, E)

    def macs(layer):
        with FlopCounterMode(display=False) as flops:
            layer(query, key, key)
        return flops.get_total_flops() // 2

    attention = 2 * 4 * 5 * E
    assert macs(fused) == macs(twin) == E * E * (4 + 2 * 5 + 4) + attention
    model = Wrapped(twin)
    apply_plan_(model, plan_for(model, rank=2, chosen=lambda name: "in_proj" in name))
    assert macs(model.layer) == 2 * E * (4 + 5) + 2 * E * (4 + 2 * 5) + E * E * 4 + attention


def transformers():
    for first, norm_first in itertools.product((True, False), (True, False)):
        settings = {"batch_first": first, "norm_first": norm_first, "dropout": 0.1}
        yield "encoder", first, nn.TransformerEncoder, nn.TransformerEncoderLayer(16, 2, 32, **settings)
        yield "decoder", first, nn.TransformerDecoder, nn.TransformerDecoderLayer(16, 2, 32, **settings)
        yield "both", first, nn.Transformer, settings


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("what", "first", "make", "layer"), list(transformers()))
def test_torchs_transformers_run_on_unfused_attention(what, first, make, layer):
    model = make(16, 2, 2, 2, 32, **layer) if what == "both" else make(layer, 2)
    source, target = normal(3, 6, 16), normal(3, 5, 16, seed=1)
    padding = torch.arange(6) >= torch.tensor([6, 4, 3])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    sequences = [source if what == "encoder" else target] if what != "both" else [source, target]
    sequences += [source] if what == "decoder" else []
    sequences = [x if first else x.transpose(0, 1) for x in sequences]
    named = {"encoder": "src", "decoder": "memory", "both": "src"}[what] + "_key_padding_mask"
    masked = {named: padding, **({"memory_key_padding_mask": padding} if what == "both" else {})}
    attend = {"mask": torch.eye(6).bool().roll(1, 0)} if what == "encoder" else {"tgt_mask": causal, **masked}
    options = [{}, masked, attend]
    for kwargs, training, differentiable in itertools.product(options, (True, False), (True, False)):
        model.train(training)

        def run():
            torch.manual_seed(3)
            output = model(*sequences, **kwargs)  # noqa: B023
            output = output if first else output.transpose(0, 1)
            return output[~padding] if what == "encoder" and named in kwargs else output  # noqa: B023

        with torch.set_grad_enabled(differentiable):
            expected = run()
            with unfused(model):
                assert any(isinstance(m, UnfusedAttention) for m in model.modules())
                same(run(), expected)


def test_code_that_takes_the_fused_weight_gets_it_multiplied_out():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.other = nn.MultiheadAttention(E, HEADS), nn.MultiheadAttention(E, HEADS)

        def forward(self, x):
            return self.attention(x, x, x)[0] + F.linear(self.other(x, x, x)[0], self.other.in_proj_weight)[..., :E]

    model = ByHand()
    expected = model(normal(4, 1, E))
    with unfused(model):
        same(model(normal(4, 1, E)), expected)
    apply_plan_(model, plan_for(model))
    assert isinstance(model.other.in_proj, FactorisedLayer)
    same(model(normal(4, 1, E)), expected)


# --- recurrent layers


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


# --- unfusing and fusing


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
    same(copy.deepcopy(model["layer"]).double()(*[x.double() for x in args]), tree_doubled(expected))


def tree_doubled(values):
    return [v.double() for v in tree_leaves(values)]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_what_cannot_be_unfused_says_why(unchanged):
    class Mine(nn.LSTM):
        pass

    model = nn.ModuleDict(
        {
            "fine": nn.LSTM(2, 2),
            "subclass": Mine(2, 2),
            "patched": nn.MultiheadAttention(E, HEADS),
            "hooks": nn.GRU(2, 2),
            "normed": torch.nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),
            "tied": nn.RNN(2, 2),
            "twin": nn.RNN(2, 2),
            "pruned": nn.MultiheadAttention(E, HEADS),
            "parametrised": nn.GRU(2, 2),
        }
    )
    model["patched"].forward = lambda *args: args
    model["hooks"].register_state_dict_pre_hook(lambda *_: None)
    model["twin"].weight_hh_l0 = model["tied"].weight_hh_l0
    torch.nn.utils.prune.l1_unstructured(model["pruned"].out_proj, "weight", 0.5)
    torch.nn.utils.parametrize.register_parametrization(model["parametrised"], "weight_hh_l0", nn.Identity())
    reasons = unfusable(model)
    expected = {
        "subclass": "subclass",
        "patched": "forward method was replaced",
        "hooks": "state-dict hooks",
        "normed": "computed from other parameters",
        "tied": "tied to another",
        "twin": "tied to another",
        "pruned": "computed from other parameters",
        "parametrised": "subclass",
    }
    assert reasons["fine"] is None
    assert all(text in reasons[name] for name, text in expected.items())
    assert "the model itself" in unfusable(nn.GRU(2, 2))[""]
    before = unchanged(model)
    with unfused(model):
        layers = {layer.name: layer for layer in list_layers(model)}
        assert isinstance(model["fine"], UnfusedRecurrent)
        assert [name for name in expected if isinstance(model[name], (UnfusedAttention, UnfusedRecurrent))] == []
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


# --- the machinery


@pytest.mark.parametrize("objective", [pytest.param("weight", marks=SLOW), "end_to_end"])
@pytest.mark.parametrize("name", MODELS)
def test_search_and_swap_meet_the_budget_and_leave_the_rest_alone(name, objective, unchanged):
    model, x = MODELS[name](), normal(4, 6, 12)
    before, example = unchanged(model), (1, 6, 12)
    plan = search_ranks(model, Budget(params=0.5), example_input=example, objective=objective)
    before.check()
    assert plan.objective == objective
    parts = {"encoder": ("self_attn.in_proj", "self_attn.out_proj"), "LSTM": ("rnn.ih_l1", "rnn.hh_l0_reverse")}[name]
    assert all(any(part in planned.name for planned in plan.factorised) for part in parts)
    apply_plan_(model, plan)
    assert bool(torch.isfinite(model(x)).all())
    assert measure_costs(model, example) == plan.compressed
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * plan.dense.params
    assert embodied_plan(model, example).dense == plan.dense
    apply_plan_(model, plan)  # already so


def test_macs_of_dense_models_count_what_torch_hides_in_fused_kernels():
    steps, gates = 6, 4 * 16
    expected = steps * 2 * gates * (12 + 16 + 32 + 16) + 32 * 5
    assert measure_costs(Sequences(), (1, steps, 12)).macs == expected
    layer = steps * (16 * 16 * 4 + 2 * 16 * 32)  # the products of queries and keys are a fused kernel on either side
    assert measure_costs(Encoder(), (1, steps, 12)).macs == steps * 12 * 16 + 2 * layer + 16 * 5 + extra_of_attention(
        steps
    )


def extra_of_attention(steps):
    """MACs that torch's flop counter sees in its attention kernel on this machine, for both layers of `Encoder`."""
    q = normal(1, 2, steps, 8)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    return 2 * (flops.get_total_flops() // 2)


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_dense_and_uninstalling_undoes_the_unfusing(name, unchanged):
    model, x = MODELS[name]().eval(), normal(4, 6, 12)
    before, expected = unchanged(model), model(x)
    replacements = apply_plan_(model, plan_for(model))
    assert all(r.unfusing is not None for r in replacements if "head" not in r.aliases[0] and "_" in r.aliases[0])
    assert torch.linalg.norm(model(x) - expected) < 1e-4 * torch.linalg.norm(expected)
    uninstall(model, replacements)
    before.check()
    assert torch.equal(model(x), expected)
    install(model, replacements)
    assert torch.linalg.norm(model(x) - expected) < 1e-4 * torch.linalg.norm(expected)
    uninstall(model, replacements)
    before.check()


def test_only_layers_with_a_factorised_projection_are_unfused():
    model = Encoder()
    apply_plan_(model, plan_for(model, 2, chosen=lambda name: name == "encoder.layers.1.self_attn.out_proj"))
    kinds = [type(layer.self_attn) for layer in model.encoder.layers]
    assert kinds == [nn.MultiheadAttention, UnfusedAttention]
    assert type(model.encoder.layers[1].self_attn.in_proj) is nn.Linear


@pytest.mark.parametrize("apply", [apply_plan_, apply_shells_])
def test_a_plan_that_does_not_fit_leaves_everything_fused(apply, unchanged):
    model = Sequences()
    before, plan = unchanged(model), plan_for(model)
    wrong = Plan((*plan.layers, LayerPlan("nowhere", "Linear", "svd", (1,), (2, 2), 0.0, 1, 1)), plan.dense, plan.dense)
    with pytest.raises(PlanMismatchError, match="'nowhere' is not in the model"):
        apply(model, wrong)
    before.check()


def test_projections_are_chosen_by_the_names_and_types_of_their_whole():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, HEADS), "rnn": nn.LSTM(4, 5), "head": nn.Linear(5, 5)})
    with unfused(model):

        def left(**selection):
            return {layer.name for layer in take_inventory(model, **selection) if layer.reason is None}

        projections = {"attention.in_proj", "attention.out_proj"}
        assert left(exclude="rnn") == projections | {"head"}
        assert left(exclude=["nn.LSTM", "head"]) == projections
        assert left(include=nn.MultiheadAttention) == left(include="att*on") == projections
        assert left(include="*.in_proj") == {"attention.in_proj"}
        assert left(overrides={nn.RNNBase: "dense", "head": "dense"}) == projections
    plan = search_ranks(model, Budget(params=0.9), exclude="attention", objective="weight")
    assert all(not p.name.startswith("attention") for p in plan.factorised)


def test_biases_of_an_unfused_layer_have_a_reason():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, HEADS, kdim=5), "more": nn.Linear(9, 9)})
    with unfused(model):
        layers = {layer.name: layer for layer in take_inventory(model)}
    assert "layers of their own" in layers["attention"].reason
    assert layers["attention"].parameters == 3 * E
    assert sum(layer.parameters for layer in layers.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compressing_heals_saves_and_loads(name, tmp_path, unchanged):
    model, x = MODELS[name]().eval(), normal(4, 6, 12)
    dense = copy.deepcopy(model)
    compress_(model, Budget(params=0.4), example_input=(1, 6, 12))
    save_compressed(model, tmp_path)
    fresh = MODELS[name]().eval()
    load_compressed(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in model.named_parameters()]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    before = unchanged(dense)
    other = copy.deepcopy(dense)
    statistics = gather_statistics(dense, (1, 6, 12))
    replacements = apply_plan_(other, plan_for(other, rank=3), statistics=statistics)
    healing = heal_(dense, other, replacements, statistics, steps=40)
    assert healing.skipped is None
    assert healing.after < healing.before
    before.check()


def test_callback_trains_the_factors_and_restores_from_its_checkpoint(make_trainer, tmp_path):
    x, y = normal(16, 6, 12), torch.arange(16) % 5
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    model = Sequences()
    trainer = make_trainer(Compress(Budget(params=0.5), **WEIGHTS_ALONE), max_epochs=2)
    trainer.fit(model, loader)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert isinstance(model.rnn, UnfusedRecurrent)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Sequences()
    resumed = make_trainer(Compress(Budget(params=0.5), **WEIGHTS_ALONE), max_epochs=3)
    resumed.fit(fresh, loader, ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(fresh.rnn, UnfusedRecurrent)
    tested = Sequences()
    make_trainer(Compress(Budget(params=0.5), **WEIGHTS_ALONE)).test(tested, loader, ckpt_path=tmp_path / "last.ckpt")
    same(tested.eval()(x), model.eval()(x))


# --- export


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", ["trace", "export", pytest.param("strict export", marks=SLOW), "compile"])
@pytest.mark.parametrize("rank", [pytest.param(None, marks=SLOW), 2])
@pytest.mark.parametrize("kind", ["attention", "LSTM", pytest.param("GRU", marks=SLOW)])
def test_tracing_exporting_and_compiling(kind, rank, way):
    layers = {
        "attention": lambda: nn.MultiheadAttention(E, HEADS, batch_first=True),
        "LSTM": lambda: nn.LSTM(E, E, 2, batch_first=True, bidirectional=True),
        "GRU": lambda: nn.GRU(E, E),
    }
    model, x = Wrapped(layers[kind]()).eval(), normal(3, 6, E)
    if rank is None:
        unfuse_(model, ["layer"])
    else:
        apply_plan_(model, plan_for(model, rank))
    expected = model(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = {
            "trace": lambda: torch.jit.trace(model, (x,)),
            "export": lambda: torch.export.export(model, (x,)).module(),
            "strict export": lambda: torch.export.export(model, (x,), strict=True).module(),
            "compile": lambda: torch.compile(model, backend="eager", fullgraph=True),
        }[way]()
        same(other(x), expected)


@pytest.mark.parametrize("mask_check", [pytest.param(True, marks=SLOW), False])
def test_compiled_encoder_steps_aside_from_torchs_fast_path(mask_check):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1, mask_check=mask_check).eval(), normal(3, 6, 16)
    padding = torch.arange(6) >= torch.tensor([6, 4, 3])[:, None]
    unfuse_(model, ["layers.0.self_attn"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        same(compiled(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))


def test_half_precision_autocast_and_meta():
    for layer in (nn.MultiheadAttention(E, HEADS), nn.LSTM(E, E, bidirectional=True)):
        model, x = Wrapped(layer).eval(), normal(6, 3, E)
        apply_plan_(model, plan_for(model, rank=3))
        expected = model(x)
        same(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected, atol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            same(model(x).float(), expected, atol=0.05)
        assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == expected.shape


def test_unchanged_checks_something():
    model = nested()
    before = Unchanged(model)
    unfuse_(model, ["again"])
    with pytest.raises(AssertionError):
        before.check()

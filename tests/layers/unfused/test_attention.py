"""Unfused attention: the same function as torch's, as projections that can be factorised."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import FactorisedLayer, apply_plan_
from lightning_compress.core.errors import ModelError
from lightning_compress.layers.unfused import UnfusedAttention, unfuse_, unfused
from tests.support.unfusing import HEADS, E, Wrapped, normal, plan_for, randomised, results_and_gradients, same


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

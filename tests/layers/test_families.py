"""Every layer type as one operator: its rows, its layout, and its factors for every geometry."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, FactorisedLayer, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.trace import trace
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.families import canonical, family_of, known_types, layer_type, operator_of, own_layout
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.geometries import geometries, images
from tests.support.zoo import LAYERS, factorised, fitting, full_ranks, kinds_for, normal, randomised, with_weight

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
ITERATIVE = ("cp", "cp3")  # fitted by sweeps that stop at a relative error of 1e-7; their predictions are bounds
SWEEP = [pytest.mark.slow, pytest.mark.sweep]


def applied(layer, x):
    """What the family says the layer does: canonical weight times rows, by group, plus the bias."""
    operator, weight = operator_of(layer), canonical(layer, layer.weight).detach()
    rows = family_of(layer).rows(layer, x)
    blocks = weight.reshape(operator.groups, -1, weight[0].numel())
    assert blocks.shape[1:] == (operator.shape[0], np.prod(operator.shape[1:]))
    found = torch.einsum("god,gnd->ngo", blocks, rows).flatten(1)
    return found if layer.bias is None else found + layer.bias.detach()


# --- rows and layouts


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weight_times_rows_is_the_output_for_every_geometry(dims):
    seen = 0
    x = images(dims)
    for layer in geometries(dims, {1: 5, 2: 11, 3: 13}[dims]):
        for inputs in (x, x[0]):  # without a batch dimension too
            output = layer(inputs).detach()
            torch.testing.assert_close(applied(layer, inputs), family_of(layer).output_rows(layer, output), **TIGHT)
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_last_inputs_give_the_same_rows(cls):
    layer, x = randomised(cls(8, 12, 3, 2, 1, groups=2)), images(2)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    got = family_of(other).rows(other, x.to(memory_format=torch.channels_last))
    assert torch.equal(got, family_of(layer).rows(layer, x))
    assert torch.equal(canonical(other, other.weight), canonical(layer, layer.weight))


@pytest.mark.parametrize("name", ["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_rows_of_linear_layers(name, shape):
    layer, x = LAYERS[name].layer(), normal(*shape, seed=3)
    if shape == (8,) and name == "Conv1D":  # addmm wants rows
        x = x[None]
    output = layer(x).detach()
    torch.testing.assert_close(applied(layer, x), family_of(layer).output_rows(layer, output), **TIGHT)
    assert family_of(layer).call(layer, x, output).rows == output.numel() // 6


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_lookups_have_no_rows(name):
    layer, arguments = LAYERS[name].layer(), LAYERS[name].call()
    assert family_of(layer).rows(layer, arguments[0]) is None
    assert operator_of(layer).lookup
    call = family_of(layer).call(layer, arguments[0], layer(*arguments))
    assert (call.positions, call.rows) == (0, {"Embedding": 10, "EmbeddingBag": 3}[name])


@pytest.mark.parametrize("name", LAYERS)
def test_layouts_are_inverse_of_each_other(name):
    layer = LAYERS[name].layer()
    weight, operator = layer.weight.detach(), operator_of(layer)
    whole = canonical(layer, weight)
    assert whole.shape == (operator.groups * operator.shape[0], *operator.shape[1:])
    assert torch.equal(own_layout(layer, whole), weight)
    other = normal(*whole.shape, seed=5)
    assert torch.equal(canonical(layer, own_layout(layer, other)), other)


def test_canonical_form_has_outputs_first_and_inputs_second():
    embedding, conv1d = LAYERS["Embedding"].layer(), LAYERS["Conv1D"].layer()
    assert canonical(embedding, embedding.weight)[4, 7] == embedding.weight[7, 4]
    assert canonical(conv1d, conv1d.weight)[4, 7] == conv1d.weight[7, 4]
    conv = randomised(nn.ConvTranspose2d(8, 12, (3, 2), groups=2))  # own: (in, out / groups, 3, 2)
    whole = canonical(conv, conv.weight)
    for group, out, in_ in itertools.product(range(2), range(6), range(4)):
        assert torch.equal(whole[group * 6 + out, in_], conv.weight[group * 4 + in_, out])


def test_known_types_are_exact():
    for name, example in LAYERS.items():
        assert layer_type(example.make()) is not None
        assert name.split()[0] in known_types() or name == "Conv1D"

    class Own(nn.Conv1d):
        def forward(self, x):
            return super().forward(x) + 1

    assert layer_type(Own(8, 8, 3)) is None


def test_depthwise_convolution_says_why_it_stays_dense():
    layer, _ = take_inventory(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 8)))
    assert layer.reason == "depthwise convolution (groups=8): one channel per group has no low rank"


# --- the factorised layer


def check_factorised(layer, kind, arguments):
    """At low ranks it computes what the dense layer with the product of its factors does, at full ones the original."""
    low, full = factorised(layer, kind), factorised(layer, kind, full_ranks(layer, kind))
    assert low.weight.shape == layer.weight.shape
    torch.testing.assert_close(low(*arguments), with_weight(layer, low.dense_weight())(*arguments), **TIGHT)
    largest = 1e-6 if kind in ITERATIVE else 1e-9
    for got, wanted in ((full(*arguments), layer(*arguments)), (full.dense_weight(), layer.weight)):
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < largest


@pytest.mark.parametrize(("name", "kind"), fitting())
def test_factors_compute_what_the_dense_layer_with_their_product_does(name, kind):
    check_factorised(LAYERS[name].layer(), kind, LAYERS[name].call())


@pytest.mark.parametrize(
    ("dims", "every"),
    [
        *((1, 29), (2, 41), (3, 71), pytest.param(2, 7, marks=pytest.mark.slow)),
        *(pytest.param(*case, marks=SWEEP) for case in ((1, 1), (2, 1), (3, 5))),
    ],
)
def test_geometries_are_passed_on_to_the_factors(dims, every):
    layers = list(geometries(dims, every))
    assert len(layers) >= 9
    for index, layer in enumerate(layers):
        kinds = kinds_for(layer)
        check_factorised(layer, kinds[index % len(kinds)], (images(dims)[0] if index % 3 else images(dims),))


# --- lookups


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_arguments_of_a_bag_reach_its_lookup(mode, last):
    layer = randomised(nn.EmbeddingBag(12, 6, mode=mode, include_last_offset=last, padding_idx=3))
    new = factorised(layer, "svd", (6,))
    indices, offsets = torch.tensor([3, 0, 7, 7, 2, 1, 8]), torch.tensor([0, 3, 5, 7] if last else [0, 3, 5])
    for args, kwargs in (((indices, offsets), {}), ((indices,), {"offsets": offsets}), ((indices[:6].view(2, 3),), {})):
        if args[0].ndim == 2 and last:
            continue
        torch.testing.assert_close(new(*args, **kwargs), layer(*args, **kwargs), **TIGHT)
    if mode == "sum":
        weights = normal(7, seed=4)
        settings = {"offsets": offsets, "per_sample_weights": weights}
        torch.testing.assert_close(new(indices, **settings), layer(indices, **settings), **TIGHT)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_row_of_the_padding_index_stays_zero_and_untrained(name):
    layer = LAYERS[name].layer()
    new = factorised(layer, "svd")
    assert new.reduce.padding_idx == new.padding_idx == 0
    torch.testing.assert_close(new.weight[0], torch.zeros(6, dtype=torch.float64), rtol=0, atol=0)
    new(*LAYERS[name].call()).square().sum().backward()
    assert not new.reduce.weight.grad[0].any()
    assert new.reduce.weight.grad[7].any()


# --- costs


@pytest.mark.parametrize(("name", "kind"), [p for p in fitting() if p.values[0].startswith(("Conv1D", "EmbeddingBag"))])
def test_costs_are_those_of_the_built_layer(name, kind):
    layer, arguments = LAYERS[name].layer(), LAYERS[name].call()
    call, operator = family_of(layer).call(layer, arguments[0], layer(*arguments)), operator_of(layer)
    new = factorised(layer, kind)
    parameters = DECOMPOSITIONS[kind].parameters(operator.shape, np.array([new.ranks]))
    macs = DECOMPOSITIONS[kind].macs(operator.shape, np.array([new.ranks]), call)
    assert parameters[0] == sum(factor.numel() for factor in new.factors().values())
    with FlopCounterMode(display=False) as counter:
        new(*arguments)
    assert macs[0] * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in LAYERS if "Bag" not in name])
def test_plan_read_off_the_model_has_the_costs_of_both(name):
    model, arguments = nn.Sequential(LAYERS[name].layer()), LAYERS[name].call()
    before = trace(model, arguments).macs
    plan = search_ranks(model, Budget(params=0.9), example_input=arguments, objective="weight", method="exact")
    apply_plan_(model, plan)
    read = embodied_plan(model, arguments)
    assert read.dense == plan.dense
    assert read.compressed == plan.compressed == measure_costs(model, arguments)
    assert read.dense.macs == before
    assert read.factorised[0].macs_before == plan.factorised[0].macs_before == before


# --- transposed convolutions that are told their output's size


class Upsampling(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1)
        self.settings = settings

    def forward(self, x):
        return self.up(self.down(x), **{name: x.shape[2:] if value else None for name, value in self.settings.items()})


def test_call_with_an_output_size_keeps_the_layer_dense():
    told, plain = Upsampling(output_size=True), Upsampling(output_size=False)
    reasons = {layer.name: layer.reason for layer in take_inventory(told, trace=trace(told, (1, 3, 8, 8)))}
    assert reasons == {
        "down": None,
        "up": "it is called with output_size=torch.Size([8, 8]), which its factors would not know",
    }
    plan = compress_(told, Budget(params=0.8), example_input=(1, 3, 8, 8), **WEIGHTS_ALONE)
    assert [p.name for p in plan.factorised] == ["down"]
    assert told(torch.randn(1, 3, 8, 8)).shape == (1, 8, 8, 8)
    assert not any(layer.reason for layer in take_inventory(plain, trace=trace(plain, (1, 3, 8, 8))))


def test_factors_called_with_an_output_size_say_so():
    told = Upsampling(output_size=True)
    compress_(told, Budget(params=0.5), **WEIGHTS_ALONE)
    assert isinstance(told.up, FactorisedLayer)
    message = r"ConvTranspose2d cannot be called with output_size=torch.Size\(\[8, 8\]\)"
    with pytest.raises(UnsupportedError, match=message):
        told(torch.randn(1, 3, 8, 8))
    told.settings = {"output_size": False}
    assert told(torch.randn(1, 3, 8, 8)).shape == (1, 8, 7, 7)


def test_second_plan_leaves_all_factorised_classes_alone():
    bag, up, head = nn.EmbeddingBag(40, 16), nn.ConvTranspose1d(16, 16, 4), nn.Linear(16, 16)
    net = nn.ModuleDict({"bag": bag, "up": up, "head": head})
    apply_plan_(
        net, search_ranks(net, Budget(params=0.7), include=["bag", "up"], kinds=["svd", "channel_svd"], method="exact")
    )
    assert [layer.type for layer in take_inventory(net)] == ["FactorisedLayer", "FactorisedLayer", "Linear"]
    apply_plan_(net, search_ranks(net, Budget(params=0.9), method="exact"))
    assert all(isinstance(module, FactorisedLayer) for module in net.values())

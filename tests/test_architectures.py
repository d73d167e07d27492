"""Small networks in the style of what people bring, and, slow, a dozen of the real ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from benchmarks.architectures import run
from benchmarks.zoo import Entry
from lightning_compress import Budget, FactorisedLayer, LayerPlan, Plan, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.trace import trace
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ModelError
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.unfused import unfused
from tests.support.architectures import CASES, drawn, image


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may hide behind a bias or a branch of zero
            if not bool(parameter.any()):
                parameter.normal_(0, 0.1)
    return model.double() if dtype == torch.float64 else model, converted(case.example, dtype)


def converted(example, dtype):
    leaves, spec = tree_flatten(example)
    return spec.unflatten([x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in leaves])


def called(model, example):
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def outputs(model, example):
    with torch.no_grad():
        return called(model, example)


def structure(value):
    leaves, spec = tree_flatten(value)
    return spec, [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]


def floats(value):
    return [x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]


def count(model):
    return sum(math.prod(p.shape) for p in {id(p): p for p in model.parameters()}.values())


def open_layers(model, example):
    with unfused(model):
        layers = take_inventory(model, trace=trace(model, example))
    return {layer.name: layer for layer in layers if layer.reason is None}, {
        layer.name: layer.reason for layer in layers if layer.reason is not None
    }


def full_rank_plan(model, example):
    planned = []
    for index, layer in enumerate(open_layers(model, example)[0].values()):
        kind, size = layer.kinds[index % len(layer.kinds)], layer.parameters
        ranks = DECOMPOSITIONS[kind].max_ranks(layer.operator.shape)
        planned.append(LayerPlan(layer.name, layer.type, kind, ranks, layer.weight_shape, 0.0, size, size))
    costs = Costs(params=count(model), macs=None, bytes=0)
    return Plan(tuple(planned), costs, costs)


@pytest.mark.parametrize("name", CASES)
def test_the_layers_that_hold_the_weight_are_open_to_the_search(name):
    layers, left = open_layers(*build(name))
    assert set(CASES[name].open.split()) <= set(layers)
    assert set(CASES[name].dense.split()) <= set(left)


def require_half(name, compress):
    """Half the parameters are kept, in a model of which one layer is frozen, with outputs of the same structure."""
    model, example = build(name)
    frozen = sorted(CASES[name].open.split())[0]
    model.get_submodule(frozen).requires_grad_(requires_grad=False)
    dense, before = outputs(model, example), count(model)
    plan = compress(model, example)
    assert count(model) <= 0.5 * before
    assert measure_costs(model, example) == plan.compressed
    assert plan.factorised
    small = outputs(model, example)
    assert structure(small) == structure(dense)
    assert all(bool(torch.isfinite(x).all()) for x in floats(small))
    for layer in model.modules():
        if isinstance(layer, FactorisedLayer) and layer.operator.lookup and layer.padding_idx is not None:
            assert not layer.weight[layer.padding_idx].any()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (not key.startswith(f"{frozen}."))
    return plan


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_half_the_parameters_are_kept_and_the_outputs_have_the_same_structure(name):
    def compress(model, example):
        plan = search_ranks(model, Budget(params=0.5), example_input=example, method="exact", objective="weight")
        apply_plan_(model, plan)
        return plan

    assert require_half(name, compress).objective == "weight"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audio", "video", "resnext", "u-net", "bag", "gpt"])
def test_whole_network_is_compressed_and_healed(name):
    def compress(model, example):
        return compress_(model, Budget(params=0.5), example_input=example)

    assert require_half(name, compress).objective == "moments"


@pytest.mark.parametrize("name", CASES)
def test_every_layer_at_full_rank_gives_the_dense_outputs(name):
    model, example = build(name, torch.float64)
    dense, twin = outputs(model, example), copy.deepcopy(model)
    plan = full_rank_plan(model, example)
    replaced = apply_plan_(twin, plan)
    assert len(replaced) >= len(plan.layers)
    for new, old in zip(floats(outputs(twin, example)), floats(dense), strict=True):
        assert float((new - old).norm()) <= 1e-6 * float(old.norm())  # CP is fitted by iteration, the rest to 1e-15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobile net", "tied language model", "detector"])
def test_the_gradient_reaches_every_factor(name):
    model, example = build(name)
    compress_(model, Budget(params=0.6), example_input=example, method="exact", objective="weight", heal=False)
    sum(x.square().sum() for x in floats(called(model, example))).backward()
    factors = [p for m in model.modules() if isinstance(m, FactorisedLayer) for p in m.factors().values()]
    assert factors
    assert all(p.grad is not None and bool(p.grad.any()) for p in factors)


def test_an_expert_that_no_token_reaches_stays_dense():
    model, _ = build("experts")
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.weight[:2] = drawn(2, 24).abs()
    example = (drawn(1, 12, 24).abs(),)
    plan = search_ranks(model, Budget(params=0.8), example_input=example, method="exact", objective="weight")
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["experts.3.up"] == "it is not called in the forward pass on the example input"


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.LazyConv2d(16, 3), nn.LazyLinear(32), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(F.relu(self.fc(F.relu(self.conv(x)).flatten(1))))


def test_a_lazy_network_says_that_it_has_no_shapes_yet_and_works_once_it_has():
    model = Lazy().eval()
    with pytest.raises(ModelError, match="no shape yet"):
        search_ranks(model, Budget(params=0.5), example_input=image(8))
    model(image(8))
    before = count(model)
    apply_plan_(
        model, search_ranks(model, Budget(params=0.5), example_input=image(8), method="exact", objective="weight")
    )
    assert count(model) <= before // 2


LARGE = [
    ("torchvision", "squeezenet1_1", "classification"),
    ("torchvision", "mobilenet_v3_small", "classification"),
    ("torchvision", "lraspp_mobilenet_v3_large", "segmentation"),
    ("torchvision", "ssdlite320_mobilenet_v3_large", "detection"),
    ("torchvision", "raft_small", "optical_flow"),
    ("timm", "efficientvit_m0", "efficientvit_msra"),
    ("timm", "gmlp_ti16_224", "mlp_mixer"),
    ("timm", "xcit_nano_12_p8_224", "xcit"),
    ("transformers", "bert", "bert"),
    ("transformers", "gpt2", "gpt2"),
    ("transformers", "mamba", "mamba"),
    ("transformers", "mixtral", "mixtral"),
    ("transformers", "whisper", "whisper"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "family"), LARGE)
def test_networks_of_the_libraries_pass_every_check_of_the_benchmark(library, name, family):
    pytest.importorskip(library)
    assert run(Entry(library, name, family))["status"] == "ok"

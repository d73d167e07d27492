"""Small networks in the style of what people bring, and, slow, a dozen of the real ones."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from benchmarks.architectures import run
from benchmarks.zoo import Entry
from lightning_compress import Budget, FactorisedLayer, LayerPlan, Plan, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.trace import trace
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ModelError
from lightning_compress.kinds.registry import DECOMPOSITIONS
from lightning_compress.layers.unfused import unfused


class Encoder(nn.Module):
    """Tokens, positions, nn.TransformerEncoder, first token."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(40, 24)
        self.positions = nn.Parameter(torch.randn(1, 9, 24) * 0.1)
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.encoder(self.tokens(x) + self.positions)[:, 0])


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Patches, a class token outside any module, pre-norm blocks with a layer scale."""

    def __init__(self, width=32, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attention = nn.ModuleList(Attention(width, 4) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, width)) for _ in range(depth)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width)) for _ in range(depth))
        self.head = nn.Linear(width, 7)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], dim=1)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            x = x + self.scales[i] * attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


class ClassAttention(nn.Module):
    """A view of a parameter is handed to a submodule, as CaiT hands over its class token."""

    def __init__(self):
        super().__init__()
        self.inner, self.cls = Attention(24, 4), nn.Parameter(torch.randn(1, 1, 24))
        self.read = nn.MultiheadAttention(24, 4, kdim=12, vdim=12, batch_first=True)
        self.wide, self.head = nn.Linear(12, 48), nn.Linear(48, 12)

    def forward(self, x):
        x = x + self.head(F.gelu(self.wide(x)))
        return self.inner(self.read(self.cls.expand(len(x), -1, -1), x, x)[0])


class SqueezeExcite(nn.Module):
    def __init__(self, width, squeezed):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNet's and EfficientNet's block: 1x1 up, depthwise, squeeze and excite, 1x1 down."""

    def __init__(self, width, factor=4):
        super().__init__()
        inner = factor * width
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            SqueezeExcite(inner, 8),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return x + self.body(x)


def mobile_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        InvertedResidual(16),
        InvertedResidual(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class ResNeXt(nn.Module):
    """A bottleneck with a grouped convolution, and a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.reduce, self.grouped = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, 2, 1, groups=4)
        self.expand, self.shortcut = nn.Conv2d(64, 96, 1), nn.Conv2d(32, 96, 1, 2)
        self.fc = nn.Linear(96, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))
        return self.fc(F.relu(y + self.shortcut(x)).mean((2, 3)))


class UNet(nn.Module):
    """Down, up by transposed convolution and by interpolation, skips by concatenation."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 48, 3, 2, 1)]
        )
        self.up = nn.ConvTranspose2d(48, 32, 2, 2)
        self.fuse = nn.ModuleDict({"fine": nn.Conv2d(48, 16, 3, padding=1), "coarse": nn.Conv2d(64, 32, 3, padding=1)})
        self.norm, self.out = nn.GroupNorm(4, 32), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        a = F.relu(self.down[0](x))
        b = F.relu(self.down[1](a))
        c = self.up(F.relu(self.down[2](b)))
        d = F.relu(self.norm(self.fuse["coarse"](torch.cat([b, c], 1))))
        d = F.interpolate(d, scale_factor=2.0)
        return self.out(F.relu(self.fuse["fine"](torch.cat([a, d], 1))))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.tokens = nn.Embedding(50, 32, padding_idx=0)
        self.rnn = kind(32, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(48, 3)

    def forward(self, x):
        return self.fc(self.rnn(self.tokens(x))[0].mean(1))


class Audio(nn.Module):
    """Strided and dilated Conv1d, weight_norm, a transposed convolution back to samples."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(1, 24, 10, 5, 4)
        self.body = nn.ModuleList(nn.Conv1d(24, 24, 3, padding="same", dilation=2**i) for i in range(3))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(24, 24, 3, padding=1))
        self.back = nn.ConvTranspose1d(24, 1, 10, 5, 4, output_padding=3)

    def forward(self, x):
        x = F.gelu(self.front(x))
        for layer in self.body:
            x = x + F.gelu(layer(x))
        return self.back(self.normed(x))


def video_net():
    return nn.Sequential(
        nn.Conv3d(3, 16, 3, (1, 2, 2), 1),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 32, (1, 3, 3), padding=(0, 1, 1)),
        nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0)),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(32, 6),
    )


class Experts(nn.Module):
    """A mixture of experts: each token goes to the best two of a ModuleList, so not all are always called."""

    def __init__(self, width=24, count=4):
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(width, 48), "up": nn.Linear(width, 48), "down": nn.Linear(48, width)})
            for _ in range(count)
        )

    def forward(self, tokens):
        x = tokens.flatten(0, 1)
        share, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if len(rows):
                y = expert["down"](F.silu(expert["gate"](x[rows])) * expert["up"](x[rows]))
                out = out.index_add(0, rows, y * share[rows, slots, None])
        return out.view_as(tokens)


class LanguageModel(nn.Module):
    """The output layer has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.body = nn.Embedding(60, 20), nn.Sequential(nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 20))
        self.head = nn.Linear(20, 60, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids, mask=None):
        x = self.tokens(input_ids)
        x = x + self.body(x)
        return {"logits": self.head(x), "hidden": (x, [x.mean(1)])}


class Detector(nn.Module):
    """A list of images to a dict per image; one head shared by two levels."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 4 * 3, 3, padding=1))
        self.classes = nn.Conv2d(24, 3 * 5, 3, padding=1)

    def forward(self, images):
        found = []
        for image in images:
            fine = F.relu(self.stem(image[None]))
            levels = [fine, F.relu(self.deep(fine))]
            boxes = torch.cat([self.head(level).flatten(2) for level in levels], -1)
            scores = torch.cat([self.classes(level).flatten(2) for level in levels], -1)
            found.append({"boxes": boxes[0], "scores": scores[0].softmax(0), "labels": scores[0].argmax(0)})
        return found


class Loose(nn.Module):
    """Parameters and buffers outside layers, a ParameterList of matrices, complex weights, a reused module."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(16, 16) * 0.1) for _ in range(2)])
        self.spectrum = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.register_buffer("shift", torch.randn(16))
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def forward(self, x):
        for _ in range(int(self.steps)):
            x = torch.tanh(self.shared(x))
        x = self.again(x) @ self.matrices[0] + self.shift @ self.matrices[1]
        x = torch.fft.irfft(torch.fft.rfft(x) * self.spectrum.to(torch.promote_types(x.dtype, torch.complex64)), n=16)
        return ((x, self.narrow(F.relu(self.wide(x)))), [{"nested": (x.sum(), None, "text")}])


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.LazyConv2d(16, 3), nn.LazyLinear(32), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(F.relu(self.fc(F.relu(self.conv(x)).flatten(1))))


class Case(NamedTuple):
    """A network, what it is called with, layers that can be factorised, others that cannot, the fraction kept."""

    make: Any
    example: Any
    open: str
    dense: str = ""
    keep: float = 0.5


def image(size=32):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


def ids(high, length=9):
    return torch.randint(1, high, (1, length), generator=torch.Generator().manual_seed(4))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


CASES = {
    "transformer encoder": Case(
        Encoder, ids(40), "tokens encoder.layers.0.linear1 encoder.layers.1.linear2 encoder.layers.0.self_attn.out_proj"
    ),
    "vision transformer": Case(ViT, image(), "patches attention.0.qkv attention.1.proj mlps.0.0 mlps.1.3 head"),
    "class attention": Case(ClassAttention, drawn(1, 9, 12), "inner.qkv wide head"),
    "mobile net": Case(
        mobile_net, image(), "0 2.body.0 2.body.6 2.body.5.reduce 3.body.5.expand 6", "2.body.3 3.body.3"
    ),
    "resnext": Case(ResNeXt, image(16), "stem reduce grouped expand shortcut fc"),
    "u-net": Case(UNet, image(16), "down.0 down.1 down.2 up fuse.fine fuse.coarse out"),
    "lstm": Case(Recurrent, ids(50), "tokens fc"),
    "gru": Case(lambda: Recurrent(nn.GRU), ids(50), "tokens fc"),
    "audio": Case(Audio, drawn(1, 1, 200), "front body.0 body.1 body.2 back", "normed"),
    "video": Case(video_net, drawn(1, 3, 4, 16, 16), "0 3 4 7"),
    "experts": Case(Experts, (drawn(1, 64, 24),), "router experts.0.gate experts.3.down"),
    "tied language model": Case(LanguageModel, {"input_ids": ids(60), "mask": None}, "tokens body.0 body.2"),
    "detector": Case(Detector, ([drawn(3, 24, 32)],), "stem deep head.0 head.2 classes"),
    "loose parameters": Case(Loose, drawn(2, 16), "shared wide narrow"),
}


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


def outputs(model, example):
    with torch.no_grad():
        if isinstance(example, dict):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


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
    layers, _ = open_layers(model, example)
    plans = [
        LayerPlan(
            layer.name,
            layer.type,
            kind := layer.kinds[index % len(layer.kinds)],
            DECOMPOSITIONS[kind].max_ranks(layer.operator.shape),
            layer.weight_shape,
            0.0,
            layer.parameters,
            layer.parameters,
        )
        for index, layer in enumerate(layers.values())
    ]
    costs = Costs(params=count(model), macs=None, bytes=0)
    return Plan(tuple(plans), costs, costs)


@pytest.mark.parametrize("name", CASES)
def test_the_layers_that_hold_the_weight_are_open_to_the_search(name):
    layers, left = open_layers(*build(name))
    assert set(CASES[name].open.split()) <= set(layers)
    assert set(CASES[name].dense.split()) <= set(left) | {n.removesuffix(".parametrizations.weight") for n in left}


@pytest.mark.parametrize("name", CASES)
def test_half_the_parameters_are_kept_and_the_outputs_have_the_same_structure(name):
    model, example = build(name)
    dense, before = outputs(model, example), count(model)
    keep = CASES[name].keep
    plan = search_ranks(model, Budget(params=keep), example_input=example, method="exact", objective="weight")
    apply_plan_(model, plan)
    assert count(model) <= keep * before
    assert count(model) == plan.compressed.params
    assert any(isinstance(m, FactorisedLayer) for m in model.modules())
    small = outputs(model, example)
    assert structure(small)[0] == structure(dense)[0]
    assert structure(small)[1] == structure(dense)[1]
    assert all(bool(torch.isfinite(x).all()) for x in floats(small))


@pytest.mark.parametrize("name", CASES)
def test_every_layer_at_full_rank_gives_the_dense_outputs(name):
    model, example = build(name, torch.float64)
    dense, twin = outputs(model, example), copy.deepcopy(model)
    plan = full_rank_plan(model, example)
    replaced = apply_plan_(twin, plan)
    assert len(replaced) >= len(plan.layers)
    for new, old in zip(floats(outputs(twin, example)), floats(dense), strict=True):
        assert float((new - old).norm()) <= 1e-6 * float(old.norm())  # CP is fitted by iteration, the rest to 1e-15


@pytest.mark.parametrize("name", ["mobile net", "tied language model", "lstm", "detector"])
def test_the_gradient_reaches_every_factor(name):
    model, example = build(name)
    compress_(model, Budget(params=0.6), example_input=example, method="exact", objective="weight", heal=False)
    result = model(**example) if isinstance(example, dict) else model(*example) if isinstance(example, tuple) else None
    loss = sum(x.square().sum() for x in floats(result if result is not None else model(example)))
    loss.backward()
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

"""Small networks in the style of what people bring, and what each is called with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tests.support.zoo import Conv1D


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


def bag_net():
    lookup = nn.EmbeddingBag(60, 16, mode="mean", padding_idx=0)
    return nn.Sequential(lookup, nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 7))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.c_fc, self.c_proj = Conv1D(48, 16), Conv1D(16, 48)
        self.head = nn.Linear(16, 40)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.c_proj(F.gelu(self.c_fc(self.norm(x)))))


class Case(NamedTuple):
    """A network, what it is called with, layers that can be factorised, and others that cannot."""

    make: Any
    example: Any
    open: str
    dense: str = ""


def image(size=32):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


def ids(high, length=9):
    return torch.randint(1, high, (1, length), generator=torch.Generator().manual_seed(4))


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


CASES = {
    "vision transformer": Case(ViT, image(), "patches attention.0.qkv attention.1.proj mlps.0.0 mlps.1.3 head"),
    "class attention": Case(ClassAttention, drawn(1, 9, 12), "inner.qkv wide head"),
    "mobile net": Case(
        mobile_net, image(), "0 2.body.0 2.body.6 2.body.5.reduce 3.body.5.expand 6", "2.body.3 3.body.3"
    ),
    "resnext": Case(ResNeXt, image(16), "stem reduce grouped expand shortcut fc"),
    "u-net": Case(UNet, image(16), "down.0 down.1 down.2 up fuse.fine fuse.coarse out"),
    "audio": Case(Audio, drawn(1, 1, 200), "front body.0 body.1 body.2 normed back"),
    "video": Case(video_net, drawn(1, 3, 4, 16, 16), "0 3 4 7"),
    "experts": Case(Experts, (drawn(1, 64, 24),), "router experts.0.gate experts.3.down"),
    "tied language model": Case(LanguageModel, {"input_ids": ids(60), "mask": None}, "tokens body.0 body.2"),
    "detector": Case(Detector, ([drawn(3, 24, 32)],), "stem deep head.0 head.2 classes"),
    "bag": Case(bag_net, ids(60, 8), "0"),
    "gpt": Case(Gpt, ids(40, 8), "embed c_fc c_proj"),
    "loose parameters": Case(Loose, drawn(2, 16), "shared wide narrow"),
}

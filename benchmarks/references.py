"""Reference networks of other kinds than images in convolutions: what they are, on which data, and how they are scored.

They were trained by `python -m benchmarks.train_references`. All data is here already: Fashion-MNIST, tones that are
synthesised, and the sources of Python's standard library as text, of which every tenth file is for tests and the one
after it for choosing. Other versions of Python have other files, so scores of text differ a little between them.
"""

from __future__ import annotations

import functools
import itertools
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.common import HERE, fashion_mnist
from lightning_compress.surgery.save import load_weights_

Part = Literal["train", "choose", "test"]
Batch = tuple[Tensor, Tensor]

WEIGHTS = HERE / "other_weights"
WINDOW, TABLE = 128, 257
"""Bytes of a text that are seen at once; rows of the transformer's table, one of which is for padding."""
WINDOWS = 1024
"""Of a text that a score is made from."""
SAMPLES, RATE = 1000, 8000
"""Of a tone, and per second."""
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477, 1633)
"""Frequencies of the keys of a telephone in Hz (ITU-T Q.23)."""
TONES = 4000
"""Tones that a score is made from."""
HELD_OUT = 5000
"""Training images that are for choosing."""


class ByteTransformer(nn.Module):
    """A causal transformer over bytes; layer norms come first."""

    def __init__(self, width: int = 192, heads: int = 6, layers: int = 4) -> None:
        super().__init__()
        self.bytes = nn.Embedding(TABLE, width)
        self.places = nn.Embedding(WINDOW, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits, (B, T, 256), of tokens (B, T)."""
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], x.device)
        return cast(Tensor, self.head(self.encoder(x, mask=mask, is_causal=True)))


class ByteGru(nn.Module):
    """A recurrent network over bytes."""

    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.gru = nn.GRU(width, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits, (B, T, 256), of tokens (B, T)."""
        return cast(Tensor, self.head(self.gru(self.bytes(tokens))[0]))


class DepthwiseNet(nn.Module):
    """Depthwise convolutions, each with a pointwise one behind it (Howard et al. 2017, "MobileNets")."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128, 256, 256)) -> None:
        super().__init__()
        parts: list[nn.Module] = [_normed(nn.Conv2d(1, widths[0], 3, padding=1, bias=False))]
        for before, after in itertools.pairwise(widths):
            stride = 2 if widths[0] < before < after else 1
            depthwise = nn.Conv2d(before, before, 3, stride=stride, padding=1, groups=before, bias=False)
            parts += [_normed(depthwise), _normed(nn.Conv2d(before, after, 1, bias=False))]
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, 10)."""
        return cast(Tensor, self.head(self.features(images).mean(dim=(2, 3))))


class SmallViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) on images of 28 by 28 in patches of 4 by 4."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 49, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, 10)."""
        x = self.patches(images).flatten(2).mT + self.places
        return cast(Tensor, self.head(self.encoder(x).mean(dim=1)))


class ToneNet(nn.Module):
    """Convolutions over a wave, (B, 1, samples)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _normed(nn.Conv1d(1, width, 63, stride=4, padding=31, bias=False)),
            _normed(nn.Conv1d(width, width, 31, stride=2, padding=15, bias=False)),
            _normed(nn.Conv1d(width, 2 * width, 15, stride=2, padding=7, bias=False)),
            _normed(nn.Conv1d(2 * width, 2 * width, 9, stride=2, padding=4, bias=False)),
        )
        self.head = nn.Linear(2 * width, len(ROWS) * len(COLUMNS))

    def forward(self, waves: Tensor) -> Tensor:
        """Returns logits, (B, 16)."""
        return cast(Tensor, self.head(self.features(waves).mean(dim=2)))


def _normed(convolution: nn.Module) -> nn.Sequential:
    channels = cast(int, convolution.out_channels)
    norm = nn.BatchNorm1d(channels) if isinstance(convolution, nn.Conv1d) else nn.BatchNorm2d(channels)
    return nn.Sequential(convolution, norm, nn.ReLU())


@functools.cache
def text(part: Part) -> Tensor:
    """Returns a part of the text as bytes."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    places = {"test": (0,), "choose": (1,), "train": tuple(range(2, 10))}[part]
    content = b"".join(path.read_bytes() for index, path in enumerate(paths) if index % 10 in places)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def windows(part: Part, size: int, generator: torch.Generator) -> Tensor:
    """Returns pieces of the text anywhere in a part, (size, WINDOW + 1)."""
    content = text(part)
    starts = torch.randint(len(content) - WINDOW - 1, (size, 1), generator=generator)
    return content[starts + torch.arange(WINDOW + 1)]


def next_bytes(part: Part, size: int, generator: torch.Generator) -> Batch:
    """Returns tokens and, at each place, the byte that follows."""
    found = windows(part, size, generator)
    return found[:, :-1], found[:, 1:]


def tones(part: Part, size: int, generator: torch.Generator) -> Batch:  # noqa: ARG001 (parts are those of the seeds)
    """Returns noisy waves of pressed keys, (size, 1, SAMPLES), and the keys."""
    keys = torch.randint(len(ROWS) * len(COLUMNS), (size,), generator=generator)
    time = torch.arange(SAMPLES) / RATE
    wave = torch.zeros(size, SAMPLES)
    for pitches, index in ((ROWS, keys // len(COLUMNS)), (COLUMNS, keys % len(COLUMNS))):
        phase, loudness = torch.rand(2, size, 1, generator=generator)
        pitch = torch.tensor(pitches, dtype=torch.float32)[index, None]
        wave += (0.3 + 0.7 * loudness) * torch.sin(2 * math.pi * (pitch * time + phase))
    noise = torch.randn(size, SAMPLES, generator=generator)
    return (wave + 3.0 * noise)[:, None], keys


def images(part: Part, size: int, generator: torch.Generator) -> Batch:
    """Returns images of Fashion-MNIST, shifted and mirrored where they are for training, and what they show."""
    data = _images(part)
    picked = torch.randint(len(data[0]), (size,), generator=generator)
    found, labels = data[0][picked], data[1][picked]
    if part == "train":
        if torch.rand((), generator=generator) < 0.5:  # noqa: PLR2004
            found = found.flip(3)
        shifts = torch.randint(-2, 3, (2,), generator=generator).tolist()
        found = found.roll(shifts, (2, 3))
    return found, labels


@functools.cache
def _images(part: Part) -> Batch:
    test, train = fashion_mnist()
    chosen: Dataset[Any] = test.dataset
    if part != "test":
        chosen = Subset(train, range(HELD_OUT) if part == "choose" else range(HELD_OUT, len(cast(Any, train))))
    batches = [*DataLoader(chosen, 1000)]
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


SEEDS = {"train": 0, "choose": 10**6, "test": 2 * 10**6}
Draw = Callable[[Part, int, torch.Generator], Batch]


@dataclass(frozen=True)
class Reference:
    """A reference network.

    Attributes:
        build: Makes it, untrained.
        draw: Draws a batch of a part of its data.
        example: An input of one sample, or its shape.
        measure: "bits per byte", or "accuracy".
        scored: Samples that a score is made from.
    """

    build: Callable[[], nn.Module]
    draw: Draw
    example: Any
    measure: str = "accuracy"
    scored: int = HELD_OUT

    def batches(self, part: Part, size: int = 250) -> Iterator[Batch]:
        """Returns the batches that a score of a part is made from, always the same."""
        generator = torch.Generator().manual_seed(SEEDS[part])
        if self.draw is images:
            found, labels = _images(part)
            yield from zip(torch.split(found, size), torch.split(labels, size), strict=True)
            return
        for _ in range(0, self.scored, size):
            yield self.draw(part, size, generator)

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        """Returns the measure of a model on a part of the data."""
        model.eval()
        total, count = 0.0, 0
        for inputs, targets in self.batches(part):
            logits, wanted = model(inputs).reshape(-1, _classes(model)), targets.reshape(-1)
            if self.measure == "accuracy":
                total += float((logits.argmax(1) == wanted).sum())
            else:
                total += float(F.cross_entropy(logits, wanted, reduction="sum")) / math.log(2)
            count += len(wanted)
        return total / count


def _classes(model: nn.Module) -> int:
    return len(cast(Tensor, cast(nn.Module, model.head).bias))


TOKENS = torch.zeros(1, WINDOW, dtype=torch.int64)
REFERENCES: dict[str, Reference] = {
    "byte_transformer": Reference(ByteTransformer, next_bytes, TOKENS, "bits per byte", scored=WINDOWS),
    "byte_gru": Reference(ByteGru, next_bytes, TOKENS, "bits per byte", scored=WINDOWS),
    "depthwise": Reference(DepthwiseNet, images, (1, 1, 28, 28)),
    "vit": Reference(SmallViT, images, (1, 1, 28, 28)),
    "tones": Reference(ToneNet, tones, (1, 1, SAMPLES), scored=TONES),
}


def trained(name: str) -> nn.Module:
    """Returns a reference network with its weights, in eval mode."""
    model = REFERENCES[name].build()
    load_weights_(model, WEIGHTS / f"{name}.safetensors")
    return model.eval()

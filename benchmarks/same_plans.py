"""Whether two versions of the package choose the same plans: eight networks, three budgets, two objectives.

python -m benchmarks.same_plans before.json     # in the version before
python -m benchmarks.same_plans after.json --compare before.json

The two reference networks have their trained weights, the others random ones whose singular values fall like those of
trained layers, so that budgets decide. Plans are the same if every layer has the same kind and ranks; what differs is
printed, and the command then fails. Run both with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import IMAGE, reference
from lightning_compress import Budget, search_ranks
from lightning_compress.core.settings import Objective

KEEP = (0.6, 0.3, 0.15)
OBJECTIVES: tuple[Objective, ...] = ("weight", "auto")
DECAY = 0.7
"""Singular values fall like k to the power of minus this."""


class TiedLanguageModel(nn.Module):
    """An embedding, a GRU, and an output layer of the embedding's weight. Inputs (B, T) tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 200, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits, (B, T, 200)."""
        logits: Tensor = self.head(self.gru(self.embedding(tokens))[0])
        return logits


class UNet(nn.Module):
    """Two levels with a skip and a transposed convolution. Inputs (B, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns one map per class, (B, 4, 16, 16)."""
        wide = F.relu(self.norm1(self.down1(images)))
        deep = F.relu(self.norm2(self.down2(wide)))
        maps: Tensor = self.head(F.relu(self.merge(torch.cat([wide, self.up(deep)], dim=1))))
        return maps


class ViT(nn.Module):
    """Patches, a class token and two encoder layers. Inputs (B, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 32, 4, stride=4), nn.Parameter(torch.zeros(1, 1, 32))
        self.encoder = encoder(layers=2)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, 10)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        encoded = self.encoder(torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1))
        logits: Tensor = self.head(encoded[:, 0])
        return logits


class LSTM(nn.Module):
    """Two layers and a classifier of the last step. Inputs (B, T, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(20, 48, 2, batch_first=True), nn.Linear(48, 10)

    def forward(self, frames: Tensor) -> Tensor:
        """Returns logits, (B, 10)."""
        logits: Tensor = self.head(self.lstm(frames)[0][:, -1])
        return logits


def encoder(layers: int) -> nn.Module:
    """Returns torch's transformer encoder of width 32. Inputs (B, T, 32)."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def depthwise() -> nn.Module:
    """Returns two depthwise-separable blocks with a classifier. Inputs (B, 3, 16, 16)."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for inputs, outputs in ((32, 96), (96, 192)):
        blocks += [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.BatchNorm2d(inputs), nn.ReLU()]
        blocks += [nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet20": (lambda: reference("resnet20"), IMAGE),
    "vgg": (lambda: reference("vgg"), IMAGE),
    "encoder": (lambda: encoder(layers=2), (1, 12, 32)),
    "lstm": (LSTM, (1, 12, 20)),
    "tied": (TiedLanguageModel, torch.zeros(1, 12, dtype=torch.long)),
    "unet": (UNet, (1, 3, 16, 16)),
    "depthwise": (depthwise, (1, 3, 16, 16)),
    "vit": (ViT, (1, 3, 16, 16)),
}


def main(path: Path, compare: Path | None, networks: list[str]) -> int:
    """Writes the plans as JSON; returns how many differ from those of another file."""
    known: dict[str, Any] = json.loads(compare.read_text(encoding="utf-8")) if compare is not None else {}
    plans: dict[str, Any] = {}
    for name in networks:
        build, example = NETWORKS[name]
        torch.manual_seed(0)
        model = build().eval()
        if name not in {"resnet20", "vgg"}:
            with_falling_spectra_(model)
        for objective in OBJECTIVES:
            for keep in KEEP:
                start = time.perf_counter()
                plans[f"{name} {keep} {objective}"] = plan_of(model, keep, objective, example)
                print(f"{name} {keep} {objective}: {time.perf_counter() - start:.1f} s", flush=True)
                path.write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
    different = [key for key in plans if known and plans[key] != known.get(key)]
    for key in different:
        before, after = known.get(key) or {}, plans[key]
        print(f"{key} differs:")
        for layer in before.keys() | after.keys():
            if before.get(layer) != after.get(layer):
                print(f"  {layer}: {before.get(layer)} before, {after.get(layer)} now")
    if known:
        print(f"{len(plans) - len(different)} of {len(plans)} plans are the same")
    return len(different)


def plan_of(model: nn.Module, keep: float, objective: Objective, example: Any) -> dict[str, Any]:
    """Returns kind and ranks of each factorised layer, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = search_ranks(model, Budget(params=keep), example_input=example, objective=objective)
    return {layer.name: [layer.kind, list(layer.ranks)] for layer in plan.factorised}


@torch.no_grad()
def with_falling_spectra_(model: nn.Module) -> None:
    """Gives every weight matrix singular values that fall, the Frobenius norm stays."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and min(parameter.shape[0], parameter[0].numel()) > 1:
            u, values, v = torch.linalg.svd(parameter.flatten(1).double(), full_matrices=False)
            falling = torch.arange(1, len(values) + 1, dtype=torch.float64) ** -DECAY
            falling *= values.norm() / falling.norm()
            parameter.copy_(((u * falling) @ v).reshape(parameter.shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    sys.exit(min(main(options.path, options.compare, options.networks), 1))

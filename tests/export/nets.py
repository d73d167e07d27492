"""Compressed networks that are exported in tests."""

from __future__ import annotations

import torch
from torch import nn

from lightning_compress import compress_

SHAPES = {"cnn": (4, 3, 8, 8), "interpolative": (4, 3, 8, 8), "mlp": (4, 32), "transposed": (4, 6, 5, 5)}


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, 10),
    )


def mixed() -> list[nn.Module]:
    """1x1 convolutions of a size that the interpolative kind factorises, to a square and to another one."""
    return [nn.Conv2d(24, 48, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 24)]


def net(name: str) -> nn.Module:
    """A compressed network in eval mode whose batch norms do something."""
    torch.manual_seed(0)
    made = {
        "cnn": cnn,
        "interpolative": lambda: nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), *mixed()),
        "mlp": lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 10)),
        "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(6, 24, 3, stride=2), nn.ReLU(), nn.Conv2d(24, 24, 3)),
    }[name]()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    kinds = ["interpolative"] if name == "interpolative" else "auto"
    return small(made, kinds=kinds)


def small(model: nn.Module, params: float = 0.6, **settings) -> nn.Module:
    plan = compress_(model, {"params": params}, objective="weight", method="exact", heal=False, target=None, **settings)
    assert plan.factorised
    return model.eval()


class Attention(nn.Module):
    """Two encoder layers, whose projections are unfused where they are factorised."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(tokens)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tokens(nn.Module):
    """An embedding whose weight the output layer uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 24)
        self.inner = nn.Linear(24, 24)
        self.head = nn.Linear(24, 60, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.inner(self.embedding(index))))


class Named(nn.Module):
    """Called with named arguments; it returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, *, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.second(torch.relu(self.first(x + shift)))
        return y, y.sum(-1)

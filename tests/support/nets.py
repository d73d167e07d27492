"""Small networks and tasks."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F


class TinyNet(nn.Module):
    """Conv, norm, conv, linear, linear: every kind applies somewhere. Inputs (B, 3, 8, 8), outputs (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(16, 16, 1)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.point(F.relu(self.conv2(x)))).mean(dim=(2, 3))
        return self.fc2(F.relu(self.fc1(x)))


DENSE_PARAMETERS = 2340  # of TinyNet, counted by hand: 224 + 16 + 1152 + 272 + 544 + 132
DENSE_BYTES = 4 * (DENSE_PARAMETERS + 16) + 8  # the two running statistics and the batch counter of the norm


def dense_macs(size: int) -> int:
    half = (size // 2) ** 2
    return 8 * 27 * size**2 + 16 * 72 * half + 16 * 16 * half + 16 * 32 + 32 * 4


class TinyTask(L.LightningModule):
    """Classifies with TinyNet; `configure` receives the module and returns what configure_optimizers returns."""

    def __init__(self, configure=None) -> None:
        super().__init__()
        self.net = TinyNet()
        self.configure = configure
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.configure(self) if self.configure else torch.optim.Adam(self.parameters(), lr=1e-2)


class InMode(nn.Module):
    """A model run in a mode of its own, such as torch.no_grad."""

    def __init__(self, model: nn.Module, mode) -> None:
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x):
        with self.mode():
            return self.model(x)


class TwoManual(TinyTask):
    """Two optimizers stepped by hand, one for the convolutions and one for the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        body = [p for name, p in self.named_parameters() if "fc" not in name]
        head = [p for name, p in self.named_parameters() if "fc" in name]
        return [
            torch.optim.SGD(body, lr=0.05, momentum=0.9, weight_decay=0.1),
            torch.optim.Adam(head, lr=1e-2, weight_decay=0.1),
        ]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)


class Doubled(nn.Module):
    """One linear layer under two names, called twice, and one more."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class Tied(nn.Module):
    """A language model with one weight for two uses, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.a = nn.Linear(12, 12)
        self.b = self.a
        self.c = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.c(self.b(self.a(self.embed(tokens)))))


class Conv(nn.Module):
    """Two convolutions around a norm, then a linear layer; inputs (B, 3, 5, 5), outputs (B, 4)."""

    def __init__(self, norm: nn.Module | None = None, between: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.norm = norm or nn.Identity()
        self.between = between or nn.ReLU()
        self.conv2 = nn.Conv2d(10, 12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.between(self.norm(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).mean(dim=(2, 3)))


class Mlp(nn.Module):
    """Two linear layers with something between and behind them; inputs (B, 8), outputs (B, 16)."""

    def __init__(self, between: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 20)
        self.between = between or nn.Tanh()
        self.second = nn.Linear(20, 16)
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(self.second(self.between(self.first(x))))


def run_in(model: nn.Module, shape: tuple[int, ...] = (1, 3, 5, 5)) -> nn.Module:
    """Gives the norms running statistics of some inputs."""
    for _ in range(10):
        model(1 + 2 * torch.rand(32, *shape[1:]))
    return model


SHAPE = (1, 3, 8, 8)
IMAGE = (1, 3, 16, 16)


def pooled() -> nn.Module:
    """A network with norms and a classifier behind a pooling that is wide for its body."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 1, bias=False),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 120),
    )  # fmt: skip
    for _ in range(20):
        net(torch.randn(32, *IMAGE[1:]))
    return net.eval()


def trained_like() -> TinyNet:
    """A net whose running statistics are those of images far from standard normal noise."""
    torch.manual_seed(3)
    net = TinyNet()
    for _ in range(30):
        net(2 + 3 * torch.rand(64, 3, 8, 8))
    return net.eval()


def random_net(seed):
    """Spectra of different decay, as trained layers have."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(8, 12, 3), nn.Conv2d(12, 20, 3), nn.Conv2d(20, 16, 1), nn.Linear(30, 24), nn.Linear(64, 48)
    )
    with torch.no_grad():
        for index, layer in enumerate(net):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            decay = torch.exp(-torch.arange(len(s)) * (0.05 + 0.1 * ((index + seed) % 4)))
            layer.weight.copy_((u * s * decay @ v).view_as(layer.weight))
    return net


def unfolding(weight, kind):
    if kind == "spatial_svd":
        out, in_, k_h, k_w = weight.shape
        return weight.permute(0, 3, 1, 2).reshape(out * k_w, in_ * k_h)
    return weight.flatten(1)


def squares(student, teacher, batch):
    """A distance of outputs, as a user may write one for `Distill(function=...)`."""
    return (student - teacher).square().mean() + 0 * batch[1].sum()

"""What `configure_optimizers` may return, as functions of the task, and tasks with a way of their own."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lightning_compress import FactorisedLayer
from tests.support.nets import TinyTask


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.factors().values()) if isinstance(layer, FactorisedLayer) else [layer.weight]


def weights_and_rest(task) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in task.parameters() if p.ndim > 1], [p for p in task.parameters() if p.ndim <= 1]


def adam(task):
    return Adam(task.parameters(), lr=1e-2)


def momentum(task):
    return SGD(task.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def groups(task):
    weights, rest = weights_and_rest(task)
    return AdamW([{"params": weights, "weight_decay": 0.1}, {"params": rest, "lr": 3e-3}], lr=1e-2)


def nesterov_groups(task):
    weights, rest = weights_and_rest(task)
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def rate_per_layer(task):
    groups = [{"params": layer.parameters(), "lr": 0.01 * (i + 1)} for i, layer in enumerate(task.net.children())]
    return RMSprop(groups)


def named(task):
    return AdamW(task.named_parameters(), lr=1e-2)


def named_groups(task):
    parameters = list(task.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in parameters if p.ndim <= 1]},
    ]
    return AdamW(groups, lr=1e-2)


def one_weight(task):
    groups = [{"params": weights_of(task.net.fc1), "lr": 0.2}, {"params": weights_of(task.net.conv2)}]
    return SGD(groups, lr=0.1, momentum=0.5)


def head_only(task):
    return SGD(task.net.fc2.parameters(), lr=0.1, momentum=0.5)


def in_steps(optimizer, scheduler):
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plateau(task):
    optimizer = nesterov_groups(task)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0, min_lr=[1e-3, 1e-4])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


def one_cycle(task):
    optimizer = nesterov_groups(task)
    return in_steps(optimizer, OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=20))


def one_cycle_adam(task):
    optimizer = adam(task)
    return in_steps(optimizer, OneCycleLR(optimizer, max_lr=0.02, total_steps=20))


def lambdas(task):
    optimizer = nesterov_groups(task)
    return in_steps(optimizer, LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1.0 / (1 + step)]))


def sequential(task):
    optimizer = rate_per_layer(task)
    parts = [LinearLR(optimizer, 0.1, total_iters=3), ConstantLR(optimizer, 0.5, total_iters=100)]
    return in_steps(optimizer, SequentialLR(optimizer, parts, milestones=[3]))


def lbfgs(task):
    return torch.optim.LBFGS(task.parameters(), lr=0.1, max_iter=3, history_size=4)


def fused(task):
    return Adam(task.parameters(), lr=1e-2, fused=True)


def maximizing_foreach(task):
    return SGD(task.parameters(), lr=1e-3, momentum=0.5, maximize=True, foreach=True)


class Prebuilt(TinyTask):
    """Builds its optimizer in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = named(self)

    def configure_optimizers(self):
        return self.optimizer

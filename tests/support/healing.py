"""A compressed model whose factors can be repaired."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.distance import output_distance
from lightning_compress.analysis.moments import input_moments
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.surgery.repair import heal_
from tests.support.compressing import CLOSED_FORM
from tests.support.nets import TinyNet

FEW = 40
"""Steps of the distillation where its result does not matter."""


def statistics_on(model: nn.Module, batches: list, source: str = "noise") -> Statistics:
    """Statistics on given arguments, without the synthesis."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    moments = input_moments(model, batches, names, source=source)
    return Statistics(tuple(batches), source, moments)


def images_like(count: int, seed: int = 4) -> list:
    """Images that differ in colour and contrast, so that the outputs of an untrained net differ too."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        colour, contrast = (4 * torch.randn(32, 3, 1, 1, generator=generator) for _ in range(2))
        batches.append(((2 + colour + contrast * torch.randn(32, 3, 8, 8, generator=generator),), {}))
    return batches


def image_model() -> TinyNet:
    torch.manual_seed(3)
    net = TinyNet()
    for args, _ in images_like(30, seed=8):
        net(*args)
    return net.eval()


class Case:
    """A dense model, its compressed copy, what was replaced, and the statistics."""

    def __init__(self, dense: nn.Module, statistics: Statistics, keep: float = 0.6, kinds=CLOSED_FORM) -> None:
        self.dense, self.statistics = dense, statistics
        self.model = copy.deepcopy(dense)
        plan = search_ranks(
            self.model, Budget(params=keep), statistics=statistics, objective="moments", method="exact", kinds=kinds
        )
        self.replacements = apply_plan_(self.model, plan, statistics=statistics)
        assert self.replacements
        self.fitting, self.judging = statistics.batches[:-1], statistics.batches[-1:]

    def heal(self, **settings):
        return heal_(self.dense, self.model, self.replacements, self.statistics, **settings)

    def distance(self, batches=None) -> float:
        return output_distance(self.dense, self.model, batches or self.judging)


def image_case(keep: float = 0.6, kinds=CLOSED_FORM) -> Case:
    dense = image_model()
    return Case(dense, statistics_on(dense, images_like(4)), keep, kinds)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], value) for name, value in state.items())


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=0)

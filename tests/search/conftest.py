"""Models and their statistics, made once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.analysis.statistics import Statistics, gather_statistics
from tests.support.nets import SHAPE, trained_like
from tests.support.searching import VECTOR, mlp


@pytest.fixture(scope="session")
def known() -> tuple[nn.Module, Statistics]:
    torch.set_num_threads(1)
    net = trained_like()
    return net, gather_statistics(net, SHAPE)


@pytest.fixture(scope="session")
def small() -> tuple[nn.Module, Statistics]:
    torch.set_num_threads(1)
    net = mlp()
    return net, gather_statistics(net, VECTOR)

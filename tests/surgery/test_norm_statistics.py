"""Running statistics follow what the factors changed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_compress.surgery.norm_statistics import move_norm_statistics_
from tests.support.healing import image_case


def test_norm_statistics_move_by_what_the_factors_changed():
    case = image_case()
    momentum, count = case.model.norm.momentum, int(case.model.norm.num_batches_tracked)
    before = case.dense.norm
    with torch.no_grad():
        for parameter in case.model.conv1.parameters():
            parameter.mul_(1.3)
    case.model.train()
    move_norm_statistics_(case.dense, case.model, case.fitting)
    with torch.no_grad():
        inputs = [(case.model.conv1(args[0]), case.dense.conv1(args[0])) for args, _ in case.fitting]
    shifts = torch.stack([(x - y).mean(dim=(0, 2, 3)) for x, y in inputs]).mean(dim=0)
    spreads = [[v.var(dim=(0, 2, 3), unbiased=False) + before.eps for v in pair] for pair in inputs]
    factors = torch.stack([x / y for x, y in spreads]).mean(dim=0)
    assert float(shifts.abs().max()) > 1e-3
    torch.testing.assert_close(case.model.norm.running_mean, before.running_mean + shifts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.model.norm.running_var, before.running_var * factors, rtol=1e-4, atol=1e-5)
    assert (case.model.norm.momentum, int(case.model.norm.num_batches_tracked)) == (momentum, count)
    assert all(m.training for m in case.model.modules())


def test_norm_that_is_called_twice_is_moved_by_the_mean_of_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.second(self.norm(self.first(x))))

    torch.manual_seed(0)
    dense = Twice().eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.first.bias.add_(0.5)
        model.second.bias.add_(2.0)
    x = torch.randn(64, 6)
    move_norm_statistics_(dense, model, [((x,), {})])  # the first call's shift cancels before the second
    torch.testing.assert_close(model.norm.running_mean, dense.norm.running_mean + 1.25, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.norm.running_var, dense.norm.running_var, rtol=1e-4, atol=1e-4)

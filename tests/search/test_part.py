"""Bounds on a submodule alone."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_compress import Budget, Compress, FactorisedLayer, Plan, compress_, search_ranks
from lightning_compress.core.errors import BudgetError, InfeasibleBudgetError
from tests.support.fitting import QUIET

pytestmark = QUIET
SETTINGS = {"target": None, "objective": "weight"}


class Gan(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
        self.generators_friend = nn.Linear(48, 48)
        self.register_buffer("more", torch.zeros(1000))

    def training_step(self, batch, batch_idx):
        return self.generators_friend(self.generator(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


@pytest.mark.parametrize("keep", [0.7, 0.4])
@pytest.mark.parametrize("resource", ["params", "bytes"])
def test_the_part_alone_is_bounded_and_compressed(resource, keep):
    model, of = Gan(), {"params": parameters, "bytes": size}[resource]
    before, friend = of(model.generator), model.generators_friend
    plan = compress_(model, Budget(**{resource: keep}, of="generator"), heal=False, **SETTINGS)
    assert 0.8 * keep < of(model.generator) / before <= keep
    assert model.generators_friend is friend
    assert all(isinstance(model.generator[i], FactorisedLayer) for i in (0, 2))
    assert plan.budget == Budget(**{resource: keep}, of="generator")
    assert Plan.from_json(plan.to_json()) == plan
    assert f"{resource} of generator <= {100 * keep:g} %" in plan.summary()


def test_a_fit_takes_it_and_goes_on_with_what_is_compressed(make_trainer):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 48)), batch_size=4)
    budget, model = {"params": 0.5, "of": "generator"}, Gan()
    for _ in range(2):
        make_trainer(Compress(budget, heal=False, **SETTINGS)).fit(model, data)
        assert parameters(model.generator) <= 0.5 * parameters(Gan().generator)
        assert type(model.generators_friend) is nn.Linear


def test_what_is_no_part_is_refused():
    with pytest.raises(BudgetError, match=r"of='generater'.*Did you mean 'generator'"):
        search_ranks(Gan(), Budget(params=0.5, of="generater"), **SETTINGS)
    with pytest.raises(
        BudgetError, match=r"Budget\(params, macs, of='generator'\): expected .* other bounds are of the whole"
    ):
        Budget(params=0.5, macs=0.5, of="generator")
    for bad in ("", 3):
        with pytest.raises(BudgetError, match="expected the name of a submodule"):
            Budget(params=0.5, of=bad)
    with pytest.raises(BudgetError, match="other bounds are of the whole"):
        Budget(max_error=0.1, of="generator")
    with pytest.raises(
        InfeasibleBudgetError, match=r"params of generator <= 0.1 % cannot be kept; as bounds on the whole"
    ):
        search_ranks(Gan(), Budget(params=0.001, of="generator"), **SETTINGS)

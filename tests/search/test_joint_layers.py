"""Linear layers that read the same share their first factor where that is cheaper."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, Plan, apply_plan_, compress_, load_compressed, save_compressed, search_ranks
from lightning_compress.core.errors import PlanMismatchError
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.optimizing import patch_optimizers_
from tests.support.plans import tampered

WIDTH, NAMES = 48, ("attention.query", "attention.key", "attention.value")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        return self.output(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))


class Block(nn.Module):
    """Projections whose weights have most of their row space in common, or nothing."""

    def __init__(self, *, common: bool = True) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(WIDTH, 10)
        basis = torch.randn(3, 12, WIDTH)
        with torch.no_grad():
            for index, name in enumerate(NAMES):
                low = torch.randn(WIDTH, 12) @ basis[0 if common else index]
                self.get_submodule(name).weight.copy_(0.05 * (low + 0.3 * torch.randn(WIDTH, WIDTH)))

    def forward(self, x):
        return self.head(x + self.attention(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def inputs():
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))


def shares(plan):
    return {layer.name: layer.joint_with for layer in plan.layers if layer.joint_with}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"objective": "weight"}, {}, {"method": "exact", "objective": "moments"}])
def test_layers_with_a_common_row_space_share(model, inputs, settings):
    dense = copy.deepcopy(model)
    plan = compress_(model, Budget(params=0.4), example_input=inputs, **settings)
    assert shares(plan) == dict.fromkeys(NAMES, NAMES[0])
    assert len({id(model.get_submodule(name).reduce.weight) for name in NAMES}) == 1
    count = sum(p.numel() for p in model.parameters())
    assert count == plan.compressed.params <= 0.4 * sum(p.numel() for p in dense.parameters())
    with FlopCounterMode(display=False) as flops:
        model(inputs[:1])
    assert plan.compressed.macs == flops.get_total_flops() // 2
    assert (model(inputs) - dense(inputs)).norm() < 0.2 * dense(inputs).norm()
    assert sum(layer.params_after for layer in plan.layers) == count


def test_sharing_keeps_more_at_the_same_budget(model, inputs, monkeypatch):
    settings = {"example_input": inputs, "objective": "weight"}
    together = search_ranks(model, Budget(params=0.4), **settings)
    monkeypatch.setattr("lightning_compress.search.tables.joint_units", lambda *_: [])
    apart = search_ranks(model, Budget(params=0.4), **settings)
    assert not shares(apart)
    assert together.signal_loss < apart.signal_loss


class Cross(Block):
    def forward(self, x):
        a = self.attention
        return self.head(x + a.output(F.scaled_dot_product_attention(a.query(x), a.key(2 * x), a.value(3 * x))))


@pytest.mark.parametrize(
    ("make", "keep", "given"),
    [(lambda: Block(common=False), 0.6, True), (Cross, 0.4, True), (Block, 0.4, False)],
    ids=["nothing in common", "they read different tensors", "unknown what they read"],
)
def test_other_layers_do_not_share(inputs, make, keep, given):
    settings = {"example_input": inputs} if given else {}
    assert not shares(search_ranks(make(), Budget(params=keep), objective="weight", **settings))


def test_plan_survives_json_and_the_model_shows_it(model, inputs):
    plan = search_ranks(model, Budget(params=0.4), example_input=inputs, objective="weight", kinds="svd")
    assert Plan.from_json(plan.to_json()) == plan
    assert "shares its first factor" in str(plan)
    apply_plan_(model, plan)
    read = embodied_plan(model, inputs)
    assert (read.dense, read.compressed) == (plan.dense, plan.compressed)
    assert shares(read) == shares(plan)
    assert [p.params_after for p in read.layers] == [p.params_after for p in plan.layers]
    assert apply_plan_(model, plan) == ()


def test_saved_and_loaded_they_still_share(model, inputs, tmp_path):
    compress_(model, Budget(params=0.4), example_input=inputs)
    save_compressed(model, tmp_path)
    other = Block().eval()
    load_compressed(other, tmp_path)
    assert len({id(other.get_submodule(name).reduce.weight) for name in NAMES}) == 1
    torch.testing.assert_close(other(inputs), model(inputs))


def test_optimizer_holds_the_shared_factor_once(model, inputs):
    optimizer = torch.optim.AdamW(model.named_parameters())
    plan = search_ranks(model, Budget(params=0.4), example_input=inputs, objective="weight")
    patch_optimizers_([optimizer], apply_plan_(model, plan))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(optimizer.param_groups[0]["param_names"]) == len(held)


def test_layers_that_cannot_share_are_refused(model, inputs, unchanged):
    plan = search_ranks(model, Budget(params=0.4), example_input=inputs, objective="weight")
    index, layer = next((i, layer) for i, layer in enumerate(plan.layers) if layer.name == NAMES[1])
    before = unchanged(model)
    with pytest.raises(PlanMismatchError, match="differ in kind, rank or inputs"):
        apply_plan_(model, tampered(plan, index, ranks=(layer.ranks[0] + 1,)))
    before.check()

"""Adapters and other wrappers that are put in the place of factors after compression."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lightning_compress import Budget, Compress, FactorisedLayer, compress_, merge_, save_compressed
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.fitting import QUIET

pytestmark = QUIET


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> torch.Tensor:  # as the adapters of a well-known library answer
        return self.base.weight

    def forward(self, inputs):
        return self.base(inputs) + self.up(self.down(inputs))


def wrap_(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Lora(child))
        else:
            wrap_(child)


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture
def task() -> Task:
    task = Task()
    compress_(task, Budget(params=0.5), heal=False, objective="weight", target=None)
    return task


@pytest.mark.parametrize("merged", [False, True])
def test_wrapped_factors_run_and_keep_their_plan(task, merged):
    for layer in (task.net[0], task.net[2]):
        layer.merged = merged
    inputs, before = torch.randn(4, 32), embodied_plan(task)
    expected = task.eval().net(inputs)
    wrap_(task.net)
    torch.testing.assert_close(task.net(inputs), expected)
    nn.init.ones_(task.net[0][0].up.weight)
    with torch.no_grad():
        assert not torch.allclose(task.net(inputs), expected)  # whatever was multiplied out before
    after = embodied_plan(task)
    assert [(p.name, p.kind, p.ranks) for p in after.layers] == [(p.name, p.kind, p.ranks) for p in before.layers]
    assert after.dense.params - before.dense.params == sum(
        m.down.weight.numel() + m.up.weight.numel() for m in task.modules() if isinstance(m, Lora)
    )


def test_what_needs_the_weight_says_what_to_do(task, tmp_path):
    wrap_(task.net)
    message = r"a tests\.layers\.test_wrapped\.Lora was put in the place of the factor 'reduce' .*: merge it into"
    for action in (lambda: save_compressed(task, tmp_path), lambda: merge_(task), lambda: task.net[0].weight):
        with pytest.raises(UnsupportedError, match=message):
            action()
    assert isinstance(task.net[0], FactorisedLayer)
    assert not list(tmp_path.iterdir())


def test_a_fit_and_its_checkpoint(task, tmp_path, make_trainer):
    wrap_(task.net)
    factors = copy.deepcopy(task.net[0][0].base.weight)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 32)), batch_size=4)
    trainer = make_trainer(Compress(Budget(params=0.9)))
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "wrapped.ckpt")
    state = torch.load(tmp_path / "wrapped.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["net.0.reduce.base.weight"], factors)
    assert torch.equal(state["net.0.reduce.up.weight"], task.net[0][0].up.weight)

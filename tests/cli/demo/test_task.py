"""The networks, and the task that trains and tests them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_compress.cli.demo.data import DigitsDataModule
from lightning_compress.cli.demo.models import MLP, VGG, ResNet20, SmallCNN
from lightning_compress.cli.demo.task import ClassificationTask


@pytest.mark.parametrize(
    ("net", "params"),
    [
        (VGG(), 420_778),
        (ResNet20(), 272_186),
        (MLP(), 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        (SmallCNN(), 9 * (32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 10 + 10),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else str(value),
)
def test_number_of_parameters(net, params):
    assert sum(p.numel() for p in net.parameters()) == params


def test_resnet20_has_twenty_weighted_layers():
    weighted = [m for m in ResNet20().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(weighted) + 1 == 20


@pytest.mark.parametrize(
    ("net", "shape", "classes"),
    [
        (SmallCNN(3, 7, width=4), (2, 3, 8, 8), 7),
        (SmallCNN(1, 10, width=4), (2, 1, 28, 28), 10),
        (MLP(48, 5, hidden=[]), (2, 3, 4, 4), 5),
        (MLP(48, 5, hidden=[8]), (2, 3, 4, 4), 5),
        (VGG(3, 6, widths=[4, 8, 8], hidden=9), (2, 3, 32, 32), 6),
        (VGG(1, 6, widths=[4, 8], hidden=9), (2, 1, 8, 8), 6),
        (ResNet20(3, 4, width=4, blocks=1), (2, 3, 32, 32), 4),
        (ResNet20(1, 4, width=4, blocks=1), (2, 1, 8, 8), 4),
    ],
)
def test_networks_return_logits(net, shape, classes):
    logits = net.eval()(torch.randn(shape))
    assert logits.shape == (shape[0], classes)
    assert torch.isfinite(logits).all()


def test_task_reports_accuracy_and_cross_entropy_of_all_test_images(make_trainer):
    net = MLP(hidden=[16])
    module = DigitsDataModule(batch_size=16, limit=150)
    result = make_trainer().test(ClassificationTask(net), datamodule=module, verbose=False)[0]
    images, labels = module.test_dataloader().dataset.tensors
    with torch.no_grad():
        logits = net.eval()(images)
    assert set(result) == {"accuracy", "loss"}
    assert result["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-6)
    assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)


def test_task_trains_with_one_cycle_over_the_whole_fit(make_trainer):
    task = ClassificationTask(MLP(hidden=[8]), lr=0.25, weight_decay=0.01, momentum=0.8)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(task, datamodule=DigitsDataModule(batch_size=50, limit=500))
    (optimizer,) = trainer.optimizers
    group = optimizer.param_groups[0]
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(optimizer, torch.optim.SGD)
    assert group["nesterov"]
    assert group["weight_decay"] == 0.01
    assert group["max_lr"] == 0.25
    assert scheduler.total_steps == 20
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in task.net.parameters())


def test_task_learns_the_digits(make_trainer):
    torch.manual_seed(0)
    module = DigitsDataModule()
    task = ClassificationTask(MLP(hidden=[64]), lr=0.1)
    trainer = make_trainer(max_epochs=8)
    trainer.fit(task, datamodule=module)
    assert trainer.test(task, datamodule=module, verbose=False)[0]["accuracy"] > 0.85

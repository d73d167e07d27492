"""The LightningModule of the command and the examples: image classification."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

Batch = tuple[Tensor, Tensor]


class ClassificationTask(LightningModule):
    """Trains any network that maps images to logits, with SGD and a one-cycle learning rate.

    Args:
        net: The network.
        num_classes: Its outputs.
        lr: Peak learning rate.
        weight_decay: L2 penalty.
        momentum: Nesterov momentum.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        *,
        lr: float = 0.1,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.net = net
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, (B, num_classes)."""
        return cast(Tensor, self.net(images))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the accuracy on the validation images."""
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_accuracy", self.val_accuracy, on_epoch=True, prog_bar=True)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs accuracy and cross-entropy on the test images."""
        images, labels = batch
        logits = self(images)
        self.test_accuracy(logits, labels)
        self.log("accuracy", self.test_accuracy, on_epoch=True)
        self.log("loss", F.cross_entropy(logits, labels), on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns SGD with one cycle over the whole fit."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cycle: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

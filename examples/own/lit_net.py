"""A LightningModule and a LightningDataModule of one's own, as any project has them.

In this folder:

    lightning-compress task._target_=lit_net.LitNet data.module._target_=lit_net.Rings
    lightning-compress -m task._target_=lit_net.LitNet data.module._target_=lit_net.Rings \
        compression.budget.params=0.5,0.3,0.1
"""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC


class LitNet(L.LightningModule):
    """Its own network, loss, optimizer and metrics; nothing in it knows of compression."""

    def __init__(self, hidden: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 1)
        self.accuracy, self.auroc = BinaryAccuracy(), BinaryAUROC()

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(points)).squeeze(1)

    def training_step(self, batch, batch_idx):
        points, labels = batch
        loss = F.binary_cross_entropy_with_logits(self(points), labels.float())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        points, labels = batch
        self.log("val/loss", F.binary_cross_entropy_with_logits(self(points), labels.float()))

    def test_step(self, batch, batch_idx):
        points, labels = batch
        logits = self(points)
        self.accuracy(logits, labels)
        self.auroc(logits, labels)
        self.log("test/loss", F.binary_cross_entropy_with_logits(logits, labels.float()), on_epoch=True)
        self.log_dict({"test/acc": self.accuracy, "test/auroc": self.auroc}, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Rings(L.LightningDataModule):
    """Points in 8 dimensions, inside a shell or outside."""

    def __init__(self, batch_size: int = 128, points: int = 4000) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        points = torch.randn(self.hparams.points, 8, generator=torch.Generator().manual_seed(0))
        labels = (points.norm(dim=1) > 2.7).long()
        split = [int(share * len(points)) for share in (0.7, 0.8)]
        self.parts = [
            TensorDataset(*pair) for pair in zip(points.tensor_split(split), labels.tensor_split(split), strict=True)
        ]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 512)

    def test_dataloader(self):
        return DataLoader(self.parts[2], 512)

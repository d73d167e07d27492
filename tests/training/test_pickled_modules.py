"""Modules that are pickled or copied while a fit has hooks on them: hyperparameters that hold the network."""

from __future__ import annotations

import copy
import io

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import FactorisedLayer
from tests.support.compressing import compress
from tests.support.fitting import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")]


class Holding(L.LightningModule):
    """Its hyperparameters hold the network, so that every checkpoint does."""

    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Copies(Callback):
    """Copies and pickles the network after each batch, and keeps what they give for the batch."""

    def __init__(self):
        self.runs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        buffer = io.BytesIO()
        torch.save(pl_module.net, buffer)
        buffer.seek(0)
        others = copy.deepcopy(pl_module.net), torch.load(buffer, weights_only=False)
        own = pl_module.net(batch[0])
        self.runs.append([torch.equal(other(batch[0]), own) for other in others])


DISTILLED = {"logits": "logits", "layers": "layers", "module": {"module": "net"}, "blocks": {"blocks": ["net.0"]}}


@pytest.mark.parametrize("which", [*DISTILLED, "nothing"])
def test_checkpoints_copies_and_pickles_of_a_module_that_is_distilled(make_trainer, tmp_path, which):
    torch.manual_seed(0)
    task = Holding(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)))
    rows = DataLoader(TensorDataset(torch.randn(32, 24), torch.randint(0, 4, (32,))), batch_size=8)
    copies = Copies()
    every = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    make_trainer(compress(0.5, distill=DISTILLED.get(which)), copies, every).fit(task, rows)
    assert copies.runs == 4 * [[True, True]]
    held = torch.load(every.best_model_path, weights_only=False)["hyper_parameters"]["net"]
    assert any(isinstance(m, FactorisedLayer) for m in held.modules())
    assert held(torch.randn(2, 24)).shape == (2, 4)

"""Sharded training (FSDP2): the layers are factorised inside configure_model, before they are sharded.

python examples/05_sharded.py --devices 2

Sharded strategies split every weight over the processes before a callback could factorise it, so `Compress` refuses
them. The plan is made beforehand, from the dense weights, and kept as JSON: a resumed run needs nothing else.
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Budget, FactorisedLayer, Plan, apply_plan_, search_ranks


def make_net() -> nn.Sequential:
    torch.manual_seed(0)  # load your own weights here
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


class Task(L.LightningModule):
    def __init__(self, plan: Path) -> None:
        super().__init__()
        self.net, self.plan = make_net(), plan

    def configure_model(self) -> None:
        if any(isinstance(module, FactorisedLayer) for module in self.net.modules()):
            return  # Lightning may call this hook more than once
        apply_plan_(self.net, Plan.from_json(self.plan.read_text()))
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(plan: Path, folder: Path, devices: int, epochs: int, checkpoint: Path | None = None) -> L.Trainer:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=32)
    trainer = L.Trainer(
        accelerator="cpu",  # "gpu" where there are some
        devices=devices,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(Task(plan), loader, ckpt_path=checkpoint)
    return trainer


def weights(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """Returns the whole weights, on all processes."""
    return {name: p.detach().full_tensor().clone() for name, p in trainer.lightning_module.named_parameters()}


def main(folder: Path, devices: int = 1) -> dict[str, torch.Tensor]:
    """Fits for three epochs, and again with a resume after the first; returns the weights at the end."""
    path = folder / "plan.json"
    # Every process searches the same; with large models let one of them, or a job before, write the file.
    plan = search_ranks(make_net(), Budget(params=0.3), example_input=(1, 32), objective="weight")
    path.write_text(plan.to_json())
    whole = weights(fit(path, folder, devices, epochs=3))

    checkpoint = folder / "sharded.ckpt"
    fit(path, folder, devices, epochs=1).save_checkpoint(checkpoint)
    trainer = fit(path, folder, devices, epochs=3, checkpoint=checkpoint)
    resumed = weights(trainer)
    if trainer.is_global_zero:
        print(plan)
        print("parameters of the fit:", sum(p.numel() for p in whole.values()))
        print("resumed equals uninterrupted:", all(torch.equal(whole[name], resumed[name]) for name in whole))
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lightning_compress_sharded")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    main(arguments.folder, arguments.devices)

"""Fashion-MNIST with a budget in MACs: half the multiply-accumulates of a ResNet-20.

    python examples/03_fashion_mnist_macs.py [--epochs 2] [--limit N] [--folder FOLDER]

Finds Debian's dataset-fashion-mnist, the four gzipped IDX files in FOLDER, or downloads them
there with torchvision. Starts from the weights under benchmarks/weights/.
"""

import argparse
from pathlib import Path

import lightning as L
import torch

from lightning_compress import Budget, Compress, Distill
from lightning_compress.cli.demo.data import FashionMNISTDataModule
from lightning_compress.cli.demo.models import ResNet20
from lightning_compress.cli.demo.task import ClassificationTask
from lightning_compress.surgery.save import load_weights_

WEIGHTS = Path(__file__).parents[1] / "benchmarks" / "weights" / "resnet20_fashion_mnist.safetensors"


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the accuracy of the dense and of the compressed model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="images per split, for a quick look")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)

    L.seed_everything(0, verbose=False)
    data = FashionMNISTDataModule(folder=options.folder, limit=options.limit)
    net = ResNet20()
    load_weights_(net, WEIGHTS)
    task = ClassificationTask(net, lr=0.05)
    task.example_input_array = torch.zeros(1, 1, 28, 28)  # MACs depend on the size of the images

    settings = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False}
    dense = L.Trainer(**settings).test(task, datamodule=data)[0]["accuracy"]

    compress = Compress(Budget(macs=0.5), distill=Distill())
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[compress], **settings)
    trainer.fit(task, datamodule=data)
    compressed = trainer.test(task, datamodule=data)[0]["accuracy"]

    print(compress.plan)
    print(f"accuracy: dense {dense:.4f}, compressed {compressed:.4f}")
    return dense, compressed


if __name__ == "__main__":
    main()

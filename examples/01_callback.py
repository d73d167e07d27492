"""Compress in a plain Lightning trainer: one more callback, nothing else changes.

python examples/01_callback.py
"""

import lightning as L

from lightning_compress import Budget, Compress, Distill, Schedule
from lightning_compress.cli.demo.data import DigitsDataModule
from lightning_compress.cli.demo.models import SmallCNN
from lightning_compress.cli.demo.task import ClassificationTask

DENSE_EPOCHS = 20
FINE_TUNING_EPOCHS = 15


def main() -> tuple[float, float]:
    """Returns the accuracy of the dense and of the compressed model."""
    L.seed_everything(0, verbose=False)
    data = DigitsDataModule()
    task = ClassificationTask(SmallCNN(), lr=0.1)
    settings = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False}

    # Your own training, or your own weights.
    trainer = L.Trainer(max_epochs=DENSE_EPOCHS, **settings)
    trainer.fit(task, datamodule=data)
    dense = trainer.test(task, datamodule=data)[0]["accuracy"]

    # The same again with the callback: it searches, swaps, and this fit fine-tunes the factors.
    compress = Compress(
        Budget(params=0.2),
        schedule=Schedule(warmup_steps=20),
        distill=Distill(weight=0.5, temperature=2.0),
    )
    task.lr = 0.05
    trainer = L.Trainer(max_epochs=FINE_TUNING_EPOCHS, callbacks=[compress], **settings)
    trainer.fit(task, datamodule=data)
    compressed = trainer.test(task, datamodule=data)[0]["accuracy"]

    print(compress.plan)
    print(f"accuracy: dense {dense:.4f}, compressed {compressed:.4f}")
    return dense, compressed


if __name__ == "__main__":
    main()

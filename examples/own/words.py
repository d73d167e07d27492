"""Text as dict batches, as tokenizers of Hugging Face make them, for a model of transformers.

In this folder:

    lightning-compress model=hugging_face task=text data.module._target_=words.Words data.classes=2 \
        'task.metrics=[accuracy,f1_score]' dense.epochs=3 finetune.epochs=2
"""

import lightning as L
import torch
from torch.utils.data import DataLoader


class Words(L.LightningDataModule):
    """Sentences of random words; the second class holds a word that the first does not."""

    def __init__(self, batch_size: int = 64, sentences: int = 1500, length: int = 16, vocabulary: int = 1000) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        h, generator = self.hparams, torch.Generator().manual_seed(0)
        words = torch.randint(10, h.vocabulary, (h.sentences, h.length), generator=generator)
        labels = torch.randint(0, 2, (h.sentences,), generator=generator)
        place = torch.randint(0, h.length, (h.sentences,), generator=generator)
        words[labels == 1, place[labels == 1]] = 7
        mask = torch.ones_like(words)
        rows = [{"input_ids": w, "attention_mask": m, "labels": y} for w, m, y in zip(words, mask, labels, strict=True)]
        first, second = int(0.7 * len(rows)), int(0.8 * len(rows))
        self.parts = {"train": rows[:first], "val": rows[first:second], "test": rows[second:]}

    def train_dataloader(self):
        return DataLoader(self.parts["train"], self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.parts["val"], 256)

    def test_dataloader(self):
        return DataLoader(self.parts["test"], 256)

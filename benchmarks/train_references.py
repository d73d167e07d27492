"""Trains the reference networks of `benchmarks.references` and writes their weights.

python -m benchmarks.train_references [NAME ...] [--minutes 12]

AdamW with one cycle on one thread, whose length is a time: the weights here took 5 minutes for the tones, 10 for the
depthwise network, 12 for the ViT, 15 for the GRU, and 30 for the transformer.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from benchmarks.references import REFERENCES, WEIGHTS

BATCH = 32
RATES = {"byte_gru": 4e-3, "depthwise": 4e-3, "tones": 3e-3}
RATE, WARM_UP = 1e-3, 0.1


def train(name: str, minutes: float) -> None:
    """Trains a network for some minutes and writes its weights."""
    torch.manual_seed(0)
    reference = REFERENCES[name]
    model, generator = reference.build(), torch.Generator().manual_seed(1)
    rate = RATES.get(name, RATE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    start, steps, done = time.process_time(), 0, 0.0
    model.train()
    while done < 1:
        done = (time.process_time() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, done / WARM_UP + 0.01, max(1e-3, (1 + math.cos(math.pi * done)) / 2))
        inputs, targets = reference.draw("train", BATCH, generator)
        logits = model(inputs)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 200 == 0:
            print(f"{name}: {done:.0%}, step {steps}, loss {float(loss):.3f}", flush=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, WEIGHTS / f"{name}.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    scores = ", ".join(f"{part} {reference.score(model, part):.4f}" for part in ("choose", "test"))
    print(f"{name}: {parameters:,} parameters, {steps} steps, {reference.measure}: {scores}", flush=True)


def main() -> None:
    """Trains what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(REFERENCES))
    parser.add_argument("--minutes", type=float, default=12.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        train(name, options.minutes)


if __name__ == "__main__":
    main()

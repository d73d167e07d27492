"""A fit with three rounds, killed with SIGKILL at random steps or times and resumed until it ends.

python -m benchmarks.kill_resume [--points 20] [--seed 0]

The final weights are compared bit by bit with those of the uninterrupted fit. Every other kill comes at a random step,
the others at a random time after the fit began, wherever the process is then: in the search, writing a checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from benchmarks.common import publish
from lightning_compress import Budget, Compress

EPOCHS, BATCHES = 6, 6
BUDGETS = (0.8, 0.6, 0.4)
PHASES = [{"budget": {"params": params}, "epochs": EPOCHS // 3} for params in BUDGETS]


class Net(L.LightningModule):
    """A small classifier with momentum, decay and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, 4)
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.net(x))  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=EPOCHS * BATCHES + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Progress(Callback):
    """Counts steps in a file, and stops for good at one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self._file, self._kill_at = folder / "steps", kill_at

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(str(trainer.global_step), encoding="utf-8")
        part.replace(self._file)  # a kill from outside never leaves it empty
        if trainer.global_step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, kill_at: int | None) -> str:
    """Fits, from the last checkpoint in the folder if there is one; returns a digest of the final weights."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    task = Net()
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(8 * BATCHES, 3, 8, 8, generator=generator), torch.randint(4, (8 * BATCHES,), generator=generator)
    )
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            Compress(
                Budget(params=BUDGETS[-1]), method="exact", objective="weight", heal=False, schedule={"phases": PHASES}
            ),
            Progress(folder, kill_at),
            ModelCheckpoint(folder, filename="last", save_top_k=-1, enable_version_counter=False),
        ],
    )
    (folder / "started").touch()
    trainer.fit(task, DataLoader(data, batch_size=8), ckpt_path=last if last.exists() else None)
    digest = hashlib.sha256()
    for name, value in task.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def killed_and_resumed(folder: Path, step: int | None, after: float | None = None) -> tuple[int, int, str]:
    """Runs a fit in processes of its own, the first one killed at a step or some seconds after the fit began.

    Returns:
        Steps and exit status of the first process, and the digest of the last one.
    """
    command = [*_command(folder), *(["--kill-at", str(step)] if step is not None else [])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if after is not None:
            while not (folder / "started").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        status = process.wait()
    steps = folder / "steps"
    return int(steps.read_text(encoding="utf-8")) if steps.exists() else 0, status, resumed(folder)


def resumed(folder: Path) -> str:
    """Runs a fit to its end in a process of its own; returns the digest."""
    done = subprocess.run(_command(folder), check=True, capture_output=True, text=True)
    return done.stdout.split()[-1]


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.kill_resume", "--fit", str(folder)]


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.fit is not None:
        warnings.simplefilter("ignore")
        print(fit(options.fit, options.kill_at))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "whole").mkdir()
        expected = resumed(Path(folder) / "whole")
        began, ended = ((Path(folder) / "whole" / file).stat().st_mtime for file in ("started", "steps"))
        draw = random.Random(options.seed)
        for point in range(options.points):
            own = Path(folder) / str(point)
            own.mkdir()
            # every other one after a time, wherever the process is then: in the search, writing a checkpoint, …
            step = draw.randint(1, EPOCHS * BATCHES - 1) if point % 2 == 0 else None
            after = None if step is not None else draw.uniform(0, 1) * (ended - began)
            reached, status, digest = killed_and_resumed(own, step, after)
            while status == 0 and after is not None:  # it was done before
                shutil.rmtree(own)
                own.mkdir()
                after *= 0.9
                reached, status, digest = killed_and_resumed(own, step, after)
            same = status == -signal.SIGKILL and digest == expected
            point_of_kill = f"step {step}" if step is not None else f"{after:.2f} s"
            rows.append({"killed after": point_of_kill, "steps done": reached, "identical": same})
            print(f"| {point} | {point_of_kill} | {reached} | {'yes' if same else f'NO, exit {status}'} |", flush=True)
    identical = sum(row["identical"] for row in rows)
    title = f"Killed and resumed fits, {identical} of {len(rows)} bit-identical to the uninterrupted one"
    publish("kill_resume", title, rows)


if __name__ == "__main__":
    main()

"""Fits on two processes of the CPU, for test_distributed.py: python tests/ddp_fits.py FOLDER [CASE ...]."""

from __future__ import annotations

import copy
import os
import sys
import traceback
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Budget, Compress
from lightning_compress.core.parallel import shared_map
from lightning_compress.training import distributed
from tests.support.compressing import DEFAULTS, compress
from tests.support.nets import TinyTask
from tests.support.stand_in import StandIn

warnings.filterwarnings("ignore")
try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:  # before Lightning 2.6
    EMAWeightAveraging = None
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else None


def averages():
    """Weight averages beside Compress, of the kind that this Lightning has."""
    if EMAWeightAveraging is not None:
        return EMAWeightAveraging(decay=0.5)
    return StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)


class NoNorm(TinyTask):
    """Without batch norm, with plain SGD: the mean of two ranks' gradients is that of the doubled batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net.norm = nn.Identity()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OwnLoss(TinyTask):
    """Logs a loss that falls on the second rank and rises on the first one."""

    def training_step(self, batch, batch_idx):
        sign = -1 if self.global_rank else 1
        self.log("own_loss", sign * 100.0 * self.current_epoch, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def data(batch_size: int, parts: int = 1) -> DataLoader:
    """All samples, or every `parts`-th one from this rank's number on."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator)
    samples = slice(int(os.environ.get("LOCAL_RANK", "0")) % parts, None, parts)
    return DataLoader(TensorDataset(x[samples], y[samples]), batch_size=batch_size)


class Watch(L.Callback):
    """The loss of every batch, and the weights at the end of every epoch."""

    def __init__(self) -> None:
        self.losses, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def fit(task, callback, *others, batch_size=4, epochs=2, ckpt_path=None, devices=2, strategy="ddp", **settings):
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=bool(others) and any(isinstance(o, ModelCheckpoint) for o in others),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=FOLDER,
        callbacks=[callback, watch, *others],
        **settings,
    )
    start = copy.deepcopy(task)
    # Lightning's sampler shuffles the training data, also those of a loader that does not
    parts = 1 if settings.get("use_distributed_sampler", True) else devices
    trainer.fit(task, data(batch_size, parts), ckpt_path=ckpt_path)
    plan = callback.plan
    return {
        "state": task.state_dict(),
        "layers": plan.layers,
        "kept": plan.kept["params"],
        "losses": watch.losses,
        "epochs": watch.weights,
        "wrapped": type(trainer.strategy.model).__name__,
        "start": start.state_dict(),
        "healing": "regression" in callback.seconds,
    }


def task_of(cls=TinyTask, seed=0):
    torch.manual_seed(seed)
    return cls()


def plain():
    return fit(task_of(NoNorm), compress(), precision="64-true", use_distributed_sampler=False)


def defaults():
    # Each rank makes a module of its own; DDP gives all the first one's weights.
    return fit(
        task_of(seed=int(os.environ.get("LOCAL_RANK", "0"))),
        compress(method="continuous", kinds="auto", **DEFAULTS),
        epochs=1,
    )


def freezing():
    return fit(
        task_of(), compress(kinds="auto", schedule={"phases": [{"epochs": 1, "train": "factors"}]})
    )  # leaves a layer dense


def distillation():
    return fit(task_of(), compress(distill={"weight": 0.4}), accumulate_grad_batches=2)


def frozen_layer():
    task = task_of()
    task.net.conv2.requires_grad_(False)
    return fit(task, compress())


def unused():
    return fit(task_of(), compress(), strategy="ddp_find_unused_parameters_true", epochs=1)


def resume():
    callback = ModelCheckpoint(FOLDER / "resume", filename="{epoch}", save_top_k=-1)
    fit(task_of(), compress(distill={}), callback, epochs=1)
    again = fit(task_of(), compress(distill={}), epochs=3, ckpt_path=FOLDER / "resume" / "epoch=0.ckpt")
    return {"whole": fit(task_of(), compress(distill={}), epochs=3), **again}


def rounds():
    # The training loss is each rank's own: the plateau comes for all when the first one sees it.
    schedule = {
        "phases": [
            {"budget": {"params": 0.8}, "until_plateau": {"monitor": "own_loss", "patience": 1, "min_delta": 10.0}},
            {"budget": {"params": 0.6}, "steps": 2},
            {"budget": {"params": 0.4}},
        ]
    }
    task = task_of(OwnLoss)
    return fit(task, compress(schedule=schedule, distill={}), averages(), epochs=4)


def averaging():
    return fit(task_of(), compress(), averages())


def error_of(function):
    try:
        function()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


def bad_budget():
    task = task_of()
    return {**error_of(lambda: fit(task, compress(0.01))), "state": task.state_dict()}


def failure_of_the_second():
    # in its share of the decompositions, then outside any share
    real, rank = distributed._Ranks.exchange, int(os.environ.get("LOCAL_RANK", "0"))
    task, found = task_of(), []

    def fails(what):
        def exchange(self, label, own):
            if label.startswith(what) and self.rank == 1 and not self._over:
                msg = f"no memory at {label}"
                raise MemoryError(msg)
            return real(self, label, own)

        return exchange

    for what in ("the example input", "the search", "the end"):
        distributed._Ranks.exchange = fails(what)
        try:
            found.append(error_of(lambda: fit(task, compress())))
        finally:
            distributed._Ranks.exchange = real
    found.append({"share": error_of(lambda: in_two(rank))})
    return {"found": found, "state": task.state_dict()}


def in_two(rank):
    def one(item):
        if item == 1:
            msg = f"item {item} fails on rank {rank}"
            raise KeyError(msg)
        return item

    class Strategy:
        global_rank, world_size, root_device = rank, 2, torch.device("cpu")

    with distributed.sharing_work(distributed._Ranks(Strategy())):
        shared_map("items", one, [0, 1, 2])


def out_of_step():
    task = task_of()
    budget = Budget(params=0.4)
    settings = {"method": "exact", "heal": False}
    objective = "moments" if os.environ.get("LOCAL_RANK", "0") == "1" else "weight"
    return error_of(lambda: fit(task, Compress(budget, objective=objective, **settings)))


def shared():
    # who decomposed what, and who made which inputs
    from lightning_compress.analysis import synthetic as synthesis
    from lightning_compress.search import units

    done = {"tables": [], "inputs": 0}
    tabulate, match = units.tabulate, synthesis._match

    def counted_tabulate(layer, **settings):
        if settings["metric"] is not None:  # the first rank alone compares with the weights
            done["tables"].append(layer.name)
        return tabulate(layer, **settings)

    def counted_match(*args):
        done["inputs"] += 1
        return match(*args)

    units.tabulate, synthesis._match = counted_tabulate, counted_match
    try:
        return {**fit(task_of(), compress(method="continuous", kinds="auto", **DEFAULTS), epochs=1), **done}
    finally:
        units.tabulate, synthesis._match = tabulate, match


CASES = [
    plain, defaults, freezing, distillation, frozen_layer, unused, resume, averaging, rounds,
    bad_budget, failure_of_the_second, out_of_step, shared,
]  # fmt: skip


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    StandIn(pytest.MonkeyPatch())  # the same times as in the tests
    results = {}
    for case in CASES:
        if not names or case.__name__ in names:
            try:
                results[case.__name__] = case()
            except Exception:
                results[case.__name__] = {"traceback": traceback.format_exc()}
                print(case.__name__, traceback.format_exc())
                break
    torch.save(results, FOLDER / f"rank{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    main(sys.argv[2:])

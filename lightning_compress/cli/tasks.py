"""A LightningModule for images, text, tables and regression, with metrics of torchmetrics by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torchmetrics
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.training.first_batch import LABELS

Problem = Literal["classification", "regression"]
Metrics = Sequence[str] | Mapping[str, Mapping[str, Any] | None]
_USUAL: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("r2_score", "mean_absolute_error"),
}


class SupervisedTask(LightningModule):
    """Trains any network on batches (inputs, targets), or on dicts with the targets under "labels", "target" or "y".

    Networks that return a dict or an object with `logits`, as those of Hugging Face, are taken as they are.

    Args:
        net: The network.
        problem: "classification" (cross-entropy on logits) or "regression" (squared error).
        num_classes: Its outputs, of a classification.
        metrics: Names of torchmetrics, such as `[accuracy, f1_score]`, or names with their arguments, such as
            `{f1_score: {average: macro}}`; None for the usual ones.
        lr: Peak learning rate of AdamW, along one cycle.
        weight_decay: Of AdamW.

    Raises:
        ConfigurationError: If the problem or a metric is not known.
    """

    def __init__(
        self,
        net: nn.Module,
        problem: Problem = "classification",
        *,
        num_classes: int | None = None,
        metrics: Metrics | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        if problem not in _USUAL:
            msg = f"problem={problem!r}: expected one of {', '.join(_USUAL)}."
            raise ConfigurationError(msg)
        self.net, self.problem, self.lr, self.weight_decay = net, problem, lr, weight_decay
        self.distillable = problem == "classification"
        chosen = metrics if metrics is not None else _USUAL[problem]
        named: Mapping[str, Any] = chosen if isinstance(chosen, Mapping) else dict.fromkeys(chosen)
        classes = num_classes if problem == "classification" else None
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict({name: metric_of(name, classes, **(more or {})) for name, more in named.items()})
            for _ in range(2)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns logits, (B, num_classes), or predictions, (B,) or (B, outputs)."""
        output = self.net(*args, **kwargs)
        if isinstance(output, Mapping):
            output = output["logits"]
        output = cast(Tensor, getattr(output, "logits", output))
        return output.squeeze(-1) if self.problem == "regression" and output.ndim > 1 else output

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns cross-entropy or squared error."""
        loss = self._step(batch)[0]
        self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the metrics with `val_` before their names, and the loss."""
        self._log(batch, self.val_metrics, "val_")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the metrics and the loss."""
        self._log(batch, self.test_metrics, "")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW with one cycle over the whole fit."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def _step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss, outputs and targets."""
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key not in LABELS}
            targets = next((value for key, value in batch.items() if key in LABELS), None)
            if targets is None:
                msg = f"a batch has no targets, only {', '.join(map(str, batch))}: name them 'labels'."
                raise ConfigurationError(msg)
            outputs = self(**inputs)
        else:
            *inputs_, targets = batch
            outputs = self(*inputs_)
        if self.problem == "regression":
            targets = targets.to(outputs.dtype).reshape(outputs.shape)
            return F.mse_loss(outputs, targets), outputs, targets
        return F.cross_entropy(outputs, targets), outputs, targets

    def _log(self, batch: Any, metrics: nn.ModuleDict, prefix: str) -> None:
        loss, outputs, targets = self._step(batch)
        for name, metric in metrics.items():
            cast(Metric, metric)(outputs, targets)
            self.log(f"{prefix}{name}", cast(Metric, metric), on_epoch=True, on_step=False, prog_bar=bool(prefix))
        self.log(f"{prefix}loss", loss, on_epoch=True, on_step=False, batch_size=len(targets))


def metric_of(name: str, num_classes: int | None, **settings: Any) -> Metric:
    """Returns a metric of torchmetrics.

    Args:
        name: Such as "accuracy", "f1_score" or "MeanSquaredError".
        num_classes: Of a classification; None for a regression.
        **settings: Further arguments of the metric.

    Raises:
        ConfigurationError: If there is no such metric, or it does not take the arguments.
    """
    known = {each.lower(): each for each in torchmetrics.__all__ if inspect.isclass(getattr(torchmetrics, each, None))}
    found = known.get(name.replace("_", "").lower())
    if found is None:
        spelt = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", each).lower() for each in known.values()]
        msg = f"torchmetrics has no metric {name!r}.{did_you_mean(name, spelt)}"
        raise ConfigurationError(msg)
    target = getattr(torchmetrics, found)
    if num_classes is not None and "task" in inspect.signature(target.__new__).parameters:
        settings = {"task": "multiclass", "num_classes": num_classes, **settings}
    try:
        return cast(Metric, target(**settings))
    except (TypeError, ValueError) as error:
        msg = f"metric {name!r} cannot be made with {settings}: {error}"
        raise ConfigurationError(msg) from error

"""What a compression keeps, as metrics of torchmetrics: for any LightningModule, or without one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.core.checks import shown
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.surgery.embodied import embodied_plan

RESOURCES = ("params", "bytes", "macs")


class CompressionRatio(Metric):
    """How many times smaller a compressed model is than the dense one it was made of; 1 for a dense model.

    Several updates, and several processes, give the ratio of the sums.

    Args:
        resource: "params", "bytes" or "macs".
        example_input: See `search_ranks`; for MACs, which are counted in a forward pass.
        **kwargs: Of torchmetrics.Metric.

    Raises:
        ConfigurationError: If the resource is unknown, or MACs are to be counted without an example input.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    dense: Tensor
    kept: Tensor

    def __init__(
        self,
        resource: Literal["params", "bytes", "macs"] = "params",
        *,
        example_input: ExampleInput | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resource not in RESOURCES:
            msg = f"CompressionRatio(resource={shown(resource)}): expected one of {', '.join(RESOURCES)}."
            raise ConfigurationError(msg)
        if resource == "macs" and example_input is None:
            msg = "CompressionRatio(resource='macs') counts in a forward pass: pass example_input=, such as a shape."
            raise ConfigurationError(msg)
        self.resource, self.example_input = resource, example_input
        self.add_state("dense", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("kept", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, model: nn.Module, dense: nn.Module | None = None) -> None:
        """Looks at a model.

        Args:
            model: The compressed one.
            dense: What it is compared with; None for what its factorised layers were made of.

        Raises:
            ConfigurationError: If one of the two is no module.
            ExampleInputError: If it fails on the example input.
        """
        for name, value in (("model", model), ("dense", dense)):
            if not isinstance(value, nn.Module) and (name == "model" or value is not None):
                msg = f"CompressionRatio.update({name}={shown(value)}): expected a torch.nn.Module."
                raise ConfigurationError(msg)
        example = self.example_input if self.resource == "macs" else None
        if dense is None:
            plan = embodied_plan(model, example)
            before, now = plan.dense, plan.compressed
        else:
            before, now = (measure_costs(each, example) for each in (dense, model))
        self.dense += self._count(before)
        self.kept += self._count(now)

    def _count(self, costs: Costs) -> int:
        return int(getattr(costs, self.resource))

    @override
    def compute(self) -> Tensor:
        """Returns the ratio."""
        return self.dense / self.kept


class RelativeError(Metric):
    """The share of the variance of the dense model's outputs that a compressed one loses: ‖f − f̂‖² / ‖f − mean f‖².

    That is the distance by which the search, the repair and the distillation judge (`Plan.output_distance`): 0 for the
    same outputs, 1 for the best ones that do not depend on the input. The mean is over the samples, the first
    dimension, of every value on its own, so all outputs have one shape but for that dimension. Where the outputs do not
    vary it is ‖f − f̂‖². Sums are in double precision; every process has to see a batch.

    Args:
        **kwargs: Of torchmetrics.Metric.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    error: Tensor
    square: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("error", "square", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Takes in the outputs on a batch.

        Args:
            preds: Those of the compressed model, (samples, …).
            target: Those of the dense one, of the same shape.

        Raises:
            ConfigurationError: If the shapes differ, or are not those of the batches before.
        """
        _require_same_shape("RelativeError", preds, target)
        own = target.detach().double()
        if self.count and self.total.shape != own.shape[1:]:
            shapes = tuple(own.shape[1:]), tuple(self.total.shape)
            msg = f"RelativeError: outputs of shape {shapes[0]} after {shapes[1]}: use one metric for each."
            raise ConfigurationError(msg)
        self.error += (preds.detach().double() - own).square().sum()
        self.square += own.square().sum()
        self.total = self.total + own.sum(dim=0)
        self.count += len(own)

    @override
    def compute(self) -> Tensor:
        """Returns the error."""
        variation = self.square - self.total.square().sum() / self.count.clamp_min(1)
        rounding = self.square * torch.finfo(torch.float64).eps * self.count
        return torch.where(variation > rounding, self.error / variation, self.error)


class TeacherAgreement(Metric):
    """The share of samples to which a compressed model gives the class that the dense one gives.

    Args:
        dim: Of the classes, 1 for images; -1 for token models, whose outputs are (samples, tokens, classes).
        **kwargs: Of torchmetrics.Metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    agreed: Tensor
    count: Tensor

    def __init__(self, *, dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(dim, int) or isinstance(dim, bool):
            msg = f"TeacherAgreement(dim={shown(dim)}): expected a whole number."
            raise ConfigurationError(msg)
        self.dim = dim
        self.add_state("agreed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Takes in the outputs on a batch.

        Args:
            preds: Logits or probabilities of the compressed model.
            target: Those of the dense one, of the same shape.
            mask: Which places count, of that shape without the classes; None for all.

        Raises:
            ConfigurationError: If shapes do not fit, or there is no such dimension.
        """
        _require_same_shape("TeacherAgreement", preds, target)
        if not -preds.ndim <= self.dim < preds.ndim:
            msg = f"TeacherAgreement(dim={self.dim}): the outputs have no such dimension, shape {tuple(preds.shape)}."
            raise ConfigurationError(msg)
        same = preds.argmax(self.dim) == target.argmax(self.dim)
        if mask is not None:
            if mask.shape != same.shape:
                msg = f"TeacherAgreement: mask is of shape {tuple(mask.shape)}, expected {tuple(same.shape)}."
                raise ConfigurationError(msg)
            same = same[mask.bool()]
        self.agreed += same.sum()
        self.count += same.numel()

    @override
    def compute(self) -> Tensor:
        """Returns the share."""
        return self.agreed / self.count


def _require_same_shape(owner: str, preds: Tensor, target: Tensor) -> None:
    if not isinstance(preds, Tensor) or not isinstance(target, Tensor) or preds.shape != target.shape or not preds.ndim:
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else shown(value) for value in (preds, target)]
        msg = f"{owner}: preds {shapes[0]} and target {shapes[1]}: expected two tensors of one shape (samples, …)."
        raise ConfigurationError(msg)

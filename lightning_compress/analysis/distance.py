"""The distance of a model's outputs from those of the dense one: one definition for search, repair and distillation.

    D = ‖f − f̂‖² / ‖f − mean f‖²

where f are the dense model's outputs and mean f is their mean over the samples that the distance is taken over, the
first dimension of the outputs, for every value of a sample on its own. So D is the share of the outputs' variance over
the inputs that is lost: 0 for the same outputs, 1 for the best ones that do not depend on the input.

The loss of fine-tuning by "layers" or "blocks" is another one (`training.distill.inner_distance`): it divides by the
variance over all values, which does not grow with the batch and which a batch of one sample has too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments, inference, output_tensors

NEGLIGIBLE = 0.02
"""Distance below which there is nothing to gain: real inputs differ more from synthetic ones than that."""
SAME = 1e-12
"""Variance over the samples, relative to that over all values, up to which samples do not differ but by rounding."""


def squared_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Returns ‖f − f̂‖² over all outputs, in float64; it can be differentiated."""
    return torch.stack([(o - t).double().square().sum() for o, t in zip(outputs, targets, strict=True)]).sum()


class OutputDistance:
    """D over all outputs of a model, pooled, on inputs that come batch by batch or in parts of batches.

    However they are parted, the mean is that over all samples; outputs of different sizes have means of their own.
    """

    def __init__(self) -> None:
        self._error = self._variation = 0.0
        self._means: dict[tuple[int, torch.Size], tuple[int, Tensor]] = {}

    def add(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Takes in the outputs f̂ and f of both models on some inputs."""
        if targets:
            self._error += float(squared_error(outputs, targets))
        for index, target in enumerate(targets):
            values = target if target.ndim else target[None]
            mean, count = values.mean(dim=0), len(values)
            self._variation += float((values - mean).double().square().sum())
            key, mean = (index, mean.shape), mean.double()
            if key in self._means:  # Chan et al. 1983, "Algorithms for Computing the Sample Variance", equation 2.1
                before, known = self._means[key]
                step, total = mean - known, before + count
                self._variation += float(step.square().sum()) * before * count / total
                mean, count = known + step * (count / total), total
            self._means[key] = count, mean

    @property
    def value(self) -> float:
        """D; ‖f − f̂‖² where the dense outputs do not vary, infinite where it is not finite."""
        value = self._error / self._variation if self._variation else self._error
        return math.inf if math.isnan(value) else value


def output_distance(dense: nn.Module, model: nn.Module, batches: Sequence[Arguments]) -> float:
    """Returns D of a model's outputs from the dense model's on some batches, see `OutputDistance`."""
    distance = OutputDistance()
    for args, kwargs in batches:
        with inference(dense), inference(model):
            targets = output_tensors(dense(*args, **kwargs))
            distance.add(output_tensors(model(*args, **kwargs)), targets)
    return distance.value


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Returns D of one tensor (samples, …) on one batch, the term of a loss: it can be differentiated.

    Samples that do not differ, as of a batch of one, say nothing of a variance: the mean is then over all values.
    """
    variance = (target - target.mean(dim=0)).square().mean()
    whole = (target - target.mean()).square().mean()
    variance = torch.where(variance > SAME * whole, variance, whole).clamp_min(torch.finfo(target.dtype).tiny)
    return (output - target).square().mean() / variance

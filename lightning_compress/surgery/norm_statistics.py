"""Running statistics of batch norms after the layers before them were factorised, a step of the repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_compress.analysis.channels import channel_moments
from lightning_compress.analysis.synthetic import running_norms
from lightning_compress.analysis.trace import Arguments, hooked, inference, input_of, sample_counts

LARGEST_FACTOR = 4.0
"""By which a running variance is changed at most."""


def move_norm_statistics_(dense: nn.Module, model: nn.Module, batches: Sequence[Arguments]) -> None:
    """Moves the running statistics of batch norms by what the factors changed in what enters them.

    The mean by the difference to the dense model's on the same inputs, the variance by the ratio: what synthetic inputs
    themselves differ by from real ones cancels. Norms that take their turn later see the earlier ones corrected.
    """
    names = {id(module): name for name, module in model.named_modules()}
    norms = [_Norm(norm, cast(_BatchNorm, dense.get_submodule(names[id(norm)]))) for norm in running_norms(model)]
    with hooked(handle for norm in norms for handle in norm.hooks()):
        for args, kwargs in batches:
            if min(sample_counts((args, kwargs)), default=1) > 1:  # the variance of one sample is none
                for norm in norms:
                    norm.expected.clear()
                with inference(dense):
                    dense(*args, **kwargs)
                with inference(model):
                    model(*args, **kwargs)
    for norm in norms:
        norm.finish()


class _Norm:
    """A batch norm of the compressed model that follows what enters it, call by call.

    Attributes:
        expected: Moments of what entered the dense model's norm in the calls of this batch that are still to come.
    """

    def __init__(self, norm: _BatchNorm, dense: _BatchNorm) -> None:
        self._norm, self._dense = norm, dense
        self._mean, self._variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        self._first = self._mean.clone(), self._variance.clone()
        self._shift, self._factor = (torch.zeros_like(self._mean, dtype=torch.float32) for _ in range(2))
        self._count = 0
        self.expected: list[tuple[Tensor, Tensor]] = []

    def hooks(self) -> Iterator[RemovableHandle]:
        """Yields the hooks on the dense model's norm and on this one."""
        yield self._dense.register_forward_pre_hook(
            lambda _module, args, kwargs: self.expected.append(channel_moments(input_of(args, kwargs))),
            with_kwargs=True,
        )
        yield self._norm.register_forward_pre_hook(
            lambda _module, args, kwargs: self._correct(input_of(args, kwargs)), with_kwargs=True
        )

    def _correct(self, inputs: Tensor) -> None:
        if not self.expected:
            return
        (mean, variance), (dense_mean, dense_variance) = channel_moments(inputs), self.expected.pop(0)
        eps = self._norm.eps
        shift = mean - dense_mean
        factor = ((variance + eps) / (dense_variance + eps)).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
        self._mean.copy_(self._first[0] + shift)
        self._variance.copy_(self._first[1] * factor)
        self._shift += shift
        self._factor += factor
        self._count += 1

    def finish(self) -> None:
        """Moves the statistics by the mean over all calls."""
        self._mean.copy_(self._first[0] + self._shift / max(1, self._count))
        self._variance.copy_(self._first[1] * (self._factor / self._count if self._count else 1.0))

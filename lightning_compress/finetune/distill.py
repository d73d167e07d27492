"""Logit distillation from the dense model."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.config import Distill
from lightning_compress.copying import detached_copy
from lightning_compress.errors import ConfigurationError, DistillationError

_IMAGE_NDIM = 4


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns T² KL(teacher ‖ student) of softened class distributions, averaged over all else.

    Args:
        student: Logits, classes in the last dimension, or in dimension 1 if there are four or
            more (dense prediction).
        teacher: Logits of the same shape.
        temperature: T.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    dim = 1 if student.ndim >= _IMAGE_NDIM else -1
    log_student = F.log_softmax(student.float() / temperature, dim=dim)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=dim)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=dim)
    return divergence.mean() * temperature**2


def fingerprint(module: nn.Module) -> str:
    """Returns a SHA-256 over names and values of the state dict."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Teacher:
    """A frozen copy of the dense module whose outputs are the student's targets.

    It is no submodule of anything, so it is in no checkpoint and no optimizer.

    Args:
        root: The model, not yet factorised.
        settings: What to distil and how.
        convert: Applied to the copy, such as a conversion of its precision.

    Raises:
        ConfigurationError: If `settings.module` is no submodule of the model.
    """

    def __init__(
        self, root: nn.Module, settings: Distill, *, convert: Callable[[nn.Module], nn.Module] = lambda module: module
    ) -> None:
        self.settings = settings
        try:
            target = root.get_submodule(settings.module or "")
        except AttributeError as error:
            known = ", ".join(name for name, _ in root.named_children())
            msg = f"Distill(module={settings.module!r}): {type(root).__name__} has no such submodule. It has: {known}."
            raise ConfigurationError(msg) from error
        self.module = convert(detached_copy(target)).eval().requires_grad_(False)
        self.fingerprint = fingerprint(self.module)

    def wrap(self, root: nn.Module, step: Callable[..., Any], log: Callable[[str, Tensor], None]) -> Distillation:
        """Returns the running distillation of a training step; detach it at the end."""
        return Distillation(self, root, step, log)


class Distillation:
    """A training step whose loss includes the distance to the teacher.

    Attributes:
        step: The wrapped training step, with the signature of the original one.
    """

    def __init__(
        self, teacher: Teacher, root: nn.Module, step: Callable[..., Any], log: Callable[[str, Tensor], None]
    ) -> None:
        self._teacher = teacher
        self._log = log
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        self._recording = False
        target = root.get_submodule(teacher.settings.module or "")
        self._handle = target.register_forward_hook(self._record, with_kwargs=True)

        @functools.wraps(step)  # without it Lightning passes the step one argument too many
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._calls.clear()
            self._recording = True
            try:
                output = step(*args, **kwargs)
            finally:
                self._recording = False
            return self._with_distillation(output)

        self.step = wrapped

    def detach(self) -> None:
        """Removes the hook."""
        self._handle.remove()

    def _record(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._recording:
            self._calls.append((args, kwargs, output))

    def _with_distillation(self, output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:  # Lightning's way to skip a batch
            return output
        weight = self._teacher.settings.weight
        distance = self._distance()
        self._log("distill_loss", distance.detach())
        total = (1 - weight) * loss + weight * distance
        return {**output, "loss": total} if isinstance(output, dict) else total

    def _distance(self) -> Tensor:
        settings = self._teacher.settings
        if not self._calls:
            what = f"submodule {settings.module!r}" if settings.module else "the LightningModule itself, self(...)"
            msg = (
                f"distillation found no logits: the training step never called {what}. "
                "Name the submodule whose output are the logits, as in Distill(module='model')."
            )
            raise DistillationError(msg)
        distances = []
        for args, kwargs, student in self._calls:
            with torch.no_grad():
                teacher = self._teacher.module(*args, **kwargs)
            if not isinstance(student, Tensor) or not isinstance(teacher, Tensor) or student.ndim < 2:  # noqa: PLR2004
                msg = f"distillation needs logits, a tensor (batch, classes, …); got {type(student).__name__}."
                raise DistillationError(msg)
            distances.append(distillation_loss(student, teacher, settings.temperature))
        self._calls.clear()
        return torch.stack(distances).mean()

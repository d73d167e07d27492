"""Distillation from the dense model: logits, outputs of layers or blocks, or the user's own function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lightning_compress.analysis.trace import hooked, output_tensors
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.compat import is_compiled, tree_map
from lightning_compress.core.copies import detached_copy, digest_of
from lightning_compress.core.errors import ConfigurationError, DistillationError
from lightning_compress.core.fine_tuning import Distill
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.unfused import unfusable, unfuse_
from lightning_compress.training.compat import is_compiled_by_lightning

_IMAGE_NDIM = 4
SMALLEST_SPREAD = 1e-6
"""A layer whose outputs vary less, a dead one, is judged by its plain distance times the inverse."""


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
    return digest_of(module.state_dict().items())


class Teacher:
    """A frozen copy of the dense module whose outputs are the student's targets.

    It is no submodule of anything, so it is in no checkpoint and no optimizer.

    Args:
        root: The model, not yet factorised.
        settings: What to distil and how.
        convert: Applied to the copy, such as a conversion of its precision.

    Raises:
        ConfigurationError: If `settings.module` or one of `settings.blocks` is no submodule of the model.
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
        known_blocks = dict(target.named_modules())
        for name in settings.blocks or ():
            if name not in known_blocks:
                msg = f"Distill(blocks=...): {name!r} is no submodule.{did_you_mean(name, known_blocks)}"
                raise ConfigurationError(msg)
        self.module = convert(detached_copy(target)).eval().requires_grad_(False)
        self.fingerprint = fingerprint(self.module)
        self._dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        if settings.dtype is not None:
            self.module.to(getattr(torch, settings.dtype))
        if settings.kind == "layers":  # the projections of attention and recurrent layers are layers too
            unfuse_(self.module, [name for name, reason in unfusable(self.module).items() if reason is None])

    def targets(self, call: Call, names: Sequence[str]) -> Call:
        """Returns what the teacher makes of the same arguments, with the outputs of some submodules."""
        args, kwargs = call.args, call.kwargs
        if self.settings.dtype is not None:
            args, kwargs = _cast((args, kwargs), getattr(torch, self.settings.dtype))
        found = Call(args, kwargs)
        with torch.no_grad(), hooked(_watch(self.module.get_submodule(name), name, lambda: found) for name in names):
            found.output = self.module(*args, **kwargs)
        if self.settings.dtype is not None:
            found.output = _cast(found.output, self._dtype)
        return found

    def wrap(
        self,
        root: nn.Module,
        step: Callable[..., Any],
        log: Callable[[str, Tensor], None],
        *,
        enabled: Callable[[], bool] = lambda: True,
        manual: bool = False,
    ) -> Distillation:
        """Returns the running distillation of a training step; detach it at the end.

        Args:
            root: The student.
            step: Its training step.
            log: Called with a name and a value.
            enabled: Whether the next step is distilled.
            manual: Whether the distance is added in `Distillation.backward` instead of to the step's loss.
        """
        return Distillation(self, root, step, log, enabled=enabled, manual=manual)


@dataclass
class Call:
    """One call of the student's or the teacher's module.

    Attributes:
        args: Its arguments.
        kwargs: Those by keyword.
        output: What it returned.
        inner: Outputs of the watched submodules, by name and call by call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    inner: dict[str, list[Tensor]] = field(default_factory=dict)


def _runs_compiled(root: nn.Module) -> bool:
    """Returns whether a LightningModule, or a module in it, is run through torch.compile."""
    return is_compiled_by_lightning(root) or any(is_compiled(m) for m in root.modules())


class Distillation:
    """A training step whose loss includes the distance to the teacher.

    Attributes:
        step: The wrapped training step, with the signature of the original one.
    """

    def __init__(
        self,
        teacher: Teacher,
        root: nn.Module,
        step: Callable[..., Any],
        log: Callable[[str, Tensor], None],
        *,
        enabled: Callable[[], bool],
        manual: bool,
    ) -> None:
        self._teacher = teacher
        self._root = root
        self._log = log
        self._manual = manual
        self._function = teacher.settings.imported()
        self._calls: list[Call] = []
        self._open: Call | None = None
        self._recording = self._used = self._called = False
        self._batch: Any = None
        self._names: tuple[str, ...] = ()
        self._handles: list[RemovableHandle] = []
        self.attach()

        @functools.wraps(step)  # without it Lightning passes the step one argument too many
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not enabled():
                return step(*args, **kwargs)
            self._calls.clear()
            self._batch = args[0] if args else next(iter(kwargs.values()), None)
            self._recording, self._used, self._called, self._open = True, False, False, None
            try:
                with self._direct_calls():
                    output = step(*args, **kwargs)
                return self._finished(output)
            finally:
                self._recording, self._batch = False, None
                self._calls.clear()

        self.step = wrapped

    def __reduce__(self) -> tuple[type[Distillation], tuple[()]]:
        """Leaves nothing of it in copies and pickles of the module, which hold its hooks."""
        return _Over, ()

    def attach(self) -> None:
        """Puts the hooks on the student, anew after its layers were exchanged."""
        self.detach()
        settings = self._teacher.settings
        target = self._root.get_submodule(settings.module or "")
        self._names = tuple(settings.blocks or ())
        if settings.kind == "layers":
            self._names = tuple(name for name, m in target.named_modules() if isinstance(m, FactorisedLayer))
        # The target's own hooks come last: of a block that is the target itself the output is noted before.
        self._handles = [
            _watch(target.get_submodule(name), name, lambda: self._open if self._recording else None)
            for name in self._names
        ]
        self._handles.append(target.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(target.register_forward_hook(self._record, with_kwargs=True))
        if _runs_compiled(self._root):
            torch.compiler.reset()  # compiled code does not look for hooks that came later

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a `manual_backward` whose loss includes the distance of the calls since the previous one."""

        @functools.wraps(backward)
        def wrapped(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            return backward(self._combined(loss) if self._calls else loss, *args, **kwargs)

        return wrapped

    @contextlib.contextmanager
    def _direct_calls(self) -> Iterator[None]:
        """Notes calls of `forward` itself too, which pass by hooks; what is compiled has been compiled without."""
        target = self._root.get_submodule(self._teacher.settings.module or "")
        if is_compiled(target) or is_compiled_by_lightning(self._root):
            yield
            return
        own, forward = vars(target).get("forward"), target.forward

        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._called or not self._recording:
                return forward(*args, **kwargs)
            self._begin(target, args, kwargs)
            output = forward(*args, **kwargs)
            self._record(target, args, kwargs, output)
            return output

        vars(target)["forward"] = noted
        try:
            yield
        finally:
            if own is None:
                vars(target).pop("forward", None)
            else:
                vars(target)["forward"] = own

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording:
            self._open, self._called = Call(args, kwargs), True

    def _record(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._recording:
            call, self._open, self._called = self._open or Call(args, kwargs), None, False
            call.output = output
            self._calls.append(call)

    def _finished(self, output: Any) -> Any:
        if self._manual:
            if not self._used:
                self._require_calls()
                msg = "distillation needs the loss: pass it to self.manual_backward(loss) in the training step."
                raise DistillationError(msg)
            return output
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:  # Lightning's way to skip a batch
            return output
        self._require_calls()
        total = self._combined(loss)
        return {**output, "loss": total} if isinstance(output, dict) else total

    def _combined(self, loss: Tensor) -> Tensor:
        settings = self._teacher.settings
        distance = torch.stack([self._distance(call) for call in self._calls]).mean()
        self._calls.clear()
        self._used = True
        self._log("distill_loss", distance.detach())
        return (1 - settings.weight if settings.is_share else 1) * loss + settings.weight * distance

    def _require_calls(self) -> None:
        if not self._calls:
            module = self._teacher.settings.module
            what = f"submodule {module!r}" if module else "the LightningModule itself, self(...)"
            msg = (
                f"distillation found no logits: the training step never called {what}. "
                "Name the submodule whose output are the logits, as in Distill(module='model')."
            )
            raise DistillationError(msg)

    def _distance(self, call: Call) -> Tensor:
        settings, student = self._teacher.settings, call.output
        targets = self._teacher.targets(call, self._names)
        if self._function is not None:
            return self._of_function(student, targets.output)
        if settings.kind != "logits":
            return inner_distance(call.inner, targets.inner)
        teacher = targets.output
        if not isinstance(student, Tensor) or not isinstance(teacher, Tensor) or student.ndim < 2:  # noqa: PLR2004
            msg = f"distillation needs logits, a tensor (batch, classes, …); got {type(student).__name__}."
            raise DistillationError(msg)
        return distillation_loss(student, teacher, settings.temperature)

    def _of_function(self, student: Any, teacher: Any) -> Tensor:
        distance = self._function(student, teacher, self._batch) if self._function is not None else None
        if not isinstance(distance, Tensor) or distance.ndim:
            got = f"shape {tuple(distance.shape)}" if isinstance(distance, Tensor) else type(distance).__name__
            msg = (
                f"Distill(function={self._teacher.settings.function!r}) must return a tensor of one number; got {got}."
            )
            raise DistillationError(msg)
        return distance


class _Over(Distillation):
    """What is left of a distillation in a copy of the module: hooks that record nothing."""

    _recording = False

    def __init__(self) -> None:
        pass


def inner_distance(student: Mapping[str, Sequence[Tensor]], teacher: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Returns the mean of ‖y − ŷ‖² / ‖y − mean y‖² over all outputs of all layers.

    Raises:
        DistillationError: If a layer was called more often in the one than in the other, or none was at all.
    """
    distances = []
    for name, targets in teacher.items():
        outputs = student.get(name, ())
        if [o.shape for o in outputs] != [t.shape for t in targets]:
            msg = f"distillation cannot compare the outputs of {name!r}: student and teacher call it differently."
            raise DistillationError(msg)
        for output, target in zip(outputs, targets, strict=True):
            goal = target.float()
            spread = (goal - goal.mean()).square().mean().clamp_min(SMALLEST_SPREAD)
            distances.append((output.float() - goal).square().mean() / spread)
    if not distances:
        msg = "distillation found no outputs of the layers or blocks: the training step never called them."
        raise DistillationError(msg)
    return torch.stack(distances).mean()


class _Watch:
    """Notes the outputs of a submodule; in copies and pickles of the module it notes nothing."""

    def __init__(self, name: str, current: Callable[[], Call | None]) -> None:
        self._name, self._current = name, current

    def __reduce__(self) -> tuple[type[_Watch], tuple[Any, ...]]:
        return _Watch, (self._name, _no_call)

    def keep(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """The hook."""
        call = self._current()
        if call is None:
            return None
        call.inner.setdefault(self._name, []).extend(output_tensors(output))
        return output.clone() if isinstance(output, Tensor) else None  # what follows may change it in place


def _no_call() -> Call | None:
    return None


def _watch(module: nn.Module, name: str, current: Callable[[], Call | None]) -> RemovableHandle:
    return module.register_forward_hook(_Watch(name, current).keep)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)

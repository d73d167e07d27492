"""Whether a compressed model still runs the dense one's computation: one forward pass of each on the example input.

In the pass of the compressed model every factorised layer works out its own output and hands on what the dense layer
makes of the same input. Nothing but the layers was changed, so all that follows must be as in the dense model: the
same calls of the same layers in the same order, and the same outputs, whatever the factors lose. Where it is not, the
model's code looked at the layer, as in `isinstance(layer, nn.Linear)`, or ran another one.

The same pass counts the multiply-accumulates as they really run, and notes whose factors are read elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from lightning_compress.analysis.agreement import (
    LEAST_TOLERANCE,
    difference_of_outputs,
    form_of,
    seed_,
)
from lightning_compress.analysis.trace import (
    Arguments,
    ExampleInput,
    WeightUses,
    as_arguments,
    flop_counter,
    hooked,
    inference,
    run,
    shape_text,
)
from lightning_compress.core.compat import tree_leaves
from lightning_compress.core.errors import (
    CompressionWarning,
    ExampleInputError,
    ForwardMismatchError,
    InfeasibleBudgetError,
)
from lightning_compress.core.plan import MOST_NAMED, Plan, percent
from lightning_compress.layers.adapters import adapter_of
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.folding import folded
from lightning_compress.layers.unfused import unfused

MISCOUNTED = 0.02
"""Relative difference of the multiply-accumulates from the plan's above which the plan is corrected."""

Pairs = Sequence[tuple[str, nn.Module, FactorisedLayer]]
"""Name, dense module and factorised layer of all that was replaced."""


@dataclass
class Pass:
    """What a forward pass did.

    Attributes:
        calls: Names of the modules in the order of their calls.
        entered: Norms of the tensors that entered each of these.
        outputs: What the model returned.
        macs: Multiply-accumulates, as `Trace.macs`.
        dense_calls: Names of layers whose dense module ran although it was replaced.
        read: Names of layers whose factors were read outside their own forward pass.
        wrong: What a factorised layer returned in another shape or dtype than the dense one.
    """

    calls: list[str] = field(default_factory=list)
    entered: list[tuple[float, ...]] = field(default_factory=list)
    outputs: Any = None
    macs: int = 0
    dense_calls: dict[str, None] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    wrong: str | None = None


@dataclass(frozen=True)
class ForwardCheck:
    """A dense model's forward pass, to compare that of the compressed model with.

    Attributes:
        model: The model.
        arguments: Of its forward pass, at batch 1.
        shown: The example input as a message shows it.
        dense: What the pass did.
    """

    model: nn.Module
    arguments: Arguments
    shown: str
    dense: Pass

    @classmethod
    def of(cls, model: nn.Module, example_input: ExampleInput) -> ForwardCheck:
        """Runs the dense model.

        Raises:
            ExampleInputError: If the example input has a wrong type or the model fails on it.
        """
        arguments, shown = as_arguments(model, example_input), f"example_input {shape_text(example_input)}"
        return cls(model, arguments, shown, _run(model, arguments, shown, ()))

    def compare(self, pairs: Pairs) -> Pass:
        """Runs the model after the swap, and returns what it did.

        Raises:
            ForwardMismatchError: If it is another computation; the message names layers and cause.
        """
        try:
            after = _run(self.model, self.arguments, self.shown, pairs)
        except ExampleInputError as error:
            cause = error.__cause__ or error
            msg = f"after the swap {_said(error)}. {_ADVICE}"
            raise ForwardMismatchError(msg) from cause
        difference = _difference(self.dense, after, [name for name, *_ in pairs])
        if difference is not None:
            raise ForwardMismatchError(difference)
        return after

    def is_reproducible(self) -> bool:
        """Returns whether the model, dense again, does the same once more; one that does not cannot be compared."""
        try:
            again = _run(self.model, self.arguments, self.shown, ())
        except ExampleInputError:
            return False
        return _difference(self.dense, again, ()) is None


_ADVICE = (
    "The model's code looks at its layers in another way than by calling them, as in isinstance(layer, nn.Linear) or "
    "nn.Conv2d, or by attributes that a factorised layer lacks: let it ask for what does not change with the layer's "
    "class (a factorised one has its name as dense_type), or leave such layers dense with exclude."
)


def _said(error: Exception) -> str:
    return str(error).rstrip(". ")


def _run(model: nn.Module, arguments: Arguments, shown: str, pairs: Pairs) -> Pass:
    """Runs a model with attention and recurrent layers unfused; factorised layers hand on what the dense ones make."""
    with unfused(model):
        found, flops = Pass(), flop_counter()
        uses = WeightUses({name: (layer, *layer.factors().values()) for name, _, layer in pairs})
        with hooked(_hooks(model, pairs, found, uses)), inference(model), uses, flops:
            seed_(model)
            found.outputs = run(model, arguments, shown)
        found.macs, found.read = flops.get_total_flops() // 2, frozenset(uses.read_elsewhere)
        return found


def _hooks(model: nn.Module, pairs: Pairs, found: Pass, uses: WeightUses) -> Iterator[RemovableHandle]:
    """Yields the hooks that note what is done, and those that hand on what the dense layers make."""
    for name, module in _watched(model):
        yield module.register_forward_pre_hook(_noting(found, name), with_kwargs=True)
    for name, dense, layer in pairs:  # the two share their hooks
        yield layer.register_forward_pre_hook(_entering(found, uses, name, dense))
        yield layer.register_forward_hook(_handing_on(found, uses, name, dense), with_kwargs=True, prepend=True)
        if dense._forward_pre_hooks is not layer._forward_pre_hooks:
            yield dense.register_forward_pre_hook(_entering(found, uses, name, dense))


def _watched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns all modules but those inside layers that are or can be factorised, and TorchScript's."""
    whole = [m for m in model.modules() if isinstance(m, FactorisedLayer) or adapter_of(m) is not None]
    parts = {id(part) for module in whole for part in module.modules() if part is not module}
    return [
        (name, module)
        for name, module in model.named_modules()
        if id(module) not in parts and not isinstance(module, torch.jit.ScriptModule)
    ]


def _noting(found: Pass, name: str) -> Callable[..., None]:
    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found.calls.append(name)
        found.entered.append(_norms((args, kwargs)))

    return note


def _entering(found: Pass, uses: WeightUses, name: str, dense: nn.Module) -> Callable[..., None]:
    def enter(module: nn.Module, _args: Any) -> None:
        if module is dense:
            found.dense_calls[name] = None
        else:
            uses.enter(name)

    return enter


def _handing_on(found: Pass, uses: WeightUses, name: str, dense: nn.Module) -> Callable[..., Any]:
    """Returns a hook that hands on what the dense layer makes of the same input; it comes before those of the user."""
    plain = folded(dense)

    def hand_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module is dense:
            return None
        uses.leave(name)
        with _disable_current_modes():  # it is not part of the compressed model
            target = plain.forward(*args, **kwargs)
        if form_of(output) != form_of(target):
            found.wrong = (
                found.wrong or f"{name!r} returns {form_of(output)} where the dense layer returned {form_of(target)}"
            )
            return None
        return torch.empty_like(output).copy_(target)  # in the memory format of the factorised layer's own

    return hand_on


def checked(check: ForwardCheck, plan: Plan, pairs: Pairs) -> Plan:
    """Compares the model after the swap, and returns the plan with the multiply-accumulates as they really run.

    Raises:
        ForwardMismatchError: As `ForwardCheck.compare`.
        InfeasibleBudgetError: If a budget of MACs is missed by what really runs.
    """
    after = check.compare(pairs)
    planned, whole = plan.compressed.macs, plan.dense.macs
    if planned is None or whole != check.dense.macs or abs(after.macs - planned) <= MISCOUNTED * planned:
        return plan
    named = [repr(name) for name, *_ in pairs if name in after.read]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    cause = f"; the weights of {', '.join(named[:MOST_NAMED])}{more} are read outside their own layers" if named else ""
    said = (
        f"the compressed model runs {percent(after.macs / whole)} of the dense model's MACs, the plan has "
        f"{percent(planned / whole)}{cause}."
    )
    limit = plan.budget.limits().get("macs") if plan.budget is not None else None
    if limit is not None and after.macs > limit * whole:
        msg = f"{said} That misses {plan.budget}: exclude these layers, or raise the budget."
        raise InfeasibleBudgetError(msg)
    warn(f"{said} The plan is corrected.", CompressionWarning, stacklevel=4)
    return replace(plan, compressed=replace(plan.compressed, macs=after.macs))


def _difference(dense: Pass, after: Pass, replaced: Sequence[str]) -> str | None:
    """Returns in what two passes differ, None if they do the same."""
    if after.dense_calls:
        names = ", ".join(map(repr, after.dense_calls))
        return (
            f"the model still runs the dense module of {names}: something outside the module tree holds it (a plain "
            "Python list?), so that nothing would be smaller or trained. Register it properly (nn.ModuleList) or "
            "exclude it."
        )
    if after.wrong is not None:
        return f"after the swap {after.wrong}."
    where = _where(dense, after, replaced)
    if dense.calls != after.calls:
        return f"after the swap the model runs other layers, or in another order: {where}. {_ADVICE}"
    said = difference_of_outputs(dense.outputs, after.outputs, values=not after.read)
    if said is not None:
        return (
            f"after the swap the model works out something else: {said}, although every factorised layer hands on what "
            f"the dense one would; {where}. {_ADVICE}"
        )
    return None


def _where(dense: Pass, after: Pass, replaced: Sequence[str]) -> str:
    """Returns where two passes part, with the replaced layers before that."""
    calls = list(zip(dense.calls, dense.entered, strict=True)), list(zip(after.calls, after.entered, strict=True))
    same = next((i for i, (a, b) in enumerate(zip(*calls, strict=False)) if not _alike(a, b)), min(map(len, calls)))
    ran = [name for name in dense.calls[:same] if name in set(replaced)]
    behind = f"behind {ran[-1]!r}, which was replaced" if ran else "before any layer that was replaced"
    names = [repr(own[same][0]) if same < len(own) else "no further layer" for own in calls]
    if names[0] != names[1]:
        return f"{behind}, it calls {names[1]} in the place of {names[0]}"
    entered = f"what enters {names[0]} differs" if same < len(calls[0]) else "what follows the last call differs"
    return f"{behind}, {entered}"


def _alike(a: tuple[str, tuple[float, ...]], b: tuple[str, tuple[float, ...]]) -> bool:
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return False
    return all(
        x == y or abs(x - y) <= LEAST_TOLERANCE * max(x, y) or math.isnan(x) for x, y in zip(a[1], b[1], strict=True)
    )


def _norms(values: Any) -> tuple[float, ...]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    with _disable_current_modes():
        return tuple(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for t in tensors)

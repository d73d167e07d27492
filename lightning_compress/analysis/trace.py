"""One forward pass of the dense model on an example input: sizes, MACs and uses of every layer.

The model comes back as it was: modes, hooks and the global random state are restored, also
after an exception, and no gradient is computed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.checks import shown
from lightning_compress.core.compat import activations_kept, tree_leaves, tree_map, uncompiled
from lightning_compress.core.errors import ExampleInputError
from lightning_compress.kinds.registry import LayerCall
from lightning_compress.layers.adapters import entering
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import family_of, layer_type
from lightning_compress.layers.unfused import unfused

ExampleInput: TypeAlias = "Tensor | Mapping[str, Any] | Sequence[Any]"
"""A tensor, a tuple or dict of positional or keyword arguments, or a shape with its batch dimension."""


Arguments: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""Positional and keyword arguments of a forward pass."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass at batch 1 showed.

    Attributes:
        calls: Sizes of each call, by module name; empty for a module that was never called.
        read_elsewhere: Names of modules whose weight was used outside their own forward.
        macs: Multiply-accumulates of the whole model.
        inputs: Number of the tensor that a module called once reads: the same for those that read the same.
        refused: Why a layer cannot be factorised with the arguments it was called with, by name.
    """

    calls: Mapping[str, tuple[LayerCall, ...]]
    read_elsewhere: frozenset[str]
    macs: int
    inputs: Mapping[str, int]
    refused: Mapping[str, str] = field(default_factory=dict)


def trace(model: nn.Module, example_input: ExampleInput) -> Trace:
    """Runs the model once in eval mode and records every layer that can be or is factorised.

    MACs are those of `torch.utils.flop_counter`, halved. Attention and recurrent layers are unfused for it,
    so names are those of their projections, and dense and compressed models are counted alike.

    Raises:
        ExampleInputError: If the example input has a wrong type or the model fails on it.
    """
    with unfused(model):
        return _trace(model, example_input)


def _trace(model: nn.Module, example_input: ExampleInput) -> Trace:
    args, kwargs = as_arguments(model, example_input)
    named = model.named_modules()
    layers = {name: m for name, m in named if layer_type(m) is not None or isinstance(m, FactorisedLayer)}
    uses = WeightUses({name: [layer._parameters.get("weight")] for name, layer in layers.items()})
    calls: dict[str, list[LayerCall]] = {name: [] for name in layers}
    read: dict[str, list[Tensor]] = {name: [] for name in layers}
    refused: dict[str, str] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            uses.leave(name)
            module = module.template if isinstance(module, FactorisedLayer) else module
            family, entered = family_of(module), entering(module, args, kwargs)
            read[name].append(entered)  # kept, so that no other tensor gets its identity
            calls[name].append(family.call(module, entered, output))
            if (refusal := family.call_refusal(module, args, kwargs)) is not None:
                refused[name] = refusal

        return hook

    hooks = itertools.chain.from_iterable(
        (
            layer.register_forward_pre_hook(lambda *_, name=name: uses.enter(name)),
            layer.register_forward_hook(record(name), with_kwargs=True),
        )
        for name, layer in layers.items()
    )
    flops = flop_counter()
    with hooked(hooks), inference(model), uses, flops:
        run(
            model,
            (args, kwargs),
            f"example_input {shape_text(example_input)}",
            " Shapes include the batch dimension; pass tensors where the values or the dtype matter.",
        )
    return Trace(
        calls={name: tuple(found) for name, found in calls.items()},
        read_elsewhere=frozenset(uses.read_elsewhere),
        macs=flops.get_total_flops() // 2,
        inputs=_numbered({name: tensors[0] for name, tensors in read.items() if len(tensors) == 1}),
        refused=refused,
    )


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    numbers: dict[int, int] = {}
    return {name: numbers.setdefault(id(tensor), len(numbers)) for name, tensor in tensors.items()}


def as_arguments(model: nn.Module, example_input: ExampleInput) -> Arguments:
    """Returns positional and keyword arguments at batch 1, on the model's device.

    A sequence of whole numbers is a shape: standard normal values in the model's dtype, drawn
    without touching the global random state. Tensors that share one leading size above 1 are
    cut to their first sample, unless all are in lists, as the images of a detection model are.

    Raises:
        ExampleInputError: If the type is none of those.
    """
    args, kwargs = whole_arguments(model, example_input)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    sizes = {t.shape[0] if t.ndim else None for t in tensors}
    if len(sizes) != 1 or None in sizes or _all_in_lists((args, kwargs)):
        return args, kwargs
    return tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, (args, kwargs))  # type: ignore[no-any-return]


def flop_counter() -> FlopCounterMode:
    """Returns a counter of the whole model alone.

    That of torch also follows the modules, by hooks on every tensor that requires a gradient, and those
    fail on views of parameters made without gradients.
    """
    flops = FlopCounterMode(display=False)
    flops.mod_tracker = cast(Any, _NoModules())
    return flops


class _NoModules:
    """In the place of torch's ModuleTracker: everything belongs to the model."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


def _all_in_lists(arguments: Arguments) -> bool:
    """Returns whether no tensor is outside a list: then each may be a sample without a batch dimension."""
    outside = tree_leaves(arguments, is_leaf=lambda node: isinstance(node, list))
    return not any(isinstance(leaf, Tensor) for leaf in outside)


def whole_arguments(model: nn.Module, example_input: ExampleInput) -> Arguments:
    """Returns positional and keyword arguments with their whole batch, on the model's device.

    Raises:
        ExampleInputError: If the type is none of those of `ExampleInput`.
    """
    require_example_input(example_input)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        kwargs = dict(example_input)
    elif isinstance(example_input, Tensor):
        args = (example_input,)
    elif is_shape(example_input):
        args = (_draw(model, tuple(example_input)),)
    else:
        args = cast("tuple[Any, ...]", example_input)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))
    if empty and device.type != "meta":
        msg = "an input is on the meta device, which has no values: pass its shape, or a tensor with values."
        raise ExampleInputError(msg)
    return tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )


def require_example_input(value: object) -> None:
    """Checks the type of an example input.

    Raises:
        ExampleInputError: If it is none of those of `ExampleInput`.
    """
    if not isinstance(value, (Tensor, Mapping, tuple)) and not is_shape(value):
        msg = (
            f"example_input={shown(value)}: expected a tensor, a tuple or dict of a forward pass's arguments, "
            "or a shape with its batch dimension such as (1, 3, 224, 224)."
        )
        raise ExampleInputError(msg)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; restores every module's mode and the global random state.

    Compiled modules run uncompiled, so that hooks see them, and checkpointed activations are kept, so that whoever
    asks for gradients in it gets those of this one forward pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), uncompiled(model), activations_kept():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def shape_text(example_input: ExampleInput) -> str:
    """Returns the example input as an error message shows it: shapes instead of values."""
    if is_shape(example_input):
        return str(tuple(cast("Sequence[int]", example_input)))
    shapes = tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, example_input)
    return str(shapes)


def is_shape(value: object) -> bool:
    """Returns whether an example input is a shape: a sequence of whole numbers above 0."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (bytes, bytearray))
        and len(value) > 0
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
    )


def _draw(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(model: nn.Module, arguments: Arguments, what: str, advice: str = "") -> Any:
    """Returns the model's outputs.

    Args:
        model: Any module.
        arguments: Of its forward pass.
        what: Which they are, for the message.
        advice: The end of the message.

    Raises:
        ExampleInputError: If the model fails, with what it said.
    """
    try:
        return model(*arguments[0], **arguments[1])
    except Exception as error:
        msg = f"the model fails on {what}: {type(error).__name__}: {error}.{advice}"
        raise ExampleInputError(msg) from error


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns what a torch layer was called with, by position or as `input`."""
    return cast(Tensor, args[0] if args else kwargs["input"])


def sample_counts(arguments: Any) -> set[int]:
    """Returns the leading sizes of the tensors in a batch that have one."""
    return {len(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim}


def output_tensors(outputs: Any) -> list[Tensor]:
    """Returns the floating-point tensors among whatever a model returns."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks again, also after an exception."""
    kept: list[RemovableHandle] = []
    try:
        kept.extend(handles)  # those made before one fails are kept too
        yield
    finally:
        for handle in kept:
            handle.remove()


class WeightUses(TorchFunctionMode):
    """Notices torch functions that take a layer's weights while another code than its forward runs.

    Args:
        weights: Of each layer, by its name; of a factorised one its factors, and itself for the weight it answers with.

    Attributes:
        read_elsewhere: Names of the layers of which that was noticed.
    """

    def __init__(self, weights: Mapping[str, Iterable[object]]) -> None:
        super().__init__()
        self.read_elsewhere: set[str] = set()
        self._owners: dict[int, set[str]] = {}
        for name, own in weights.items():
            for weight in own:
                self._owners.setdefault(id(weight), set()).add(name)
        self._running: list[str] = []

    def enter(self, name: str) -> None:
        """Says that a layer begins its forward pass."""
        self._running.append(name)

    def leave(self, name: str) -> None:
        """Says that it ends it."""
        self._running.remove(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # shape, dtype and the like do no harm
            for leaf in tree_leaves((args, kwargs)):
                owners = self._owners.get(id(getattr(leaf, "layer", leaf))) if isinstance(leaf, Tensor) else None
                if owners is not None and not owners.intersection(self._running):
                    self.read_elsewhere |= owners
        return result

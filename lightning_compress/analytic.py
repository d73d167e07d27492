"""What enters each layer, worked out from the norm layers alone: no input is made up and nothing is run.

The model is traced symbolically (`torch.fx`) and its graph is read with a mean and a variance per
channel in place of tensors. A norm layer states both whatever enters it; from there they are
carried on until the next one:

- Batch norm with running statistics: z ~ N(β, γ²), since those statistics normalise what training
  saw (Ioffe and Szegedy 2015, "Batch Normalization", algorithm 2); exactly γ² v / (v + ε), so a
  channel whose running variance v is 0 is the constant β. Layer norm, RMS norm, group norm and
  instance norm: mean β, variance γ² per channel, as if each channel were normalised by itself.
- ReLU of a Gaussian z: E[x] = βΦ(β/γ) + γφ(β/γ), E[x²] = (β² + γ²)Φ(β/γ) + βγφ(β/γ) (Frey and
  Hinton 1999, "Variational Learning in Nonlinear Gaussian Belief Networks", appendix B). Other
  elementwise functions: Gauss-Hermite quadrature of the function itself (Abramowitz and Stegun
  1964, 25.4.46), to about 1e-4 of the deviation where they are smooth and 1e-2 at a kink. Several
  in a row, or several of one tensor (x·σ(x)), are one function of the Gaussian they began with.
- Sums and products of different tensors take them as independent: means and variances add, and
  Var[xy] = Var[x]Var[y] + Var[x]E[y]² + E[x]²Var[y] (Goodman 1960, "On the Exact Variance of
  Products"). What a sum, a product, a linear layer or a convolution gives is taken as Gaussian.
- Linear layers and convolutions: mean Wμ + b, variance Σ w²σ², inputs independent over channels and
  kernel positions, the padding ignored.
- Pooling and resizing keep both: right for the mean of an average, an upper bound of its variance,
  and an approximation for maxima.

Everything else is unknown, and so is what follows it up to the next norm layer.

The Gaussian is the weak point. With real images the norm layers of the benchmarks' networks give β and
γ² within a few per cent, but skewed distributions: behind ReLU the root mean square of a channel is
off by 10 to 30 %, about as much as it varies between the channels of one layer.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import io
import operator
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from numpy.polynomial import hermite_e
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_compress.opening import OpenModule
from lightning_compress.tracing import inference

NODES = 64
"""Of the Gauss-Hermite quadrature."""

ROWS = 256
"""Of a linear layer's weight that are held in double precision at a time."""


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and variance of what enters a layer, per channel; over samples and positions.

    Attributes:
        mean: E[x], (channels,) float64 on the CPU; channels = in_features of a Linear, in_channels of
            a Conv2d.
        variance: E[x²] − E[x]², (channels,), not negative.
    """

    mean: Tensor
    variance: Tensor


def analytic_moments(model: nn.Module) -> Mapping[str, ChannelMoments]:
    """Returns input moments of every nn.Linear and nn.Conv2d that follow from the model's own norm layers.

    No data is used and the model is neither run nor changed: its structure is copied (the
    parameters are shared) and the copy is traced in eval mode, without hooks, which are taken to
    observe only. Arguments of `forward` with a default keep it. A module that cannot be copied
    or traced (control flow by the values of tensors, say) is unknown to what surrounds it; its parts are
    read for themselves, from inputs of which nothing is known. A layer that is called several
    times gets the mean and the second moment over all its calls.

    Args:
        model: Any module, on any device, of any floating-point precision.

    Returns:
        By the layer's first name in `model.named_modules()`. Layers of which one call has an
        unknown or non-finite input are missing, and so are those that are never called.
    """
    calls: dict[int, list[_Value | None]] = defaultdict(list)
    aside = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
        warnings.simplefilter("ignore")
        _explore(model, calls, set())
    found = {}
    for name, module in model.named_modules():
        inputs = [value for value in calls[id(module)] if value is not None]
        if inputs and len(inputs) == len(calls[id(module)]):
            mean = torch.stack([value.mean for value in inputs]).mean(dim=0)
            second = torch.stack([value.mean.square() + value.variance for value in inputs]).mean(dim=0)
            variance = inputs[0].variance if len(inputs) == 1 else (second - mean.square()).clamp(min=0)
            found[name] = ChannelMoments(mean, variance)
    return found


# The trace


def _explore(model: nn.Module, calls: dict[int, list[_Value | None]], explored: set[int]) -> None:
    """Adds what enters the layers of a module whose inputs are unknown; then the same for parts it could not trace."""
    if id(model) in explored or not any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules()):
        return
    explored.add(id(model))
    originals = dict(model.named_modules())
    tracer = _Tracer()
    opaque = [""]
    try:
        root = _Root(_structural_copy(model))
        with inference(root):
            graph = tracer.trace(root)
            found = _read_graph(root, graph, tracer.abandoned)
        opaque = tracer.opaque
    except Exception:  # whatever a foreign module raises when it is copied or traced
        found = []
    for name, value in found:
        if name in originals:  # not one that `forward` has added
            calls[id(originals[name])].append(value)
    for name in opaque:
        for child in originals[name].children():
            _explore(child, calls, explored)


class _Root(nn.Module):
    """Calls a module with one unknown object in place of each argument that has no default."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, unknown: Any) -> Any:
        parameters = [p for p in inspect.signature(self.module.forward).parameters.values() if p.default is p.empty]
        args = [unknown for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        kwargs = {p.name: unknown for p in parameters if p.kind is p.KEYWORD_ONLY}
        return self.module(*args, **kwargs) if args or kwargs else self.module(unknown)


class _Tracer(fx.Tracer):
    """Traces through every module, and gets over those that it cannot trace.

    Attributes:
        opaque: Names of the modules that could not be traced.
        abandoned: What was recorded of them until then.
    """

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.opaque: list[str] = []
        self.abandoned: set[fx.Node] = set()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],  # noqa: ARG002, it would run the hooks
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = (self.submodule_paths or {}).get(m)  # None where a module is kept in a plain list, for instance
        if _is_leaf(m):
            return self._unknown() if name is None else self.create_proxy("call_module", name, args, kwargs)
        traced = len(self.graph.nodes)
        try:
            if type(m) is nn.TransformerEncoderLayer and "forward" not in vars(m):
                return _encoder_layer(m, *args, **kwargs)
            return m.forward(*args, **kwargs)
        except Exception:  # whatever code that expects tensors raises on something else
            self.abandoned.update(list(self.graph.nodes)[traced:])
            if name is not None:
                self.opaque.append(_original_name(name))
            return self._unknown()

    def _unknown(self) -> Any:
        return self.create_proxy("call_function", _unknown, (), {})


def _unknown() -> None:
    """Stands in the graph for a call of which nothing is known."""


def _original_name(name: str) -> str:
    return name.removeprefix("module").removeprefix(".")  # the attribute of `_Root`


def _is_leaf(module: nn.Module) -> bool:
    forward = type(module).forward
    if isinstance(module, OpenModule):
        return True
    is_torch = str(getattr(forward, "__module__", "")).startswith("torch.nn.") and "forward" not in vars(module)
    return is_torch and (not module._modules or isinstance(module, nn.MultiheadAttention))


def _encoder_layer(layer: nn.TransformerEncoderLayer, src: Tensor, *_: Any, **__: Any) -> Tensor:
    """`nn.TransformerEncoderLayer.forward` without its checks and its fast path; masks change no moments."""

    def attend(x: Tensor) -> Tensor:
        return cast(Tensor, layer.dropout1(layer.self_attn(x, x, x)[0]))

    def feed_forward(x: Tensor) -> Tensor:
        return cast(Tensor, layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))))

    if layer.norm_first:
        x = src + attend(layer.norm1(src))
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(src + attend(src))
    return cast(Tensor, layer.norm2(x + feed_forward(x)))


def _structural_copy(model: nn.Module) -> nn.Module:
    """Deep-copies a module but for its parameters, which are shared, its hooks and its trainer.

    So nothing that `forward` does to its module while it is traced reaches the original.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo.update({id(p): p for p in module._parameters.values()})
        tensors = [*module._buffers.values(), *vars(module).values()]
        memo.update({id(t): t.detach().clone() for t in tensors if isinstance(t, Tensor)})
        for key, value in vars(module).items():
            if key.startswith("_") and "_hooks" in key and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif key == "_trainer":
                memo[id(value)] = None
    return copy.deepcopy(model, memo)


# What a tensor of the graph is known as


class _Unknown(Exception):  # noqa: N818
    """A rule does not apply."""


def _require(condition: object) -> None:
    if not condition:
        raise _Unknown


class _Layout(enum.Enum):
    FIRST = enum.auto()  # (B, C, ...)
    LAST = enum.auto()  # (..., C)
    BLOCKS = enum.auto()  # (B, C·s): s neighbours share a channel, as after flattening (B, C, ...)


@dataclass(frozen=True)
class _Value:
    """A tensor of the graph.

    Attributes:
        mean: (C,) float64.
        variance: (C,).
        layout: Where the channels are.
        ndim: Number of dimensions, None if unknown. With 2 the layout is LAST or BLOCKS.
        samples: Values at the nodes of the quadrature, (NODES, C); None of a Gaussian.
        source: The same object in all values that are elementwise functions of one tensor.
    """

    mean: Tensor
    variance: Tensor
    layout: _Layout
    ndim: int | None
    samples: Tensor | None = None
    source: object = field(default_factory=object)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def at_nodes(self) -> Tensor:
        if self.samples is not None:
            return self.samples
        return self.mean + self.variance.sqrt() * _quadrature()[0][:, None]


def _dimensions(value: _Value) -> int:
    _require(value.ndim is not None)
    return cast(int, value.ndim)


_Place: TypeAlias = "tuple[_Layout, int | None]"


def _place(layout: _Layout, ndim: int | None) -> _Place:
    return (_Layout.LAST if layout is _Layout.FIRST and ndim == 2 else layout), ndim  # noqa: PLR2004


def _value(mean: Tensor, variance: Tensor, place: _Place, samples: Tensor | None = None) -> _Value:
    _require(torch.isfinite(mean).all() and torch.isfinite(variance).all())
    return _Value(mean, variance.clamp(min=0), *place, samples)


def _moved(value: _Value, layout: _Layout, ndim: int | None) -> _Value:
    """The same entries in another shape."""
    layout, ndim = _place(layout, ndim)
    return replace(value, layout=layout, ndim=ndim)


def _common_place(a: _Value, b: _Value) -> _Place:
    """Where the channels of two tensors that are broadcast against each other are."""
    _require(a.channels == b.channels)
    if a.layout is b.layout:
        _require(a.ndim == b.ndim or None in (a.ndim, b.ndim))
        return a.layout, a.ndim if a.ndim is not None else b.ndim
    _require(all(v.ndim in (None, 2) for v in (a, b)))
    return _Layout.LAST, 2


@functools.cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the expectation under N(0, 1)."""
    nodes, weights = hermite_e.hermegauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def _read(tensor: Any) -> Tensor:
    _require(isinstance(tensor, Tensor))
    return cast(Tensor, tensor).detach().to("cpu", torch.float64)


# The graph


def _read_graph(root: nn.Module, graph: fx.Graph, abandoned: set[fx.Node]) -> list[tuple[str, _Value | None]]:
    """Returns each call of a layer, by the layer's name in the original: its input, None if unknown."""
    modules = dict(root.named_modules())
    known: dict[fx.Node, _Value | Tensor | fx.Node] = {}
    users = {node: len(node.users) for node in graph.nodes}
    calls = []
    for node in graph.nodes:
        args, kwargs = cast(Any, fx.node.map_arg)((node.args, node.kwargs), known.__getitem__)
        module = modules[node.target] if node.op == "call_module" else None
        name = _called_layer(node, modules)
        if name is not None and node not in abandoned:
            calls.append((_original_name(name), _input_of(modules[name], args, kwargs)))
        known[node] = node
        with contextlib.suppress(Exception):  # a call that no rule foresees is unknown, whatever went wrong with it
            known[node] = _evaluate(root, node, module, args, kwargs)
        if _is_in_place(node, module) and isinstance(node.args[0], fx.Node):
            known[node.args[0]] = known[node]
        for used in node.all_input_nodes:
            users[used] -= 1
            if users[used] == 0:
                del known[used]
    return calls


def _evaluate(
    root: nn.Module, node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Value | Tensor:
    if node.op == "get_attr":
        return cast(Tensor, functools.reduce(getattr, str(node.target).split("."), root))
    if module is not None:
        value = _MODULES[type(module).forward](module, *args, **kwargs)
    elif getattr(node.target, "__name__", "") == "stochastic_depth":  # of torchvision.ops
        value = args[0]
    else:
        value = _CALLS[node.target](*args, **kwargs)
    _require(isinstance(value, _Value))
    return cast(_Value, value)


def _called_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns the name of the nn.Linear or nn.Conv2d that a node applies, as a module or by its weight."""
    if node.op == "call_module":
        name = str(node.target)
    elif node.target in (F.linear, F.conv2d) and len(node.args) > 1 and getattr(node.args[1], "op", "") == "get_attr":
        name = str(cast(fx.Node, node.args[1]).target).rpartition(".")[0]
    else:
        return None
    return name if isinstance(modules.get(name), (nn.Linear, nn.Conv2d)) else None


def _input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value | None:
    value = cast(_Value, args[0] if args else kwargs.get("input"))
    with contextlib.suppress(_Unknown):
        if isinstance(layer, nn.Conv2d):
            return _entering_conv2d(value, layer.in_channels)
        return _entering_linear(value, cast(nn.Linear, layer).in_features)
    return None


def _is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")
    return bool(by_name or getattr(module, "inplace", False) or node.kwargs.get("inplace", False))


# Rules; each takes the arguments of what it stands for, a known tensor as a `_Value`, an unknown one as its node


def _entering_linear(value: _Value, features: int) -> _Value:
    """What a linear layer sees, (features,). Of (B, C) or (B, C, L) the former is meant: batch norm does not tell."""
    _require(isinstance(value, _Value) and (value.layout is not _Layout.FIRST or value.ndim is None))
    if value.layout is _Layout.BLOCKS:
        _require(features % value.channels == 0)
        mean, variance = (t.repeat_interleave(features // value.channels) for t in (value.mean, value.variance))
        return _value(mean, variance, (_Layout.LAST, 2))
    _require(value.channels == features)
    return replace(value, layout=_Layout.LAST, ndim=2 if value.layout is _Layout.FIRST else value.ndim)


def _entering_conv2d(value: _Value, channels: int) -> _Value:
    _require(isinstance(value, _Value) and value.layout is _Layout.FIRST and value.ndim in (None, 4))
    _require(value.channels == channels)
    return value


def _linear(input: _Value, weight: Any, bias: Any = None) -> _Value:
    entering = _entering_linear(input, weight.shape[1])
    rows = weight.split(ROWS)
    mean = torch.cat([_read(w) @ entering.mean for w in rows])
    variance = torch.cat([_read(w).square() @ entering.variance for w in rows])
    return _value(mean if bias is None else mean + _read(bias), variance, (_Layout.LAST, entering.ndim))


def _conv2d(  # noqa: PLR0917, the arguments of `F.conv2d`
    input: _Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,  # noqa: ARG001
    padding: Any = 0,  # noqa: ARG001
    dilation: Any = 1,  # noqa: ARG001
    groups: int = 1,
) -> _Value:
    weight = _read(weight)
    entering = _entering_conv2d(input, weight.shape[1] * groups)
    grouped = weight.unflatten(0, (groups, -1))
    mean = torch.einsum("goikl,gi->go", grouped, entering.mean.view(groups, -1)).flatten()
    variance = torch.einsum("goikl,gi->go", grouped.square(), entering.variance.view(groups, -1)).flatten()
    return _value(mean if bias is None else mean + _read(bias), variance, (_Layout.FIRST, 4))


def _norm(channels: int, weight: Any, bias: Any, place: _Place) -> _Value:
    mean = torch.zeros(channels, dtype=torch.float64, device="cpu") if bias is None else _read(bias)
    deviation = torch.ones_like(mean) if weight is None else _read(weight)
    _require(mean.shape == deviation.shape == (channels,))
    return _value(mean, deviation.square(), place)


def _batch_norm(  # noqa: PLR0917, the arguments of `F.batch_norm`
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = None,  # noqa: ARG001
    eps: float = 1e-5,
    ndim: int | None = None,
) -> _Value:
    _require(not training)
    mean, variance = _read(running_mean), _read(running_var)
    _require(torch.isfinite(mean).all() and (variance >= 0).all())
    place = _place(_Layout.FIRST, input.ndim if ndim is None and isinstance(input, _Value) else ndim)
    out = _norm(len(mean), weight, bias, place)
    return _value(out.mean, out.variance * variance / (variance + eps), place)


def _layer_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, *_: Any) -> _Value:
    (channels,) = normalized_shape
    return _norm(channels, weight, bias, (_Layout.LAST, input.ndim if isinstance(input, _Value) else None))


def _channel_norm(input: Any, channels: int | None, weight: Any, bias: Any, ndim: int | None = None) -> _Value:
    """Group norm or instance norm."""
    if isinstance(input, _Value):
        ndim = input.ndim if ndim is None else ndim
        channels = input.channels if channels is None else channels
    elif channels is None:
        channels = len(_read(weight))
    return _norm(channels, weight, bias, _place(_Layout.FIRST, ndim))


def _instance_norm_module(module: Any, input: Any) -> _Value:
    ndim = _ndim(module)
    if module.running_mean is not None:
        return _batch_norm_module(module, input)
    return _channel_norm(input, module.num_features, module.weight, module.bias, ndim)


def _batch_norm_module(module: Any, input: Any) -> _Value:
    statistics = module.running_mean, module.running_var
    return _batch_norm(input, *statistics, module.weight, module.bias, eps=module.eps, ndim=_ndim(module))


def _ndim(module: nn.Module) -> int | None:
    """Number of dimensions of what a norm layer takes, None if its class does not tell."""
    if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        return 4
    return 5 if isinstance(module, (nn.BatchNorm3d, nn.InstanceNorm3d)) else None


def _relu(input: _Value, **_: Any) -> _Value:
    if input.samples is not None:
        return _elementwise(torch.relu, input)
    mean, deviation = input.mean, input.variance.sqrt()
    ratio = mean / deviation.clamp(min=torch.finfo(torch.float64).tiny)
    below, density = torch.special.ndtr(ratio), torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    first = mean * below + deviation * density
    second = (mean.square() + input.variance) * below + mean * deviation * density
    result = _value(first, second - first.square(), (input.layout, input.ndim), input.at_nodes().relu())
    return replace(result, source=input.source)


def _elementwise(function: Callable[..., Any], *args: Any, **kwargs: Any) -> _Value:
    """Applies a function to one or several elementwise functions of one tensor; constants may be per channel."""
    values = [a for a in args if isinstance(a, _Value)]
    _require(values and not any(isinstance(a, fx.Node) for a in (*args, *kwargs.values())))
    _require(all(v.source is values[0].source for v in values))
    place = _common_place(values[0], values[-1])
    operands = [
        a.at_nodes().clone() if isinstance(a, _Value) else _per_channel(a, values[0]) if isinstance(a, Tensor) else a
        for a in args
    ]
    samples = function(*operands, **kwargs)
    _require(samples.shape == (NODES, values[0].channels))
    weights = _quadrature()[1]
    mean = weights @ samples
    return replace(_value(mean, weights @ (samples - mean).square(), place, samples), source=values[0].source)


def _per_channel(constant: Tensor, value: _Value) -> Tensor:
    """A constant that is broadcast against a tensor, as (C,) or (); unknown where it varies over positions."""
    if constant.numel() == 1:
        return _read(constant).reshape(())
    _require(value.layout is not _Layout.BLOCKS and constant.numel() == value.channels)
    axis = 1 - _dimensions(value) if value.layout is _Layout.FIRST else -1
    _require(constant.ndim >= -axis and constant.shape[axis] == value.channels)
    return _read(constant).flatten()


def _prelu(input: _Value, weight: Any) -> _Value:
    weight = _read(weight).flatten()
    along = input.layout is _Layout.FIRST or input.ndim == 2  # noqa: PLR2004
    _require(len(weight) == 1 or (len(weight) == input.channels and along and input.layout is not _Layout.BLOCKS))
    return _elementwise(lambda x: torch.where(x > 0, x, weight * x), input)


def _arithmetic(
    function: Callable[..., Tensor],
    independent: Callable[[_Value, _Value], tuple[Tensor, Tensor]] | None,
    input: Any,
    other: Any,
    **kwargs: Any,
) -> _Value:
    """Applies a function of two operands, each a known tensor or a constant."""
    if isinstance(input, _Value) and isinstance(other, _Value) and input.source is not other.source:
        if independent is None or kwargs:
            raise _Unknown
        return _value(*independent(input, other), _common_place(input, other))
    return _elementwise(function, input, other, **kwargs)


def _sum(a: _Value, b: _Value) -> tuple[Tensor, Tensor]:
    return a.mean + b.mean, a.variance + b.variance


def _difference(a: _Value, b: _Value) -> tuple[Tensor, Tensor]:
    return a.mean - b.mean, a.variance + b.variance


def _product(a: _Value, b: _Value) -> tuple[Tensor, Tensor]:
    variance = a.variance * b.variance + a.variance * b.mean.square() + a.mean.square() * b.variance
    return a.mean * b.mean, variance


def _cat(tensors: Any, dim: int = 0) -> _Value:
    _require(tensors and all(isinstance(t, _Value) for t in tensors))
    first = tensors[0]
    _require(all((t.layout, t.ndim) == (first.layout, first.ndim) for t in tensors))
    along = dim == 1 if first.layout is _Layout.FIRST else dim == -1 or (dim == 1 and first.ndim == 2)  # noqa: PLR2004
    _require(along and first.layout is not _Layout.BLOCKS)
    gaussian = all(t.samples is None for t in tensors)
    samples = None if gaussian else torch.cat([t.at_nodes() for t in tensors], dim=1)
    mean, variance = (torch.cat([getattr(t, name) for t in tensors]) for name in ("mean", "variance"))
    return _value(mean, variance, (first.layout, first.ndim), samples)


def _same(input: _Value, *_: Any, **__: Any) -> _Value:
    return input


def _dropout(input: _Value, p: float, training: bool, inplace: bool = False) -> _Value:  # noqa: ARG001
    _require(not training)
    return input


def _pool(input: _Value, *_: Any, return_indices: bool = False, **__: Any) -> _Value:
    """Pools or resizes the positions of (B, C, ...)."""
    _require(input.layout is _Layout.FIRST and not return_indices)
    return replace(input, source=object())


def _mean(input: _Value, dim: Any, keepdim: bool = False, **_: Any) -> _Value:
    """Averages over positions; a negative dimension is one where the number of dimensions is unknown."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    if input.ndim is not None:
        dims = [d % input.ndim for d in dims]
    if input.layout is _Layout.FIRST:
        _require(all(d not in (0, 1) and d >= -2 for d in dims))  # noqa: PLR2004
    else:
        _require(input.layout is _Layout.LAST and -1 not in dims and input.ndim != 2)  # noqa: PLR2004
        _require(input.ndim is None or input.ndim - 1 not in dims)
    ndim = input.ndim if keepdim or input.ndim is None else input.ndim - len(dims)
    return replace(_moved(input, input.layout, ndim), source=object())


def _flatten(input: _Value, start_dim: int = 0, end_dim: int = -1) -> _Value:
    whole = end_dim == -1 or (input.ndim is not None and end_dim == input.ndim - 1)
    if start_dim == 1 and whole:
        if input.layout is _Layout.FIRST:
            return _moved(input, _Layout.BLOCKS, 2)
        _require(input.ndim == 2)  # noqa: PLR2004
        return input
    if input.layout is _Layout.FIRST:
        _require(start_dim > 1 and whole)
        return _moved(input, _Layout.FIRST, start_dim + 1)
    _require(input.layout is _Layout.LAST and start_dim == 0 and end_dim == -2)  # noqa: PLR2004
    return _moved(input, _Layout.LAST, 2)


def _reshape(input: _Value, *shape: Any) -> _Value:
    """Knows (B, −1), (B, C, ...), (B, C, 1, ...) and (..., C)."""
    sizes = shape if len(shape) != 1 or isinstance(shape[0], (int, fx.Node)) else tuple(shape[0])
    _require(len(sizes) > 1 and all(isinstance(s, (int, fx.Node)) for s in sizes))
    batch = sizes[0] == -1 or _is_size(sizes[0], 0)
    channels = sizes[1] == input.channels or _is_size(sizes[1], 1)
    if input.layout is _Layout.FIRST and len(sizes) == 2:  # noqa: PLR2004
        if isinstance(sizes[1], int) and sizes[1] > 0:
            _require(sizes[1] % input.channels == 0)
        else:
            _require(sizes[0] != -1)
        _require(batch)
        return _moved(input, _Layout.BLOCKS, 2)
    if input.layout is _Layout.FIRST:
        _require(batch and channels)
        return _moved(input, _Layout.FIRST, len(sizes))
    if input.ndim == 2 and all(s == 1 for s in sizes[2:]):  # noqa: PLR2004
        _require(batch and (channels or sizes[1] == -1))
        return input if len(sizes) == 2 else _moved(input, _Layout.FIRST, len(sizes))  # noqa: PLR2004
    _require(input.layout is _Layout.LAST and sizes[-1] == input.channels)
    return _moved(input, _Layout.LAST, len(sizes))


def _is_size(size: Any, dim: int) -> bool:
    """Returns whether a number of the graph is the size of some tensor in a dimension."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return dim in (*size.args[1:], *size.kwargs.values())
    shape = size.args[0] if size.target is operator.getitem and size.args[1] == dim else None
    if not isinstance(shape, fx.Node):
        return False
    return shape.target == "size" or (shape.target is getattr and shape.args[1:] == ("shape",))


def _permute(input: _Value, *order: Any) -> _Value:
    dims = list(order[0] if len(order) == 1 else order)
    _require(input.layout is not _Layout.BLOCKS and input.ndim in (None, len(dims)))
    dims = [d % len(dims) for d in dims]
    return _with_channels_at(input, dims.index(1 if input.layout is _Layout.FIRST else len(dims) - 1), len(dims))


def _transpose(input: _Value, dim0: int, dim1: int) -> _Value:
    order = list(range(_dimensions(input)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(input, order)


def _with_channels_at(value: _Value, position: int, ndim: int | None) -> _Value:
    if position == 1:
        return _moved(value, _Layout.FIRST, ndim)
    _require(ndim is not None and position == ndim - 1)
    return _moved(value, _Layout.LAST, ndim)


def _squeeze(input: _Value, *dims: int) -> _Value:
    """Takes out positions; all of them where no dimension is given."""
    _require(input.layout is _Layout.FIRST)
    if not dims:
        return _moved(input, _Layout.FIRST, 2)
    return _mean(input, dims[0] if len(dims) == 1 else dims)


def _unsqueeze(input: _Value, dim: int) -> _Value:
    ndim = _dimensions(input)
    index: list[Any] = [slice(None)] * ndim
    index.insert(dim % (ndim + 1), None)
    return _getitem(input, tuple(index))


def _getitem(input: _Value, index: Any) -> _Value:
    """Takes positions or samples out, adds dimensions; unknown where it selects channels.

    Where the number of dimensions is unknown, a channel that is selected from (..., C) shows
    itself in the next layer, which then has another number of channels.
    """
    entries = index if isinstance(index, tuple) else (index,)
    _require(input.layout is not _Layout.BLOCKS)
    _require(all(e is None or isinstance(e, (int, slice)) for e in entries))
    if input.layout is _Layout.LAST and input.ndim is None:
        return replace(input, source=object())
    channel = 1 if input.layout is _Layout.FIRST else _dimensions(input) - 1
    axis, kept, position = 0, 0, None
    for entry in entries:
        if entry is not None and axis == channel:
            _require(entry == slice(None))
            position = kept
        axis += entry is not None
        kept += not isinstance(entry, int)
    position = kept + channel - axis if position is None else position
    taken = replace(input, source=object())
    return _with_channels_at(taken, position, None if input.ndim is None else input.ndim + kept - axis)


# The tables of rules


def _module_rules() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """By the forward function, so that subclasses with a forward of their own are left out."""
    yield nn.Linear.forward, lambda m, input: _linear(input, m.weight, m.bias)
    yield nn.Conv2d.forward, lambda m, input: _conv2d(input, m.weight, m.bias, groups=m.groups)
    yield nn.BatchNorm2d.forward, _batch_norm_module  # and that of its siblings
    yield nn.SyncBatchNorm.forward, _batch_norm_module
    yield nn.LayerNorm.forward, lambda m, input: _layer_norm(input, m.normalized_shape, m.weight, m.bias)
    yield nn.RMSNorm.forward, lambda m, input: _layer_norm(input, m.normalized_shape, m.weight)
    yield nn.GroupNorm.forward, lambda m, input: _channel_norm(input, m.num_channels, m.weight, m.bias)
    yield nn.InstanceNorm2d.forward, _instance_norm_module
    yield nn.ReLU.forward, lambda _, input: _relu(input)
    yield nn.PReLU.forward, lambda m, input: _prelu(input, m.weight)
    yield nn.Flatten.forward, lambda m, input: _flatten(input, m.start_dim, m.end_dim)
    yield nn.Upsample.forward, lambda _, input: _pool(input)
    for name in _ACTIVATION_MODULES.split():
        yield getattr(nn, name).forward, lambda m, input: _elementwise(m.forward, input)
    for name in _IDENTITY_MODULES.split():
        yield getattr(nn, name).forward, lambda _, input: input
    for name in ("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        for dimensions in (1, 2, 3):
            forward = getattr(nn, f"{name}{dimensions}d").forward
            yield forward, lambda m, input: _pool(input, return_indices=getattr(m, "return_indices", False))


_ACTIVATION_MODULES = """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU6 SELU SiLU Sigmoid Softplus
    Softshrink Softsign Tanh Tanhshrink Threshold
"""

_IDENTITY_MODULES = "AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout Identity"

_ELEMENTWISE = """
    abs celu clamp clamp_max clamp_min clip elu erf exp gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu
    logsigmoid mish neg pow relu6 selu sigmoid silu softplus softshrink softsign square tanh tanhshrink threshold
"""

_RULES: dict[str, Callable[..., Any]] = {
    "adaptive_avg_pool1d": _pool,
    "adaptive_avg_pool2d": _pool,
    "adaptive_avg_pool3d": _pool,
    "adaptive_max_pool1d": _pool,
    "adaptive_max_pool2d": _pool,
    "adaptive_max_pool3d": _pool,
    "alpha_dropout": _dropout,
    "avg_pool1d": _pool,
    "avg_pool2d": _pool,
    "avg_pool3d": _pool,
    "batch_norm": _batch_norm,
    "bfloat16": _same,
    "cat": _cat,
    "clone": _same,
    "concat": _cat,
    "contiguous": _same,
    "conv2d": _conv2d,
    "detach": _same,
    "double": _same,
    "dropout": _dropout,
    "dropout1d": _dropout,
    "dropout2d": _dropout,
    "dropout3d": _dropout,
    "expand_as": _same,
    "flatten": _flatten,
    "float": _same,
    "getitem": _getitem,
    "group_norm": lambda input, num_groups, weight=None, bias=None, eps=1e-5: _channel_norm(input, None, weight, bias),  # noqa: ARG005
    "half": _same,
    "interpolate": _pool,
    "layer_norm": lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: _layer_norm(  # noqa: ARG005
        input, normalized_shape, weight, bias
    ),
    "linear": _linear,
    "max_pool1d": _pool,
    "max_pool2d": _pool,
    "max_pool3d": _pool,
    "mean": _mean,
    "permute": _permute,
    "prelu": _prelu,
    "relu": _relu,
    "reshape": _reshape,
    "rms_norm": lambda input, normalized_shape, weight=None, eps=None: _layer_norm(input, normalized_shape, weight),  # noqa: ARG005
    "squeeze": _squeeze,
    "swapaxes": _transpose,
    "to": _same,
    "transpose": _transpose,
    "type_as": _same,
    "unsqueeze": _unsqueeze,
    "view": _reshape,
}

_ARITHMETIC: dict[str, tuple[str, Callable[[_Value, _Value], tuple[Tensor, Tensor]] | None]] = {
    "add": ("add", _sum),
    "sub": ("sub", _difference),
    "mul": ("mul", _product),
    "div": ("truediv", None),
}


def _call_rules() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """By the function, or the name of the method; in each of torch's spellings."""
    for name, rule in _RULES.items():
        for target in _spellings(name):
            yield target, rule
    for name in _ELEMENTWISE.split():
        for target in _spellings(name):
            function = getattr(Tensor, target) if isinstance(target, str) else target
            yield target, functools.partial(_elementwise, function)
    for name, (operator_name, independent) in _ARITHMETIC.items():
        rule = functools.partial(_arithmetic, getattr(torch, name), independent)
        for target in (*_spellings(name), *_spellings(operator_name)):
            yield target, rule


def _spellings(name: str) -> Iterator[Any]:
    for spelling in (name, f"{name}_"):
        for home in (torch, F, operator):
            if callable(getattr(home, spelling, None)):
                yield getattr(home, spelling)
        if hasattr(Tensor, spelling):
            yield spelling


_MODULES: dict[Any, Callable[..., Any]] = dict(_module_rules())
_CALLS: dict[Any, Callable[..., Any]] = dict(_call_rules())

"""What every decomposition provides, and the one module class they all become."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SMALL_WEIGHT = 2**22

_SHAPE_ATTRIBUTES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


@dataclass(frozen=True)
class LayerCall:
    """Sizes seen in one call of a layer at batch 1.

    Attributes:
        inputs: Spatial size of the input, (H, W) for Conv2d, () for Linear.
        outputs: Spatial size of the output, likewise.
        rows: Independent vectors a Linear was applied to (1, or the sequence length); for
            Conv2d the number of images, 1.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rows: int

    @property
    def positions(self) -> int:
        """How often the weight is applied: rows times output positions."""
        return self.rows * int(np.prod(self.outputs, dtype=np.int64))


@dataclass(frozen=True)
class RankProfile:
    """Relative errors of one kind of decomposition over its ranks.

    Attributes:
        ranks: Shape (n, number of ranks of the kind), whole numbers.
        errors: Shape (n,), ‖(W − Ŵ) S^½‖²_F / ‖W S^½‖²_F in [0, 1].
        spectral: Shape (n,), the largest singular value left out, relative to the largest of all;
            None where it follows from the errors or the kind has no spectrum.
    """

    ranks: Ints
    errors: Floats
    spectral: Floats | None = None


@contextlib.contextmanager
def threads_for(weight: Tensor) -> Iterator[None]:
    """One thread for the linear algebra of small weights, whatever the process is set to.

    Below about 2000 x 2000 a second thread gains nothing, and where other processes hold the
    cores, threads that wait for each other have been seen to take ten times as long.
    """
    if weight.numel() > SMALL_WEIGHT:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


class Decomposition(ABC):
    """One kind of factorisation: its mathematics, its costs and the layers it becomes.

    Weights are passed as float64 CPU tensors of the dense layer's own shape. Costs leave the
    bias out (it is kept as it is) and are vectorised over the rows of `ranks`, shape (n, R).
    """

    kind: str

    @abstractmethod
    def unsupported(self, layer: nn.Module) -> str | None:
        """Returns why the kind does not apply to the layer, or None if it does."""

    @abstractmethod
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the ranks at which a weight of this shape is reproduced exactly."""

    @abstractmethod
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        """Returns the error of every rank, from one decomposition.

        Args:
            weight: The dense weight.
            metric: Second moment S of what enters the layer, (D, D) with D = in for Linear and
                in·k_h·k_w for Conv2d; None for the identity.
        """

    @abstractmethod
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        """Returns the number of weights the factors hold, shape (n,)."""

    @abstractmethod
    def macs(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        """Returns the multiply-accumulates of one call, shape (n,)."""

    @abstractmethod
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the weights of the child layers by name, float64, fitted in the metric."""

    def gated(self, factors: Mapping[str, Tensor], gates: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """Returns the factors with each ordered component times its gate.

        This is the rule of kinds with one rank, whose components are the rows of the first factor.

        Args:
            factors: Weights of the child layers by name, as from `factorise`.
            gates: Called with the index of a rank and the number of its components, returns (count,).
        """
        first = next(iter(factors))
        return {**factors, first: along(factors[first], gates(0, len(factors[first])))}

    @abstractmethod
    def children(self, layer: nn.Module, ranks: tuple[int, ...]) -> dict[str, nn.Module]:
        """Returns the child layers in forward order, on the meta device, the bias in the last."""

    @abstractmethod
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Returns the weight of the dense layer that the factors are equivalent to."""


class FactorisedLayer(nn.Sequential):
    """A dense layer's replacement: its factors as plain torch layers, applied in order.

    `weight` is read-only and multiplies the factors out, for code that reads the weight of a
    layer (the eval fast path of nn.TransformerEncoderLayer does); `bias` is the dense layer's
    own Parameter.

    Attributes:
        kind: Kind of decomposition, a key of `DECOMPOSITIONS`.
        ranks: Its ranks.
        weight_shape: Shape of the dense weight.
        dense_type: "Linear" or "Conv2d".
        error: Predicted relative error of the plan it was made from, None if unknown.
    """

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        *,
        dense: nn.Module,
        decomposition: Decomposition,
        ranks: tuple[int, ...],
    ) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self._decomposition = decomposition
        self.kind = decomposition.kind
        self.ranks = ranks
        self.weight_shape = tuple(cast(Tensor, dense.weight).shape)
        self.dense_type = type(dense).__name__
        self.error: float | None = None
        for name in _SHAPE_ATTRIBUTES:
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))

    def factors(self) -> dict[str, Tensor]:
        """Returns the weights of the child layers by name, the live Parameters."""
        return {name: cast(Tensor, child.weight) for name, child in self.named_children()}

    def dense_weight(self) -> Tensor:
        """Returns the equivalent dense weight, shape `weight_shape`, differentiable."""
        return self._decomposition.dense_weight(self.factors(), self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """The equivalent dense weight."""
        return self.dense_weight()

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense layer's bias, held by the last factor."""
        return cast("nn.Parameter | None", self[-1].bias)

    def extra_repr(self) -> str:
        """Returns kind and ranks for `print(model)`."""
        return f"kind={self.kind}, ranks={self.ranks}"


def along(factor: Tensor, gates: Tensor, dim: int = 0) -> Tensor:
    """Returns a factor times one gate, (n,), for each index of a dimension of size n."""
    shape = [1] * factor.ndim
    shape[dim] = -1
    return factor * gates.to(factor).reshape(shape)


def conv_like(
    layer: nn.Conv2d,
    in_channels: int,
    out_channels: int,
    *,
    axes: tuple[int, ...] = (0, 1),
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """Returns a Conv2d on the meta device with the layer's geometry on the given spatial axes.

    On the other axes it has kernel 1, stride 1, no padding and no dilation. String padding
    ("same", "valid") is worked out per axis by torch itself, so it is passed on; a 1x1 with
    no axis at all gets none.
    """

    def on_axes(values: tuple[int, ...], neutral: int) -> tuple[int, int]:
        return cast("tuple[int, int]", tuple(v if axis in axes else neutral for axis, v in enumerate(values)))

    padding: Any = layer.padding
    if not isinstance(padding, str):
        padding = on_axes(padding, 0)
    elif not axes:
        padding = 0
    return nn.Conv2d(
        in_channels,
        out_channels,
        on_axes(layer.kernel_size, 1),
        stride=on_axes(layer.stride, 1),
        padding=padding,
        dilation=on_axes(layer.dilation, 1),
        groups=groups,
        padding_mode=layer.padding_mode if axes else "zeros",
        bias=bias,
        device="meta",
    )


def singular_energies(matrix: Tensor) -> Floats:
    """Returns the squared singular values, largest first.

    They are the eigenvalues of the smaller Gram matrix, many times faster than an SVD; in
    float64 they are exact to 1e-15 of the largest, and only sums of them are used.
    """
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    energies: Floats = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).numpy()
    return energies


def balanced(expand: Tensor, reduce: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors, (outputs, r) and (r, inputs), with their norms shared out evenly per component.

    Both then train at the same scale. A component of zero keeps its column in `expand`: were both
    factors zero, neither would ever receive a gradient.
    """
    tiny = torch.finfo(expand.dtype).tiny
    root = (reduce.norm(dim=1) / expand.norm(dim=0).clamp_min(tiny)).sqrt()
    floor = 1e-2 * root.max() if bool(root.any()) else torch.ones((), dtype=root.dtype)
    root = root.clamp_min(floor)
    return expand * root, reduce / root[:, None]


def tail_errors(energies: Floats) -> Floats:
    """Returns the relative error left after keeping the first 1, 2, … n of sorted energies."""
    total = energies.sum()
    if total == 0:
        return np.zeros(len(energies))
    tails = np.cumsum(energies[::-1])[::-1]
    errors: Floats = np.clip(np.append(tails[1:], 0.0) / total, 0.0, 1.0)
    return errors


def spectral_errors(energies: Floats, largest: float) -> Floats:
    """Returns σ_{r+1} / σ_1 after keeping the first r = 1, 2, … n components, 0 after the last.

    Args:
        energies: Squared singular values, largest first, shape (n,).
        largest: σ_1², that of the whole weight.
    """
    if largest == 0:
        return np.zeros(len(energies))
    errors: Floats = np.sqrt(np.append(energies[1:], 0.0) / largest)
    return errors

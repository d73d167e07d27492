"""What every decomposition provides, and the one module class they all become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_compress.core.parallel import one_thread

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SMALL_WEIGHT = 2**22


@dataclass(frozen=True)
class Operator:
    """What a layer does with its weight, whatever its class: the one form decompositions work on.

    Attributes:
        shape: Shape of the weight of one group, (out, in, *kernel); no kernel for nn.Linear.
        groups: Number of groups, each of that shape and with channels of its own.
        transposed: Whether it is a transposed convolution.
        lookup: Whether the inputs are indices into the second dimension (nn.Embedding).
        rowwise: Whether a lookup returns one row per index, with an ordinary gradient (not nn.EmbeddingBag,
            sparse gradients or such as are scaled by the frequency).
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    lookup: bool = False
    rowwise: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel on each spatial axis."""
        return self.shape[2:]

    @property
    def is_spatial(self) -> bool:
        """Whether the weight spans more than one position."""
        return any(size > 1 for size in self.kernel)


@dataclass(frozen=True)
class Stage:
    """One child layer of a kind, for one group of the dense layer; sizes may be arrays over ranks, (n,).

    Attributes:
        name: Name of the child.
        outputs: Channels out.
        inputs: Channels in.
        axes: The spatial axes its kernel spans, with the dense layer's geometry; on the others it is 1.
        groups: Of the child itself (the rank, where each channel is filtered on its own).
    """

    name: str
    outputs: Any
    inputs: Any
    axes: tuple[int, ...] = ()
    groups: Any = 1

    def parameters(self, kernel: tuple[int, ...]) -> Any:
        """Returns the number of weights."""
        return self.outputs * (self.inputs // self.groups) * int(np.prod([kernel[axis] for axis in self.axes]))


@dataclass(frozen=True)
class LayerCall:
    """Sizes seen in one call of a layer at batch 1.

    Attributes:
        inputs: Spatial size of the input, (H, W) for Conv2d, () for Linear.
        outputs: Spatial size of the output, likewise.
        rows: Independent vectors a Linear or nn.Embedding was applied to (1, or the sequence
            length); for convolutions the number of images, 1.
        transposed: See `Operator`: the weight is then applied at every input position.
        lookup: See `Operator`: the weight is then not multiplied at all.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rows: int
    transposed: bool = False
    lookup: bool = False

    @property
    def positions(self) -> int:
        """How often the dense weight is applied: rows times positions, 0 for a lookup."""
        if self.lookup:
            return 0
        return self.rows * int(np.prod(self.inputs if self.transposed else self.outputs, dtype=np.int64))


@dataclass(frozen=True)
class RankProfile:
    """Relative errors of one kind of decomposition over its ranks.

    Attributes:
        ranks: Shape (n, number of ranks of the kind), whole numbers.
        errors: Shape (n,), ‖(W − Ŵ) S^½‖²_F / ‖W S^½‖²_F in [0, 1].
    """

    ranks: Ints
    errors: Floats


def threads_for(weight: Tensor) -> AbstractContextManager[None]:
    """One thread for the linear algebra of small weights, whatever the process is set to.

    Below about 2000 x 2000 a second thread gains nothing, and where other processes hold the
    cores, threads that wait for each other have been seen to take ten times as long.
    """
    return one_thread() if weight.numel() <= SMALL_WEIGHT else nullcontext()


class Decomposition(ABC):
    """One kind of factorisation: its mathematics, its costs and the layers it becomes.

    All of it is about one group: weights are float64 CPU tensors of `Operator.shape`. Costs leave
    the bias out (it is kept as it is) and are vectorised over the rows of `ranks`, shape (n, R).

    Attributes:
        kind: Its name, a key of `DECOMPOSITIONS`.
        splits_outputs: Whether the output channels are shared between several factors; the metric
            of the outputs is then left out, as no one factor could undo it.
        refines: Whether `factorise` betters the factors that `profile` measures, whose errors are then bounds.
        fits_roughly: Whether the errors of `profile` are those of a quick fit, which `factorise` betters.
        leaves: Share of the errors of `profile` that `factorise` typically leaves.
    """

    kind: str
    splits_outputs: bool = False
    refines: bool = False
    fits_roughly: bool = False
    leaves: float = 1.0

    @abstractmethod
    def unsupported(self, operator: Operator) -> str | None:
        """Returns why the kind does not apply, or None if it does."""

    def automatic(self, operator: Operator) -> bool:  # noqa: ARG002
        """Returns whether "auto" tries the kind on a layer it applies to; not where little can be gained."""
        return True

    def fit_work(self, shape: tuple[int, ...], ranks: tuple[int, ...], *, in_metric: bool) -> float:  # noqa: ARG002
        """Returns about how many multiply-adds `factorise` takes beyond a closed form.

        Args:
            shape: Of the weight.
            ranks: Of the kind.
            in_metric: Whether in that of all inputs.
        """
        return 0.0

    @abstractmethod
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the ranks at which a weight of this shape is reproduced exactly."""

    @abstractmethod
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        """Returns the error of every rank, from one decomposition.

        Args:
            weight: The dense weight.
            metric: Second moment S of what enters the layer, (D, D) with D = in times the kernel's
                size; None for the identity.
        """

    @abstractmethod
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        """Returns the child layers in forward order; their sizes have shape (n,)."""

    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        """Returns the number of weights the factors hold, shape (n,)."""
        return cast(Ints, sum(stage.parameters(shape[2:]) for stage in self.stages(shape, ranks)))

    def macs(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        """Returns the multiply-accumulates of one call, shape (n,)."""
        total = np.zeros(len(ranks), dtype=np.int64)
        for index, (stage, before, after) in enumerate(self.stage_positions(shape, ranks, call)):
            if not (call.lookup and index == 0):
                total = total + stage.parameters(shape[2:]) * (before if call.transposed else after) * call.rows
        return total

    def activations(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        """Returns how many numbers the stages write in one call, shape (n,).

        The measure of Radosavovic et al. 2020, "Designing Network Design Spaces", which find that it says more
        of the time a network takes than its MACs.
        """
        total = np.zeros(len(ranks), dtype=np.int64)
        for stage, _, after in self.stage_positions(shape, ranks, call):
            total = total + stage.outputs * after * call.rows
        return total

    def stage_positions(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Iterator[tuple[Stage, int, int]]:
        """Yields every stage with the number of positions that it reads and that it writes.

        A stage works on the sizes that the axes have by then: the outputs' once some stage spanned them.
        """
        size = list(call.inputs)
        for stage in self.stages(shape, ranks):
            before = int(np.prod(size, dtype=np.int64))
            for axis in stage.axes:
                size[axis] = call.outputs[axis]
            yield stage, before, int(np.prod(size, dtype=np.int64))

    @abstractmethod
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the weights of the child layers by name, float64, fitted in the metric."""

    def draft(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        """Returns factors as `factorise` does, in a fraction of the time and not quite as good where that is slow.

        The search gates their components; those it decides on are fitted anew.
        """
        return self.factorise(weight, ranks, metric)

    def refit(
        self, weight: Tensor, factors: Mapping[str, Tensor], ranks: tuple[int, ...], metric: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns factors as `factorise` does, of a weight and metric near those that some factors were fitted to."""
        del factors
        return self.factorise(weight, ranks, metric)

    def gated(self, factors: Mapping[str, Tensor], gates: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """Returns the factors with each ordered component times its gate.

        This is the rule of kinds with one rank, whose components are the rows of the first factor.

        Args:
            factors: Weights of the child layers by name, as from `factorise`.
            gates: Called with the index of a rank and the number of its components, returns (count,).
        """
        first = next(iter(factors))
        return {**factors, first: along(factors[first], gates(0, len(factors[first])))}

    def buffer_bytes(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """Returns the bytes of what a factorised layer stores besides its weights."""
        return 0

    def finished(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the factors of one group in the form that is stored; they stand for the same weight."""
        return dict(factors)

    @abstractmethod
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Returns the weight of the dense layer that the factors are equivalent to."""


def along(factor: Tensor, gates: Tensor, dim: int = 0) -> Tensor:
    """Returns a factor times one gate, (n,), for each index of a dimension of size n."""
    shape = [1] * factor.ndim
    shape[dim] = -1
    return factor * gates.to(factor).reshape(shape)


def pointwise(matrix: Tensor, dims: int) -> Tensor:
    """Returns a matrix (out, in) as the weight of a convolution with kernel 1, (out, in, 1, …)."""
    return matrix.reshape(*matrix.shape, *(1 for _ in range(dims)))


def singular_energies(matrix: Tensor) -> Floats:
    """Returns the squared singular values, largest first.

    They are the eigenvalues of the smaller Gram matrix, many times faster than an SVD; in
    float64 they are exact to 1e-15 of the largest, and only sums of them are used.
    """
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    energies: Floats = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).numpy()
    return energies


def equalise_norms(*factors: Tensor) -> list[Tensor]:
    """Returns factors (size, r), two or more, with the norm of each component shared out evenly over them.

    They then train at the same scale, and their product stays. A component of zero, or nearly so, has it in the second
    factor alone and some direction in the others: were two of its factors zero, none would ever receive a gradient.
    """
    norms = torch.stack([factor.norm(dim=0) for factor in factors])  # (factors, r)
    shares = norms.log().mean(dim=0).exp()
    even = shares.clamp_min(1e-2 * shares.max() if bool(shares.any()) else torch.ones_like(shares[0]))
    rest = norms.prod(dim=0) / even ** (len(factors) - 1)
    component = torch.arange(len(shares))
    equalised = []
    for index, (factor, norm) in enumerate(zip(factors, norms, strict=True)):
        unit = factor / torch.where(norm > 0, norm, 1)
        unit[component % len(unit), component] += (norm == 0).to(unit)
        equalised.append(unit * (rest if index == 1 else even))
    return equalised


def tail_errors(energies: Floats) -> Floats:
    """Returns the relative error left after keeping the first 1, 2, … n of sorted energies."""
    total = energies.sum()
    if total == 0:
        return np.zeros(len(energies))
    tails = np.cumsum(energies[::-1])[::-1]
    errors: Floats = np.clip(np.append(tails[1:], 0.0) / total, 0.0, 1.0)
    return errors

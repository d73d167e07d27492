"""Very large nn.Linear and nn.Embedding as tensors of four modes: tensor-train matrix and Tucker.

A size n is split into its two most balanced factors, and the weight (out, in) becomes
(out_1, out_2, in_1, in_2); the smaller of each pair is out_2 and in_1, which costs the fewest MACs.
The number of rows of an embedding, which seldom has such factors, is rounded up to in_1 · in_2.
The output channels are then shared between two factors, so the metric G of the outputs is left out.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_compress.kinds.base import (
    Decomposition,
    Floats,
    Ints,
    LayerCall,
    Operator,
    RankProfile,
    Stage,
    along,
    equalise_norms,
    singular_energies,
    tail_errors,
)
from lightning_compress.kinds.metric import regularised, solvable, whitened_targets
from lightning_compress.kinds.tensor_train import even, geometric

SMALLEST = 2**16
"""Weights with fewer entries are left to `svd`: there is little to gain."""
UNBALANCED = 16
"""Largest ratio of the two factors of a size."""
FEATURES = 2048
"""Ranks of `tt_linear` are tabulated up to so many features (rank times in_1); more cost more MACs than dense."""
SWEEPS = 3
"""Rounds of the alternating fits."""
SETTLED = 1e-3
"""A round that lowers the error by less than this fraction is the last."""
AUTOMATIC_SIZE = 2**23
"""Entries from which on "auto" tries these kinds."""
LARGE, FEW, LANCZOS_TOLERANCE = 1024, 16, 1e-4
"""Singular vectors of a matrix of this size, at most one of so many, are found by Lanczos iteration."""


def balanced_factors(size: int) -> tuple[int, int]:
    """Returns the factors p <= q of a size that are nearest to each other."""
    small = next(p for p in range(math.isqrt(size), 0, -1) if size % p == 0)
    return small, size // small


def modes_of(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Returns (out_1, out_2, in_1, in_2) of a weight (out, in)."""
    (out_2, out_1), (in_1, in_2) = (balanced_factors(size) for size in shape)
    return out_1, out_2, in_1, in_2


class _Tensorised(Decomposition):
    """A kind whose factors are those of the weight as a tensor of four modes."""

    splits_outputs = True
    fits_roughly = True

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if operator.kernel:
            return f"{self.kind} factorises nn.Linear only"
        if operator.lookup:
            return f"{self.kind} multiplies its inputs and cannot look rows up; embeddings take svd or tt_embedding"
        return self._why_unfit(operator, operator.shape)

    def _why_unfit(self, operator: Operator, sizes: Sequence[int]) -> str | None:
        """Returns what is wrong with the size of the weight, or with those that are split into their factors."""
        if math.prod(operator.shape) < SMALLEST:
            return f"{self.kind} is for weights of {SMALLEST} entries or more, not {math.prod(operator.shape)}"
        for size in sizes:
            small, large = balanced_factors(size)
            if large > UNBALANCED * small:
                return f"{self.kind} needs sizes with two balanced factors; {size} is {small} x {large} at best"
        return None

    @override
    def automatic(self, operator: Operator) -> bool:
        return math.prod(operator.shape) >= AUTOMATIC_SIZE

    @override
    def stages(self, shape: tuple[int, ...], ranks: Ints) -> tuple[Stage, ...]:
        """Returns none: the children are modules of their own."""
        return ()

    @override
    @abstractmethod
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints: ...

    @abstractmethod
    def row_macs(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        """Returns the multiply-accumulates of one input vector, shape (n,)."""

    @abstractmethod
    def row_activations(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        """Returns how many numbers are written for one input vector, shape (n,)."""

    @override
    def macs(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        return self.row_macs(shape, ranks) * call.rows

    @override
    def activations(self, shape: tuple[int, ...], ranks: Ints, call: LayerCall) -> Ints:
        return self.row_activations(shape, ranks) * call.rows


class _Child(nn.Module):
    """A child layer with an uninitialised weight; the last of a layer gets the bias."""

    bias: nn.Parameter | None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))
        self.register_parameter("bias", None)

    def _biased(self, output: Tensor) -> Tensor:
        return output if self.bias is None else output + self.bias

    @override
    def extra_repr(self) -> str:
        """Returns the weight's shape for `print(model)`."""
        return " x ".join(map(str, self.weight.shape))


class InnerCore(_Child):
    """Sums over in_2: (…, in_1 · in_2) to (…, in_1 · r, out_2); its weight is (r, out_2, in_2)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        _, size, inputs = self.weight.shape
        rows = x.reshape(*x.shape[:-1], -1, inputs)  # (…, in_1, in_2)
        return F.linear(rows, self.weight.flatten(0, 1)).reshape(*x.shape[:-1], -1, size)


class OuterCore(_Child):
    """Sums over in_1 and the rank: (…, in_1 · r, out_2) to (…, out_1 · out_2); its weight is (out_1, in_1, r)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._biased((self.weight.flatten(1) @ x).flatten(-2))


class ModeProduct(_Child):
    """Multiplies the last of two modes and puts it first: (…, m · p) to (…, q · m); its weight is (q, p)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x.reshape(*x.shape[:-1], -1, self.weight.shape[1]), self.weight)
        return self._biased(product.transpose(-1, -2).flatten(-2))


class _TwoCores(_Tensorised):
    """W ≈ Σ_i A_i ⊗ B_i with A_i (out_1, in_1) and B_i (out_2, in_2), cut to the size of W."""

    @abstractmethod
    def _modes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Returns (out_1, out_2, in_1, in_2)."""

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        out_1, out_2, in_1, in_2 = self._modes(shape)
        return (min(out_1 * in_1, out_2 * in_2),)

    @override
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        out_1, out_2, in_1, in_2 = self._modes(shape)
        costs: Ints = ranks[:, 0] * (out_1 * in_1 + out_2 * in_2)
        return costs

    def _factors(self, shape: tuple[int, ...], outer: Tensor, inner: Tensor) -> dict[str, Tensor]:
        """Returns the factors of cores (out_1 · in_1, r) and (r, out_2 · in_2)."""
        out_1, out_2, in_1, in_2 = self._modes(shape)
        outer, columns = equalise_norms(outer, inner.T)
        return {"inner": columns.T.reshape(-1, out_2, in_2), "outer": outer.reshape(out_1, in_1, -1)}

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        product = torch.einsum("air,rbj->abij", factors["outer"], factors["inner"])
        return product.flatten(2).flatten(0, 1)[:, : shape[1]]


class TtLinear(_TwoCores):
    """W ≈ Σ_i A_i ⊗ B_i with A_i (out_1, in_1) and B_i (out_2, in_2): a tensor-train matrix of two cores.

    The best of every rank is the SVD of the rearranged weight, (out_1·in_1) x (out_2·in_2). In a
    metric it starts from that of the weight whitened by the nearest product of two moments, with
    exact least squares for the A_i (these errors are the profile's), and goes on by alternating
    least squares.

    Source: Novikov et al. 2015, "Tensorizing Neural Networks", section 3; Van Loan and Pitsianis
    1993, "Approximation with Kronecker Products".
    """

    kind = "tt_linear"

    @override
    def _modes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        return modes_of(shape)

    @override
    def row_macs(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        out_1, out_2, in_1, in_2 = modes_of(shape)
        costs: Ints = ranks[:, 0] * in_1 * out_2 * (in_2 + out_1)
        return costs

    @override
    def row_activations(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        _, out_2, in_1, _ = modes_of(shape)
        written: Ints = ranks[:, 0] * in_1 * out_2 + shape[0]
        return written

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        modes = modes_of(tuple(weight.shape))
        limit = min(*self.max_ranks(tuple(weight.shape)), max(1, FEATURES // modes[2]))
        if metric is None or not bool(metric.any()):
            matrix = _rearranged(weight.reshape(modes))
            energies, total = (_leading(matrix, limit).T @ matrix).square().sum(dim=1), matrix.square().sum()
            lost = total - energies.cumsum(0)
            errors = (lost / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp(0, 1).numpy()
        else:
            errors = _KroneckerFit(weight, metric).errors(limit)
        return RankProfile(ranks=np.arange(1, limit + 1)[:, None], errors=errors)

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        shape = tuple(weight.shape)
        if metric is None or not bool(metric.any()):
            return self._factors(shape, *_best_cores(_rearranged(weight.reshape(modes_of(shape))), *ranks))
        return self._factors(shape, *_KroneckerFit(weight, metric).fit(*ranks))

    @override
    def own_children(self, operator: Operator, ranks: tuple[int, ...]) -> dict[str, nn.Module]:
        out_1, out_2, in_1, in_2 = modes_of(operator.shape)
        return {"inner": InnerCore(*ranks, out_2, in_2), "outer": OuterCore(out_1, in_1, *ranks)}


class InnerLookup(_Child):
    """Looks rows up by the index modulo in_2: (…) to (…, r · out_2); its weight is (r, out_2, in_2)."""

    @override
    def forward(self, index: Tensor, _: Tensor | None) -> Tensor:
        return F.embedding(index % self.weight.shape[2], self.weight.flatten(0, 1).T)


class OuterLookup(_Child):
    """Looks rows up by the index divided by in_2 and multiplies: to (…, out_1 · out_2); its weight is (out_1, in_1, r).

    Args:
        shape: Of the weight.
        inner_size: in_2.
    """

    def __init__(self, *shape: int, inner_size: int) -> None:
        super().__init__(*shape)
        self.inner_size = inner_size

    @override
    def forward(self, index: Tensor, inner: Tensor) -> Tensor:
        out_1, _, rank = self.weight.shape
        rows = F.embedding(index // self.inner_size, self.weight.transpose(0, 1).flatten(1))
        product = rows.reshape(*index.shape, out_1, rank) @ inner.reshape(*index.shape, rank, -1)
        return product.flatten(-2)


class TtEmbedding(_TwoCores):
    """An embedding's rows v = (i, j) as Σ_r a_ir ⊗ b_rj: a tensor-train matrix of two cores that is looked up.

    The best of every rank is the SVD of the rearranged table, (out_1·in_1) x (out_2·in_2), with rows of
    zeros up to in_1 · in_2.

    Source: Hrinchuk et al. 2020, "Tensorized Embedding Layers", section 3, with two cores; see `TtLinear`.
    """

    kind = "tt_embedding"
    fits_roughly = False

    @override
    def unsupported(self, operator: Operator) -> str | None:
        if not operator.lookup:
            return f"{self.kind} factorises nn.Embedding only"
        if not operator.rowwise:
            return f"{self.kind} looks up row by row, without sparse or scaled gradients; this layer takes svd"
        return self._why_unfit(operator, operator.shape[:1])

    @override
    def _modes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Returns the modes with in_1 · in_2 >= rows."""
        out_2, out_1 = balanced_factors(shape[0])
        in_2 = math.isqrt(shape[1] - 1) + 1
        return out_1, out_2, -(-shape[1] // in_2), in_2

    @override
    def row_macs(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        costs: Ints = ranks[:, 0] * shape[0]
        return costs

    @override
    def row_activations(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        out_1, out_2, *_ = self._modes(shape)
        written: Ints = ranks[:, 0] * (out_1 + out_2) + shape[0]
        return written

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        errors = tail_errors(singular_energies(self._matrix(weight)))
        return RankProfile(ranks=np.arange(1, len(errors) + 1)[:, None], errors=errors)

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        return self._factors(tuple(weight.shape), *_best_cores(self._matrix(weight), *ranks))

    def _matrix(self, weight: Tensor) -> Tensor:
        """Returns a table (out, rows) as (out_1 · in_1, out_2 · in_2), filled up with zeros."""
        modes = self._modes(tuple(weight.shape))
        filled = F.pad(weight, (0, modes[2] * modes[3] - weight.shape[1]))
        return _rearranged(filled.reshape(modes))

    @override
    def own_children(self, operator: Operator, ranks: tuple[int, ...]) -> dict[str, nn.Module]:
        out_1, out_2, in_1, in_2 = self._modes(operator.shape)
        return {"inner": InnerLookup(*ranks, out_2, in_2), "outer": OuterLookup(out_1, in_1, *ranks, inner_size=in_2)}


def _rearranged(tensor: Tensor) -> Tensor:
    """Returns (out_1, out_2, in_1, in_2) as (out_1 · in_1, out_2 · in_2)."""
    return tensor.transpose(1, 2).flatten(2).flatten(0, 1)


def _best_cores(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the factors (rows, r) and (r, columns) of the truncated SVD."""
    inner = _leading(matrix.T, rank).T
    return matrix @ inner.T, inner


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Returns the leading left singular vectors, (rows, r); a few of a large matrix by Lanczos iteration."""
    if min(matrix.shape) < LARGE or rank * FEW > min(matrix.shape) or not bool(matrix.any()):
        vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
        return vectors.flip(1)[:, :rank]
    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    u, values, _ = svds(matrix.numpy(), rank, tol=LANCZOS_TOLERANCE, v0=start, return_singular_vectors="u")
    return torch.from_numpy(u[:, np.argsort(-values)].copy())


class _Whitened:
    """The weight as a tensor, whitened by L_1 ⊗ L_2, the product of the moments of in_1 and in_2 alone.

    Attributes:
        modes: (out_1, out_2, in_1, in_2).
        metric: S with a ridge, (in_1, in_2, in_1, in_2); None for the identity.
        cross: W S, in the shape of the modes.
        roots: L_1 and L_2.
        tensor: The whitened weight.
        total: ‖W S^½‖².
    """

    def __init__(self, weight: Tensor, metric: Tensor | None) -> None:
        self.modes = modes_of(tuple(weight.shape))
        *_, in_1, in_2 = self.modes
        self.tensor = self.cross = weight.reshape(self.modes)
        self.metric, self.roots = None, (torch.eye(in_1, dtype=weight.dtype), torch.eye(in_2, dtype=weight.dtype))
        if metric is not None and bool(metric.any()):
            metric = regularised(metric)
            self.metric = metric.reshape(in_1, in_2, in_1, in_2)
            self.cross = (weight @ metric).reshape(self.modes)
            moments = (self.metric.diagonal(dim1=1, dim2=3).sum(-1), self.metric.diagonal(dim1=0, dim2=2).sum(-1))
            scale = metric.diagonal().sum().sqrt()
            one, two = (torch.linalg.cholesky(moment / scale) for moment in moments)
            self.tensor = torch.einsum("abij,ip,jq->abpq", self.tensor, one, two)
            self.roots = one, two
        self.total = float((self.cross * weight.reshape(self.modes)).sum())


def _unwhitened(maps: Tensor, root: Tensor) -> Tensor:
    """Returns M L⁻¹ of maps M, (…, n)."""
    result: Tensor = torch.linalg.solve_triangular(root, maps, upper=False, left=False)
    return result


class _KroneckerFit(_Whitened):
    """Tensor-train matrix of two cores in the metric S; every least-squares step is exact."""

    def _start(self, rank: int) -> Tensor:
        """Returns the inner core, (r, out_2, in_2), nested in the rank."""
        inner = _leading(_rearranged(self.tensor).T, rank).T.reshape(rank, self.modes[1], self.modes[3])
        return _unwhitened(inner, self.roots[1])

    def _outer_system(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the normal matrix and right sides of the outer core, (r·in_1, r·in_1) and (r·in_1, out_1)."""
        gram = torch.einsum("rbj,sbk->rsjk", inner, inner).flatten(2)
        return self._system(gram, "ijkl->ikjl"), torch.einsum("abij,rbj->ria", self.cross, inner).flatten(0, 1)

    def _inner_system(self, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the same of the inner core, (r·in_2, r·in_2) and (r·in_2, out_2)."""
        gram = torch.einsum("air,aks->rsik", outer, outer).flatten(2)
        return self._system(gram, "ijkl->jlik"), torch.einsum("abij,air->rjb", self.cross, outer).flatten(0, 1)

    def _system(self, gram: Tensor, order: str) -> Tensor:
        rank = len(gram)
        assert self.metric is not None
        metric = torch.einsum(order, self.metric)
        size = len(metric)
        normal = gram.flatten(0, 1) @ metric.flatten(2).flatten(0, 1).T  # (r * r, n * n)
        return solvable(normal.reshape(rank, rank, size, size).transpose(1, 2).reshape(rank * size, rank * size))

    def errors(self, limit: int) -> Floats:
        """Returns the errors of the ranks 1, 2, … of the start."""
        if not self.total > 0:
            return np.zeros(limit)
        targets = whitened_targets(*self._outer_system(self._start(limit)))
        explained = targets.square().sum(1).reshape(limit, -1).sum(1).cumsum(0)
        return (1 - explained / self.total).clamp(0, 1).numpy()

    def fit(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns the outer and the inner cores, (out_1 · in_1, r) and (r, out_2 · in_2), largest components first."""
        out_1, out_2, in_1, in_2 = self.modes
        inner, lost = self._start(rank), math.inf
        for _ in range(SWEEPS):
            normal, right = self._outer_system(inner)
            solution = torch.linalg.solve(normal, right)
            before, lost = lost, self.total - float((solution * right).sum())
            outer = solution.reshape(rank, in_1, out_1).permute(2, 1, 0)
            if not lost > 0 or lost > before * (1 - SETTLED):
                break
            inner = torch.linalg.solve(*self._inner_system(outer)).reshape(rank, in_2, out_2).transpose(1, 2)
        else:
            outer = torch.linalg.solve(*self._outer_system(inner)).reshape(rank, in_1, out_1).permute(2, 1, 0)
        return self._ordered(outer, inner)

    def _ordered(self, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cores of the same product whose components are those of its SVD in the whitened weight."""
        out_1, out_2, in_1, in_2 = self.modes
        one, two = self.roots
        left, upper = torch.linalg.qr(torch.einsum("air,ip->apr", outer, one).flatten(0, 1))
        right, lower = torch.linalg.qr((inner @ two).flatten(1).T)
        u, s, vh = torch.linalg.svd(upper @ lower.T)
        outer = ((left @ u) * s).reshape(out_1, in_1, -1)
        inner = (vh @ right.T).reshape(-1, out_2, in_2)
        outer = torch.linalg.solve_triangular(one.T, outer, upper=True)
        inner = _unwhitened(inner, two)
        return outer.flatten(0, 1), inner.flatten(1)


class TuckerLinear(_Tensorised):
    """The weight as (out_1, out_2, in_1, in_2) in Tucker form; ranks are those of the modes in this order.

    The profile's errors are those of the truncated higher-order SVD of the whitened weight with the
    exact core; the fit starts there and goes on by higher-order orthogonal iteration. Its tuples
    form a grid in which the two ranks of the outputs are neighbours, and those of the inputs.

    Source: Tucker 1966; De Lathauwer et al. 2000, "A Multilinear Singular Value Decomposition";
    the reshape is that of Novikov et al. 2015, "Tensorizing Neural Networks".
    """

    kind = "tucker_linear"

    @override
    def max_ranks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        modes, total = modes_of(shape), math.prod(shape)
        return tuple(min(size, total // size) for size in modes)

    @override
    def parameters(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        costs: Ints = ranks.prod(axis=1) + (ranks * np.array(modes_of(shape))).sum(axis=1)
        return costs

    @override
    def row_macs(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        out_1, out_2, in_1, in_2 = modes_of(shape)
        s_1, s_2, t_1, t_2 = ranks.T
        inputs, outputs = in_1 * t_2 * (in_2 + t_1), out_2 * s_1 * (s_2 + out_1)
        costs: Ints = inputs + ranks.prod(axis=1) + outputs
        return costs

    @override
    def row_activations(self, shape: tuple[int, ...], ranks: Ints) -> Ints:
        _, out_2, in_1, _ = modes_of(shape)
        s_1, s_2, t_1, t_2 = ranks.T
        written: Ints = in_1 * t_2 + t_1 * t_2 + s_1 * s_2 + out_2 * s_1 + shape[0]
        return written

    @override
    def profile(self, weight: Tensor, metric: Tensor | None = None) -> RankProfile:
        shape = tuple(weight.shape)
        full = np.array([self.max_ranks(shape)])
        ranks = np.array(list(_near(self.max_ranks(shape))))
        ranks = np.unique(np.concatenate([ranks[self.parameters(shape, ranks) < weight.numel()], full]), axis=0)
        return RankProfile(ranks=ranks, errors=_ModesFit(weight, metric).errors(ranks))

    @override
    def factorise(self, weight: Tensor, ranks: tuple[int, ...], metric: Tensor | None = None) -> dict[str, Tensor]:
        return _ModesFit(weight, metric).fit(ranks)

    @override
    def own_children(self, operator: Operator, ranks: tuple[int, ...]) -> dict[str, nn.Module]:
        (out_1, out_2, in_1, in_2), (s_1, s_2, t_1, t_2) = modes_of(operator.shape), ranks
        return {
            "reduce2": ModeProduct(t_2, in_2),
            "reduce1": ModeProduct(t_1, in_1),
            "core": nn.Linear(t_1 * t_2, s_1 * s_2, bias=False, device="meta"),
            "expand2": ModeProduct(out_2, s_2),
            "expand1": ModeProduct(out_1, s_1),
        }

    @override
    def gated(self, factors: Mapping[str, Tensor], gates: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """Gates the basis of each mode with its rank."""
        outputs = {
            name: along(factors[name], gates(bond, factors[name].shape[1]), dim=1)
            for bond, name in enumerate(("expand1", "expand2"))
        }
        inputs = {
            name: along(factors[name], gates(2 + bond, len(factors[name])))
            for bond, name in enumerate(("reduce1", "reduce2"))
        }
        return {**factors, **outputs, **inputs}

    @override
    def dense_weight(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        expand_1, expand_2, reduce_1, reduce_2 = (factors[f] for f in ("expand1", "expand2", "reduce1", "reduce2"))
        core = factors["core"].reshape(expand_1.shape[1], expand_2.shape[1], len(reduce_1), len(reduce_2))
        return _in_bases(core, [expand_1.T, expand_2.T, reduce_1, reduce_2]).reshape(shape)


def _near(limits: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields tuples on a geometric grid: the two ranks of the outputs at most a step apart, as those of the inputs."""
    pairs = []
    for one, two in (limits[:2], limits[2:]):
        grids = geometric(one, 2), geometric(two, 2)
        pairs.append([(r, s) for (i, r), (j, s) in itertools.product(*map(enumerate, grids)) if abs(i - j) <= 1])
    yield from ((*outputs, *inputs) for outputs, inputs in itertools.product(*pairs))


def _in_bases(tensor: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Returns a tensor with each mode multiplied by a basis, (size of the mode, new size); None leaves it."""
    for basis in bases:  # the first mode becomes the last, as often as there are modes
        tensor = tensor.movedim(0, -1) if basis is None else torch.tensordot(tensor, basis, dims=([0], [0]))
    return tensor


class _ModesFit(_Whitened):
    """Tucker of four modes: bases in the whitened weight, the core by exact least squares in S."""

    def _basis(self, mode: int, rank: int, bases: Sequence[Tensor | None]) -> Tensor:
        """Returns the leading directions of a mode seen through the bases of the others, (size, r)."""
        others = [None if other == mode else basis for other, basis in enumerate(bases)]
        matrix = _in_bases(self.tensor, others).movedim(mode, 0).flatten(1)
        return _leading(matrix, rank)

    def _reduce(self, bases: Sequence[Tensor]) -> list[Tensor]:
        """Returns the bases of the inputs as maps of what enters the layer, (t, in_1) and (t, in_2)."""
        return [_unwhitened(basis.T, root) for root, basis in zip(self.roots, bases[2:], strict=True)]

    def _targets(self, bases: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Returns Φ S Wᵀ in the bases of the outputs, (t_1·t_2, s_1, s_2), and Φ S Φᵀ, None for the identity."""
        one, two = self._reduce(bases)
        cross = _in_bases(self.cross, [*bases[:2], one.T, two.T]).flatten(2).movedim(2, 0)
        if self.metric is None:
            return cross, None
        count = len(one) * len(two)
        features = _in_bases(self.metric, [one.T, two.T, one.T, two.T]).reshape(count, count)
        return cross, solvable(features)

    def errors(self, ranks: Ints) -> Floats:
        """Returns the errors of tuples of ranks, with the bases of the higher-order SVD."""
        errors = np.zeros(len(ranks))
        if not self.total > 0:
            return errors
        bases = [self._basis(mode, size, [None] * 4) for mode, size in enumerate(self.modes)]
        cross, features = self._targets(bases)
        sizes = self.modes[2:]
        cross = cross.reshape(*sizes, *cross.shape[1:])
        features = None if features is None else features.reshape(*sizes, *sizes)
        for one, two in {tuple(row) for row in ranks[:, 2:].tolist()}:
            targets = cross[:one, :two].flatten(0, 1)
            if features is not None:
                own = features[:one, :two, :one, :two].reshape(one * two, one * two)
                targets = whitened_targets(own, targets.flatten(1)).reshape(targets.shape)
            explained = targets.square().sum(0).cumsum(0).cumsum(1).numpy()
            rows = np.flatnonzero((ranks[:, 2:] == (one, two)).all(axis=1))
            errors[rows] = 1 - explained[ranks[rows, 0] - 1, ranks[rows, 1] - 1] / self.total
        return np.clip(errors, 0.0, 1.0)

    def fit(self, ranks: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns the weights of the child layers."""
        bases = [self._basis(mode, rank, [None] * 4) for mode, rank in enumerate(ranks)]
        best, core, least = bases, *self._core(bases)
        lost = least
        for _ in range(SWEEPS):
            if not lost > 0:
                break
            bases, before = list(bases), lost
            for mode, rank in enumerate(ranks):
                bases[mode] = self._basis(mode, rank, bases)
            found, lost = self._core(bases)
            if lost < least:
                best, core, least = bases, found, lost
            if lost > before * (1 - SETTLED):
                break
        one, two = self._reduce(best)
        factors = {"reduce2": two, "reduce1": one, "core": core, "expand2": best[1], "expand1": best[0]}
        return dict(zip(factors, even(list(factors.values())), strict=True))

    def _core(self, bases: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Returns the best core, (s_1·s_2, t_1·t_2), and the energy it loses."""
        cross, features = self._targets(bases)
        cross = cross.flatten(1)
        core = cross if features is None else torch.linalg.solve(features, cross)
        return core.T, max(self.total - float((core * cross).sum()), 0.0)

"""A check for kinds of decomposition of one's own: what the search, the plans and the layers rely on.

The layers are nn.Linear, convolutions in one to three dimensions (1x1 and with a kernel, grouped and
transposed) and nn.Embedding; where the kind takes neither of the small matrices, one of 2^16 entries
each. Of all of them these must hold, in float64:

- Full rank is exact.
- The errors of `profile` lie in [0, 1], fall with each rank, and are those of the fitted factors: with and
  without second moments of the inputs and of the outputs. Where the kind says `refines`, factors may be
  better; where it says `fits_roughly`, a little worse too, and errors need only nearly fall.
- `parameters`, `macs`, `activations` and `buffer_bytes` are those of the layers that are built.
- The built layer computes what the dense one does with `dense_weight`, and has the same gradients, which
  reach every factor.
- `factorise` gives the same each time and leaves the weight alone; `draft` gives factors of the same shapes;
  `gated` asks for the gates of each rank and takes everything away where those of one rank are zero.
- A weight of zeros has no error and factors that can train; inputs that never vary give finite factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.kinds.base import Decomposition, RankProfile
from lightning_compress.kinds.metric import Metric
from lightning_compress.kinds.registry import (
    decomposition_of,
    fit_factors,
    gated_weight,
    multiplied_out,
    rank_errors,
    resolve_kinds,
    weighted_energy,
)
from lightning_compress.kinds.tensorised import TtEmbedding
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import canonical, children_of, family_of, operator_of, stored_factor
from lightning_compress.layers.variants import FactorisedLookup

EXACT, EXACT_IN_METRIC = 1e-10, 1e-5
"""Relative squared error at full rank; second moments have a ridge, which costs a little."""
ABOVE, BELOW, NEAR_ZERO = 1e-3, 1e-2, 2e-6
"""By what the error of factors may be above or below that of the profile, relative to it, and absolutely."""
BETTERED = 0.75
"""By what it may be below where the profile has bounds."""
ROUGHLY, RISING = 0.25, 0.25
"""By what it may be above for kinds that fit roughly, and by what their errors may rise with a rank."""
ROUNDING = 1e-9
SAMPLES = 3
"""Tuples of ranks of each layer that are fitted, besides full rank."""
LARGE = 2**14
"""Weights with more entries are fitted at lower ranks, and at full rank in no metric: it takes minutes."""


def check_decomposition(kind: str | Decomposition) -> None:
    """Checks a kind of decomposition on one small layer of each type that it applies to.

    What it checks is said at the top of this module. For example a kind for nn.Linear, which can be used by its name
    once it is in `lightning_compress.kinds.registry.DECOMPOSITIONS`:

        >>> import numpy as np, torch
        >>> from lightning_compress.kinds.base import Decomposition, RankProfile, Stage, tail_errors
        >>> from lightning_compress.kinds.metric import output_basis
        >>> class LeadingOutputs(Decomposition):
        ...     kind = "leading_outputs"
        ...     def unsupported(self, operator):
        ...         return "nn.Linear only" if operator.kernel or operator.lookup else None
        ...     def max_ranks(self, shape):
        ...         return (shape[0],)
        ...     def stages(self, shape, ranks):
        ...         return Stage("reduce", ranks[:, 0], shape[1]), Stage("expand", shape[0], ranks[:, 0])
        ...     def _basis(self, weight, metric):
        ...         return output_basis(weight, torch.eye(weight.shape[1]).to(weight) if metric is None else metric)
        ...     def profile(self, weight, metric=None):
        ...         errors = tail_errors(self._basis(weight, metric)[0])
        ...         return RankProfile(np.arange(1, len(errors) + 1)[:, None], errors)
        ...     def factorise(self, weight, ranks, metric=None):
        ...         basis = self._basis(weight, metric)[1][:, : ranks[0]]
        ...         return {"reduce": basis.T @ weight, "expand": basis}
        ...     def dense_weight(self, factors, shape):
        ...         return factors["expand"] @ factors["reduce"]
        >>> check_decomposition(LeadingOutputs())

    Args:
        kind: The decomposition, or the name of a registered one.

    Raises:
        AssertionError: If something does not hold; it says what, for which layer and at which ranks.
        ConfigurationError: If no kind of that name is registered.
    """
    decomposition = decomposition_of(resolve_kinds([kind])[0]) if isinstance(kind, str) else kind
    with torch.random.fork_rng(devices=[]):
        layers = list(_layers(decomposition))
    for layer, inputs in layers:
        _Check(decomposition, layer, inputs).all()
    if not layers:
        msg = f"{decomposition.kind}: unsupported() refuses every layer it could be checked on."
        raise AssertionError(msg)


def _layers(kind: Decomposition) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yields the layers that a kind applies to, of random weights, with inputs for one call."""
    tokens = torch.tensor([[3, 0, 7, 7, 2], [1, 8, 0, 0, 11]])
    small = [(nn.Linear(8, 6), (2, 3, 8)), (nn.Embedding(12, 6), tokens)]
    large = [(nn.Linear(320, 256), (3, 320)), (nn.Embedding(1030, 64), 90 * tokens)]
    kernels: list[tuple[nn.Module, Any]] = [
        (nn.Conv1d(8, 6, 1), (2, 8, 5)),
        (nn.Conv2d(8, 6, 1, stride=2), (2, 8, 5, 4)),
        (nn.Conv3d(8, 6, 1), (1, 8, 2, 3, 2)),
        (nn.Conv2d(8, 6, 1, groups=2), (1, 8, 3, 4)),
        (nn.Conv1d(4, 5, 3, stride=2), (2, 4, 9)),
        (nn.Conv2d(4, 5, (3, 5), (2, 1), (1, 2)), (2, 4, 7, 6)),
        (nn.Conv2d(4, 5, (1, 3)), (1, 4, 5, 6)),
        (nn.Conv2d(8, 6, 3, dilation=2, groups=2, bias=False), (1, 8, 6, 7)),
        (nn.Conv3d(4, 3, (2, 3, 2), padding=1), (1, 4, 3, 5, 4)),
        (nn.ConvTranspose1d(4, 5, 4, 2, 1), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 5, 3, 2, 1, output_padding=1), (2, 4, 4, 3)),
        (nn.ConvTranspose2d(8, 6, 2, 2, groups=2), (1, 8, 3, 4)),
        (nn.ConvTranspose3d(4, 3, (2, 1, 3), 2), (1, 4, 3, 2, 2)),
    ]
    matrices: list[tuple[nn.Module, Any]] = small if any(_applies(kind, layer) for layer, _ in small) else large
    for layer, inputs in (*matrices, *kernels):
        if _applies(kind, layer):
            generator = torch.Generator().manual_seed(0)
            for parameter in layer.double().parameters():
                parameter.data.normal_(generator=generator)
            yield layer, inputs if isinstance(inputs, Tensor) else _normal(*inputs, seed=1)


def _applies(kind: Decomposition, layer: nn.Module) -> bool:
    return kind.unsupported(operator_of(layer)) is None


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moment(size: int, groups: int, seed: int) -> Tensor:
    """Returns a second moment, (size, size), or one for each of several groups."""
    basis = torch.linalg.qr(_normal(groups, size, size, seed=seed))[0]
    moments: Tensor = (basis * torch.logspace(0, 2, size, dtype=torch.float64)) @ basis.mT
    return moments if groups > 1 else moments[0]


def _gradients(loss: Tensor, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradient of each factor, of zeros where none reaches it."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(factor) for name, factor in factors.items()}
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(factors, found, strict=True))


class _Check:
    """The checks of one kind on one layer.

    Args:
        kind: The kind.
        layer: A layer it applies to, in float64.
        inputs: Of one call.
    """

    def __init__(self, kind: Decomposition, layer: nn.Module, inputs: Tensor) -> None:
        self.kind, self.layer, self.inputs = kind, layer, inputs
        self.operator = operator_of(layer)
        self.groups, self.shape = self.operator.groups, self.operator.shape
        self.weight = canonical(layer, next(layer.parameters()).detach()).contiguous()
        self.full = kind.max_ranks(self.shape)
        self.above, self.rising = (ROUGHLY, RISING) if kind.fits_roughly else (ABOVE, 0.0)
        self.below = BETTERED if kind.fits_roughly or kind.refines else BELOW
        self.fits: dict[tuple[tuple[int, ...], str], dict[str, Tensor]] = {}

    def require(self, condition: Any, what: str, ranks: tuple[int, ...] | None = None) -> None:
        """Raises an AssertionError unless something holds."""
        if not bool(condition):
            at = "" if ranks is None else f" at ranks {ranks}"
            msg = f"{self.kind.kind} on {self.layer}{at}: {what}"
            raise AssertionError(msg)

    def all(self) -> None:
        """Runs the checks one after the other."""
        sampled = self.errors("", None)
        metric = self.metric()
        if metric is not None:
            self.errors(" in a metric", metric)
        for ranks in dict.fromkeys((*sampled, self.full)):
            new = self.built(ranks)
            self.costs(new, ranks)
            self.computes(new, ranks)
            self.gates(ranks)
        self.zeros()
        self.dead_inputs()

    def metric(self) -> Metric | None:
        """Returns second moments of what the kind is fitted in, None for a lookup that splits the outputs."""
        inputs = None if self.operator.lookup else _moment(math.prod(self.shape[1:]), self.groups, 2)
        outputs = None if self.kind.splits_outputs else _moment(self.shape[0], self.groups, 3)
        return None if inputs is None and outputs is None else Metric(inputs, outputs)

    def low(self) -> tuple[int, ...]:
        """Returns about half of the full rank, or an eighth of a large weight's."""
        return tuple(max(1, rank // (8 if self.weight.numel() > LARGE else 2)) for rank in self.full)

    def sampled(self, profile: RankProfile) -> list[tuple[int, ...]]:
        """Returns some ranks of a profile."""
        last = (len(profile.ranks) - 1) // (4 if self.weight.numel() > LARGE else 1)
        rows = np.unique(np.linspace(0, last, SAMPLES + 1).astype(int)[:-1])
        return [tuple(row) for row in profile.ranks[rows].tolist()]

    # --- errors

    def errors(self, name: str, metric: Metric | None) -> list[tuple[int, ...]]:
        """Checks the profile and the factors against it, at the ranks that are returned."""
        given = self.weight.clone()
        profile = rank_errors(self.kind, given, metric, self.groups)
        self.require(torch.equal(self.weight, given), f"profile() changes the weight{name}.")
        self.profile_is_sound(profile, name)
        predictions = {tuple(row): float(e) for row, e in zip(profile.ranks.tolist(), profile.errors, strict=True)}
        sampled = self.sampled(profile)
        for ranks in sampled:
            error, predicted = self.error(ranks, name, metric), predictions[ranks]
            close = predicted * (1 - self.below) - NEAR_ZERO <= error <= predicted * (1 + self.above) + NEAR_ZERO
            self.require(
                close, f"profile() says an error of {predicted:.6g}{name}, the factors' is {error:.6g}.", ranks
            )
        exact = EXACT if metric is None else EXACT_IN_METRIC
        if metric is None or self.weight.numel() <= LARGE:
            error = self.error(self.full, name, metric)
            self.require(error <= exact, f"full rank is not exact: the error{name} is {error:.3g}.", self.full)
        predicted = predictions.get(self.full, 0.0)
        self.require(predicted <= exact, f"profile() says an error of {predicted:.3g}{name} at full rank.", self.full)
        again = fit_factors(self.kind, self.weight, sampled[-1], metric, self.groups)
        for factor, value in self.fitted(sampled[-1], name, metric).items():
            same = torch.equal(value, again[factor])
            self.require(same, f"factorise() gives another {factor!r} the second time{name}.", sampled[-1])
        return sampled

    def fitted(self, ranks: tuple[int, ...], name: str = "", metric: Metric | None = None) -> dict[str, Tensor]:
        """Returns fitted factors, the same ones each time."""
        if (ranks, name) not in self.fits:
            given = self.weight.clone()
            self.fits[ranks, name] = fit_factors(self.kind, given, ranks, metric, self.groups)
            self.require(torch.equal(self.weight, given), f"factorise() changes the weight{name}.", ranks)
        return self.fits[ranks, name]

    def error(self, ranks: tuple[int, ...], name: str, metric: Metric | None) -> float:
        """Returns the relative squared error of fitted factors."""
        factors = self.fitted(ranks, name, metric)
        lost = self.weight - multiplied_out(self.kind, factors, self.shape, self.groups)
        return weighted_energy(lost, metric, self.groups) / weighted_energy(self.weight, metric, self.groups)

    def profile_is_sound(self, profile: RankProfile, name: str) -> None:
        """Checks the ranks and the errors of a profile, and that these fall."""
        ranks, errors = profile.ranks, profile.errors
        shapes = f"ranks of shape {ranks.shape} and errors of shape {errors.shape}"
        sound = ranks.shape == (len(errors), len(self.full)) and np.issubdtype(ranks.dtype, np.integer)
        self.require(sound, f"profile() gives {shapes}{name}, not whole numbers (n, {len(self.full)}) and (n,).")
        inside = ((ranks >= 1) & (ranks <= np.array(self.full))).all()
        self.require(inside, f"profile() has ranks outside 1 to {self.full}, those of max_ranks().")
        self.require(len(np.unique(ranks, axis=0)) == len(ranks), "profile() lists ranks more than once.")
        self.require(((errors >= 0) & (errors <= 1)).all(), f"profile() has errors outside [0, 1]{name}.")
        for row, error in zip(ranks, errors, strict=True):
            larger = (ranks >= row).all(axis=1)
            worst = int(np.where(larger, errors, -1.0).argmax())
            high = tuple(ranks[worst].tolist())
            rises = f"the error{name} rises from {error:.6g} at ranks {tuple(row.tolist())} to {errors[worst]:.6g}."
            self.require(errors[worst] <= error * (1 + self.rising) + ROUNDING, rises, high)

    # --- the layer

    @property
    def looks_up(self) -> bool:
        """Whether the layer becomes cores that look up their own part of the index."""
        return isinstance(self.kind, TtEmbedding)

    def built(self, ranks: tuple[int, ...]) -> FactorisedLayer:
        """Returns the layer with fitted factors."""
        factors = self.fitted(ranks)
        children = children_of(self.kind, self.layer, ranks)
        names = f"factorise() gives {list(factors)}, the child layers are {list(children)}."
        self.require(list(factors) == list(children), names, ranks)
        for name, child in children.items():
            holds, value = next(child.parameters()).shape, stored_factor(child, factors[name])
            shapes = f"the factor {name!r} is {tuple(value.shape)} in its layer, which holds {tuple(holds)}."
            self.require(value.numel() == holds.numel(), shapes, ranks)
            child.weight = nn.Parameter(value.reshape(holds).clone())
        last = children[list(children)[-1]]
        last.register_parameter("bias", getattr(self.layer, "bias", None))
        cls = FactorisedLookup if self.looks_up else FactorisedLayer
        return cls(children, dense=self.layer, decomposition=self.kind, ranks=ranks)

    def costs(self, new: FactorisedLayer, ranks: tuple[int, ...]) -> None:
        """Checks parameters, MACs, activations and buffers against those of the layer."""
        written: list[int] = []
        hooks = [c.register_forward_hook(lambda _, __, output: written.append(output.numel())) for c in new]
        with FlopCounterMode(display=False) as counter:
            output = new(self.inputs)
        for hook in hooks:
            hook.remove()
        call = family_of(self.layer).call(self.layer, self.inputs, output)
        row = np.array([ranks])
        expected = {
            "parameters": (self.kind.parameters(self.shape, row), sum(f.numel() for f in new.factors().values())),
            "macs": (self.kind.macs(self.shape, row, call), counter.get_total_flops() // 2),
            "activations": (self.kind.activations(self.shape, row, call), sum(written)),
        }
        if self.looks_up:
            del expected["activations"]  # cores write more than they return
        for name, (costs, found) in expected.items():
            self.require(np.shape(costs) == (1,), f"{name}() has shape {np.shape(costs)} for ranks of (1, R).", ranks)
            says = int(costs[0]) * self.groups
            self.require(says == found, f"{name}() says {says}, the built layer has {found}.", ranks)
        stored = sum(b.numel() * b.element_size() for b in new.buffers())
        says = self.kind.buffer_bytes(self.shape) * self.groups
        self.require(says == stored, f"buffer_bytes() says {says}, the built layer has {stored}.", ranks)

    def computes(self, new: FactorisedLayer, ranks: tuple[int, ...]) -> None:
        """Checks the output of the layer and the gradients of its factors."""
        output = new(self.inputs)
        dense = functional_call(self.layer, {"weight": new.dense_weight()}, (self.inputs,))
        same = output.shape == dense.shape and torch.allclose(output, dense, 1e-8, 1e-8)
        self.require(same, "the built layer does not compute what the dense one does with dense_weight().", ranks)
        target, factors = _normal(*output.shape, seed=4), new.factors()
        got, through = (_gradients((found - target).square().sum(), factors) for found in (output, dense))
        for name, factor in factors.items():
            reached = not factor.numel() or got[name].any()
            self.require(reached, f"no gradient reaches the factor {name!r} in the layer.", ranks)
            agree = torch.allclose(got[name], through[name], 1e-6, 1e-6)
            self.require(agree, f"the gradient of {name!r} is not the one through dense_weight().", ranks)

    def gates(self, ranks: tuple[int, ...]) -> None:
        """Checks what the search does with the factors of a draft."""
        draft = fit_factors(self.kind, self.weight, ranks, None, self.groups, draft=True)
        shapes = [{name: tuple(f.shape) for name, f in found.items()} for found in (draft, self.fitted(ranks))]
        self.require(shapes[0] == shapes[1], f"draft() gives {shapes[0]}, factorise() {shapes[1]}.", ranks)
        product = multiplied_out(self.kind, draft, self.shape, self.groups)
        for off in (None, *range(len(ranks))):
            asked: dict[int, int] = {}

            def gate(index: int, count: int, off: int | None = off, asked: dict[int, int] = asked) -> Tensor:
                asked[index] = count
                return torch.full((count,), float(index != off), dtype=torch.float64)

            gated = gated_weight(self.kind, draft, self.operator, gate)
            wrong = f"gated() asks for gates of ranks {dict(sorted(asked.items()))}, by index."
            self.require(asked == dict(enumerate(ranks)), wrong, ranks)
            expected = product if off is None else torch.zeros_like(product)
            gates = "1" if off is None else f"0 for rank {off}"
            self.require(torch.allclose(gated, expected), f"gates of {gates} give another weight.", ranks)

    # --- what could break

    def zeros(self) -> None:
        """Checks a weight of zeros."""
        zero, ranks = torch.zeros(self.shape, dtype=torch.float64), self.low()
        for moment in (None, *self.moments()):
            self.require(
                not self.kind.profile(zero, moment).errors.any(), "profile() has errors for a weight of zeros."
            )
            factors = self.kind.factorise(zero, ranks, moment)
            product = self.kind.dense_weight(factors, self.shape)
            self.require((product == 0).all(), "the factors of a weight of zeros are not one of zeros.", ranks)
            dead = [name for name, factor in factors.items() if not bool(factor.any())]
            trains = f"of a weight of zeros the factors {dead} are zero: no gradient will reach any of them."
            self.require(len(dead) <= 1, trains, ranks)

    def dead_inputs(self) -> None:
        """Checks inputs that never vary."""
        weight, ranks, dead = self.weight.chunk(self.groups)[0], self.low(), "where inputs never vary"
        for moment in self.moments():
            errors = self.kind.profile(weight, moment).errors
            self.require(((errors >= 0) & (errors <= 1)).all(), f"profile() has errors outside [0, 1] {dead}.")
            for name, factor in self.kind.factorise(weight, ranks, moment).items():
                finite = f"factorise() gives a factor {name!r} that is not finite {dead}."
                self.require(factor.isfinite().all(), finite, ranks)

    def moments(self) -> list[Tensor]:
        """Returns second moments of inputs of which a third, or none, ever varies."""
        if self.operator.lookup:
            return []
        moment = _moment(math.prod(self.shape[1:]), 1, 5)
        third = len(moment) // 3
        moment[:third], moment[:, :third] = 0, 0
        return [moment, torch.zeros_like(moment)]

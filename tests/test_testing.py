"""What every kind of decomposition must hold, and that the check of it finds what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.kinds.registry import AUTOMATIC, DECOMPOSITIONS
from lightning_compress.kinds.svd import Svd
from lightning_compress.kinds.tucker import Tucker2
from lightning_compress.layers.families import operator_of
from lightning_compress.testing import _layers, check_decomposition


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_kind_holds_what_everything_relies_on(kind):
    check_decomposition(kind)


def test_layers_are_of_every_type_and_each_kind_is_checked_on_those_it_applies_to():
    types = {type(layer).__name__ for kind in DECOMPOSITIONS.values() for layer, _ in _layers(kind)}
    dims = [f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)]
    assert types == {"Linear", "Embedding", *dims}
    for kind in DECOMPOSITIONS.values():
        layers = [layer for layer, _ in _layers(kind)]
        assert layers
        assert all(kind.unsupported(operator_of(layer)) is None for layer in layers)
    assert any(operator_of(layer).groups > 1 for layer, _ in _layers(DECOMPOSITIONS["tucker2"]))


class Plain(Svd):
    """The SVD of nn.Linear: sound."""

    kind = "plain"

    def unsupported(self, operator):
        return "nn.Linear only" if operator.kernel or operator.lookup else None


class WrongParameters(Plain):
    def parameters(self, shape, ranks):
        return super().parameters(shape, ranks) + 1


class WrongMacs(Plain):
    def macs(self, shape, ranks, call):
        return super().macs(shape, ranks, replace(call, rows=1))


class WrongActivations(Plain):
    def activations(self, shape, ranks, call):
        return shape[0] * ranks[:, 0]


class CostsOfAllRanksTogether(Plain):
    def parameters(self, shape, ranks):
        return super().parameters(shape, ranks).sum()


class Buffers(Plain):
    def buffer_bytes(self, shape):
        return 8


class NotExact(Plain):
    def factorise(self, weight, ranks, metric=None):
        factors = super().factorise(weight, ranks, metric)
        if ranks == self.max_ranks(tuple(weight.shape)):
            factors["expand"][:, -1] = 0
        return factors


class OtherErrors(Plain):
    def profile(self, weight, metric=None):
        profile = super().profile(weight, metric)
        return replace(profile, errors=profile.errors**2)


class TooHighErrors(Plain):
    def profile(self, weight, metric=None):
        profile = super().profile(weight, metric)
        return replace(profile, errors=profile.errors**0.9)


class RisingErrors(Plain):
    def profile(self, weight, metric=None):
        profile = super().profile(weight, metric)
        return replace(profile, errors=profile.errors[[1, 0, *range(2, len(profile.errors))]])


class ErrorsThatAreNone(Plain):
    def profile(self, weight, metric=None):
        profile = super().profile(weight, metric)
        return replace(profile, errors=1 + profile.errors)


class RanksFromZero(Plain):
    def profile(self, weight, metric=None):
        profile = super().profile(weight, metric)
        return replace(profile, ranks=profile.ranks - 1)


class FlatRanks(Plain):
    def profile(self, weight, metric=None):
        profile = super().profile(weight, metric)
        return replace(profile, ranks=profile.ranks[:, 0])


class WithoutMetric(Plain):
    def factorise(self, weight, ranks, metric=None):
        return super().factorise(weight, ranks)


class RandomFactors(Plain):
    def factorise(self, weight, ranks, metric=None):
        basis = torch.linalg.qr(torch.randn(*ranks, *ranks, dtype=torch.float64))[0]
        factors = super().factorise(weight, ranks, metric)
        return {"reduce": basis @ factors["reduce"], "expand": factors["expand"] @ basis.T}


class InPlace(Plain):
    def factorise(self, weight, ranks, metric=None):
        factors = super().factorise(weight, ranks, metric)
        weight.neg_()
        return factors


class OtherNames(Plain):
    def factorise(self, weight, ranks, metric=None):
        return dict(zip(("a", "b"), super().factorise(weight, ranks, metric).values(), strict=True))

    def dense_weight(self, factors, shape):
        return factors["b"] @ factors["a"]


class OtherShapes(Plain):
    def stages(self, shape, ranks):
        return super().stages(shape, ranks + 1)


class Detached(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.detach())


class WithoutGradient(Plain):
    def own_children(self, operator, ranks):
        out, in_ = operator.shape
        return {"reduce": Detached(in_, *ranks, bias=False), "expand": nn.Linear(*ranks, out)}


class Bent(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class NotLinear(WithoutGradient):
    def own_children(self, operator, ranks):
        return {**super().own_children(operator, ranks), "reduce": Bent(operator.shape[1], *ranks, bias=False)}


class DetachedProduct(Plain):
    def dense_weight(self, factors, shape):
        return factors["expand"].detach() @ factors["reduce"]


class ZerosThatCannotTrain(Plain):
    def factorise(self, weight, ranks, metric=None):
        factors = super().factorise(weight, ranks, metric)
        return factors if weight.any() else {name: torch.zeros_like(f) for name, f in factors.items()}


class NotFinite(Plain):
    def factorise(self, weight, ranks, metric=None):
        factors = super().factorise(weight, ranks, metric)
        if metric is not None and weight.any():
            factors["reduce"] = factors["reduce"] * (metric.diagonal() / metric.diagonal())
        return factors


class OtherDraft(Plain):
    def draft(self, weight, ranks, metric=None):
        return {name: factor.T for name, factor in super().draft(weight, ranks, metric).items()}


class NoGates(Plain):
    def gated(self, factors, gates):
        gates(0, len(factors["reduce"]))
        return dict(factors)


class GatesOfOneRank(Tucker2):
    kind = "one_gate"

    def gated(self, factors, gates):
        return {**factors, "reduce": factors["reduce"] * gates(1, len(factors["reduce"]))[:, None, None, None]}

    def unsupported(self, operator):
        return super().unsupported(operator) or (None if len(operator.kernel) == 2 else "Conv2d only")


class Nothing(Plain):
    def unsupported(self, operator):
        return "not today"


LAYER = r"plain on Linear\(in_features=8, out_features=6, bias=True\)"


def test_sound_kind_of_ones_own_passes_and_random_numbers_stay():
    before = torch.get_rng_state()
    check_decomposition(Plain())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongParameters(), rf"{LAYER} at ranks \(1,\): parameters\(\) says 15, the built layer has 14\."),
        (WrongMacs(), rf"{LAYER} at ranks \(1,\): macs\(\) says 14, the built layer has 84\."),
        (WrongActivations(), rf"{LAYER} at ranks \(1,\): activations\(\) says 6, the built layer has 42\."),
        (CostsOfAllRanksTogether(), r"parameters\(\) has shape \(\) for ranks of \(1, R\)\."),
        (Buffers(), r"buffer_bytes\(\) says 8, the built layer has 0\."),
        (NotExact(), rf"{LAYER} at ranks \(6,\): full rank is not exact: the error is 0\.\d+"),
        (OtherErrors(), rf"{LAYER} at ranks \(1,\): profile\(\) says an error of 0\.\d+, the factors' is 0\.\d+\."),
        (TooHighErrors(), r"at ranks \(1,\): profile\(\) says an error of 0\.\d+, the factors' is 0\.\d+\."),
        (RisingErrors(), r"at ranks \(2,\): the error rises from 0\.\d+ at ranks \(1,\) to 0\.\d+\."),
        (ErrorsThatAreNone(), r"profile\(\) has errors outside \[0, 1\]\."),
        (RanksFromZero(), r"profile\(\) has ranks outside 1 to \(6,\), those of max_ranks\(\)\."),
        (FlatRanks(), r"ranks of shape \(6,\) and errors of shape \(6,\), not whole numbers \(n, 1\) and \(n,\)\."),
        (WithoutMetric(), r"profile\(\) says an error of 0\.\d+ in a metric, the factors' is 0\.\d+\."),
        (RandomFactors(), r"factorise\(\) gives another 'reduce' the second time\."),
        (InPlace(), r"at ranks \(1,\): factorise\(\) changes the weight\."),
        (OtherNames(), r"factorise\(\) gives \['a', 'b'\], the child layers are \['reduce', 'expand'\]\."),
        (OtherShapes(), r"the factor 'reduce' is \(1, 8\) in its layer, which holds \(2, 8\)\."),
        (WithoutGradient(), rf"{LAYER} at ranks \(1,\): no gradient reaches the factor 'reduce' in the layer\."),
        (NotLinear(), r"the built layer does not compute what the dense one does with dense_weight\(\)\."),
        (DetachedProduct(), r"the gradient of 'expand' is not the one through dense_weight\(\)\."),
        (ZerosThatCannotTrain(), r"the factors \['reduce', 'expand'\] are zero: no gradient will reach any of them\."),
        (NotFinite(), r"factorise\(\) gives a factor 'reduce' that is not finite where inputs never vary\."),
        (OtherDraft(), r"draft\(\) gives \{'reduce': \(8, 1\), .*\}, factorise\(\) \{'reduce': \(1, 8\)"),
        (NoGates(), r"gates of 0 for rank 0 give another weight\."),
        (GatesOfOneRank(), r"gated\(\) asks for gates of ranks \{1: 1\}, by index\."),
        (Nothing(), r"plain: unsupported\(\) refuses every layer it could be checked on\."),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_broken_kind_is_caught_and_named(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_decomposition(kind)


def test_unknown_name_is_refused():
    with pytest.raises(ConfigurationError, match=r"unknown kind 'svdd'\. Did you mean 'svd'"):
        check_decomposition("svdd")

"""What every kind of decomposition must hold, and that the check of it finds what is wrong."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.kinds.registry import AUTOMATIC
from lightning_compress.kinds.svd import Svd
from lightning_compress.kinds.tucker import Tucker2
from lightning_compress.testing import check_decomposition


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUTOMATIC)
def test_kind_holds_what_everything_relies_on(kind):
    check_decomposition(kind)


class Plain(Svd):
    """The SVD of nn.Linear: sound."""

    kind = "plain"

    def unsupported(self, operator):
        return "nn.Linear only" if operator.kernel or operator.lookup else None


def broken(**methods):
    """The sound kind with methods that receive what its own return, then their arguments."""

    def changed(name, change):
        def method(self, *args):
            return change(getattr(Plain, name)(self, *args), *args)

        return method

    return type("Broken", (Plain,), {name: changed(name, change) for name, change in methods.items()})()


def other_profile(**changes):
    """A kind whose profile has other ranks, or errors."""
    return broken(profile=lambda p, *_: replace(p, **{key: new(getattr(p, key)) for key, new in changes.items()}))


def last_component_lost(factors, weight, ranks, metric=None):
    if ranks == Plain().max_ranks(tuple(weight.shape)):
        factors["expand"][:, -1] = 0
    return factors


def turned_at_random(factors, weight, ranks, metric=None):
    basis = torch.linalg.qr(torch.randn(*ranks, *ranks, dtype=torch.float64))[0]
    return {"reduce": basis @ factors["reduce"], "expand": factors["expand"] @ basis.T}


def weight_changed(factors, weight, *_):
    weight.neg_()
    return factors


def all_zero(factors, weight, *_):
    return factors if weight.any() else {name: torch.zeros_like(f) for name, f in factors.items()}


def divided_by_the_metric(factors, weight, ranks, metric=None):
    if metric is not None and weight.any():
        factors["reduce"] = factors["reduce"] * (metric.diagonal() / metric.diagonal())
    return factors


def gated_by_nothing(gated, factors, gates):
    gates(0, len(factors["reduce"]))
    return dict(factors)


class OtherNames(Plain):
    def factorise(self, weight, ranks, metric=None):
        return dict(zip(("a", "b"), super().factorise(weight, ranks, metric).values(), strict=True))

    def dense_weight(self, factors, shape):
        return factors["b"] @ factors["a"]


class OtherShapes(Plain):
    def stages(self, shape, ranks):
        return super().stages(shape, ranks + 1)


class GatesOfOneRank(Tucker2):
    kind = "one_gate"

    def gated(self, factors, gates):
        return {**factors, "reduce": factors["reduce"] * gates(1, len(factors["reduce"]))[:, None, None, None]}

    def unsupported(self, operator):
        return super().unsupported(operator) or (None if len(operator.kernel) == 2 else "Conv2d only")


def test_kind_is_offered_layers_of_every_type():
    asked = []
    with pytest.raises(AssertionError, match="refuses every layer"):
        check_decomposition(broken(unsupported=lambda _, operator: asked.append(operator) or "not today"))
    assert {(len(o.kernel), o.transposed, o.lookup) for o in asked} >= {
        *((0, False, lookup) for lookup in (False, True)),
        *((dims, transposed, False) for dims in (1, 2, 3) for transposed in (False, True)),
    }
    assert {(o.kernel == (1, 1), o.groups > 1) for o in asked} >= {
        (one, several) for one in (0, 1) for several in (0, 1)
    }


def test_sound_kind_of_ones_own_passes_and_random_numbers_stay():
    before = torch.get_rng_state()
    check_decomposition(Plain())
    assert torch.equal(torch.get_rng_state(), before)


BROKEN = [
    (broken(parameters=lambda found, *_: found + 1), "(1,): parameters() says 15, the built layer has 14."),
    (broken(macs=lambda found, shape, ranks, call: found // call.rows), "macs() says 14, the built layer has 84."),
    (broken(activations=lambda _, shape, ranks, __: shape[0] * ranks[:, 0]), "says 6, the built layer has 42."),
    (broken(parameters=lambda found, *_: found.sum()), "parameters() has shape () for ranks of (1, R)."),
    (broken(buffer_bytes=lambda *_: 8), "buffer_bytes() says 8, the built layer has 0."),
    (broken(factorise=last_component_lost), "at ranks (6,): full rank is not exact: the error is #"),
    (other_profile(errors=lambda e: e**2), "(1,): profile() says an error of #, the factors' is #."),
    (other_profile(errors=lambda e: e**0.9), "(1,): profile() says an error of #, the factors' is #."),
    (other_profile(errors=lambda e: e[[1, 0, *range(2, len(e))]]), "(2,): the error rises from # at ranks (1,) to #."),
    (other_profile(errors=lambda e: 1 + e), "profile() has errors outside [0, 1]."),
    (other_profile(ranks=lambda r: r - 1), "profile() has ranks outside 1 to (6,), those of max_ranks()."),
    (other_profile(ranks=lambda r: r[:, 0]), "ranks of shape (6,) and errors of shape (6,), not whole numbers (n, 1)"),
    (
        broken(factorise=lambda _, weight, ranks, *__: Plain().factorise(weight, ranks)),
        "an error of # in a metric, the",
    ),
    (broken(factorise=turned_at_random), "factorise() gives another 'reduce' the second time."),
    (broken(factorise=weight_changed), "at ranks (1,): factorise() changes the weight."),
    (OtherNames(), "factorise() gives ['a', 'b'], the child layers are ['reduce', 'expand']."),
    (OtherShapes(), "the factor 'reduce' is (1, 8) in its layer, which holds (2, 8)."),
    (
        broken(dense_weight=lambda w, factors, _: w.detach() + 0 * factors["reduce"].sum()),
        "the gradient of 'reduce' is not",
    ),
    (broken(factorise=all_zero), "the factors ['reduce', 'expand'] are zero: no gradient will reach any of them."),
    (broken(factorise=divided_by_the_metric), "a factor 'reduce' that is not finite where inputs never vary."),
    (
        broken(draft=lambda factors, *_: {name: f.T for name, f in factors.items()}),
        "draft() gives {'reduce': (8, 1), 'e",
    ),
    (broken(gated=gated_by_nothing), "gates of 0 for rank 0 give another weight."),
    (broken(unsupported=lambda *_: "not today"), "unsupported() refuses every layer it could be checked on."),
    (GatesOfOneRank(), "gated() asks for gates of ranks {1: 1}, by index."),
]
"""What is broken, and the message about it, in which # stands for a fraction."""


@pytest.mark.parametrize(("kind", "message"), BROKEN)
def test_broken_kind_is_caught_and_named(kind, message):
    with pytest.raises(AssertionError, match=re.escape(message).replace("\\#", r"0\.\d+")) as caught:
        check_decomposition(kind)
    layer = "" if "refuses" in message else " on Conv2d" if kind.kind == "one_gate" else " on Linear(in_features=8"
    assert str(caught.value).startswith(f"{kind.kind}{layer}")


def test_unknown_name_is_refused():
    with pytest.raises(ConfigurationError, match=r"unknown kind 'svdd'\. Did you mean 'svd'"):
        check_decomposition("svdd")

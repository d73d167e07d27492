"""A kind of a user's own, through `register_kind`."""

from __future__ import annotations

import pytest
import torch

from lightning_compress import (
    Budget,
    Compress,
    Plan,
    apply_plan_,
    compress_,
    load_compressed,
    merge_,
    save_compressed,
    search_ranks,
)
from lightning_compress.core.errors import ConfigurationError, PlanMismatchError
from lightning_compress.kinds.registry import DECOMPOSITIONS, register_kind
from lightning_compress.kinds.svd import ChannelSvd, Svd
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.nets import TinyNet

SHAPE = (1, 3, 8, 8)
IMPORT_IT = "A kind of your own is known once the module that calls register_kind is imported"


class Anywhere(ChannelSvd):
    """Channel SVD of 1x1 convolutions too."""

    kind = "anywhere"

    def unsupported(self, operator):
        return None if operator.kernel else "anywhere factorises convolutions only"


@pytest.fixture
def kind():
    """Registered during the test alone."""
    yield register_kind(Anywhere()).kind
    DECOMPOSITIONS.pop("anywhere", None)


def test_registered_kind_is_returned_and_named_as_any_other(kind):
    assert type(DECOMPOSITIONS[kind]) is Anywhere
    net = TinyNet()
    named = search_ranks(net, Budget(params=0.7), kinds=[kind, "svd"], method="energy")
    assert {p.name: p.kind for p in named.factorised if p.kind == kind}.keys() >= {"conv2"}
    overridden = search_ranks(
        net, Budget(params=0.7), kinds="svd", overrides={"conv2": {"kinds": kind}}, method="energy"
    )
    assert {p.name: p.kind for p in overridden.factorised}["conv2"] == kind
    alone = search_ranks(net, Budget(params=0.8), kinds=kind, method="energy")
    reasons = {p.name: p.reason for p in alone.layers}
    assert reasons["fc1"] == "anywhere factorises convolutions only"
    assert Compress(Budget(params=0.5), kinds=kind).settings.kinds == kind


def test_automatic_choice_does_not_try_a_registered_kind(kind):
    assert kind not in {p.kind for p in search_ranks(TinyNet(), Budget(params=0.3)).factorised}


def test_model_with_a_registered_kind_is_saved_loaded_and_merged(kind, tmp_path, images):
    net = TinyNet().eval()
    plan = compress_(net, Budget(params=0.7, macs=0.8), example_input=SHAPE, kinds=kind, **WEIGHTS_ALONE)
    assert {p.kind for p in plan.factorised} == {kind}
    assert Plan.from_json(plan.to_json()) == plan
    again, loaded = TinyNet().eval(), TinyNet().eval()
    apply_plan_(again, Plan.from_json(plan.to_json()))
    assert [(p.name, p.kind, p.ranks) for p in embodied_plan(again).factorised] == [
        (p.name, p.kind, p.ranks) for p in plan.factorised
    ]
    save_compressed(net, tmp_path)
    load_compressed(loaded, tmp_path)
    assert torch.equal(loaded(images), net(images))
    merge_(loaded)
    torch.testing.assert_close(loaded(images), net(images))


def test_kind_that_is_not_registered_is_an_error_that_says_what_to_import(kind, tmp_path, unchanged):
    net = TinyNet()
    compress_(net, Budget(params=0.7), kinds=kind, **WEIGHTS_ALONE)
    save_compressed(net, tmp_path)
    del DECOMPOSITIONS[kind]
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(PlanMismatchError, match=f"unknown kind 'anywhere' in the plan.*{IMPORT_IT}"):
        load_compressed(model, tmp_path)
    with pytest.raises(ConfigurationError, match=f"kinds='anywhere': unknown kind 'anywhere'.*{IMPORT_IT}"):
        search_ranks(model, Budget(params=0.5), kinds=kind)
    with pytest.raises(ConfigurationError, match=f"unknown kind 'anywhere'.*{IMPORT_IT}"):
        search_ranks(model, Budget(params=0.5), overrides={"conv2": {"kinds": kind}})
    with pytest.raises(ConfigurationError, match=f"unknown kind 'anywhere'.*{IMPORT_IT}"):
        Compress(Budget(params=0.5), kinds=kind)
    before.check()


def named(name):
    return type("Own", (Svd,), {"kind": name})()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("halves", r"register_kind\('halves'\): expected an instance of Decomposition\.$"),
        (Anywhere, r"register_kind\(<class .*Anywhere'>\): expected an instance .* Make an instance of the class"),
        (Svd(), r"register_kind\(Svd\): the name 'svd' is taken"),
        (named("dense"), r"register_kind\(Own\): the name 'dense' is taken"),
        (named("auto"), r"register_kind\(Own\): the name 'auto' is taken"),
        (named(""), r"register_kind\(Own\): its kind is '', expected a name such as 'svd'"),
    ],
)
def test_what_cannot_be_registered_is_refused(given, message):
    before = dict(DECOMPOSITIONS)
    with pytest.raises(ConfigurationError, match=message):
        register_kind(given)
    assert before == DECOMPOSITIONS

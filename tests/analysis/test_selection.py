"""Which layers include, exclude and overrides choose, and what they set."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_compress import Override
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.core.errors import ConfigurationError, NothingToFactoriseError, SelectionError
from tests.support.selecting import chosen_in, layers_of, reasons_of


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fc1", ["fc1"]),
        ("fc*", ["fc1", "fc2"]),
        ("*1", ["conv1", "fc1"]),
        ("Conv2d", ["conv1", "conv2", "point"]),
        ("nn.Conv2d", ["conv1", "conv2", "point"]),
        ("torch.nn.Linear", ["fc1", "fc2"]),
        (nn.Linear, ["fc1", "fc2"]),
        (["point", nn.Linear], ["point", "fc1", "fc2"]),
        (("conv[12]",), ["conv1", "conv2"]),
    ],
)
def test_include_and_exclude_take_names_globs_types_and_classes(net, pattern, expected):
    every = ["conv1", "conv2", "point", "fc1", "fc2"]
    assert chosen_in(net, include=pattern) == expected
    assert chosen_in(net, exclude=pattern) == [name for name in every if name not in expected]
    reasons = reasons_of(net, include=pattern)
    assert {reasons[name] for name in every if name not in expected} == {"not matched by include"}
    assert {reasons_of(net, exclude=pattern)[name] for name in expected} == {"matched by exclude"}


def test_own_reason_of_a_layer_comes_before_that_of_a_pattern(net):
    reasons = (
        reasons_of(net, exclude="norm"),
        reasons_of(net, include="fc1"),
        reasons_of(net, overrides={"norm": "dense"}),
    )
    assert {r["norm"] for r in reasons} == {"no kind factorises BatchNorm2d"}


def test_exclude_wins_over_include(net):
    assert chosen_in(net, include="fc*", exclude="fc2") == ["fc1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["fc9", "block.*", "Conv3d", "nn.Conv3d", nn.Conv3d])
def test_pattern_without_a_match_is_an_error(net, argument, pattern):
    with pytest.raises(SelectionError, match=rf"^{argument}: .*matches no layer.*named_modules.*such as '") as error:
        take_inventory(net, **{argument: ["fc1", pattern]})
    assert repr(pattern) in str(error.value)


def test_unmatched_override_is_an_error(net):
    with pytest.raises(SelectionError, match=r"overrides: 'fc7' matches no layer.*such as .*'fc1'.*globs"):
        take_inventory(net, overrides={"fc7": "dense"})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, [3], [None], {"fc1": 1}])
def test_pattern_of_a_wrong_type_is_an_error(net, argument, value):
    with pytest.raises(
        ConfigurationError, match=f"^{argument}=.*expected a name, a glob, a layer type, or a list"
    ) as e:
        take_inventory(net, **{argument: value})
    assert repr(value) in str(e.value)


def test_overrides_set_kinds_and_bounds(net):
    layers = layers_of(
        net,
        overrides={
            "conv*": {"kinds": ["tucker2"], "min_rank": 2},
            "fc1": Override(max_rank=3),
            "fc2": "dense",
            "point": {"dense": True},
        },
    )
    assert [layers[name].kinds for name in ("conv1", "conv2")] == [("tucker2",)] * 2
    assert [(layers[name].min_rank, layers[name].max_rank) for name in ("conv1", "fc1")] == [(2, None), (1, 3)]
    assert layers["fc2"].reason == layers["point"].reason == "kept dense by overrides"


def test_later_override_wins_field_by_field(net):
    layers = layers_of(
        net,
        overrides={
            "nn.Conv2d": {"kinds": "channel_svd", "min_rank": 2, "max_rank": 6},
            "conv*": {"max_rank": 4},
            "conv2": {"kinds": "spatial_svd", "min_rank": 1},
            "point": {"kinds": "svd"},
        },
    )
    found = {name: (layers[name].kinds, layers[name].min_rank, layers[name].max_rank) for name in ("conv1", "conv2")}
    assert found == {"conv1": (("channel_svd",), 2, 4), "conv2": (("spatial_svd",), 1, 4)}
    assert (layers["point"].min_rank, layers["point"].max_rank) == (2, 6)


def test_overrides_of_several_patterns_that_cross_are_an_error(net):
    with pytest.raises(ConfigurationError, match=r"min_rank=6, max_rank=4.*min_rank must not exceed max_rank"):
        take_inventory(net, overrides={"Linear": {"min_rank": 6}, "fc1": {"max_rank": 4}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("fc1", "dense")], r"overrides=\[\('fc1', 'dense'\)\]: expected a mapping from patterns"),
        ("fc1", r"overrides='fc1': expected a mapping from patterns"),
        ({"fc1": 5}, r"overrides\['fc1'\]=5: expected a mapping such as"),
        ({"fc1": {"maxrank": 5}}, r"overrides\['fc1'\]: unknown key 'maxrank'. Did you mean 'max_rank'"),
        ({"fc1": {"kinds": "tuker2"}}, r"kinds='tuker2': unknown kind 'tuker2'. Did you mean 'tucker2'"),
        ({"fc1": {"kinds": []}}, r"kinds=\[\]: expected 'auto'"),
        ({0: "dense"}, r"overrides: the pattern 0 is no string; quote it, as in \{'0': 'dense'\}"),
    ],
)
def test_malformed_overrides_are_errors(net, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        take_inventory(net, overrides=overrides)


def test_excluding_every_layer_leaves_nothing(net):
    with pytest.raises(NothingToFactoriseError, match=r"conv1 \(Conv2d\): matched by exclude"):
        take_inventory(net, exclude=["Conv2d", "Linear"])

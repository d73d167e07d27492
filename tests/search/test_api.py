"""What `search_ranks` takes, what it refuses, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, Override, search_ranks
from lightning_compress.core.errors import ConfigurationError, ExampleInputError, SelectionError
from tests.support.nets import SHAPE, TinyNet
from tests.support.searching import METHODS, running_net


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["continuous", "paper"])
def test_search_does_not_depend_on_the_callers_gradient_mode(small, method, context):
    net, statistics = small
    expected = search_ranks(net, Budget(params=0.6), method=method, statistics=statistics)
    with context():
        plan = search_ranks(net, Budget(params=0.6), method=method, statistics=statistics)
    assert (plan.objective, plan.layers) == (expected.objective, expected.layers)


@pytest.mark.parametrize("method", METHODS)
def test_search_is_deterministic(net, method):
    first, second = (search_ranks(net, Budget(params=0.5), method=method, seed=seed) for seed in (0, 7))
    assert first.layers == second.layers
    assert (first.seed, second.seed) == (0, 7)
    assert first.seconds > 0


def test_budget_may_be_a_mapping_and_a_ratio_is_a_fraction(net):
    plans = [search_ranks(net, b, method="exact") for b in ({"params": 0.5}, Budget(params=0.5), {"ratio": "2x"})]
    assert plans[0].layers == plans[1].layers == plans[2].layers
    assert plans[0].budget == plans[2].budget == Budget(params=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_progress_is_reported(net, method):
    seen = []
    search_ranks(net, Budget(params=0.5), method=method, progress=lambda what, done: seen.append((what, done)))
    for what in dict.fromkeys(what for what, _ in seen):
        done = [d for w, d in seen if w == what]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0.0, 1.0)
    assert seen[0][0] == "decomposing layers"
    assert len({what for what, _ in seen}) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("multiple", [2, 4])
def test_ranks_are_multiples(method, multiple):
    plan = search_ranks(running_net(0), Budget(params=0.5), method=method, rank_multiple=multiple)
    assert plan.factorised
    for layer in plan.factorised:
        # a mode smaller than the multiple may keep its full size
        full = layer.weight_shape[:2] if layer.kind == "tucker2" else (multiple,) * len(layer.ranks)
        assert all(r % multiple == 0 or r == size < multiple for r, size in zip(layer.ranks, full, strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank_multiple": 64, "kinds": "svd"}, r"'point': no rank .* multiple of 64 .* max_rank=None; .*svd \(16,\)"),
        ({"overrides": {"fc2": {"min_rank": 9, "kinds": "svd"}}}, r"'fc2': no rank of \['svd'\].* min_rank=9 .*\(4,\)"),
    ],
)
def test_bounds_that_leave_no_rank_are_an_error(net, setting, message):
    with pytest.raises(ConfigurationError, match=message):
        search_ranks(net, Budget(params=0.9), **setting)


@pytest.mark.parametrize("method", METHODS)
def test_kinds_overrides_include_and_exclude_are_kept(net, method):
    plan = search_ranks(
        net,
        Budget(params=0.75),
        method=method,
        kinds=["svd", "tucker2"],
        exclude=["fc2", "conv1"],
        overrides={"fc1": Override(min_rank=2, max_rank=3), "conv2": {"kinds": "spatial_svd"}, "point": "dense"},
    )
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["fc1"].ranks in {(2,), (3,), ()}
    assert layers["conv2"].kind in {"spatial_svd", "dense"}
    assert {n: layers[n].reason for n in ("fc2", "conv1", "point")} == {
        "fc2": "matched by exclude",
        "conv1": "matched by exclude",
        "point": "kept dense by overrides",
    }
    assert layers["conv2"].kind == "spatial_svd"  # nothing else can save a quarter


BAD_SETTINGS = [
    ({"method": "exakt"}, ConfigurationError, r"search method 'exakt' is unknown. Did you mean 'exact'.*uniform"),
    ({"method": None}, ConfigurationError, r"search method None is unknown.*continuous, energy, exact, paper, uniform"),
    ({"method": ["exact"]}, ConfigurationError, r"search method \['exact'\] is unknown"),
    ({"objective": "weights"}, ConfigurationError, r"objective='weights' is unknown. Did you mean 'weight'"),
    ({"objective": ""}, ConfigurationError, r"objective='' is unknown.*end_to_end"),
    ({"objective": 1}, ConfigurationError, r"objective=1 is unknown"),
    ({"rank_multiple": 0}, ConfigurationError, r"rank_multiple=0: expected a whole number of at least 1"),
    ({"rank_multiple": 2.0}, ConfigurationError, r"rank_multiple=2.0: expected a whole number"),
    ({"rank_multiple": True}, ConfigurationError, r"rank_multiple=True: expected a whole number"),
    ({"seed": -1}, ConfigurationError, r"seed=-1: expected a whole number of at least 0"),
    ({"seed": "0"}, ConfigurationError, r"seed='0': expected a whole number"),
    ({"kinds": "tuker2"}, ConfigurationError, r"kinds='tuker2': unknown kind 'tuker2'. Did you mean 'tucker2'"),
    ({"include": "nope"}, SelectionError, r"include: 'nope' matches no layer"),
    ({"exclude": ["nope.*"]}, SelectionError, r"exclude: 'nope\.\*' matches no layer"),
    ({"overrides": {"fc1": {"rank": 2}}}, ConfigurationError, r"overrides\['fc1'\]: unknown key 'rank'.*max_rank"),
]


@pytest.mark.parametrize(("setting", "error", "message"), BAD_SETTINGS, ids=[str(s) for s, *_ in BAD_SETTINGS])
def test_wrong_setting_is_an_error_before_the_model_is_run(net, unchanged, setting, error, message):
    calls = []
    net.fc1.register_forward_hook(lambda *_: calls.append(1))
    before = unchanged(net)
    with pytest.raises(error, match=message):
        search_ranks(net, Budget(params=0.5), example_input=SHAPE, **setting)
    before.check()
    assert calls == []


@pytest.mark.parametrize("model", [None, 5, "resnet", TinyNet, {"a": nn.Linear(2, 2)}])
def test_model_that_is_no_module_is_an_error(model):
    with pytest.raises(ConfigurationError, match=r"model=.*: expected a torch.nn.Module") as error:
        search_ranks(model, Budget(params=0.5))
    assert repr(model) in str(error.value)


def test_budget_in_macs_needs_an_example_input(net, unchanged):
    before = unchanged(net)
    with pytest.raises(
        ExampleInputError, match=r"a budget in MACs \(macs <= 50 %\) needs example_input: .*\(1, 3, 224"
    ):
        search_ranks(net, Budget(macs=0.5))
    before.check()

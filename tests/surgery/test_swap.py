"""apply_plan_: which layers are replaced, which plans do not fit, what is inherited, what the model then shows."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.core.errors import ConfigurationError, PlanMismatchError
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.swap import apply_shells_, install, uninstall
from tests.support.interruptions import interrupting
from tests.support.nets import TinyNet
from tests.support.plans import RANKS, plan_for, tampered


@pytest.fixture
def plan(net):
    return plan_for(net)


def test_planned_layers_are_replaced_and_the_others_stay(net, plan, images):
    dense = dict(net.named_modules())
    order = list(dict(net.named_children()))
    replacements = apply_plan_(net, plan)
    assert [(r.aliases, r.dense) for r in replacements] == [((name,), dense[name]) for name in RANKS]
    assert all(net.get_submodule(r.aliases[0]) is r.factorised for r in replacements)
    assert {name for name, m in net.named_modules() if isinstance(m, FactorisedLayer)} == set(RANKS)
    assert net.norm is dense["norm"]
    assert net.fc2 is dense["fc2"]
    assert list(dict(net.named_children())) == order
    assert [(net.conv1.kind, net.conv1.ranks), (net.fc1.kind, net.fc1.ranks)] == [RANKS["conv1"], RANKS["fc1"]]
    assert net.conv1.error == 0.5
    assert net(images).shape == (5, 4)


@pytest.mark.parametrize("apply", [apply_plan_, apply_shells_])
def test_global_random_state_is_not_used(net, plan, apply):
    state = torch.get_rng_state()
    apply(net, plan)
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_stay_the_same_parameters(net, plan):
    biases = {name: net.get_submodule(name).bias for name in RANKS}
    apply_plan_(net, plan)
    for name, bias in biases.items():
        assert net.get_submodule(name).bias is bias
        assert list(net.get_submodule(name).children())[-1].bias is bias
    assert biases["conv2"] is None


def test_failure_while_decomposing_changes_nothing(net, unchanged, plan):
    before, steps = unchanged(net), []
    with pytest.raises(KeyboardInterrupt):
        apply_plan_(net, plan, progress=interrupting("factorising layers", 0.6, steps))
    before.check()
    assert steps == [("factorising layers", done) for done in (0.0, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize("apply", [apply_plan_, apply_shells_])
@pytest.mark.parametrize(
    ("index", "fields", "message"),
    [
        (3, {"name": "fc3"}, r"the plan's layer 'fc3' is not in the model. Did you mean 'fc[12]'\? Known: conv1"),
        (3, {"name": "norm"}, r"layer 'norm' cannot be factorised: no kind factorises BatchNorm2d"),
        (3, {"type": "Conv2d"}, r"'fc1' is a Linear .*\(32, 16\) in the model, a Conv2d with weight \(32, 16\)"),
        (3, {"weight_shape": (32, 17)}, r"a Linear .*\(32, 16\) in the model, a Linear with weight \(32, 17\)"),
        (3, {"kind": "svdd"}, r"layer 'fc1' has the unknown kind 'svdd' in the plan. Did you mean 'svd'\? Known: svd"),
        (3, {"kind": "tucker2", "ranks": (2, 2)}, r"'fc1' cannot become tucker2 .*\(2, 2\): tucker2 factorises convol"),
        (1, {"kind": "svd"}, r"'conv2' cannot become svd with ranks \(5,\): svd factorises nn.Linear, embeddings"),
        (2, {"kind": "channel_svd"}, r"'point' cannot become channel_svd .*: channel_svd of a 1x1 convolution is svd"),
        (3, {"ranks": (17,)}, r"'fc1' cannot become svd with ranks \(17,\): its ranks go up to \(16,\)"),
        (3, {"ranks": (4, 4)}, r"'fc1' cannot become svd with ranks \(4, 4\): its ranks go up to \(16,\)"),
        (0, {"ranks": (4,)}, r"'conv1' cannot become tucker2 with ranks \(4,\): its ranks go up to \(8, 3\)"),
        (0, {"ranks": (8, 4)}, r"'conv1' cannot become tucker2 with ranks \(8, 4\): its ranks go up to \(8, 3\)"),
    ],
)
def test_plan_that_does_not_fit_says_what_differs(net, unchanged, plan, index, fields, message, apply):
    net.norm.eval()
    net.conv1.register_forward_hook(lambda *_: None)
    before = unchanged(net)
    with pytest.raises(PlanMismatchError, match=message):
        apply(net, tampered(plan, index, **fields))
    before.check()


def test_second_apply_does_nothing(net, unchanged, plan):
    apply_plan_(net, plan)
    before = unchanged(net)
    assert apply_plan_(net, plan) == ()
    before.check()


def test_rest_of_a_plan_is_applied_to_a_partly_factorised_model(net, plan):
    first = dataclasses.replace(plan, layers=plan.layers[:2])
    apply_plan_(net, first)
    kept = net.conv1
    assert [r.aliases for r in apply_plan_(net, plan)] == [("point",), ("fc1",)]
    assert net.conv1 is kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: tampered(p, 3, ranks=(5,)), r"'fc1' is already factorised \(svd, ranks \(4,\)\), the plan wants svd, ranks \(5,\): apply the plan to the dense model"),  # noqa: E501
        (lambda p: tampered(p, 1, kind="channel_svd"), r"'conv2' is already factorised \(spatial_svd, ranks \(5,\)\), the plan wants channel_svd"),  # noqa: E501
        (lambda p: dataclasses.replace(p, layers=p.layers[:3]), r"layer 'fc1' is factorised in the model \(svd, ranks \(4,\)\) but dense in the plan"),  # noqa: E501
        (lambda p: tampered(p, 3, kind="dense", ranks=()), r"layer 'fc1' is factorised in the model .* but dense in the plan"),  # noqa: E501
    ],
)  # fmt: skip
def test_other_plan_on_a_factorised_model_is_an_error(net, unchanged, plan, change, message):
    apply_plan_(net, plan)
    before = unchanged(net)
    with pytest.raises(PlanMismatchError, match=message):
        apply_plan_(net, change(plan))
    before.check()


@pytest.mark.parametrize("wrong", [None, "plan.json", {"layers": []}, Budget(params=0.5)])
def test_plan_of_a_wrong_type_is_an_error(net, unchanged, wrong):
    before = unchanged(net)
    with pytest.raises(ConfigurationError, match=r"plan=.*: expected a Plan, as search_ranks returns it") as error:
        apply_plan_(net, wrong)
    assert repr(wrong) in str(error.value)
    before.check()


def test_frozen_weights_and_modes_are_inherited(net, plan):
    net.conv1.weight.requires_grad_(False)
    net.fc1.requires_grad_(False)
    net.conv2.eval()
    apply_plan_(net, plan)
    assert [f.requires_grad for f in net.conv1.factors().values()] == [False] * 3
    assert net.conv1.bias.requires_grad
    assert not any(p.requires_grad for p in net.fc1.parameters())
    assert all(p.requires_grad for p in net.conv2.parameters())
    assert [m.training for m in net.conv2.modules()] == [False] * 3
    assert [m.training for m in net.fc1.modules()] == [True] * 3


def test_factors_are_leaves_that_an_optimizer_can_train(net, plan, images):
    with torch.no_grad():
        apply_plan_(net, plan)
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(images).square().sum().backward()
    optimizer.step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name]) and "bias" not in name] == []


def test_shared_module_is_replaced_under_every_name(images):
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.inner = nn.Sequential(self.a, nn.ReLU())
            self.table = nn.ModuleDict({"x": self.a, "y": self.inner})
            self.items = nn.ModuleList([nn.Linear(2, 2), self.a])

    model = Shares()
    (replacement,) = apply_plan_(model, plan_for(model, {"a": ("svd", (2,))}))
    assert replacement.aliases == ("a", "inner.0", "table.x", "table.y.0", "items.1")
    assert isinstance(model.a, FactorisedLayer)
    assert model.a is model.inner[0] is model.table["x"] is model.items[1]
    assert replacement.dense not in set(model.modules())


def test_plan_may_name_a_shared_module_by_another_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    apply_plan_(model, plan_for(model, {"b": ("svd", (2,))}))
    assert model["a"] is model["b"]
    assert isinstance(model["a"], FactorisedLayer)


def test_uninstall_and_install_are_inverse(net, unchanged, plan):
    before = unchanged(net)
    replacements = apply_plan_(net, plan)
    after = unchanged(net)
    uninstall(net, replacements)
    before.check()
    install(net, replacements)
    after.check()


def test_shells_have_the_structure_and_no_values(net, plan):
    factorised = copy.deepcopy(net)
    apply_plan_(factorised, plan)
    biases = {name: net.get_submodule(name).bias for name in RANKS}
    apply_shells_(net, plan)
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in factorised.state_dict().items()}
    assert all(net.get_submodule(name).bias is bias for name, bias in biases.items())
    assert not any(f.any() for name in RANKS for f in net.get_submodule(name).factors().values())


def test_plan_of_reads_the_plan_off_the_model(net):
    searched = search_ranks(net, Budget(params=0.5), method="exact")
    apply_plan_(net, searched)
    read = embodied_plan(net)
    assert (read.dense, read.compressed) == (searched.dense, searched.compressed)
    assert (read.budget, read.method, read.optimality_gap) == (None, None, None)
    fields = ("name", "type", "kind", "ranks", "error", "params_before", "params_after")
    assert [[getattr(p, f) for f in fields] for p in read.layers] == [
        [getattr(p, f) for f in fields] for p in searched.layers
    ]
    assert [p.weight_shape for p in read.factorised] == [p.weight_shape for p in searched.factorised]
    fresh = TinyNet()
    apply_plan_(fresh, read)
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in net.named_parameters()]

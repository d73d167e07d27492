"""Plans with the names that a submodule has for its layers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.core.errors import PlanError
from lightning_compress.core.plan_names import plan_below
from lightning_compress.surgery.swap import apply_plan_


@pytest.fixture(scope="module")
def inner() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16))


@pytest.fixture(scope="module")
def plan(inner):
    outer = nn.ModuleDict({"net": nn.ModuleDict({"body": inner})})
    return search_ranks(outer, Budget(params=0.6), method="uniform", objective="weight")


@pytest.mark.parametrize(("name", "first"), [("", "net.body.0"), ("net", "body.0"), ("net.body", "0")])
def test_names_are_those_below(plan, name, first):
    below = plan_below(plan, name)
    assert below.layers[0].name == first
    assert dataclasses.replace(below, layers=plan.layers) == plan
    assert [
        dataclasses.replace(layer, name=f"{name}.{layer.name}" if name else layer.name) for layer in below.layers
    ] == [*plan.layers]


def test_it_can_be_applied_to_the_submodule(inner, plan):
    net = copy.deepcopy(inner)
    apply_plan_(net, plan_below(plan, "net.body"))
    assert sum(p.numel() for p in net.parameters()) == plan.compressed.params


def test_the_layer_whose_factor_is_shared_is_renamed_too(plan):
    shared = [
        dataclasses.replace(layer, joint_with="net.body.0") if not layer.is_dense else layer for layer in plan.layers
    ]
    below = plan_below(dataclasses.replace(plan, layers=tuple(shared)), "net")
    assert {layer.joint_with for layer in below.factorised} == {"body.0"}


def test_a_single_layer_is_named_as_the_model_itself():
    torch.manual_seed(0)
    plan = search_ranks(
        nn.ModuleDict({"net": nn.Linear(24, 24)}), Budget(params=0.6), method="uniform", objective="weight"
    )
    assert [layer.name for layer in plan_below(plan, "net").layers] == [""]


@pytest.mark.parametrize("name", ["ne", "body", "net.body.0", "other"])
def test_a_layer_outside_is_refused(plan, name):
    with pytest.raises(PlanError, match=f"the plan has layers that are not in '{name}': 'net.body"):
        plan_below(plan, name)

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator

import pytest
import torch
from torch import nn

from lightning_compress import Budget, LayerPlan, Plan, search_ranks
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import PlanFormatError
from lightning_compress.core.plan import FORMAT, SCHEMA, percent
from tests.support.nets import TinyNet


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    net = TinyNet()
    return search_ranks(
        net, Budget(params=0.5, macs=0.6), example_input=(1, 3, 8, 8), method="exact", objective="weight"
    )


def changed(plan, change):
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


def test_plan_is_frozen(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.layers = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.layers[0].kind = "svd"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.dense.params = 0
    assert hash(plan) == hash(Plan.from_json(plan.to_json()))


@pytest.mark.parametrize(
    ("budget", "example"),
    [(Budget(params=0.5), None), (Budget(ratio="2x"), None), (Budget(macs=0.5, bytes=0.6), (1, 3, 8, 8))],
    ids=str,
)
def test_json_round_trip_gives_an_equal_plan(net, budget, example):
    plan = search_ranks(net, budget, example_input=example, method="uniform", seed=3)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert all(isinstance(layer.ranks, tuple) and isinstance(layer.weight_shape, tuple) for layer in again.layers)
    assert Plan.from_json(again.to_json()) == plan


def test_json_round_trip_without_what_is_optional():
    bare = Plan((LayerPlan("a", "Linear", "svd", (1,), (2, 3), 0.25, 9, 8),), Costs(9, None, 36), Costs(8, None, 32))
    assert Plan.from_json(bare.to_json()) == bare
    assert bare.budget is bare.method is bare.optimality_gap is bare.seed is None


def test_json_names_format_and_schema(plan):
    data = json.loads(plan.to_json())
    assert (data["format"], data["schema"]) == (FORMAT, SCHEMA) == ("lightning_compress/plan", 1)


def test_print_shows_every_layer_and_every_reason(plan):
    text = str(plan)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    flat = " ".join(line.split("│")[10].strip() for line in text.splitlines() if line.startswith("│"))
    for layer in plan.layers:
        row = rows[layer.name]
        assert layer.type in row
        assert layer.kind in row
        assert f"{layer.params_before:,}" in row
        if not layer.is_dense:
            assert ", ".join(map(str, layer.ranks)) in row
            assert f"{layer.error:.4f}" in row
            assert layer.source in row.split("│")[6]
            kept = f"{100 * layer.params_after / layer.params_before:.1f} %"
            assert f"{layer.params_before:,} → {layer.params_after:,} ({kept})" in row
            assert f"{1e3 * layer.latency_before:.3g} → {1e3 * layer.latency_after:.3g}" in row.split("│")[9]
        else:
            assert " ".join(layer.reason.split()) in " ".join(flat.split())
    assert f"params 2,340 → {plan.compressed.params:,} ({100 * plan.compressed.params / 2340:.1f} % kept)" in text
    assert f"MACs 36,992 → {plan.compressed.macs:,} ({100 * plan.compressed.macs / 36992:.1f} % kept)" in text
    assert f"bytes 9,432 → {plan.compressed.bytes:,}" in text
    assert f"latency {1e3 * plan.dense.latency:.3g} → {1e3 * plan.compressed.latency:.3g} ms" in text
    assert "budget params <= 50 %, macs <= 60 %; method exact; signal loss" in text
    assert "\x1b" not in text


def test_print_does_without_what_is_optional(plan):
    for field in ("seconds", "optimality_gap", "method", "seed"):
        assert "budget params <= 50 %" in str(
            Plan.from_json(changed(plan, lambda d, name=field: d.update({name: None})))
        )
    bare = Plan((LayerPlan("", "Linear", "svd", (1,), (2, 3), 0.25, 10, 5),), Costs(10, None, 40), Costs(5, None, 20))
    assert "MACs" not in str(bare)
    assert "latency" not in str(bare)
    assert "budget" not in str(bare)
    assert "(model)" in str(bare)
    assert "method" not in str(bare)
    assert str(bare).splitlines()[-2:] == [
        "params 10 → 5 (50.0 % kept); bytes 40 → 20 (50.0 % kept)",
        "signal loss 0.2877",  # -log(1 - 0.25)
    ]


def test_plan_of_a_search_on_outputs_says_so_and_comes_back_equal(net):
    plan = search_ranks(net, Budget(max_error=0.5), example_input=(1, 3, 8, 8), method="exact")
    assert (plan.objective, plan.source) == ("moments", "batch norm")
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).budget == Budget(max_error=0.5)
    assert set(plan.timings) == {"synthetic inputs", "moments", "search"}
    assert plan.output_distance <= 0.5
    text = str(plan)
    assert f"budget output distance <= 0.5; method exact; output distance {plan.output_distance:.4f}; signal" in text
    measured = {line.split("│")[1].strip(): line.split("│")[6].strip() for line in text.splitlines() if "│" in line}
    assert plan.factorised
    assert {layer.source for layer in plan.factorised} == {"batch norm"}
    assert all(measured[layer.name] == f"{layer.samples} batch norm" for layer in plan.factorised)


@pytest.mark.parametrize("name", ["[bold]", "[/x]", "a[0]", "[link=x]y[/link]"])
def test_print_shows_names_with_brackets_as_they_are(name):
    model = nn.ModuleDict({name: nn.Linear(16, 16)})
    text = str(search_ranks(model, Budget(params=0.6), method="exact"))
    assert name in text


def test_kept_and_signal_loss(plan):
    assert plan.kept == {
        "params": plan.compressed.params / 2340,
        "macs": plan.compressed.macs / 36992,
        "bytes": plan.compressed.bytes / 9432,
        "latency": plan.compressed.latency / plan.dense.latency,
    }
    survives = math.prod(1 - layer.error for layer in plan.layers)
    assert math.exp(-plan.signal_loss) == pytest.approx(survives, rel=1e-12)
    assert {layer.name for layer in plan.factorised} == {layer.name for layer in plan.layers if layer.kind != "dense"}


@pytest.mark.parametrize(
    ("fraction", "text"), [(None, "?"), (0.0, "0.0 %"), (0.2, "20.0 %"), (0.12345, "12.3 %"), (1, "100.0 %")]
)
def test_percent(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize("text", ["", "{", "plan", '{"format": ', "\x00\x01", None, 5])
def test_text_that_is_no_json_is_damaged(text):
    with pytest.raises(PlanFormatError, match="the plan is damaged: not JSON") as error:
        Plan.from_json(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"plan"', "{}", '{"format": "other/plan", "schema": 1}'])
def test_foreign_json_is_no_plan(text):
    message = r"this is no plan of lightning_compress: expected \"format\": 'lightning_compress/plan', got"
    with pytest.raises(PlanFormatError, match=message) as error:
        Plan.from_json(text)
    assert str(json.loads(text)) in str(error.value)


@pytest.mark.parametrize("schema", [2, 99, "1", None, 1.0, True])
def test_newer_or_odd_schema_is_an_error(plan, schema):
    with pytest.raises(PlanFormatError, match=f"has schema {schema!r}; this version reads schema 1 and older. Update"):
        Plan.from_json(changed(plan, lambda d: d.update(schema=schema)))


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *(((), field.name) for field in dataclasses.fields(Plan)),
        *((("layers", 2), field.name) for field in dataclasses.fields(LayerPlan)),
        *(((costs,), field) for costs in ("dense", "compressed") for field in ("params", "macs", "bytes", "latency")),
    ],
)
def test_missing_field_is_named(plan, path, field):
    with pytest.raises(PlanFormatError, match=f"the plan is damaged: KeyError: '{field}'"):
        Plan.from_json(changed(plan, lambda d: functools.reduce(operator.getitem, path, d).pop(field)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", {}, r"'layers' is \{\}, expected list"),
        ("layers", [3], r"a layer is 3, expected an object"),
        ("layers", [[]], r"a layer is \[\], expected an object"),
        ("dense", None, r"'dense' is None, expected dict"),
        ("compressed", {"params": 1.5, "macs": None, "bytes": 1}, r"'params' is 1.5, expected int"),
        ("compressed", {"params": True, "macs": None, "bytes": 1}, r"'params' is True, expected int"),
        ("budget", 0.2, r"'budget' is 0.2, expected dict"),
        ("budget", {"params": 2}, r"BudgetError: Budget\(params=2\)"),
        ("budget", {"rams": 0.2}, r"ConfigurationError: budget: unknown key 'rams'"),
        ("method", 1, r"'method' is 1, expected str"),
        ("data_free", 1, r"'data_free' is 1, expected bool"),
        ("data_free", None, r"'data_free' is None, expected bool"),
        ("optimality_gap", "0", r"'optimality_gap' is '0', expected float"),
        ("seconds", True, r"'seconds' is True, expected float"),
        ("seed", 0.5, r"'seed' is 0.5, expected int"),
        ("objective", 1, r"'objective' is 1, expected str"),
        ("source", 1, r"'source' is 1, expected str"),
        ("output_distance", "0", r"'output_distance' is '0', expected float"),
        ("timings", [1.0], r"'timings' is \[1.0\], expected dict"),
        ("target", "torch", r"'target' is 'torch', expected dict"),
        ("predicted_latency", "1", r"'predicted_latency' is '1', expected float"),
        ("memory_format", 1, r"'memory_format' is 1, expected str"),
        ("layers.0.name", 3, r"'name' is 3, expected str"),
        ("layers.0.kind", None, r"'kind' is None, expected str"),
        ("layers.0.ranks", 3, r"'ranks' is 3, expected list"),
        ("layers.0.ranks", [0], r"'ranks' is \[0\], expected whole numbers above 0"),
        ("layers.0.ranks", [2.0], r"'ranks' is \[2.0\], expected whole numbers above 0"),
        ("layers.0.ranks", [True], r"'ranks' is \[True\], expected whole numbers"),
        ("layers.0.weight_shape", ["8"], r"'weight_shape' is \['8'\], expected whole numbers"),
        ("layers.0.error", "small", r"'error' is 'small', expected float"),
        ("layers.0.params_before", 1.5, r"'params_before' is 1.5, expected int"),
        ("layers.0.macs_after", "1", r"'macs_after' is '1', expected int"),
        ("layers.0.reason", 1, r"'reason' is 1, expected str"),
        ("layers.0.source", 1, r"'source' is 1, expected str"),
        ("layers.0.latency_before", "1", r"'latency_before' is '1', expected float"),
        ("layers.0.latency_after", True, r"'latency_after' is True, expected float"),
    ],
)
def test_field_of_a_wrong_type_is_named(plan, field, value, message):
    def change(data):
        (data["layers"][0] if field.startswith("layers.0.") else data)[field.removeprefix("layers.0.")] = value

    with pytest.raises(PlanFormatError, match=f"the plan is damaged: .*{message}"):
        Plan.from_json(changed(plan, change))


def test_whole_numbers_are_read_where_fractions_are_expected(plan):
    read = Plan.from_json(changed(plan, lambda d: d.update(seconds=2)))
    assert read.seconds == 2

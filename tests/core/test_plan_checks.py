"""What no plan can be, from code and from JSON alike; and that every plan prints."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from torch import nn

from lightning_compress import Budget, LayerPlan, Override, Plan, apply_plan_
from lightning_compress.core.checks import LARGEST
from lightning_compress.core.costs import Costs
from lightning_compress.core.effort import Effort
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    LightningCompressError,
    PlanFormatError,
    PlanMismatchError,
)
from lightning_compress.core.settings import SearchSettings

NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**400


def layer(name="a", **fields):
    return LayerPlan(**{
        "name": name, "type": "Linear", "kind": "svd", "ranks": (1,), "weight_shape": (4, 4), "error": 0.25,
        "params_before": 20, "params_after": 12, **fields,
    })  # fmt: skip


def plan(*layers, **fields):
    costs = {"dense": Costs(20, 16, 80), "compressed": Costs(12, 8, 48)}
    return Plan(layers or (layer(),), **{**costs, **fields})


SIZES = [-1, 1.5, True, "1", HUGE, LARGEST + 1]
AMOUNTS = [-0.5, NAN, INFINITE, True, "1", HUGE]
LAYER_FIELDS = {
    "name": [None, 3],
    "type": [None, 3],
    "kind": [None, 3],
    "ranks": [(0,), (-3,), (1.0,), (True,), ("1",), 3, (HUGE,), (LARGEST + 1,), ()],
    "weight_shape": [(0, 4), (-1, 4), (4.0, 4), (HUGE, 4), 4, ()],
    "error": [-0.1, 1.0001, NAN, INFINITE, HUGE, None, "0", True],
    "params_before": [*SIZES, None],
    "params_after": [*SIZES, None],
    "macs_before": SIZES,
    "macs_after": SIZES,
    "reason": [1, b"x"],
    "source": [1],
    "joint_with": [1, "b", ""],
    "samples": SIZES,
    "error_spread": AMOUNTS,
    "latency_before": AMOUNTS,
    "latency_after": AMOUNTS,
    "merged": [1, None, "no"],
}
DEEP = {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}}}
PLAN_FIELDS = {
    "layers": [3, [3], None, "ab"],
    "dense": [None, 3, {}],
    "compressed": [None, 3],
    "budget": [0.2, {"params": 0.2}],
    "method": [1],
    "objective": [1],
    "source": [1],
    "data_free": [1, None],
    "optimality_gap": [-0.1, NAN, "0", HUGE],
    "output_distance": [-0.1, NAN, "0", HUGE],
    "seconds": AMOUNTS,
    "timings": [[1.0], None, {"search": "1"}, {"search": -1}, {"search": HUGE}, {3: 1.0}, {"a": DEEP}],
    "seed": SIZES,
    "target": ["torch", {3: 1}, {"a": object()}, {"a": HUGE}, DEEP],
    "predicted_latency": AMOUNTS,
    "memory_format": [1, "channels_first", True],
    "cut": [1, "healing", {"healing": 1}, {1: "fewer"}, ["healing"], None],
}


def cases(fields):
    return [
        pytest.param(name, value, id=f"{name}-{i}") for name, values in fields.items() for i, value in enumerate(values)
    ]


def in_json(value):
    """Whether a value comes through JSON as it is."""
    try:
        return json.loads(json.dumps(value)) == value or isinstance(value, (tuple, float))
    except TypeError:
        return False


def test_every_field_is_tried():
    assert set(LAYER_FIELDS) == {field.name for field in dataclasses.fields(LayerPlan)}
    assert set(PLAN_FIELDS) == {field.name for field in dataclasses.fields(Plan)}


@pytest.mark.parametrize(("name", "value"), cases(LAYER_FIELDS))
def test_layer_field_out_of_range_is_an_error_in_code_and_in_json(name, value):
    with pytest.raises(ConfigurationError, match=rf"'{name}' is |shares the first factor|{name}="):
        plan(layer(**{name: value}))
    if not in_json(value):
        return
    data = json.loads(plan().to_json())
    data["layers"][0][name] = value
    with pytest.raises(PlanFormatError, match="the plan is damaged"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(("name", "value"), cases(PLAN_FIELDS))
def test_plan_field_out_of_range_is_an_error_in_code_and_in_json(name, value):
    with pytest.raises(ConfigurationError, match=rf"the plan: '{name}' "):
        Plan(**{"layers": (layer(),), "dense": Costs(20, 16, 80), "compressed": Costs(12, 8, 48), name: value})
    if not in_json(value) or value == {"params": 0.2}:
        return
    data = {**json.loads(plan().to_json()), name: value}
    with pytest.raises(PlanFormatError, match="the plan is damaged"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, value) for name in ("params", "bytes", "macs") for value in SIZES), *(("latency", v) for v in AMOUNTS)],
)
def test_costs_out_of_range_are_an_error_in_code_and_in_json(name, value):
    fields = {"params": 1, "macs": 1, "bytes": 1, "latency": 1.0, name: value}
    with pytest.raises(ConfigurationError, match=rf"Costs\({name}="):
        Costs(**fields)
    with pytest.raises(PlanFormatError, match="the plan is damaged"):
        Plan.from_json(json.dumps({**json.loads(plan().to_json()), "dense": fields}))


RELATIONS = {
    "one name twice": ((layer(), layer()), r"layer 'a' is there twice"),
    "shares with nothing": ((layer(joint_with="b"),), r"layer 'a' shares the first factor of 'b', which is no"),
    "shares with a dense one": (
        (layer(joint_with="b"), layer("b", kind="dense", ranks=())),
        r"layer 'a' shares the first factor of 'b', which is no",
    ),
    "shares with one that does not": ((layer(joint_with="b"), layer("b")), r"shares the first factor of 'b', which is"),
    "a chain": (
        (layer(joint_with="b"), layer("b", joint_with="c"), layer("c", joint_with="c")),
        r"layer 'a' shares the first factor of 'b', which is no",
    ),
    "a dense one shares": (
        (layer("b", joint_with="b"), layer(kind="dense", ranks=(), joint_with="b")),
        "layer 'a' sha",
    ),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_layers_that_do_not_fit_together_are_an_error_in_code_and_in_json(relation):
    layers, message = RELATIONS[relation]
    with pytest.raises(ConfigurationError, match=message):
        plan(*layers)
    data = json.loads(plan().to_json())
    data["layers"] = [dataclasses.asdict(entry) for entry in layers]
    with pytest.raises(PlanFormatError, match=f"the plan is damaged: .*{message}"):
        Plan.from_json(json.dumps(data))


def test_dense_layer_with_ranks_and_factorised_one_without_are_errors():
    with pytest.raises(ConfigurationError, match=r"'ranks' is \[1\], expected none for 'dense'"):
        layer(kind="dense")
    with pytest.raises(ConfigurationError, match=r"'ranks' is \[\], expected some for 'nowhere'"):
        layer(kind="nowhere", ranks=())


def test_ranks_of_a_kind_that_nobody_knows_are_found_by_the_swap():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(PlanMismatchError, match=r"has the unknown kind 'nowhere'"):
        apply_plan_(model, plan(layer("0", kind="nowhere", ranks=(10**15,))))
    with pytest.raises(PlanMismatchError, match=r"its ranks go up to"):
        apply_plan_(model, plan(layer("0", ranks=(10**15,))))


@pytest.mark.parametrize("tied", [True, False])
def test_first_factor_shared_by_an_embedding_is_found_by_the_swap(tied):
    model = nn.ModuleDict({"a": nn.Embedding(6, 4), "b": nn.Linear(4, 6, bias=False)})
    if tied:
        model["b"].weight = model["a"].weight
    before = dict(model.named_modules())
    wrong = layer("a", type="Embedding", weight_shape=(6, 4), joint_with="a")
    with pytest.raises(PlanMismatchError, match=r"share the first factor of 'a' are not all linear, with own weights"):
        apply_plan_(model, plan(wrong))
    assert dict(model.named_modules()) == before


def test_lists_are_taken_for_tuples():
    assert layer(ranks=[1], weight_shape=[4, 4]) == layer()


# --- JSON


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": "lightning_compress/plan", "schema": 1, "timings": ' + "[" * 900 + "]" * 900 + "}",
        '{"format": "lightning_compress/plan", "schema": ' + "9" * 4000 + "}",
        '{"format": "lightning_compress/plan", "schema": ' + "9" * 5000 + "}",
        '{"format": ' + "[" * 900 + "]" * 900 + "}",
    ],
    ids=["lists", "objects", "timings", "schema", "more digits than Python reads", "format"],
)
def test_deep_and_huge_json_is_an_error_of_ours(text):
    with pytest.raises(PlanFormatError):
        Plan.from_json(text)


@pytest.mark.parametrize("where", ["params_before", "error", "latency_after", "samples"])
@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400", "NaN", "-Infinity", "-1"])
def test_numbers_that_json_can_write_and_no_plan_holds(where, value):
    data = json.loads(plan().to_json())
    data["layers"][0][where] = "HERE"
    with pytest.raises(PlanFormatError, match="the plan is damaged"):
        Plan.from_json(json.dumps(data).replace('"HERE"', value))


def test_timings_deep_enough_to_break_a_comparison_are_refused():
    deep = 1.0
    for _ in range(300):
        deep = {"a": deep}
    for field in ("timings", "target"):
        with pytest.raises(PlanFormatError, match=rf"the plan: '{field}' is"):
            Plan.from_json(json.dumps({**json.loads(plan().to_json()), field: {"a": deep}}))


# --- printing

ODD = ["[bold]", "[/]", "[link=x]y[/link]", "a\nb", "\x1b[31mred", "\ud800", "", " ", "中文" * 40, "[" * 50, "\\[x]"]
EMPTY = Costs(0, 0, 0, 0.0)
LARGE = Costs(LARGEST, LARGEST, LARGEST, 1e308)


@pytest.mark.parametrize("odd", ODD)
def test_every_text_is_printed_as_it_is(odd):
    entries = (
        layer(odd, type=odd, kind=odd or "svd", reason=odd, source=odd, macs_before=1, macs_after=1),
        layer("slow", latency_before=1.0, latency_after=2.0, joint_with="slow"),
    )
    made = plan(*entries, method=odd, objective=odd, source=odd, target={"backend": odd, "batch": odd}, dense=LARGE)
    text = str(dataclasses.replace(made, compressed=LARGE))
    assert "\x1b" not in text
    text.encode()
    if odd.isprintable() and odd.strip() and len(odd) < 12:
        assert text.count(odd) >= 5
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("dense", [EMPTY, LARGE, Costs(20, None, 80)])
@pytest.mark.parametrize("compressed", [EMPTY, LARGE, Costs(20, None, 80)])
def test_every_size_is_printed(dense, compressed):
    size = {"params_before": dense.params, "params_after": compressed.params, "macs_before": dense.macs}
    times = {"latency_before": dense.latency, "latency_after": compressed.latency, "error_spread": 1e308}
    entry = layer(**size, **times, macs_after=compressed.macs, error=1.0, samples=LARGEST)
    made = plan(
        entry,
        dense=dense,
        compressed=compressed,
        target={},
        predicted_latency=1e308,
        seconds=1e308,
        optimality_gap=math.inf,
        output_distance=math.inf,
    )
    assert "params" in str(made)
    kept = made.kept["params"]
    assert kept is None if dense.params == 0 else kept == compressed.params / dense.params
    assert Plan.from_json(made.to_json()) == made


def test_plan_of_no_layers_is_printed():
    empty = Plan((), EMPTY, EMPTY)
    assert empty.kept == {"params": None, "macs": None, "bytes": None, "latency": None}
    assert "params 0 → 0 (? kept)" in str(empty)


# --- numbers of settings


@pytest.mark.parametrize("digits", [20, 400, 5000])
@pytest.mark.parametrize(
    ("make", "error"),
    [
        *((lambda n, name=name: Budget(**{name: n}), BudgetError) for name in ("params", "macs", "bytes", "latency")),
        (lambda n: Budget(max_error=n), BudgetError),
        (
            lambda n: Budget(ratio=f"1{'0' * min(n.bit_length() // 4, 4000)}x") if n > 10**300 else Budget(params=n),
            BudgetError,
        ),
        (lambda n: Override(max_rank=n), ConfigurationError),
        (lambda n: SearchSettings(seed=n), ConfigurationError),
        (lambda n: SearchSettings(rank_multiple=n), ConfigurationError),
        (lambda n: Effort(work=n), ConfigurationError),
    ],
)
def test_huge_numbers_are_an_error_of_ours(make, error, digits):
    with pytest.raises(error):
        make(10**digits)


def test_huge_milliseconds_are_an_error_of_ours():
    for number in (HUGE, 10**5000):
        with pytest.raises(BudgetError, match=r"Budget\(latency_ms="):
            Budget(latency_ms=number)
    assert Budget(latency_ms=10**20).bounds == {"latency_ms": 1e20}


def test_errors_of_the_constructor_are_of_our_tree():
    assert issubclass(ConfigurationError, LightningCompressError)

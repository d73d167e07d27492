from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from lightning_compress.core.errors import BudgetError, ConfigurationError, LightningCompressError, UnsupportedError
from lightning_compress.core.fine_tuning import Distill, Phase, Schedule
from lightning_compress.core.settings import RESOURCES, Budget, Override, SearchSettings

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"params": 0.2}, {"params": 0.2}),
        ({"params": 1}, {"params": 1.0}),
        ({"macs": 0.3}, {"macs": 0.3}),
        ({"bytes": 1e-6}, {"bytes": 1e-6}),
        ({"ratio": "5x"}, {"params": 0.2}),
        ({"ratio": "1x"}, {"params": 1.0}),
        ({"ratio": " 2.5 X "}, {"params": 0.4}),
        ({"ratio": "4x", "bytes": 0.5}, {"params": 0.25, "bytes": 0.5}),
        ({"latency": 0.7}, {"latency": 0.7}),
        (
            {"latency": 1, "bytes": 0.3, "macs": 0.2, "params": 0.1},
            {"params": 0.1, "macs": 0.2, "bytes": 0.3, "latency": 1.0},
        ),
        ({"latency_ms": 3}, {}),
        ({"latency_ms": 3, "params": 0.5}, {"params": 0.5}),
    ],
)
def test_budget_limits_are_the_given_fractions_in_a_fixed_order(settings, limits):
    for budget in (Budget(**settings), Budget.from_value(settings), Budget.from_value(OmegaConf.create(settings))):
        assert list(budget.limits().items()) == list(limits.items())
        assert all(type(limit) is float for limit in budget.limits().values())


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(params=0.2), "params <= 20 %"),
        (Budget(ratio="3x"), "params <= 33.3333 %"),
        (Budget(params=1), "params <= 100 %"),
        (Budget(bytes=0.3, params=0.25), "params <= 25 %, bytes <= 30 %"),
        (Budget(macs=0.005), "macs <= 0.5 %"),
        (Budget(latency=0.5, macs=0.3), "macs <= 30 %, latency <= 50 %"),
        (Budget(latency_ms=2.5, params=0.25), "params <= 25 %, latency <= 2.5 ms"),
    ],
)
def test_budget_prints_as_a_user_would_write_it(budget, text):
    assert str(budget) == text


def test_budgets_of_either_spelling_are_equal_and_hash_alike():
    assert Budget(ratio="5x") == Budget(params=0.2)
    assert hash(Budget(ratio="5x")) == hash(Budget(params=0.2))
    assert Budget(ratio="5x").ratio is None
    assert Budget(params=0.2) != Budget(macs=0.2)


def test_budget_survives_its_own_fields():
    budget = Budget(ratio="8x", macs=0.5, latency=0.9, latency_ms=3)
    assert Budget.from_value(dataclasses.asdict(budget)) == Budget.from_value(budget.as_dict()) == budget


@pytest.mark.parametrize(
    ("parse", "settings"),
    [
        (Budget.from_value, Budget(params=0.2)),
        (lambda value: Override.from_value(value, "conv*"), Override(max_rank=3)),
        (Schedule.from_value, Schedule(warmup_steps=3)),
        (Distill.from_value, Distill(weight=1)),
    ],
)
def test_settings_pass_through_and_are_frozen(parse, settings):
    assert parse(settings) is settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, dataclasses.fields(settings)[0].name, None)


@pytest.mark.parametrize("name", RESOURCES)
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 5, NAN, INFINITE, -INFINITE, True, False, "0.2", [0.2], 0.2j])
def test_budget_refuses_what_is_no_kept_fraction(name, value):
    with pytest.raises(BudgetError) as caught:
        Budget(**{name: value})
    assert f"Budget({name}={value!r})" in str(caught.value)
    assert "a number in (0, 1]" in str(caught.value)
    with pytest.raises(BudgetError):
        Budget.from_value({name: value})


@pytest.mark.parametrize(
    "ratio", [5, 5.0, 0.2, "5", "x", "", "0x", "0.5x", "-5x", "5xx", "1:5", "20%", "nanx", "infx", "1e3x", True, []]
)
def test_budget_refuses_what_is_no_ratio(ratio):
    with pytest.raises(BudgetError) as caught:
        Budget(ratio=ratio)
    assert f"Budget(ratio={ratio!r})" in str(caught.value)
    assert "such as '5x'" in str(caught.value)


def test_budget_refuses_both_spellings_at_once():
    with pytest.raises(BudgetError, match=r"params=0\.2, ratio='5x'.*one of the two"):
        Budget(params=0.2, ratio="5x")


@pytest.mark.parametrize("make", [Budget, lambda: Budget.from_value({}), lambda: Budget.from_value({"params": None})])
def test_budget_refuses_to_bound_nothing(make):
    known = "params, macs, bytes, latency, latency_ms, ratio='5x', or max_error"
    with pytest.raises(BudgetError, match=f"bounds nothing: give at least one of {known}"):
        make()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"latency_ms": 3}, 0.75),
        ({"latency_ms": 3, "latency": 0.5}, 0.5),
        ({"latency_ms": 1, "latency": 0.5}, 0.25),
        ({"latency_ms": 5}, 1.0),
        ({"latency": 0.5}, 0.5),
    ],
)
def test_milliseconds_are_a_fraction_once_the_time_of_the_dense_model_is_known(settings, kept):
    budget = Budget(**settings)
    assert budget.limits(4e-3) == {"latency": pytest.approx(kept)}
    assert budget.bounds == settings
    assert budget.budgeted == ("latency",)
    assert budget.bounds_latency
    assert budget.needs_example_input


@pytest.mark.parametrize("value", [0, -1, NAN, INFINITE, "3", True, [3]])
def test_budget_refuses_what_are_no_milliseconds(value):
    with pytest.raises(BudgetError) as caught:
        Budget(latency_ms=value, params=0.5)
    assert f"Budget(latency_ms={value!r}): expected the most milliseconds" in str(caught.value)


@pytest.mark.parametrize("bound", [{"latency": 0.5}, {"latency_ms": 3}])
def test_budget_refuses_a_quality_target_beside_a_bound_on_time(bound):
    with pytest.raises(BudgetError, match="give bounds or a quality target, not both"):
        Budget(max_error=0.1, **bound)


@pytest.mark.parametrize(
    ("parse", "what", "values", "write"),
    [
        (Budget.from_value, "budget", [0.2, 5, "5x", None, [0.2], Budget, object()], "Budget(params=0.2)"),
        (
            lambda value: Override.from_value(value, "conv*"),
            "overrides['conv*']",
            [None, 8, "Dense", "svd", ["dense"], True, Override],
            "{'max_rank': 8}, or 'dense'",
        ),
        (Schedule.from_value, "schedule", [100, "warmup", [1, 2], True, Distill()], "{'warmup_steps': 100}"),
        (
            Distill.from_value,
            "distill",
            [0.5, "teacher", True, False, [0.5], Schedule()],
            "{'weight': 0.5, 'temperature': 2}",
        ),
    ],
)
def test_settings_from_a_wrong_type_say_what_to_write(parse, what, values, write):
    for value in values:
        with pytest.raises(ConfigurationError) as caught:
            parse(value)
        assert f"{what}={value!r}" in str(caught.value)
        assert write in str(caught.value)


KNOWN = {
    "budget": (Budget.from_value, "params, macs, latency, latency_ms, bytes, ratio, max_error, of"),
    "schedule": (Schedule.from_value, "warmup_steps, phases"),
    "distill": (Distill.from_value, "weight, temperature, module, kind, blocks, function, dtype"),
    "overrides['fc*']": (lambda value: Override.from_value(value, "fc*"), "kinds, min_rank, max_rank, dense"),
}


@pytest.mark.parametrize(
    ("owner", "key", "suggestion"),
    [
        ("budget", "parms", "params"),
        ("budget", "mac", "macs"),
        ("schedule", "warmup_step", "warmup_steps"),
        ("distill", "temprature", "temperature"),
        ("overrides['fc*']", "maxrank", "max_rank"),
        *((owner, key, None) for owner in KNOWN for key in ("zzzzzz", 7, None)),
    ],
)
def test_unknown_key_is_named_with_the_known_ones_and_a_suggestion_if_one_is_close(owner, key, suggestion):
    parse, known = KNOWN[owner]
    hint = f" Did you mean {suggestion!r}?" if suggestion else ""
    with pytest.raises(ConfigurationError) as caught:
        parse({key: 1})
    assert str(caught.value) == f"{owner}: unknown key {key!r}.{hint} Known: {known}."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("dense", Override(dense=True)),
        ({"dense": True}, Override(dense=True)),
        ({}, Override()),
        ({"max_rank": 8}, Override(max_rank=8)),
        ({"min_rank": 8, "max_rank": 8}, Override(min_rank=8, max_rank=8)),
        ({"kinds": ["svd", "tucker2"], "min_rank": 1}, Override(kinds=["svd", "tucker2"], min_rank=1)),
        ({"kinds": "svd"}, Override(kinds="svd")),
    ],
)
def test_override_from_a_value(value, expected):
    assert Override.from_value(value, "conv*") == expected


def test_override_refuses_crossed_bounds():
    with pytest.raises(ConfigurationError, match=r"min_rank=9, max_rank=8\): min_rank must not exceed max_rank"):
        Override(min_rank=9, max_rank=8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Schedule()),
        ({}, Schedule()),
        ({"warmup_steps": 100}, Schedule(100)),
        (
            {"phases": [{"epochs": 2, "train": "factors"}], "warmup_steps": 5},
            Schedule(5, [Phase(epochs=2, train="factors")]),
        ),
        (OmegaConf.create({"phases": [{"epochs": 2}]}), Schedule(phases=[Phase(epochs=2)])),
    ],
)
def test_schedule_from_a_value(value, expected):
    assert Schedule.from_value(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({}, Distill(0.5, 2.0, None)),
        ({"weight": 1, "temperature": 4}, Distill(1, 4)),
        (OmegaConf.create({"module": "net"}), Distill(0.5, 2.0, "net")),
    ],
)
def test_distill_from_a_value(value, expected):
    assert Distill.from_value(value) == expected


COUNT, NOT_COUNTS = "a whole number of at least", [-1, 2.0, "4", True, [4]]


@pytest.mark.parametrize(
    ("make", "field", "values", "expected"),
    [
        *((Override, field, [*NOT_COUNTS, 0], f"{COUNT} 1") for field in ("min_rank", "max_rank")),
        (Override, "dense", [1, 0, "yes"], "true or false"),
        (Schedule, "warmup_steps", [*NOT_COUNTS, None], f"{COUNT} 0"),
        (Distill, "weight", [0, -0.5, 1.01, NAN, INFINITE, "0.5", True, None], "the share of the distillation"),
        (Distill, "temperature", [0, -1, NAN, INFINITE, "2", True, None], "a number above 0"),
        (Distill, "module", [1, True, ["net"]], "the name of a submodule"),
    ],
)
def test_wrong_value_of_a_field_is_named_with_what_is_expected(make, field, values, expected):
    for value in values:
        with pytest.raises(ConfigurationError) as caught:
            make(**{field: value})
        assert str(caught.value).startswith(f"{make.__name__}({field}={value!r}): expected {expected}")


@pytest.mark.parametrize(
    ("error", "base"),
    [(BudgetError, ValueError), (ConfigurationError, ValueError), (UnsupportedError, NotImplementedError)],
)
def test_errors_are_of_our_tree_and_of_pythons(error, base):
    assert issubclass(error, base)
    assert issubclass(error, LightningCompressError)


def test_no_seed_is_the_default_one():
    assert SearchSettings(seed=None) == SearchSettings()

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from lightning_compress.core.errors import BudgetError, ConfigurationError, LightningCompressError, UnsupportedError
from lightning_compress.core.fine_tuning import Distill, Schedule
from lightning_compress.core.settings import RESOURCES, Budget, Override

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
        ({"bytes": 0.3, "macs": 0.2, "params": 0.1}, {"params": 0.1, "macs": 0.2, "bytes": 0.3}),
    ],
)
def test_budget_limits_are_the_given_fractions_in_a_fixed_order(settings, limits):
    for budget in (Budget(**settings), Budget.from_value(settings), Budget.from_value(OmegaConf.create(settings))):
        assert list(budget.limits().items()) == list(limits.items())
        assert all(type(limit) is float for limit in budget.limits().values())


def test_resources_are_what_a_budget_can_bound():
    assert RESOURCES == ("params", "macs", "bytes")


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(params=0.2), "params <= 20 %"),
        (Budget(ratio="3x"), "params <= 33.3333 %"),
        (Budget(params=1), "params <= 100 %"),
        (Budget(bytes=0.3, params=0.25), "params <= 25 %, bytes <= 30 %"),
        (Budget(macs=0.005), "macs <= 0.5 %"),
    ],
)
def test_budget_prints_as_a_user_would_write_it(budget, text):
    assert str(budget) == text


def test_budgets_of_either_spelling_are_equal_and_hash_alike():
    assert Budget(ratio="5x") == Budget(params=0.2)
    assert hash(Budget(ratio="5x")) == hash(Budget(params=0.2))
    assert Budget(ratio="5x").ratio is None
    assert Budget(params=0.2) != Budget(macs=0.2)


def test_budget_passes_through_and_survives_its_own_fields():
    budget = Budget(ratio="8x", macs=0.5)
    assert Budget.from_value(budget) is budget
    assert Budget.from_value(dataclasses.asdict(budget)) == budget


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
    with pytest.raises(
        BudgetError, match="bounds nothing: give at least one of params, macs, bytes, ratio='5x', or max_error"
    ):
        make()


@pytest.mark.parametrize("latency", [0.5, 0, "fast"])
def test_budget_refuses_latency_and_names_the_closest_bound(latency):
    with pytest.raises(UnsupportedError) as caught:
        Budget(latency=latency, params=0.5)
    assert f"latency={latency!r}" in str(caught.value)
    assert "use macs=" in str(caught.value)


@pytest.mark.parametrize("value", [0.2, 5, "5x", None, [0.2], (("params", 0.2),), Budget, object()])
def test_budget_from_a_wrong_type_says_what_to_write(value):
    with pytest.raises(BudgetError) as caught:
        Budget.from_value(value)
    assert f"budget={value!r}" in str(caught.value)
    assert "Budget(params=0.2)" in str(caught.value)


@pytest.mark.parametrize(
    ("parse", "owner", "key", "suggestion"),
    [
        (Budget.from_value, "budget", "parms", "params"),
        (Budget.from_value, "budget", "mac", "macs"),
        (Schedule.from_value, "schedule", "warmup_step", "warmup_steps"),
        (Distill.from_value, "distill", "temprature", "temperature"),
        (lambda value: Override.from_value(value, "fc*"), "overrides['fc*']", "maxrank", "max_rank"),
    ],
)
def test_unknown_key_is_named_with_a_suggestion_and_the_known_ones(parse, owner, key, suggestion):
    with pytest.raises(ConfigurationError) as caught:
        parse({key: 1})
    message = str(caught.value)
    assert message.startswith(f"{owner}: unknown key {key!r}. Did you mean {suggestion!r}? Known: ")
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("parse", "known"),
    [
        (Budget.from_value, "params, macs, latency, bytes, ratio, max_error"),
        (Schedule.from_value, "warmup_steps, freeze_epochs, phases"),
        (Distill.from_value, "weight, temperature, module, kind, blocks, function, dtype"),
        (lambda value: Override.from_value(value, "x"), "kinds, min_rank, max_rank, dense"),
    ],
)
@pytest.mark.parametrize("key", ["zzzzzz", 7, None])
def test_unknown_key_without_a_close_one_lists_the_known_ones_only(parse, known, key):
    with pytest.raises(ConfigurationError) as caught:
        parse({key: 1})
    assert str(caught.value).endswith(f"unknown key {key!r}. Known: {known}.")


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


def test_override_passes_through():
    override = Override(max_rank=3)
    assert Override.from_value(override, "conv*") is override


@pytest.mark.parametrize("value", [None, 8, "Dense", "svd", ["dense"], True, Override])
def test_override_of_a_wrong_type_names_the_pattern_and_the_value(value):
    with pytest.raises(ConfigurationError) as caught:
        Override.from_value(value, "conv*")
    assert f"overrides['conv*']={value!r}" in str(caught.value)
    assert "{'max_rank': 8}, or 'dense'" in str(caught.value)


@pytest.mark.parametrize("name", ["min_rank", "max_rank"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, [4]])
def test_override_refuses_what_is_no_rank(name, value):
    with pytest.raises(ConfigurationError) as caught:
        Override(**{name: value})
    assert str(caught.value) == f"Override({name}={value!r}): expected a whole number of at least 1."


def test_override_refuses_crossed_bounds():
    with pytest.raises(ConfigurationError, match=r"min_rank=9, max_rank=8\): min_rank must not exceed max_rank"):
        Override(min_rank=9, max_rank=8)


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_override_dense_is_true_or_false(value):
    with pytest.raises(ConfigurationError) as caught:
        Override(dense=value)
    assert str(caught.value) == f"Override(dense={value!r}): expected true or false."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Schedule(0, 0)),
        ({}, Schedule(0, 0)),
        ({"warmup_steps": 100}, Schedule(100, 0)),
        ({"freeze_epochs": 2, "warmup_steps": 5}, Schedule(5, 2)),
        (OmegaConf.create({"freeze_epochs": 2}), Schedule(0, 2)),
    ],
)
def test_schedule_from_a_value(value, expected):
    assert Schedule.from_value(value) == expected


def test_schedule_and_distill_pass_through():
    schedule, distill = Schedule(warmup_steps=3), Distill(weight=1)
    assert Schedule.from_value(schedule) is schedule
    assert Distill.from_value(distill) is distill


@pytest.mark.parametrize("name", ["warmup_steps", "freeze_epochs"])
@pytest.mark.parametrize("value", [-1, 1.0, "10", True, None])
def test_schedule_refuses_what_is_no_count(name, value):
    with pytest.raises(ConfigurationError) as caught:
        Schedule.from_value({name: value})
    assert str(caught.value) == f"Schedule({name}={value!r}): expected a whole number of at least 0."


@pytest.mark.parametrize("value", [100, "warmup", [1, 2], True, Distill()])
def test_schedule_of_a_wrong_type_says_what_to_write(value):
    with pytest.raises(ConfigurationError) as caught:
        Schedule.from_value(value)
    assert f"schedule={value!r}" in str(caught.value)
    assert "{'warmup_steps': 100}" in str(caught.value)


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


@pytest.mark.parametrize("weight", [0, -0.5, 1.01, NAN, INFINITE, "0.5", True, None])
def test_distill_refuses_what_is_no_share(weight):
    with pytest.raises(ConfigurationError) as caught:
        Distill(weight=weight)
    assert f"Distill(weight={weight!r})" in str(caught.value)
    assert "a number in (0, 1]" in str(caught.value)


@pytest.mark.parametrize("temperature", [0, -1, NAN, INFINITE, "2", True, None])
def test_distill_refuses_what_is_no_temperature(temperature):
    with pytest.raises(ConfigurationError) as caught:
        Distill(temperature=temperature)
    assert str(caught.value) == f"Distill(temperature={temperature!r}): expected a number above 0."


@pytest.mark.parametrize("module", [1, True, ["net"]])
def test_distill_module_is_a_name(module):
    with pytest.raises(ConfigurationError) as caught:
        Distill(module=module)
    assert str(caught.value) == f"Distill(module={module!r}): expected the name of a submodule."


@pytest.mark.parametrize("value", [0.5, "teacher", True, False, [0.5], Schedule()])
def test_distill_of_a_wrong_type_says_what_to_write(value):
    with pytest.raises(ConfigurationError) as caught:
        Distill.from_value(value)
    assert f"distill={value!r}" in str(caught.value)
    assert "{'weight': 0.5, 'temperature': 2}" in str(caught.value)


@pytest.mark.parametrize("settings", [Budget(params=0.2), Override(), Schedule(), Distill()])
def test_settings_are_frozen(settings):
    field = dataclasses.fields(settings)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, field, None)


@pytest.mark.parametrize("error", [BudgetError, ConfigurationError])
def test_configuration_errors_are_value_errors_of_our_tree(error):
    assert issubclass(error, ValueError)
    assert issubclass(error, LightningCompressError)


def test_unsupported_is_a_not_implemented_error_of_our_tree():
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(UnsupportedError, LightningCompressError)

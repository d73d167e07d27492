"""Phases, rounds and distillation as settings; what they do is tested in tests/training."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lightning_compress import Budget, Compress, Phase, Plateau, Schedule
from lightning_compress.core.errors import BudgetError, ConfigurationError
from lightning_compress.core.fine_tuning import Distill


def phases(*given):
    return {"phases": list(given)}


SCHEDULES = {
    "two lengths": (phases({"epochs": 1, "steps": 2}), r"Phase\(epochs=1, steps=2\): give one"),
    "no length": (phases({}, {"epochs": 1}), "phase 0 of the schedule never ends and 1 come"),
    "unknown": (phases({"epoch": 1}), "schedule.phases: unknown key 'epoch'. Did you mean"),
    "no list": ({"phases": {"epochs": 1}}, "expected a list of phases"),
    "no phase": (phases(3), "3 is no phase, expected a Phase or a mapping"),
    "zero": (phases({"epochs": 0}), r"Phase\(epochs=0\): expected a whole number of at least 1"),
    "train": (phases({"train": "head"}), r"Phase\(train='head'\): expected 'all', 'factors'"),
    "no globs": (phases({"train": []}), r"Phase\(train=\[\]\)"),
    "scale": (phases({"lr_scale": -1}), r"Phase\(lr_scale=-1\): expected a number of at least"),
    "distill": (phases({"distill": True}), "phase 0 of the schedule has distill=true"),
    "mode": (phases({"until_plateau": {"monitor": "x", "mode": "up"}}), "'min' or 'max'"),
    "plateau": (phases({"until_plateau": 3}), "until_plateau=3: expected a metric, as in"),
}
ROUNDS = {
    "growing": ({"params": 0.3}, {"params": 0.4}, "do not decrease: params <= 30 % and then params <= 40 %"),
    "others": ({"params": 0.3}, {"bytes": 0.2}, "bound different things, params <= 30 %, then bytes <= 20 %"),
    "late": (None, {"params": 0.2}, "and the first has none: give the first one"),
    "loose": (
        {"params": 0.8},
        {"params": 0.5},
        "ends at params <= 50 %, which does not keep the budget of the callback, params <= 40 %",
    ),
}


@pytest.mark.parametrize(("schedule", "said"), SCHEDULES.values(), ids=SCHEDULES)
def test_bad_schedules_are_refused(schedule, said):
    with pytest.raises(ConfigurationError, match=said):
        Compress({"params": 0.4}, schedule=schedule)


@pytest.mark.parametrize(("first", "second", "said"), ROUNDS.values(), ids=ROUNDS)
def test_rounds_that_do_not_lead_to_the_budget_are_refused(first, second, said):
    with pytest.raises(BudgetError, match=said):
        Compress({"params": 0.4}, schedule=phases({"budget": first, "epochs": 1}, {"budget": second}))


def test_schedule_comes_from_plain_values_and_from_hydra():
    expected = Schedule(
        phases=(
            Phase(budget=Budget(params=0.6), epochs=2, train=("net.*",)),
            Phase(budget=Budget(params=0.4), until_plateau=Plateau("val_loss", patience=2), distill=True),
        )
    )
    values = phases(
        {"budget": {"params": 0.6}, "epochs": 2, "train": ["net.*"]},
        {"budget": {"params": 0.4}, "until_plateau": {"monitor": "val_loss", "patience": 2}, "distill": True},
    )
    for value in (values, OmegaConf.create(values)):
        assert Schedule.from_value(value) == expected
        callback = Compress({"params": 0.4}, schedule=value, distill="layers")
        assert callback.schedule == expected
        assert callback.distill == Distill(kind="layers")


def test_plateau_of_a_metric_that_rises():
    plateau = Plateau("acc", mode="max", min_delta=0.1)
    assert plateau.improves(0.5, None)
    assert plateau.improves(0.61, 0.5)
    assert not plateau.improves(0.59, 0.5)
    assert not plateau.improves(float("nan"), None)


DISTILLATIONS = {
    "kind": ({"kind": "logit"}, r"Distill\(kind='logit'\): unknown\. Did you mean 'logits'"),
    "no blocks": ({"kind": "blocks"}, r"'blocks' needs blocks, other kinds have none"),
    "blocks of layers": ({"kind": "layers", "blocks": ["a"]}, r"'blocks' needs blocks, other kinds have none"),
    "a name": ({"blocks": "net"}, r"Distill\(blocks='net'\): expected a list of names"),
    "no function": ({"function": 3}, r"Distill\(function=3\): expected a function or its import path"),
    "no module": ({"function": "nowhere.at_all"}, r"Distill\(function='nowhere\.at_all'\) cannot be imported"),
    "no name": ({"function": "math.sinus"}, r"Distill\(function='math\.sinus'\) cannot be imported"),
    "no path": ({"function": "squares"}, r"Distill\(function='squares'\) cannot be imported"),
    "dtype": ({"dtype": "half"}, r"Distill\(dtype='half'\): no precision of the teacher\. Known: float16"),
    "weight": ({"kind": "layers", "weight": 0}, r"Distill\(weight=0\): expected the weight, above 0"),
}


@pytest.mark.parametrize(("settings", "said"), DISTILLATIONS.values(), ids=DISTILLATIONS)
def test_bad_distillations_are_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        Compress({"params": 0.4}, distill=settings)

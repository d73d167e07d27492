"""Which objective is taken, and what it needs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.moments import Moments
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import ConfigurationError, ExampleInputError
from tests.support.nets import IMAGE, pooled
from tests.support.searching import VECTOR


@pytest.mark.parametrize(
    ("method", "given", "objective"),
    [
        *(("continuous", given, "moments") for given in ("example_input", "statistics", "calibration")),
        *(("exact", given, "moments") for given in ("example_input", "statistics", "calibration")),
        *((method, None, "weight") for method in ("continuous", "exact")),
        *((method, "example_input", "weight") for method in ("uniform", "energy", "paper")),
        ("uniform", "statistics", "moments"),
        ("paper", "statistics", "weight"),
    ],
)
def test_automatic_objective_is_the_best_that_applies(small, method, given, objective):
    net, statistics = small
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    every = {"example_input": VECTOR, "statistics": statistics, "calibration": [inputs]}
    plan = search_ranks(net, Budget(params=0.8), method=method, **({given: every[given]} if given else {}))
    assert plan.objective == objective
    assert (plan.output_distance is None) == (objective == "weight")
    assert plan.data_free == (given != "calibration")


@pytest.mark.parametrize("method", ["exact", "uniform", "energy", "paper"])
def test_other_methods_do_not_know_the_outputs(small, method):
    message = rf"objective='end_to_end' is nothing for method='{method}'.*the methods that take it: 'continuous'"
    with pytest.raises(ConfigurationError, match=message):
        search_ranks(small[0], Budget(params=0.6), example_input=VECTOR, objective="end_to_end", method=method)


@pytest.mark.parametrize("objective", ["moments", "end_to_end"])
def test_objectives_of_the_outputs_without_any_input_are_an_error(net, unchanged, objective):
    before = unchanged(net)
    message = rf"objective='{objective}' needs an example_input.*or calibration"
    with pytest.raises(ExampleInputError, match=message):
        search_ranks(net, Budget(params=0.5), objective=objective)
    with pytest.raises(ExampleInputError, match=message):
        compress_(net, Budget(params=0.5), objective=objective, heal=False)
    before.check()


def misled(net: nn.Module):
    """Statistics whose moments say that but one direction of the classifier's inputs is ever used."""
    statistics = gather_statistics(net, IMAGE)
    one = torch.zeros(32, 32, dtype=torch.float64)
    one[0, 0] = 1.0
    wrong = {**statistics.moments, "8": Moments(one, one[0], source="batch norm")}
    return type(statistics)(statistics.batches, statistics.source, wrong, {}, statistics.judging)


@pytest.mark.slow
def test_the_weights_alone_are_taken_where_moments_mislead():
    net = pooled()
    known = gather_statistics(net, IMAGE)
    kinds = ["svd", "channel_svd"]
    good = search_ranks(net, Budget(params=0.6), example_input=IMAGE, statistics=known, kinds=kinds)
    assert good.objective != "weight"
    plan = search_ranks(net, Budget(params=0.6), example_input=IMAGE, statistics=misled(net), kinds=kinds)
    assert (plan.objective, plan.source, plan.data_free) == ("weight", "weight", True)
    asked = search_ranks(
        net, Budget(params=0.6), example_input=IMAGE, statistics=misled(net), kinds=kinds, objective="moments"
    )
    assert asked.objective == "moments"  # who asks for it gets it


@pytest.mark.slow
def test_factors_of_a_plan_of_the_weights_are_fitted_to_the_weights_whatever_statistics_are_passed():
    net, models = pooled(), []
    statistics, kinds = misled(net), ["svd", "channel_svd"]
    plan = search_ranks(net, Budget(params=0.6), example_input=IMAGE, statistics=statistics, kinds=kinds)
    assert plan.objective == "weight"
    for known in (statistics, None):
        models.append(copy.deepcopy(net))
        apply_plan_(models[-1], plan, statistics=known)
    for ours, plain in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, plain)

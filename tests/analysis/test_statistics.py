"""What is known of a model's activations, and from where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.moments import input_moments
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import ExampleInputError
from tests.support.errors import planned_error, require_planned_errors
from tests.support.nets import SHAPE, trained_like
from tests.support.searching import mlp
from tests.support.unchanged import Unchanged


def test_model_comes_back_as_it_was():
    net = trained_like().train()
    before = Unchanged(net)
    gather_statistics(net, SHAPE)
    before.check()


@pytest.mark.usefixtures("unshrunk")
def test_calibration_takes_real_batches_and_says_so(net, images):
    statistics = gather_statistics(net, SHAPE, calibration=[images[:3], images[3:]])
    assert (statistics.source, statistics.data_free) == ("real", False)
    expected = input_moments(net, [((images,), {})], ["fc2"])["fc2"].second
    torch.testing.assert_close(statistics.metric("fc2").inputs, expected, rtol=1e-5, atol=1e-7)
    plan = search_ranks(net, Budget(params=0.5), statistics=statistics)
    assert (plan.objective, plan.source, plan.data_free) == ("moments", "real", False)
    assert {layer.source for layer in plan.factorised} == {"real"}
    again = search_ranks(net, Budget(params=0.5), calibration=[images[:3], images[3:]])
    assert (again.layers, again.data_free) == (plan.layers, False)


@pytest.mark.parametrize("kind", ["svd", "channel_svd", "spatial_svd", "tucker2"])
def test_fewer_rows_of_inputs_than_there_are_inputs_are_no_obstacle(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1 if kind == "svd" else 3, padding=1))
    batches = [torch.randn(2, 4, 4, 4)]  # 32 positions, 64 or 576 inputs of the last layer
    plan = search_ranks(
        net, Budget(params=0.5), calibration=batches, objective="moments", overrides={"2": {"kinds": kind}}
    )
    statistics = gather_statistics(net, calibration=batches)
    dense = net[2].weight.detach().clone()
    apply_plan_(net, plan, statistics=statistics)
    error = planned_error(statistics.metric("2"), dense, net[2].weight)
    assert error == pytest.approx(plan.layers[1].error, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(4, 6), r"calibration=Tensor: expected batches of inputs.*\[batch\]"),
        (7, "calibration=int: expected batches of inputs"),
        ([], "calibration holds no batch"),
        (iter(()), "calibration holds no batch"),
        ([torch.zeros(4, 7)], "the model fails on real inputs"),
        ([torch.full((4, 6), float("nan"))], "the inputs of layer '0' are not finite on real inputs"),
        ([[torch.zeros(4, 6), torch.zeros(4)]], "calibration"),
        ([(4, 6)], "calibration"),
    ],
)
@pytest.mark.parametrize("entrance", [search_ranks, compress_])
def test_calibration_that_cannot_be_used_is_an_error(calibration, message, entrance, unchanged):
    net = mlp()
    before = unchanged(net)
    with pytest.raises(ExampleInputError, match=message):
        entrance(net, Budget(params=0.6), calibration=calibration)
    before.check()


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].weight.data.fill_(3e38)
    with pytest.raises(ExampleInputError, match=r"the inputs of layer '1' are not finite.*objective='weight'"):
        gather_statistics(net, (1, 3))


def test_statistics_without_any_input_are_an_error(net):
    with pytest.raises(ExampleInputError, match=r"no moments without inputs: pass an example_input.*or calibration"):
        gather_statistics(net)


def test_errors_of_a_plan_are_those_of_the_outputs():
    net = trained_like()
    statistics = gather_statistics(net, SHAPE)
    plan = search_ranks(net, Budget(params=0.4), statistics=statistics, example_input=SHAPE)
    assert (plan.objective, plan.source) == ("moments", "batch norm")
    require_planned_errors(net, plan, statistics)

"""What is looked at once more before a plan is final, and what a layer's error does to the outputs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.drawing import leaves, noise, textured
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.moments import OTHER_KIND, Moments, batch_statistics, input_moments
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.analysis.synthetic import LEAST_SIDE, synthesise
from lightning_compress.analysis.trace import trace
from lightning_compress.core.effort import EFFORTS
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.plan import BETTER_ELSEWHERE, DENSE, LayerPlan
from lightning_compress.core.progress import silent
from lightning_compress.search.end_to_end import Outputs, output_distance
from lightning_compress.search.exact import solve
from lightning_compress.search.problem import problem_of
from lightning_compress.search.safeguards import gives_up_most, spend_what_is_left
from lightning_compress.search.sensitivity import weighted
from lightning_compress.search.tables import tabulate_units
from lightning_compress.search.units import units_of
from tests.support.compressing import CLOSED_FORM, compressed_model
from tests.support.nets import TinyNet
from tests.support.unchanged import Unchanged

IMAGE = (1, 3, 16, 16)


def pooled(seed: int = 0) -> nn.Module:
    """A network with norms and a classifier behind a pooling that is wide for its body."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 1, bias=False),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 120),
    )  # fmt: skip
    for _ in range(20):
        net(torch.randn(32, *IMAGE[1:]))
    return net.eval()


@pytest.mark.parametrize("draw", [noise, leaves, textured])
def test_drawn_images_are_of_unit_scale_and_of_the_generator_alone(draw):
    images, again, other = (draw((6, 3, 40, 32), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert images.shape == (6, 3, 40, 32)
    assert bool(torch.isfinite(images).all())
    assert 0.9 < float(images.std()) < 1.1
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_textured_images_have_a_spectrum_nearer_to_photographs_than_noise():
    def slope(images: torch.Tensor) -> float:
        power = torch.fft.rfft2(images).abs().square().mean(dim=(0, 1))[0, 1:33].log()
        return float(np.polyfit(np.log(np.arange(1, 33)), power.numpy(), 1)[0])

    white = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slope(textured((32, 3, 64, 64), torch.Generator().manual_seed(0))) < -1.2 < slope(white)


def test_norms_take_the_statistics_of_the_batch_for_a_while():
    net, images = pooled(), 3 + 2 * torch.randn(16, *IMAGE[1:])
    before = Unchanged(net)
    with torch.no_grad(), batch_statistics(net):
        normed = net[1](net[0](images))
    torch.testing.assert_close(normed.mean(dim=(0, 2, 3)), net[1].bias.detach(), rtol=1e-3, atol=1e-3)
    before.check()


def test_images_are_smaller_where_as_many_large_ones_are_too_dear(try_only):
    net, shape = pooled(), (1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE)
    small = synthesise(net, shape, count=8, steps=2)
    assert small.batches[0][0][0].shape[2:] == shape[2:]
    assert small.drawn == ()
    try_only(work=10**9)
    made = synthesise(net, shape, count=64, steps=2)
    assert made.batches[0][0][0].shape[2:] == (LEAST_SIDE, LEAST_SIDE)
    assert made.drawn
    assert {batch[0][0].shape[2:] for batch in made.drawn} == {(LEAST_SIDE, LEAST_SIDE)}

    class Flat(nn.Sequential):
        """Takes images of one size alone."""

    flat = Flat(nn.Conv2d(3, 2, 3, stride=8), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 24 * 24, 4)).eval()
    whole = synthesise(flat, shape, count=64, steps=2)
    assert whole.batches[0][0][0].shape[2:] == shape[2:]


@pytest.fixture
def scarce(try_only) -> tuple[nn.Module, Statistics]:
    """A network and what is known of it where few inputs can be afforded."""
    try_only(work=10**8)
    net = pooled()
    return net, gather_statistics(net, (1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE))


def test_moments_of_drawn_inputs_are_the_mean_of_two_kinds_shrunk(scarce):
    net, statistics = scarce
    assert statistics.scarce
    drawn = synthesise(net, (1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE)).drawn
    plain = input_moments(net, drawn, ["3", "8"])
    with batch_statistics(net):
        normed = input_moments(net, drawn, ["3", "8"])
    for name in ("3", "8"):
        found, first, second = statistics.moments[name], normed[name], plain[name]
        torch.testing.assert_close(found.mean, (first.mean + second.mean) / 2)
        own = (first.second + second.second) / 2 - torch.outer(found.mean, found.mean)
        covariance = found.second - torch.outer(found.mean, found.mean)
        torch.testing.assert_close(covariance.trace(), own.trace())
        off = ~torch.eye(len(own), dtype=torch.bool)
        torch.testing.assert_close(covariance[off], (1 - OTHER_KIND) * own[off])
        assert found.shrinkage >= OTHER_KIND


def test_small_images_are_not_drawn_and_their_factors_are_repaired(try_only):
    try_only(work=10**8)
    net = pooled()
    made = synthesise(net, IMAGE)
    assert made.source == "batch norm"
    assert sum(len(batch[0][0]) for batch in made.batches) < EFFORTS["balanced"].inputs
    assert made.drawn == ()
    done = compressed_model(net, Budget(params=0.6), example_input=IMAGE)
    assert done.healing is not None


@pytest.mark.parametrize("objective", ["auto", "weight"])
def test_factors_are_not_repaired_on_scarce_inputs_and_a_warning_says_so(scarce, objective):
    net, statistics = scarce
    settings = {"statistics": statistics} if objective == "auto" else {"objective": objective}
    example = torch.empty(1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE)
    healed, plain = copy.deepcopy(net), copy.deepcopy(net)
    with pytest.warns(CompressionWarning, match="not healed.*calibration"):
        done = compressed_model(healed, Budget(params=0.6), example_input=example, **settings)
    assert done.healing is None
    compressed_model(plain, Budget(params=0.6), example_input=example, heal=False, **settings)
    for own, other in zip(healed.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_layers_are_weighed_by_what_they_do_to_the_outputs():
    """Of two branches alike one is multiplied by nearly zero: its errors hardly count."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            return self.first(x) + 0.01 * self.second(x)

    torch.manual_seed(0)
    net = Branches()
    statistics = gather_statistics(net, (1, 20))
    units, budget = units_of(take_inventory(net, kinds="svd")), Budget(params=0.7)
    problem = problem_of(tabulate_units(units, budget, 1, statistics, silent), measure_costs(net), budget)
    outputs = Outputs(net, units, statistics)
    found = weighted(problem, solve(problem).choice, outputs)
    assert found.weights[0] > 50 * found.weights[1]
    choices = [solve(each).choice for each in (problem, found)]
    assert output_distance(outputs, found, choices[1]) < output_distance(outputs, problem, choices[0])


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_the_whole_budget_is_used_where_errors_are_left(keep):
    net = pooled()
    plan = search_ranks(net, Budget(params=keep), example_input=IMAGE)
    step = max(sum(layer.weight_shape[:2]) for layer in plan.factorised)
    assert plan.compressed.params > keep * plan.dense.params - step


def test_what_is_left_goes_to_larger_ranks_of_the_same_kinds():
    net = TinyNet().eval()
    dense, budget = measure_costs(net), Budget(params=0.9)
    tables = tabulate_units(units_of(take_inventory(net, kinds=CLOSED_FORM)), budget, 1, None, silent)
    problem = problem_of(tables, dense, budget)
    small = solve(problem_of(problem.layers, dense, Budget(params=0.5))).choice
    spent = spend_what_is_left(problem, small)
    assert problem.fits(spent)
    assert problem.loss_of(spent) < problem.loss_of(small)
    for table, before, after in zip(problem.layers, small, spent, strict=True):
        assert table.kinds[before] in (DENSE, table.kinds[after])
        assert (table.costs[after] >= table.costs[before]).all()


def misled(net: nn.Module):
    """Statistics whose moments say that but one direction of the classifier's inputs is ever used."""
    statistics = gather_statistics(net, IMAGE)
    one = torch.zeros(32, 32, dtype=torch.float64)
    one[0, 0] = 1.0
    wrong = {**statistics.moments, "8": Moments(one, one[0], source="batch norm")}
    return type(statistics)(statistics.batches, statistics.source, wrong, {}, statistics.judging)


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


def layer(name: str, error: float, params: int, *, dense: bool = False, reason: str | None = None) -> LayerPlan:
    kind = "dense" if dense else "svd"
    return LayerPlan(name, "Linear", kind, () if dense else (1,), (2, 2), error, params, params, reason=reason)


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


def test_layers_of_a_large_model_are_measured_on_few_inputs_or_not_at_all(try_only):
    net = pooled()
    statistics = gather_statistics(net, IMAGE)
    layers, budget = units_of(take_inventory(net, kinds=["svd", "channel_svd"])), Budget(params=0.7)
    outputs = Outputs(net, layers, statistics)
    problem = problem_of(tabulate_units(layers, budget, 1, statistics, silent), measure_costs(net), budget)
    choice, macs = solve(problem).choice, trace(net, IMAGE).macs
    seen: list[int] = []
    with net[8].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0]))):
        for inputs, most in ((10_000, 256), (70, 64), (10, 10)):
            try_only(work=inputs * macs * len(layers))
            seen.clear()
            assert weighted(problem, choice, outputs).weights is not None
            assert sum(len(args[0]) for args, _ in outputs.within(inputs).statistics.batches) == most
            assert sum(seen) <= 64 + (1 + len(layers)) * most  # the count of MACs, the dense outputs, each layer
        try_only(work=2 * macs * len(layers))
        assert weighted(problem, choice, outputs) is problem


def test_layers_that_give_up_most_are_those_beside_which_the_rest_stays_dense():
    worst, fine = layer("a", 0.6, 100), layer("b", 0.1, 50)
    rest = layer("c", 0.0, 300, dense=True, reason=BETTER_ELSEWHERE)
    excluded = layer("d", 0.0, 900, dense=True, reason="excluded")
    assert [found.name for found in gives_up_most([worst, fine, rest])] == ["a"]
    assert gives_up_most([worst, fine, layer("c", 0.3, 300), excluded]) == []


def test_a_plan_that_gives_one_layer_up_warns_with_its_name():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 8), nn.Tanh(), nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 64))
    overrides = {"0": {"min_rank": 7}, "2": {"min_rank": 7}}
    with pytest.warns(CompressionWarning, match=r"layer '4' loses \d+ % of its energy \(svd, .* raise the budget"):
        search_ranks(
            nn.Sequential(*net, nn.Linear(64, 120)), Budget(params=0.9), kinds="svd", objective="weight",
            overrides={**overrides, "4": {"max_rank": 4}, "5": {"min_rank": 41}},
        )  # fmt: skip

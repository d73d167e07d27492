"""The strategies beside exact: what each one chooses, and what it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.progress import silent
from lightning_compress.search.exact import smallest
from lightning_compress.search.strategies import STRATEGIES, register_strategy
from tests.support.nets import SHAPE, TinyNet
from tests.support.searching import METHODS, brute_force, random_problem, running_net


def test_strategies_of_the_package_are_those_tested_here():
    own = {name for name, found in STRATEGIES.items() if found.solve.__module__.startswith("lightning_compress.")}
    assert own == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_every_strategy_returns_a_choice_that_fits(method, seed):
    problem = random_problem(seed, budgeted=("params", "bytes"), keep=0.3 + 0.1 * seed)
    assert brute_force(problem) < np.inf
    choice = STRATEGIES[method].solve(problem, progress=silent)
    assert (problem.cost_of(choice) <= problem.limits).all()
    assert len(choice) == len(problem.layers)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "budget",
    [Budget(params=0.2), Budget(params=0.5), Budget(params=0.8), Budget(macs=0.4), Budget(params=0.3, macs=0.3)],
    ids=str,
)
def test_continuous_is_within_one_percent_of_exact(seed, budget):
    net = running_net(seed)
    exact, continuous = (
        search_ranks(net, budget, example_input=SHAPE, method=method, objective="weight")
        for method in ("exact", "continuous")
    )
    assert continuous.signal_loss <= 1.01 * exact.signal_loss
    assert exact.signal_loss <= continuous.signal_loss * (1 + 2e-4)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_uniform_takes_the_same_share_of_every_layer(keep):
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(20, 60, bias=False), nn.Linear(64, 16, bias=False))
    plan = search_ranks(net, Budget(params=keep), method="uniform")
    sizes = [(layer.weight_shape, layer.params_after / layer.params_before) for layer in plan.layers]

    def at(share):  # the largest rank of each layer whose share of the dense parameters is at most this
        kept = []
        for (out, in_), _ in sizes:
            ranks = [r for r in range(1, min(out, in_) + 1) if r * (out + in_) < out * in_]
            shares = [r * (out + in_) / (out * in_) for r in ranks] + [1.0]
            kept.append(max([s for s in shares if s <= share], default=shares[0]))
        return kept

    every = sorted({s for share in np.linspace(0, 1, 2001) for s in at(share)})
    weights = [out * in_ for (out, in_), _ in sizes]
    fitting = [s for s in every if np.dot(at(s), weights) <= keep * sum(weights) + 1e-6]
    assert [share for _, share in sizes] == pytest.approx(at(max(fitting)))


def test_uniform_uses_the_first_kind_that_applies():
    net = running_net(1)
    plan = search_ranks(net, Budget(params=0.5), method="uniform")
    assert {layer.kind for layer in plan.factorised} <= {"svd", "channel_svd"}
    other = search_ranks(net, Budget(params=0.5), method="uniform", kinds=["tucker2", "svd"])
    assert {layer.kind for layer in other.factorised} == {"tucker2", "svd"}


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_energy_takes_the_cheapest_candidate_within_one_threshold(keep):
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(20, 60), nn.Linear(64, 16))
    plan = search_ranks(net, Budget(params=keep), method="energy", kinds="svd")
    dense = sum(p.numel() for p in net.parameters())

    def at(threshold):
        after, ranks = 0, []
        for layer in net:
            out, in_ = layer.weight.shape
            energy = torch.linalg.svdvals(layer.weight.detach().double()).square()
            errors = [float(energy[r:].sum() / energy.sum()) for r in range(1, len(energy) + 1)]
            fitting = [r for r, e in enumerate(errors, 1) if e <= threshold and r * (out + in_) < out * in_]
            ranks.append((fitting[0],) if fitting else ())
            after += (fitting[0] * (out + in_) if fitting else out * in_) + out
        return after, ranks

    thresholds = sorted({layer.error for layer in plan.layers} | set(np.linspace(0, 1, 3001)))
    least = next(t for t in thresholds if at(t + 1e-9)[0] <= keep * dense)
    assert max(layer.error for layer in plan.layers) <= least + 1e-9
    assert [layer.ranks for layer in plan.layers] == at(max(layer.error for layer in plan.layers) + 1e-9)[1]


@pytest.mark.parametrize(
    ("name", "objectives", "said"),
    [
        ("exact", ("weight",), r"register_strategy\('exact'\): the name is taken"),
        ("own", ("weights",), r"register_strategy\('own'\): unknown objective 'weights'\. Did you mean 'weight'\?"),
        ("own", ("auto",), r"unknown objective 'auto'"),
        ("own", (), r"unknown objective ''"),
    ],
)
def test_strategy_with_a_taken_name_or_an_unknown_objective_is_refused(name, objectives, said):
    before = dict(STRATEGIES)
    with pytest.raises(ConfigurationError, match=said):
        register_strategy(name, objectives=objectives)
    assert before == STRATEGIES


def test_own_strategy_is_given_the_layers_of_its_candidates(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "own", None)  # taken out again after the test
    del STRATEGIES["own"]
    seen = []

    @register_strategy("own", kinds=("svd", "tucker2"))
    def search_own(problem, *, progress):
        seen.append(problem)
        return smallest(problem)

    net = TinyNet().eval()
    statistics = gather_statistics(net, SHAPE)
    plan = search_ranks(net, Budget(params=0.7), method="own", exclude=["conv2"])
    assert (plan.method, len(seen)) == ("own", 1)
    search_ranks(net, Budget(max_error=0.9), method="own", exclude=["conv2"], statistics=statistics)
    assert len(seen) > 1
    for problem in seen:
        assert [unit.name for unit in problem.units] == [table.name for table in problem.layers]
        assert [unit.name for unit in problem.units] == ["conv1", "point", "fc1", "fc2"]
        for unit, table in zip(problem.units, problem.layers, strict=True):
            assert torch.equal(unit.double_weight(), net.get_submodule(unit.name).weight.detach().double())
            assert unit.operator.shape == tuple(unit.double_weight().shape)
            assert set(table.kinds) <= {*unit.kinds, "dense"}

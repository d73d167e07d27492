"""Data-free repair of the factors."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_compress import Budget, Compress, FactorisedLayer, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.distance import output_distance
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import CompressionWarning, ConfigurationError, UnsupportedError
from lightning_compress.surgery.repair import heal_
from tests.support.compressing import compressed_model
from tests.support.interruptions import interrupting
from tests.support.nets import SHAPE, TinyTask, trained_like


def compressed(keep: float = 0.6):
    dense = trained_like()
    model = copy.deepcopy(dense)
    statistics = gather_statistics(model, SHAPE)
    plan = search_ranks(model, Budget(params=keep), statistics=statistics, objective="moments")
    return dense, model, apply_plan_(model, plan, statistics=statistics), statistics


@pytest.mark.slow
def test_healing_brings_the_outputs_nearer_on_inputs_it_did_not_see():
    dense = trained_like()
    model, statistics = copy.deepcopy(dense), gather_statistics(dense, SHAPE)
    plan = search_ranks(model, Budget(params=0.6), objective="weight")  # factors that leave something to repair
    replacements = apply_plan_(model, plan)
    fresh = gather_statistics(dense, SHAPE, seed=9).batches
    before = output_distance(dense, model, fresh)
    healing = heal_(dense, model, replacements, statistics)
    assert healing.after <= healing.regressed < healing.before
    assert healing.after == pytest.approx(output_distance(dense, model, statistics.batches[-1:]), rel=1e-6)
    assert output_distance(dense, model, fresh) < 0.8 * before
    assert healing.skipped is None
    assert set(healing.seconds) == {"regression", "distillation"}


def test_one_layer_is_refitted_to_the_least_squares_optimum():
    dense = trained_like()
    model = copy.deepcopy(dense)
    statistics = gather_statistics(model, SHAPE)
    plan = search_ranks(
        model, Budget(params=0.9), objective="weight", include="fc1", overrides={"fc1": {"max_rank": 4}}
    )
    replacements = apply_plan_(model, plan)
    healing = heal_(dense, model, replacements, statistics, steps=0)
    assert healing.after == healing.regressed < healing.before
    outputs = statistics.metric("fc1").outputs
    root = torch.linalg.cholesky(0.95 * outputs / outputs.diagonal().mean() + 0.05 * torch.eye(len(outputs)).double()).T
    with torch.no_grad():
        rows = []
        handle = dense.fc1.register_forward_pre_hook(lambda _m, args: rows.append(args[0].double()))
        for args, _ in statistics.batches[:-1]:
            dense(*args)
        handle.remove()
    x = torch.cat(rows)
    x = x - x.mean(dim=0)
    weight = dense.fc1.weight.detach().double()
    fitted = model.fc1.dense_weight().detach().double()
    lost = float((root @ (fitted - weight) @ x.T).square().sum())
    best = float(torch.linalg.svdvals(root @ weight @ x.T)[model.fc1.ranks[0] :].square().sum())
    assert lost == pytest.approx(best, rel=0.05)
    assert lost >= best * (1 - 1e-6)


@pytest.mark.slow
def test_healing_that_does_not_help_leaves_the_factors_as_they_were():
    dense, model, replacements, statistics = compressed()
    heal_(dense, model, replacements, statistics)
    twice = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(dense)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in dense.state_dict().items()})
    healing = heal_(other, model, replacements, statistics, steps=0)  # nothing to imitate: outputs of zero
    assert healing.after <= healing.before
    if healing.after == healing.before:
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in twice.items())


@pytest.mark.slow
def test_healing_keeps_structure_modes_and_the_dense_model():
    dense, model, replacements, statistics = compressed()
    weights = copy.deepcopy(dense.state_dict())
    names = list(model.state_dict())
    model.train()
    heal_(dense, model, replacements, statistics)
    assert list(model.state_dict()) == names
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())
    assert all(not m._forward_pre_hooks for m in [*dense.modules(), *model.modules()])


@pytest.mark.slow
def test_compress_heals_in_one_call_and_is_deterministic():
    first, again = trained_like(), trained_like()
    plan = compress_(first, Budget(params=0.3), example_input=SHAPE)
    done = compressed_model(again, Budget(params=0.3), example_input=SHAPE, objective="auto", heal=True)
    assert plan.objective == done.plan.objective == "end_to_end"
    assert done.healing.after < done.healing.before
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_without_an_example_input_a_warning_says_there_is_no_healing(net):
    other = copy.deepcopy(net)
    with pytest.warns(CompressionWarning, match=r"the factors are not healed\. Pass an example_input, or heal=False"):
        done = compressed_model(net, Budget(params=0.5))
    assert (done.healing, done.plan.objective) == (None, "weight")
    compress_(other, Budget(params=0.5), heal=False)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_callback_heals_before_fine_tuning(make_trainer, loader):
    task = TinyTask()
    callback = Compress(Budget(params=0.4), objective="moments")
    make_trainer(callback).fit(task, loader, loader)
    assert callback.plan.objective == "moments"
    assert any(isinstance(m, FactorisedLayer) for m in task.modules())


@pytest.mark.parametrize("heal", [1, "yes", None])
def test_heal_is_true_or_false(heal):
    with pytest.raises(ConfigurationError, match=f"heal={heal!r}: expected true or false"):
        Compress(Budget(params=0.4), heal=heal)


def test_interrupted_compression_leaves_the_dense_model(unchanged):
    model = trained_like()
    before = unchanged(model)
    progress = interrupting("healing: regression", 0.5)
    with pytest.raises(KeyboardInterrupt):
        compressed_model(model, Budget(params=0.5), example_input=SHAPE, heal=True, progress=progress)
    before.check()


@pytest.mark.slow
def test_healing_with_the_weight_objective_starts_from_the_weights():
    healed = trained_like()
    done = compressed_model(healed, Budget(params=0.5), example_input=SHAPE, objective="weight")
    assert (done.plan.objective, done.plan.source) == ("weight", "weight")
    assert done.healing.after < done.healing.before


@pytest.mark.slow
def test_optimizer_that_cannot_take_the_factors_leaves_the_dense_module(make_trainer, loader):
    class Muon(torch.optim.SGD):
        """Only the name matters: an optimizer for matrices."""

    task = TinyTask(lambda module: Muon(module.parameters(), lr=0.1))
    weights = copy.deepcopy(task.state_dict())
    with pytest.raises(UnsupportedError, match="Muon trains matrices only"):
        make_trainer(Compress(Budget(params=0.4), heal=True)).fit(task, loader, loader)
    assert list(task.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in task.state_dict().items())

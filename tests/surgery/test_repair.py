"""Repair of the factors: what it promises, and that nothing else is touched."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.distance import output_distance
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.compress import Compression
from lightning_compress.surgery.repair import _held_out, heal_
from lightning_compress.surgery.state import shared_state
from tests.support.healing import FEW, Case, image_case, image_model, images_like, same, state_of, statistics_on
from tests.support.interruptions import failing_at
from tests.support.nets import SHAPE, Doubled, InMode, trained_like
from tests.support.unchanged import Unchanged


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


@pytest.mark.parametrize("keep", [0.35, 0.6, 0.95])
def test_healing_is_never_worse_on_inputs_held_out_and_its_distances_are_true(keep):
    case = image_case(keep)
    before = case.distance()
    healing = case.heal(steps=FEW)
    assert healing.before == before
    assert healing.after <= healing.regressed <= healing.before
    assert healing.after == pytest.approx(case.distance(), rel=1e-6)
    assert healing.skipped is None
    assert set(healing.seconds) == {"regression", "distillation"}
    assert all(value >= 0 for value in healing.seconds.values())


def test_result_is_the_best_state_that_was_judged():
    case, seen = image_case(0.4), []

    def look(what, done):
        if what == "healing: distillation":
            seen.append(case.distance())

    healing = case.heal(steps=60, progress=look)
    assert len(seen) == 4  # the start and three looks
    assert healing.after == min(healing.regressed, *seen)
    assert case.distance() == healing.after


def test_without_steps_there_is_the_regression_alone():
    case = image_case(0.4)
    healing = case.heal(steps=0)
    assert healing.after == healing.regressed < healing.before
    assert healing.skipped is not None


def test_healing_that_cannot_help_leaves_every_bit():
    case = image_case()
    case.dense = copy.deepcopy(case.model)  # a model to imitate that it is already equal to
    state = state_of(case.model)
    healing = heal_(case.dense, case.model, (), case.statistics, steps=FEW)
    assert (healing.before, healing.after) == (0, 0)
    assert same(case.model, state)


def test_without_layers_there_is_no_distillation():
    case = image_case()
    healing = heal_(case.dense, case.model, (), case.statistics)
    assert healing.skipped == "no layer is factorised"
    assert healing.after <= healing.before


def test_distillation_that_costs_too_much_is_skipped(try_only):
    try_only(work=10**6)
    healing = image_case().heal()
    assert healing.skipped == "20 steps would cost more than 1e+06 MACs"


@pytest.mark.slow
def test_outputs_that_are_near_already_are_left_alone(monkeypatch):
    case = image_case(0.6)
    before = state_of(case.model)
    monkeypatch.setattr("lightning_compress.surgery.repair.NEGLIGIBLE", 1.01 * case.distance())
    healing = case.heal()
    assert same(case.model, before)
    assert healing.before == healing.regressed == healing.after == case.distance()
    assert "the output distance is below" in healing.skipped
    monkeypatch.setattr("lightning_compress.surgery.repair.NEGLIGIBLE", 0.99 * case.distance())
    assert case.heal().after < healing.before


def test_modes_hooks_counters_and_gradients_come_back_and_frozen_parameters_stay():
    case = image_case(0.4)
    model, norm = case.model.train(), case.model.norm.eval()
    norm.momentum = 0.3
    norm.num_batches_tracked.fill_(77)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, 3.0) if index % 3 else None
    norm.weight.requires_grad_(False)
    before, dense, scale = Unchanged(model), Unchanged(case.dense), norm.weight.detach().clone()
    case.heal(steps=FEW)
    dense.check()
    before.check_all_but_values()
    assert all(p.is_leaf for p in model.parameters())
    assert torch.equal(norm.weight, scale)  # a frozen scale of a norm is not trained
    assert int(norm.num_batches_tracked) == 77


@pytest.mark.slow
def test_healing_is_deterministic_under_the_seed_whatever_the_callers_gradient_mode():
    healed = []
    modes = (nullcontext, torch.no_grad, torch.inference_mode, nullcontext)
    for seed, noise, mode in zip((0, 0, 0, 5), (1, 2, 1, 1), modes, strict=True):
        case = image_case(0.4)
        torch.manual_seed(noise)  # the global state is not used
        with mode():
            distance = case.heal(steps=FEW, seed=seed).after
        healed.append((case.model, distance))
    model, distance = healed[0]
    for other, its_own in healed[1:3]:
        assert same(other, state_of(model))
        assert its_own == distance
    assert not same(healed[3][0], state_of(model))


def test_undo_restores_biases_and_scales_that_healing_moved():
    case = image_case(0.4)
    before = state_of(case.dense)
    kept = shared_state(case.model, case.replacements)
    case.heal(steps=FEW)
    plan = search_ranks(copy.deepcopy(case.dense), Budget(params=0.4), method="exact")
    Compression(plan, case.replacements, None, kept, {}).undo_(case.model)
    assert same(case.model, before)


def test_shared_state_is_everything_healing_changes_but_the_factors():
    case = image_case(0.4)
    factors = {id(f) for r in case.replacements for f in r.factorised.factors().values()}
    before = state_of(case.model)
    tensors = {id(t) for t, _ in shared_state(case.model, case.replacements)}
    case.heal(steps=FEW)
    named = {**dict(case.model.named_parameters()), **dict(case.model.named_buffers())}
    changed = {id(t) for name, t in named.items() if not torch.equal(t, before[name])}
    assert changed
    assert changed <= tensors | factors


HEALING_PHASES = ["healing: regression", "healing: distillation", "healing"]


def test_phases_of_healing_are_these():
    case, seen = image_case(), []
    case.heal(steps=FEW, progress=lambda what, _: seen.append(what))
    assert list(dict.fromkeys(seen)) == HEALING_PHASES


@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("phase", HEALING_PHASES)
def test_interruption_by_the_progress_brings_every_bit_back(phase, exception):
    case = image_case()
    model, dense = Unchanged(case.model), Unchanged(case.dense)

    def interrupt(what, done):
        if what == phase and (done > 0 or phase == "healing: distillation"):
            raise exception

    with pytest.raises(exception):
        case.heal(steps=FEW, progress=interrupt)
    model.check()
    dense.check()


@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", [2, 9, 25, 32, 40])
def test_interruption_of_a_forward_pass_brings_every_bit_back(call, exception):
    case = image_case()
    with case.model.conv1.register_forward_pre_hook(failing_at(call, exception)):
        model, dense = Unchanged(case.model), Unchanged(case.dense)
        with pytest.raises(exception):
            case.heal(steps=FEW)
        model.check()
    dense.check()


def test_layer_that_the_inputs_never_reach_is_left_alone():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x) if len(x) else self.idle(x)

    dense = Skips().eval()
    batches = [((torch.randn(32, 8),), {}) for _ in range(3)]
    case = Case(dense, Statistics(tuple(batches), "noise", {}), 0.7)
    case.statistics = statistics_on(dense, batches)
    idle = state_of(case.model.idle)
    healing = case.heal(steps=FEW)
    assert same(case.model.idle, idle)
    assert healing.after <= healing.before


def test_model_that_cannot_be_differentiated_is_regressed_but_not_distilled():
    dense = InMode(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4)), torch.no_grad).eval()
    case = Case(dense, statistics_on(dense, [((torch.randn(64, 8),), {}) for _ in range(4)]), 0.6)
    healing = case.heal(steps=FEW)
    assert healing.skipped is not None
    assert healing.after == healing.regressed <= healing.before


class Pair(nn.Module):
    """Two inputs; the layers get theirs by keyword, norm included."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 24), nn.Linear(4, 24)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, left, right):
        x = self.left(input=left) + self.right(input=right)
        return {"logits": self.head(input=torch.relu(self.norm(input=x))), "mask": left > 0}


def arguments(sizes, *widths):
    return [tuple(torch.randn(n, width) for width in widths) for n in sizes]


def pairs(form):
    dense, inputs = Pair(), arguments([64] * 4, 6, 4)
    for _ in range(20):
        dense(*inputs[0])
    named = [((), dict(zip(("left", "right"), pair, strict=True))) for pair in inputs]
    return dense, named if form == "names" else [(pair, {}) for pair in inputs], 0.6


def with_norm():
    return nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))


MODELS = {
    "inputs by position": lambda: pairs("positions"),
    "inputs by name": lambda: pairs("names"),
    "a layer used twice": lambda: (Doubled(16, 3), [(x, {}) for x in arguments([64] * 4, 16)], 0.6),
    # as the last batch of a loader may be: no batch norm can take statistics over it
    "a batch of one sample": lambda: (with_norm(), [(x, {}) for x in arguments((32, 32, 1, 32), 8)], 0.8),
    "one batch for both": lambda: (image_model(), images_like(1), 0.6),
}


@pytest.mark.parametrize("which", MODELS)
def test_models_of_other_kinds_are_healed(which):
    dense, batches, keep = MODELS[which]()
    dense.eval()
    case = Case(dense, statistics_on(dense, batches), keep)
    case.judging = _held_out(batches)[1]
    names = [name for name, _ in case.model.named_modules(remove_duplicate=False)]
    healing = case.heal(steps=FEW)
    assert healing.after <= healing.before if "one" in which else healing.after < healing.before
    assert healing.after == pytest.approx(case.distance(), rel=1e-6)
    assert all(bool(torch.isfinite(value).all()) for value in case.model.state_dict().values())
    assert [name for name, _ in case.model.named_modules(remove_duplicate=False)] == names


def test_samples_of_a_single_batch_are_held_out_too():
    batch = ((torch.arange(8.0)[:, None],), {"mask": torch.ones(8, 2), "scale": torch.tensor(3.0)})
    fitting, judging = _held_out([batch])
    assert [part[0][0].flatten().tolist() for part in (*fitting, *judging)] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert judging[0][1]["mask"].shape == (2, 2)
    assert judging[0][1]["scale"] == 3.0
    unequal = ((torch.ones(8, 1), torch.ones(4, 1)), {})
    assert _held_out([unequal]) == ([unequal], [unequal])
    assert [len(part) for part in _held_out([batch] * 5)] == [4, 1]

"""Repair of the factors on synthetic inputs: its stages, and that nothing else is touched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.analysis.distance import output_distance
from lightning_compress.analysis.moments import input_moments, output_moments
from lightning_compress.analysis.statistics import Statistics, gather_statistics
from lightning_compress.compress import Compression
from lightning_compress.surgery.distillation import EVERY, LEARNING_RATE, SLOWER, _shuffled, descend, distil
from lightning_compress.surgery.norm_statistics import move_norm_statistics_
from lightning_compress.surgery.regression import in_forward_order, refit_
from lightning_compress.surgery.repair import heal_
from lightning_compress.surgery.state import BestState, restore_, shared_state
from tests.support.compressing import CLOSED_FORM, compressed_model
from tests.support.nets import SHAPE, TinyNet
from tests.support.unchanged import Unchanged

FEW = 40
"""Steps of the distillation where its result does not matter."""


def statistics_on(model: nn.Module, batches: list, source: str = "noise") -> Statistics:
    """Statistics on given arguments, without the synthesis."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    moments = input_moments(model, batches, names, source=source)
    return Statistics(tuple(batches), source, moments)


def images_like(count: int, seed: int = 4) -> list:
    """Images that differ in colour and contrast, so that the outputs of an untrained net differ too."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        colour, contrast = (4 * torch.randn(32, 3, 1, 1, generator=generator) for _ in range(2))
        batches.append(((2 + colour + contrast * torch.randn(32, 3, 8, 8, generator=generator),), {}))
    return batches


def image_model() -> TinyNet:
    torch.manual_seed(3)
    net = TinyNet()
    for args, _ in images_like(30, seed=8):
        net(*args)
    return net.eval()


class Case:
    """A dense model, its compressed copy, what was replaced, and the statistics."""

    def __init__(self, dense: nn.Module, statistics: Statistics, keep: float = 0.6, kinds=CLOSED_FORM) -> None:
        self.dense, self.statistics = dense, statistics
        self.model = copy.deepcopy(dense)
        plan = search_ranks(
            self.model, Budget(params=keep), statistics=statistics, objective="moments", method="exact", kinds=kinds
        )
        self.replacements = apply_plan_(self.model, plan, statistics=statistics)
        assert self.replacements
        self.fitting, self.judging = statistics.batches[:-1], statistics.batches[-1:]

    def heal(self, **settings):
        return heal_(self.dense, self.model, self.replacements, self.statistics, **settings)

    def distance(self, batches=None) -> float:
        return output_distance(self.dense, self.model, batches or self.judging)


def image_case(keep: float = 0.6, kinds=CLOSED_FORM) -> Case:
    dense = image_model()
    return Case(dense, statistics_on(dense, images_like(4)), keep, kinds)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], value) for name, value in state.items())


# --- the stages -------------------------------------------------------------------------------------


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=0)


def test_regression_is_the_best_of_its_rank_on_the_inputs_of_the_layer():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 9)).double()
    batches = [((torch.randn(400, 8, dtype=torch.float64),), {}) for _ in range(2)]
    case = Case(dense, statistics_on(dense, batches), 0.7)
    for replacement in case.replacements:
        refit_(case.dense, case.model, replacement, batches, metric=None, calls=1)
    inputs = torch.cat([args[0] for args, _ in batches])
    with torch.no_grad():
        for name in ("0", "2"):
            new, old = case.model.get_submodule(name), case.dense.get_submodule(name)
            if not isinstance(new, FactorisedLayer):
                continue
            x = inputs if name == "0" else case.dense[:2](inputs)
            x_new = inputs if name == "0" else case.model[:2](inputs)
            target, output = old(x), new(x_new)
            torch.testing.assert_close(output.mean(dim=0), target.mean(dim=0), rtol=1e-4, atol=1e-5)
            # the best rank-r map of X̂ to the targets: least squares, then a truncated SVD of what it predicts
            features = centred(x_new)
            fitted = features @ torch.linalg.lstsq(features, centred(target)).solution
            u, s, vh = torch.linalg.svd(fitted, full_matrices=False)
            rank = new.ranks[0]
            best = float(((u[:, :rank] * s[:rank]) @ vh[:rank] - centred(target)).square().sum())
            lost = float((centred(output) - centred(target)).square().sum())
            assert best * (1 - 1e-9) <= lost <= best * 1.01 + 1e-9
            assert float(vh[rank:].square().sum()) > 0


def test_regression_of_a_convolution_fits_its_outputs_on_what_enters_it_now():
    case = image_case(0.5, ["svd", "channel_svd"])
    (replacement,) = [r for r in case.replacements if r.aliases[0] == "conv2"]
    new = case.model.conv2

    def lost() -> float:
        total = 0.0
        with torch.no_grad():
            for args, _ in case.fitting:
                x, x_new = (F.relu(m.norm(m.conv1(args[0]))) for m in (case.dense, case.model))
                total += float((case.dense.conv2(x) - new(x_new)).square().sum())
        return total

    before = lost()
    refit_(case.dense, case.model, replacement, case.fitting, metric=None, calls=1)
    assert lost() < before
    assert new.ranks == replacement.factorised.ranks


def test_regression_goes_in_forward_order_whatever_the_order_of_registration():
    class Net(nn.Module):
        def __init__(self, names) -> None:
            super().__init__()
            torch.manual_seed(1)
            layers = {"a": nn.Linear(8, 24), "b": nn.Linear(24, 24), "c": nn.Linear(24, 6)}
            for name in names:
                self.add_module(name, layers[name])

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    batches = [((torch.randn(64, 8),), {}) for _ in range(4)]
    healed = []
    for names in ("abc", "cba"):
        dense = Net(names).eval()
        case = Case(dense, statistics_on(dense, batches), 0.4)
        healed.append(case.heal(steps=0))
    assert healed[0].before == pytest.approx(healed[1].before, rel=1e-5)
    assert healed[0].regressed == pytest.approx(healed[1].regressed, rel=1e-3)


def test_norm_statistics_move_by_what_the_factors_changed():
    case = image_case()
    momentum, count = case.model.norm.momentum, int(case.model.norm.num_batches_tracked)
    before = case.dense.norm
    with torch.no_grad():
        for parameter in case.model.conv1.parameters():
            parameter.mul_(1.3)
    case.model.train()
    move_norm_statistics_(case.dense, case.model, case.fitting)
    with torch.no_grad():
        inputs = [(case.model.conv1(args[0]), case.dense.conv1(args[0])) for args, _ in case.fitting]
    shifts = torch.stack([(x - y).mean(dim=(0, 2, 3)) for x, y in inputs]).mean(dim=0)
    spreads = [[v.var(dim=(0, 2, 3), unbiased=False) + before.eps for v in pair] for pair in inputs]
    factors = torch.stack([x / y for x, y in spreads]).mean(dim=0)
    assert float(shifts.abs().max()) > 1e-3
    torch.testing.assert_close(case.model.norm.running_mean, before.running_mean + shifts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.model.norm.running_var, before.running_var * factors, rtol=1e-4, atol=1e-5)
    assert (case.model.norm.momentum, int(case.model.norm.num_batches_tracked)) == (momentum, count)
    assert all(m.training for m in case.model.modules())


def test_norm_that_is_called_twice_is_moved_by_the_mean_of_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.second(self.norm(self.first(x))))

    torch.manual_seed(0)
    dense = Twice().eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.first.bias.add_(0.5)
        model.second.bias.add_(2.0)
    x = torch.randn(64, 6)
    move_norm_statistics_(dense, model, [((x,), {})])  # the first call's shift cancels before the second
    torch.testing.assert_close(model.norm.running_mean, dense.norm.running_mean + 1.25, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.norm.running_var, dense.norm.running_var, rtol=1e-4, atol=1e-4)


def test_norm_statistics_come_back_after_an_interruption():
    case = image_case()
    momentum, count = case.model.norm.momentum, int(case.model.norm.num_batches_tracked)

    def interrupt(_module, _args):
        raise KeyboardInterrupt

    with case.model.fc2.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        move_norm_statistics_(case.dense, case.model, case.fitting)
    assert (case.model.norm.momentum, int(case.model.norm.num_batches_tracked)) == (momentum, count)
    assert not any(m.training for m in case.model.modules())


def test_distillation_descends_the_distance_of_the_outputs():
    case = image_case(0.4)
    before = case.distance(case.fitting)
    looks = list(distil(case.dense, case.model, case.replacements, case.fitting, 50, 0, LEARNING_RATE))
    assert looks == [20, 40, 50]
    assert case.distance(case.fitting) < before


@pytest.mark.parametrize(("distances", "expected"), [([0.9], 1), ([1.5, 0.9], 2), ([math.inf, math.nan, 0.9], 3)])
def test_distillation_starts_anew_at_a_smaller_rate_where_the_first_look_proves_it_too_high(distances, expected):
    model, rates, looks = nn.Linear(2, 2), [], iter(distances)
    states, start = BestState(model, lambda: 1.0), model.weight.detach().clone()

    def attempt(rate):
        assert torch.equal(model.weight, start)  # what the attempt before did is undone
        rates.append(rate)
        with torch.no_grad():
            model.weight.add_(1)
        yield EVERY

    descend(attempt, states, lambda _: next(looks))
    assert rates == [LEARNING_RATE / SLOWER**i for i in range(expected)]


@pytest.mark.slow
def test_distillation_takes_all_its_steps_though_it_does_not_help_at_first(monkeypatch):
    case, looks = image_case(0.4), []
    distances = iter([1.0, 0.95, 0.9, 0.9, *[1.05] * 7, 0.5])
    monkeypatch.setattr("lightning_compress.surgery.repair.output_distance", lambda *_: next(distances))
    healing = case.heal(steps=160, progress=lambda what, done: looks.append(done) if "distil" in what else None)
    assert looks[-1] == 1
    assert healing.after == 0.5


def test_batches_are_mixed_without_repeating_a_sample():
    batches = [((torch.arange(8.0)[:, None] + 100 * i, {"n": 3}), {}) for i in range(3)]
    (values, other), kwargs = _shuffled(batches, torch.Generator().manual_seed(0))
    assert (other, kwargs) == ({"n": 3}, {})
    assert sorted((values.flatten() % 100).tolist()) == list(range(8))
    assert len(set((values.flatten() // 100).tolist())) > 1


def test_batches_of_different_sizes_are_mixed_up_to_the_smallest():
    batches = [((torch.zeros(n, 2),), {}) for n in (5, 3)]
    (values,), _ = _shuffled(batches, torch.Generator().manual_seed(0))
    assert values.shape == (3, 2)


# --- what it promises -------------------------------------------------------------------------------


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


def test_healing_that_cannot_help_leaves_every_bit():
    case = image_case()
    case.dense = copy.deepcopy(case.model)  # a model to imitate that it is already equal to
    state = state_of(case.model)
    healing = heal_(case.dense, case.model, (), case.statistics, steps=FEW)
    assert (healing.before, healing.after) == (0, 0)
    assert same(case.model, state)


def test_without_steps_there_is_the_regression_alone():
    case = image_case(0.4)
    healing = case.heal(steps=0)
    assert healing.after == healing.regressed < healing.before
    assert healing.skipped is not None


def test_without_layers_there_is_no_distillation():
    case = image_case()
    healing = heal_(case.dense, case.model, (), case.statistics)
    assert healing.skipped == "no layer is factorised"
    assert healing.after <= healing.before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_regressed_but_not_distilled(dtype):
    dense = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).to(dtype).eval()
    batches = [((torch.randn(64, 8).to(dtype),), {}) for _ in range(4)]
    case = Case(dense, statistics_on(dense, batches), 0.5)
    healing = case.heal()
    assert healing.skipped == "the parameters are in half precision"
    assert healing.after == healing.regressed <= healing.before
    assert all(p.dtype == dtype for p in case.model.parameters())


def test_distillation_that_costs_too_much_is_skipped(try_only):
    try_only(work=10**6)
    healing = image_case().heal()
    assert healing.skipped == "20 steps would cost more than 1e+06 MACs"


def test_frozen_parameters_stay_frozen_and_gradients_are_untouched():
    case = image_case(0.4)
    for index, parameter in enumerate(case.model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, 3.0) if index % 3 else None
    case.model.norm.weight.requires_grad_(False)
    before = [(p, p.requires_grad, p.grad) for p in case.model.parameters()]
    scale = case.model.norm.weight.detach().clone()
    dense = Unchanged(case.dense)
    case.heal(steps=FEW)
    dense.check()
    assert all(p.grad is None for p in case.dense.parameters())
    assert [id(p) for p in case.model.parameters()] == [id(p) for p, _, _ in before]
    for parameter, required, grad in before:
        assert parameter.requires_grad is required
        assert parameter.grad is grad
        assert grad is None or bool((grad == 3).all())
        assert parameter.is_leaf
    assert torch.equal(case.model.norm.weight, scale)  # a frozen scale of a norm is not trained


def test_momentum_counters_modes_and_hooks_come_back():
    case = image_case()
    case.model.train()
    case.model.norm.eval()
    case.model.norm.momentum = 0.3
    case.model.norm.num_batches_tracked.fill_(77)
    modes = [m.training for m in case.model.modules()]
    hooks = Unchanged(case.model).hooks
    rng = torch.get_rng_state()
    case.heal(steps=FEW)
    assert [m.training for m in case.model.modules()] == modes
    assert Unchanged(case.model).hooks == hooks
    assert (case.model.norm.momentum, int(case.model.norm.num_batches_tracked)) == (0.3, 77)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.slow
def test_healing_is_deterministic_under_the_seed():
    states, healings = [], []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        case = image_case(0.4)
        torch.manual_seed(noise)  # the global state is not used
        healings.append(case.heal(steps=FEW, seed=seed))
        states.append(case)
    assert same(states[0].model, state_of(states[1].model))
    assert healings[0].after == healings[1].after
    assert not same(states[0].model, state_of(states[2].model))


@pytest.mark.slow
def test_healing_does_not_depend_on_the_callers_gradient_mode():
    cases = [image_case(0.4) for _ in range(3)]
    cases[0].heal(steps=FEW)
    with torch.no_grad():
        cases[1].heal(steps=FEW)
    with torch.inference_mode():
        cases[2].heal(steps=FEW)
    assert same(cases[0].model, state_of(cases[1].model))
    assert same(cases[0].model, state_of(cases[2].model))


# --- interruptions ----------------------------------------------------------------------------------


def phases(run) -> list[str]:
    seen: list[str] = []
    run(lambda what, done: seen.append(what))
    return list(dict.fromkeys(seen))


HEALING_PHASES = ["healing: regression", "healing: distillation", "healing"]


def test_phases_of_healing_are_these():
    case = image_case()
    assert phases(lambda report: case.heal(steps=FEW, progress=report)) == HEALING_PHASES


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
    case, calls = image_case(), []

    def interrupt(_module, _args):
        calls.append(0)
        if len(calls) == call:
            raise exception

    with case.model.conv1.register_forward_pre_hook(interrupt):
        model, dense = Unchanged(case.model), Unchanged(case.dense)
        required = [p.requires_grad for p in case.model.parameters()]
        with pytest.raises(exception):
            case.heal(steps=FEW)
        model.check()
    dense.check()
    assert [p.requires_grad for p in case.model.parameters()] == required
    assert all(p.grad is None for p in case.model.parameters())
    assert (case.model.norm.momentum, len(calls)) == (0.1, call)


# --- undo -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_undo_of_a_healed_compression_restores_every_bit(training):
    model = image_model().train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = Unchanged(model)
    done = compressed_model(model, Budget(params=0.5), example_input=SHAPE)
    assert done.healing.after < done.healing.before
    assert any(not torch.equal(tensor, value) for tensor, value in done.kept)
    done.undo_(model)
    before.check()
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


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


def test_shared_state_goes_back_by_value_in_place():
    case = image_case()
    kept = shared_state(case.model, case.replacements)
    before = [(t, t.detach().clone()) for t, _ in kept]
    with torch.no_grad():
        for tensor, _ in kept:
            tensor.add_(1)
    restore_(kept)
    assert all(torch.equal(tensor, value) for tensor, value in before)


# --- models of other kinds --------------------------------------------------------------------------


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


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_inputs_by_position_and_by_name(form):
    torch.manual_seed(0)
    dense = Pair()
    pairs = [(torch.randn(64, 6), torch.randn(64, 4)) for _ in range(4)]
    for _ in range(20):
        dense(*pairs[0])
    dense.eval()
    batches = [
        (pair, {}) if form == "tuple" else ((), dict(zip(("left", "right"), pair, strict=True))) for pair in pairs
    ]
    case = Case(dense, statistics_on(dense, batches), 0.6)
    healing = case.heal(steps=FEW)
    assert healing.after < healing.before
    assert healing.after == pytest.approx(case.distance(), rel=1e-6)


class Shared(nn.Module):
    """One layer used twice in a row, and under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.again = self.body
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.body(x)))))


def test_layer_that_is_used_twice():
    torch.manual_seed(0)
    dense = Shared().eval()
    batches = [((torch.randn(64, 16),), {}) for _ in range(4)]
    statistics = statistics_on(dense, batches)
    case = Case(dense, statistics, 0.6)
    assert case.model.body is case.model.again
    healing = heal_(case.dense, case.model, case.replacements, statistics, steps=FEW)
    assert healing.after < healing.before
    assert case.model.body is case.model.again
    assert healing.after == pytest.approx(output_distance(dense, case.model, batches[-1:]), rel=1e-6)


def test_layer_that_the_inputs_never_reach_is_left_alone():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x) if len(x) else self.idle(x)

    torch.manual_seed(0)
    dense = Skips().eval()
    batches = [((torch.randn(32, 8),), {}) for _ in range(3)]
    case = Case(dense, Statistics(tuple(batches), "noise", {}), 0.7)
    case.statistics = statistics_on(dense, batches)
    idle = state_of(case.model.idle)
    case.judging = batches[-1:]
    healing = case.heal(steps=FEW)
    assert same(case.model.idle, idle)
    assert healing.after <= healing.before


def test_model_that_cannot_be_differentiated_is_regressed_but_not_distilled():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))

        def forward(self, x):
            with torch.no_grad():
                return self.net(x)

    torch.manual_seed(0)
    dense = Frozen().eval()
    case = Case(dense, statistics_on(dense, [((torch.randn(64, 8),), {}) for _ in range(4)]), 0.6)
    healing = case.heal(steps=FEW)
    assert healing.skipped is not None
    assert healing.after == healing.regressed <= healing.before


def test_batch_of_one_sample():
    """As the last batch of a loader may be: no batch norm can take statistics over it."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)).eval()
    sizes = (32, 32, 1, 32)
    case = Case(dense, statistics_on(dense, [((torch.randn(n, 8),), {}) for n in sizes]), 0.8)
    healing = case.heal(steps=FEW)
    assert healing.after <= healing.before
    assert all(bool(torch.isfinite(m.running_var).all()) for m in case.model.modules() if isinstance(m, _BatchNorm))


def test_one_batch_is_both_fitted_and_judged():
    dense = image_model()
    statistics = statistics_on(dense, images_like(1))
    case = Case(dense, statistics)
    case.fitting = statistics.batches
    healing = case.heal(steps=FEW)
    assert healing.after <= healing.before


def test_outputs_in_the_metric_of_the_outputs():
    """The regression is in G: what of the error reaches the outputs counts."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 2, bias=False)).double().eval()
    batches = [((torch.randn(200, 8, dtype=torch.float64),), {}) for _ in range(2)]
    moments = input_moments(dense, batches, ["0"])
    outputs = output_moments(dense, batches, ["0"])["0"]
    lost = []
    for metric in (None, outputs):
        case = Case(dense, Statistics(tuple(batches), "noise", {}), 0.55)
        first = [r for r in case.replacements if r.aliases[0] == "0"]
        assert first
        from lightning_compress.kinds.metric import Metric

        whole = Metric(moments["0"].second, metric) if metric is not None else None
        refit_(case.dense, case.model, first[0], batches, metric=whole, calls=1)
        with torch.no_grad():
            errors = [dense[1](dense[0](args[0]) - case.model[0](args[0])) for args, _ in batches]
        lost.append(sum(float(e.square().sum()) for e in errors))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.slow
def test_statistics_of_the_default_synthesis_heal():
    dense = image_model()
    statistics = gather_statistics(dense, SHAPE)
    case = Case(dense, statistics, 0.5)
    fresh = images_like(2, seed=11)
    before = case.distance(fresh)
    healing = case.heal(steps=FEW)
    assert healing.after < healing.before
    assert case.distance(fresh) < before


class Repeating(nn.Module):
    """Applies one layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.head(x)


def test_layer_that_is_called_several_times_is_fitted_to_all_its_calls():
    torch.manual_seed(0)
    dense = Repeating().double()
    batches = [((torch.randn(200, 12, dtype=torch.float64),), {}) for _ in range(3)]
    case = Case(dense, statistics_on(dense, batches), 0.9)
    (replacement,) = [r for r in case.replacements if r.aliases[0] == "again"]
    ((first, calls),) = in_forward_order(case.model, [replacement], batches[0])
    assert (first, calls) == (replacement, 3)
    entered: dict[int, list[torch.Tensor]] = {}
    for model in (case.dense, case.model):
        seen = entered.setdefault(id(model), [])
        handle = model.again.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            for args, _ in batches:
                model(*args)
        handle.remove()
    x, x_new = (torch.cat(entered[id(model)]) for model in (case.dense, case.model))
    refit_(case.dense, case.model, replacement, batches, metric=None, calls=3)
    with torch.no_grad():
        target, output = case.dense.again(x), case.model.again(x_new)
    torch.testing.assert_close(output.mean(dim=0), target.mean(dim=0), rtol=1e-4, atol=1e-5)
    fitted = centred(x_new) @ torch.linalg.lstsq(centred(x_new), centred(target)).solution
    s = torch.linalg.svdvals(fitted)
    best = float((fitted - centred(target)).square().sum() + s[replacement.factorised.ranks[0] :].square().sum())
    assert float((centred(output) - centred(target)).square().sum()) <= best * 1.01


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

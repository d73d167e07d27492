"""Factors refitted to the outputs of the dense layers, against least squares."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.surgery.regression import in_forward_order, refit_
from lightning_compress.surgery.repair import heal_
from tests.support.healing import Case, centred, image_case, same, state_of, statistics_on
from tests.support.nets import SHAPE, trained_like


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


def best_of_rank(x: torch.Tensor, target: torch.Tensor, rank: int) -> float:
    """Of all maps of that rank of the centred inputs: least squares, then a truncated SVD of what it predicts."""
    x, target = centred(x), centred(target)
    fitted = x @ torch.linalg.lstsq(x, target).solution
    tail = torch.linalg.svdvals(fitted)[rank:].square().sum()
    return float((fitted - target).square().sum() + tail)


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
            best = best_of_rank(x_new, target, new.ranks[0])
            lost = float((centred(output) - centred(target)).square().sum())
            assert best * (1 - 1e-9) <= lost <= best * 1.01 + 1e-9
            assert new.ranks[0] < min(x_new.shape[1], target.shape[1])


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


def test_layer_whose_inputs_never_vary_is_left_alone():
    dense = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 9)).double()
    varied, constant = (torch.randn(n, 8, dtype=torch.float64).expand(64, 8) for n in (64, 1))
    case = Case(dense, statistics_on(dense, [((varied,), {})] * 2), 0.6)
    before = state_of(case.model)
    refit_(case.dense, case.model, case.replacements[0], [((constant,), {})], metric=None, calls=1)
    assert same(case.model, before)
    refit_(case.dense, case.model, case.replacements[0], [((varied,), {})], metric=None, calls=1)
    assert not same(case.model, before)


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
    best = best_of_rank(x_new, target, replacement.factorised.ranks[0])
    assert float((centred(output) - centred(target)).square().sum()) <= best * 1.01

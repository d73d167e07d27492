from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from lightning_compress import Budget, Compress, FactorisedLayer, Phase, Plateau, Schedule, merge_
from lightning_compress.core.errors import BudgetError, ConfigurationError, InfeasibleBudgetError
from lightning_compress.core.fine_tuning import Distill
from lightning_compress.training.optimizers import exchange_parameters_
from lightning_compress.training.rounds import compress_again_, reconcile_
from lightning_compress.training.schedule import PhaseTracker
from tests.support.compressing import CLOSED_FORM, WEIGHTS_ALONE, compress, compressed_model
from tests.support.nets import TinyNet, TinyTask, TwoManual
from tests.support.resuming import (
    IN_STEPS,
    factorised,
    groups,
    lbfgs,
    momentum,
    named,
    one_cycle,
    require_identical_resume,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

THREE = {
    "phases": [
        {"budget": {"params": 0.8}, "epochs": 1},
        {"budget": {"params": 0.6}, "epochs": 1},
        {"budget": {"params": 0.4}},
    ]
}


def smaller(net, params=0.5, example_input=None):
    settings = {"method": "exact", "kinds": CLOSED_FORM, **WEIGHTS_ALONE}
    return compressed_model(net, Budget(params=params), example_input=example_input, **settings)


def held(optimizers) -> list[int]:
    return [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]


# --- where a fit stands in its schedule -------------------------------------------------------------------


def test_course_goes_through_epochs_steps_and_plateaus():
    schedule = Schedule(
        phases=[{"epochs": 2}, {"steps": 5}, {"until_plateau": {"monitor": "loss", "patience": 2, "min_delta": 0.1}}]
    )
    tracker = PhaseTracker(schedule)
    tracker.begin(3, 100)  # a fit that goes on from a dense run
    assert [tracker.over(e, 0, boundary=True) for e in (3, 4, 5)] == [False, False, True]
    assert not tracker.over(5, 0, boundary=False)
    assert tracker.advance(5, 120).steps == 5
    assert [tracker.over(5, step, boundary=False) for step in (120, 124, 125)] == [False, False, True]
    assert tracker.advance(6, 125).until_plateau == Plateau("loss", patience=2, min_delta=0.1)
    waits = []
    for value in (1.0, 0.95, float("nan"), 0.5, 0.45, 0.41):  # only 0.5 is better by more than 0.1
        tracker.observe({"loss": torch.tensor(value), "other": 0.0})
        waits.append(tracker.over(7, 130, boundary=True))
    assert waits == [False, False, True, False, False, True]
    assert tracker.advance(8, 140) == Phase()
    assert not tracker.over(10**6, 10**6, boundary=True)


def test_course_goes_on_from_its_state():
    schedule = Schedule(warmup_steps=4, phases=[{"epochs": 1, "lr_scale": 0.5}, {"until_plateau": "loss"}])
    tracker, other = PhaseTracker(schedule), PhaseTracker(schedule)
    tracker.begin(0, 0)
    tracker.advance(1, 2)
    tracker.observe({"loss": 1.0})
    tracker.observe({"loss": 2.0})
    other.load(tracker.state())
    assert other.state() == tracker.state()
    assert all(type(value) in (int, float) for value in tracker.state().values())
    assert [other.scale(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_plateau_of_a_metric_that_rises():
    plateau = Plateau("acc", mode="max", min_delta=0.1)
    assert plateau.improves(0.5, None)
    assert plateau.improves(0.61, 0.5)
    assert not plateau.improves(0.59, 0.5)
    assert not plateau.improves(float("nan"), None)


# --- one round on a model and its optimizers -------------------------------------------------------------------


def test_a_round_starts_from_the_trained_weights_and_gives_the_model_of_the_merged_one():
    net = TinyNet()
    smaller(net, 0.8)
    with torch.no_grad():  # training
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    expected = copy.deepcopy(net)
    merge_(expected)
    smaller(expected)
    again = compress_again_(net, smaller)
    assert factorised(net) == factorised(expected)
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in net.state_dict().items())
    assert again.done.plan.dense.params == sum(p.numel() for p in TinyNet().parameters())
    assert sum(p.numel() for p in net.parameters()) <= 0.5 * again.done.plan.dense.params


def test_a_round_keeps_the_optimizer_state_of_all_that_stays():
    net = TinyNet()
    smaller(net, 0.8)
    weights = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim == 1]
    optimizer = AdamW([{"params": weights, "lr": 0.1}, {"params": rest, "lr": 0.2}])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    bias, alias = net.fc1.bias, optimizer.param_groups[0]["params"]
    moment = optimizer.state[bias]["exp_avg"].clone()
    exchange_parameters_([optimizer], compress_again_(net, smaller).exchanges)
    assert net.fc1.bias is bias
    assert torch.equal(optimizer.state[bias]["exp_avg"], moment)
    assert optimizer.param_groups[0]["params"] is alias
    assert [id(p) for p in alias] == [id(p) for p in net.parameters() if p.ndim > 1]  # same order, layer by layer
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in rest]
    assert {id(p) for p in optimizer.state} <= set(held([optimizer]))


def test_names_in_an_optimizer_follow_a_round():
    net = TinyNet()
    smaller(net, 0.8)
    optimizer = SGD(net.named_parameters(), lr=0.1)
    exchange_parameters_([optimizer], compress_again_(net, lambda n: smaller(n, 0.35)).exchanges)
    own = {id(p): name for name, p in net.named_parameters()}
    assert optimizer.param_groups[0]["param_names"] == [own[key] for key in held([optimizer])]
    assert sorted(held([optimizer])) == sorted(own)


def test_a_layer_that_a_round_leaves_dense_gets_its_weight_into_the_optimizer():
    net = TinyNet()
    smaller(net, 0.5)
    optimizer = SGD(net.named_parameters(), lr=0.1)
    was = factorised(net)
    compressed = compress_again_(
        net,
        lambda n: compressed_model(n, {"params": 0.95}, method="exact", objective="weight", heal=False, include="fc1"),
    )
    exchange_parameters_([optimizer], compressed.exchanges)
    assert len(was) > len(factorised(net))
    own = {id(p): name for name, p in net.named_parameters()}
    assert sorted(held([optimizer])) == sorted(own)
    assert optimizer.param_groups[0]["param_names"] == [own[key] for key in held([optimizer])]


def test_a_round_that_fails_leaves_everything_as_it_was(unchanged):
    net = TinyNet()
    smaller(net, 0.8)
    before = unchanged(net)
    with pytest.raises(InfeasibleBudgetError):
        compress_again_(net, lambda n: smaller(n, 0.01))
    before.check()
    compress_again_(net, smaller).undo_(net)
    before.check()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        return self.head(self.rnn(x)[0])


def test_rounds_of_attention_and_recurrent_layers_unfuse_and_fuse_them():
    net = Attention()
    smaller(net, 0.9)
    optimizer = SGD(net.parameters(), lr=0.1)
    start = [sorted(factorised(net))]
    for params in (0.7, 0.5):
        exchange_parameters_([optimizer], compress_again_(net, lambda n, p=params: smaller(n, p)).exchanges)
        assert sorted(held([optimizer])) == sorted(id(p) for p in net.parameters())
        start.append(sorted(factorised(net)))
    assert any("attention" in name or "rnn" in name for name in start[-1])
    net(torch.randn(2, 3, 16)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(("first", "second"), [(0.8, 0.4), (0.4, 0.8)])
def test_structure_of_any_round_is_rebuilt_from_any_other(first, second):
    net, other = TinyNet(), TinyNet()
    smaller(net, first)
    plan = smaller(other, second).plan
    optimizer = SGD(net.parameters(), lr=0.1)
    _, exchanges = reconcile_(net, plan)
    exchange_parameters_([optimizer], exchanges)
    net.load_state_dict(other.state_dict())
    assert factorised(net) == factorised(other)
    assert sorted(held([optimizer])) == sorted(id(p) for p in net.parameters())
    kept = list(net.modules())
    assert reconcile_(net, plan) == ((), ())
    assert [a is b for a, b in zip(net.modules(), kept, strict=True)]


# --- rounds in a fit ----------------------------------------------------------------------------------------


class Sizes(Callback):
    # Parameters, structure and rates in every batch.
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.sizes.append(sum(p.numel() for p in pl_module.parameters()))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        assert set(held(trainer.optimizers)) == {id(p) for p in pl_module.parameters()}


def test_budgets_are_reached_in_steps_and_schedulers_go_on(make_trainer, loader):
    task, sizes = TinyTask(one_cycle), Sizes()
    plain = Sizes()
    dense = sum(p.numel() for p in task.parameters())
    make_trainer(compress(0.99), plain, max_epochs=4).fit(copy.deepcopy(task), loader)
    callback = compress(schedule=THREE)
    make_trainer(callback, sizes, max_epochs=4).fit(task, loader)
    for batches, limit in ((slice(0, 4), 0.8), (slice(4, 8), 0.6), (slice(8, 16), 0.4)):
        assert len({*sizes.sizes[batches]}) == 1
        assert 0.7 * limit < sizes.sizes[batches][0] / dense <= limit
    assert sizes.rates == plain.rates
    assert callback.plan.budget == Budget(params=0.4)
    assert callback.plan.dense.params == dense


@pytest.mark.slow
def test_rounds_in_steps_begin_in_mid_epoch_with_two_optimizers_too(make_trainer, loader):
    task, sizes = TinyTask(groups), Sizes()
    make_trainer(compress(0.5, schedule=IN_STEPS), sizes, max_epochs=2).fit(task, loader)
    assert sizes.sizes[2] > sizes.sizes[3]
    assert len(set(sizes.sizes)) == 2
    task, sizes = TwoManual(), Sizes()
    make_trainer(compress(0.5, schedule=IN_STEPS), sizes, max_epochs=1).fit(task, loader)
    assert sizes.sizes[1] > sizes.sizes[2]  # two steps a batch


def test_a_round_waits_for_accumulated_gradients(make_trainer, loader):
    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            missing = [n for n, p in pl_module.named_parameters() if p.grad is None]
            assert not missing, missing

    schedule = {"phases": [{"budget": {"params": 0.8}, "steps": 1}, {"budget": {"params": 0.5}}]}
    sizes = Sizes()
    trainer = make_trainer(compress(0.5, schedule=schedule), Steps(), sizes, accumulate_grad_batches=2)
    trainer.fit(TinyTask(), loader)
    assert sizes.sizes[1] > sizes.sizes[2]


def test_round_when_the_metric_stops_falling(make_trainer, loader):
    class Logged(TinyTask):
        def training_step(self, batch, batch_idx):
            self.log("height", [3.0, 2.0, 2.0, 2.0, 2.0, 2.0][self.current_epoch], on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    schedule = {
        "phases": [
            {"budget": {"params": 0.8}, "until_plateau": {"monitor": "height", "patience": 2}},
            {"budget": {"params": 0.5}},
        ]
    }
    sizes = Sizes()
    make_trainer(compress(0.5, schedule=schedule), sizes, max_epochs=6).fit(Logged(), loader)
    assert [size < sizes.sizes[0] for size in sizes.sizes] == 16 * [False] + 8 * [True]  # epochs 2 and 3 were in vain


def test_metric_that_is_never_logged_is_an_error(make_trainer, loader):
    schedule = {"phases": [{"until_plateau": "trian_loss"}, {}]}
    with pytest.raises(ConfigurationError, match=r"waits for 'trian_loss', which was not logged.*'train_loss'"):
        make_trainer(compress(schedule=schedule)).fit(TinyTask(), loader)


ACROSS = {
    "epochs": (THREE, 0),
    "epochs, last": (THREE, 1),
    "steps": (IN_STEPS, 0),
}
ACROSS_CASES = [
    pytest.param(*case, id=name, marks=() if name == "steps" else pytest.mark.slow) for name, case in ACROSS.items()
]


@pytest.mark.parametrize(("schedule", "after"), ACROSS_CASES)
@pytest.mark.parametrize(
    "configure", [groups, pytest.param(named, marks=pytest.mark.slow), pytest.param(lbfgs, marks=pytest.mark.slow)]
)
def test_resume_across_a_round_is_identical(make_trainer, loader, tmp_path, schedule, after, configure):
    params = 0.4 if schedule is THREE else 0.5
    require_identical_resume(
        make_trainer, loader, tmp_path, TinyTask(configure), {"params": params, "schedule": schedule}, after
    )


@pytest.mark.slow
def test_resume_across_a_round_with_healing_and_distillation_is_identical(make_trainer, loader, tmp_path):
    settings = {"params": 0.5, "schedule": IN_STEPS, "distill": "layers", "heal": True, "objective": "auto"}
    require_identical_resume(make_trainer, loader, tmp_path, TinyTask(momentum), settings, 0)


# --- what a phase trains, and how fast -------------------------------------------------------------------------


class Moved(Callback):
    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        own = dict(pl_module.named_parameters())
        self.moved.append({name for name, p in self.before.items() if not torch.equal(p, own[name])})


def test_phases_say_what_is_trained(make_trainer, loader):
    schedule = {"phases": [{"steps": 2, "train": ["net.fc*"]}, {"steps": 1, "train": "factors"}]}
    task, moved = TinyTask(momentum), Moved()
    make_trainer(compress(schedule=schedule), moved).fit(task, loader)
    factors = {id(f) for m in task.modules() if isinstance(m, FactorisedLayer) for f in m.factors().values()}
    names = {name: id(p) for name, p in task.named_parameters()}
    head = {name for name in names if name.startswith("net.fc")}
    assert moved.moved == [head, head, {n for n, key in names.items() if key in factors}, set(names)]


def test_globs_that_match_nothing_are_an_error(make_trainer, loader):
    schedule = {"phases": [{"steps": 2, "train": ["head.*"]}]}
    with pytest.raises(ConfigurationError, match=r"train=\['head\.\*'\] of a phase matches no parameter of TinyTask"):
        make_trainer(compress(schedule=schedule)).fit(TinyTask(), loader)


def test_phases_scale_the_rate_of_a_step_and_nothing_else_sees_it(make_trainer, loader):
    class Plain(SGD):
        seen: list[list[float]] = []  # noqa: RUF012

        def step(self, closure=None):
            self.seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def configure(task):
        weights = [p for p in task.parameters() if p.ndim > 1]
        return Plain([{"params": weights, "lr": 1.0}, {"params": task.net.norm.parameters(), "lr": 2.0}])

    schedule = {"phases": [{"steps": 2, "lr_scale": 0.1}, {"steps": 2, "lr_scale": 0.5, "warmup_steps": 2}]}
    trainer = make_trainer(compress(schedule=schedule), max_epochs=2)
    trainer.fit(TinyTask(configure), loader)
    expected = [[0.1, 0.2], [0.1, 0.2], [0.25, 1.0], [0.5, 1.0], *[[1.0, 2.0]] * 4]
    np.testing.assert_allclose(Plain.seen, expected)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1.0, 2.0]


def test_phases_turn_distillation_on_and_off(make_trainer, loader):
    class Seen(Callback):
        def __init__(self) -> None:
            self.ratios: list[bool] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            own = trainer.callback_metrics["train_loss"]
            self.ratios.append(torch.equal(outputs["loss"], own))

    schedule = {"phases": [{"steps": 2, "distill": False}, {"steps": 1}, {"distill": False}]}
    seen = Seen()
    make_trainer(compress(schedule=schedule, distill={"weight": 0.4}), seen).fit(TinyTask(), loader)
    assert seen.ratios == [True, True, False, True]


# --- bad settings --------------------------------------------------------------------------------------------

BAD = {
    "two lengths": (
        {"phases": [{"epochs": 1, "steps": 2}]},
        ConfigurationError,
        r"Phase\(epochs=1, steps=2\): give one",
    ),
    "no length": ({"phases": [{}, {"epochs": 1}]}, ConfigurationError, "phase 0 of the schedule never ends and 1 come"),
    "unknown": ({"phases": [{"epoch": 1}]}, ConfigurationError, "schedule.phases: unknown key 'epoch'. Did you mean"),
    "no list": ({"phases": {"epochs": 1}}, ConfigurationError, "expected a list of phases"),
    "no phase": ({"phases": [3]}, ConfigurationError, "3 is no phase, expected a Phase or a mapping"),
    "zero": (
        {"phases": [{"epochs": 0}]},
        ConfigurationError,
        r"Phase\(epochs=0\): expected a whole number of at least 1",
    ),
    "train": ({"phases": [{"train": "head"}]}, ConfigurationError, r"Phase\(train='head'\): expected 'all', 'factors'"),
    "no globs": ({"phases": [{"train": []}]}, ConfigurationError, r"Phase\(train=\[\]\)"),
    "scale": (
        {"phases": [{"lr_scale": -1}]},
        ConfigurationError,
        r"Phase\(lr_scale=-1\): expected a number of at least",
    ),
    "distill": ({"phases": [{"distill": True}]}, ConfigurationError, "phase 0 of the schedule has distill=true"),
    "mode": ({"phases": [{"until_plateau": {"monitor": "x", "mode": "up"}}]}, ConfigurationError, "'min' or 'max'"),
    "plateau": ({"phases": [{"until_plateau": 3}]}, ConfigurationError, "until_plateau=3: expected a metric, as in"),
    "both": ({"freeze_epochs": 1, "phases": [{}]}, ConfigurationError, "give one of the two; a phase that freezes is"),
    "growing": (
        {"phases": [{"budget": {"params": 0.3}, "epochs": 1}, {"budget": {"params": 0.4}}]},
        BudgetError,
        "do not decrease: params <= 30 % and then params <= 40 %",
    ),
    "others": (
        {"phases": [{"budget": {"params": 0.3}, "epochs": 1}, {"budget": {"bytes": 0.2}}]},
        BudgetError,
        "bound different things, params <= 30 %, then bytes <= 20 %",
    ),
    "late": (
        {"phases": [{"epochs": 1}, {"budget": {"params": 0.2}}]},
        BudgetError,
        "and the first has none: give the first one",
    ),
    "loose": (
        {"phases": [{"budget": {"params": 0.8}, "epochs": 1}, {"budget": {"params": 0.5}}]},
        BudgetError,
        "ends at params <= 50 %, which does not keep the budget of the callback, params <= 40 %",
    ),
}


@pytest.mark.parametrize(("schedule", "error", "said"), BAD.values(), ids=BAD)
def test_bad_schedules_are_refused(schedule, error, said):
    with pytest.raises(error, match=said):
        Compress({"params": 0.4}, schedule=schedule)


def test_schedule_comes_from_plain_values_and_from_hydra():
    from omegaconf import OmegaConf

    expected = Schedule(
        phases=(
            Phase(budget=Budget(params=0.6), epochs=2, train=("net.*",)),
            Phase(budget=Budget(params=0.4), until_plateau=Plateau("val_loss", patience=2), distill=True),
        )
    )
    values = {
        "phases": [
            {"budget": {"params": 0.6}, "epochs": 2, "train": ["net.*"]},
            {"budget": {"params": 0.4}, "until_plateau": {"monitor": "val_loss", "patience": 2}, "distill": True},
        ]
    }
    for value in (values, OmegaConf.create(values)):
        assert Schedule.from_value(value) == expected
        callback = Compress({"params": 0.4}, schedule=value, distill="layers")
        assert callback.schedule == expected
        assert callback.distill == Distill(kind="layers")


def test_losses_of_a_fit_in_rounds_are_those_of_a_loop_by_hand(make_trainer, loader):
    task = TinyTask(lambda t: SGD(t.parameters(), lr=0.05))
    plain = copy.deepcopy(task)
    make_trainer(
        compress(0.5, schedule=IN_STEPS | {"phases": [*IN_STEPS["phases"][:1], {"budget": {"params": 0.5}}]})
    ).fit(task, loader)
    plain.train()
    smaller(plain, 0.8, (1, 3, 8, 8))
    for step, (x, y) in enumerate(loader):
        if step == 3:
            merge_(plain)
            smaller(plain, 0.5, (1, 3, 8, 8))
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p.sub_(0.05 * p.grad)
    assert factorised(task) == factorised(plain)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], value, rtol=1e-4, atol=1e-6)

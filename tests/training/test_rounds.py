"""Rounds of compression: on a model and its optimizers, and in a fit."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from lightning_compress import Budget, merge_
from lightning_compress.core.errors import CompressionWarning, ConfigurationError, InfeasibleBudgetError
from lightning_compress.training.optimizers import exchange_parameters_
from lightning_compress.training.rounds import Rebuilt, compress_again_, reconcile_
from tests.support.compressing import CLOSED_FORM, WEIGHTS_ALONE, compress, compressed_model
from tests.support.fitting import QUIET, count, factorised, held_by, require_same_state
from tests.support.nets import TinyNet, TinyTask, TwoManual
from tests.support.optimizers import groups, one_cycle, weights_and_rest
from tests.support.resuming import IN_STEPS, THREE

pytestmark = QUIET


def smaller(net, params=0.5, example_input=None, **settings):
    settings = {"method": "exact", "kinds": CLOSED_FORM, **WEIGHTS_ALONE, **settings}
    return compressed_model(net, Budget(params=params), example_input=example_input, **settings)


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
    require_same_state(net, expected)
    assert again.done.plan.dense.params == count(TinyNet())
    assert count(net) <= 0.5 * again.done.plan.dense.params


def test_a_round_keeps_the_optimizer_state_of_all_that_stays():
    net = TinyNet()
    smaller(net, 0.8)
    weights, rest = weights_and_rest(net)
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
    assert {id(p) for p in optimizer.state} <= set(held_by([optimizer]))


@pytest.mark.parametrize(
    "settings", [{"params": 0.35}, {"params": 0.95, "include": "fc1"}], ids=["smaller", "some dense again"]
)
def test_an_optimizer_and_its_names_follow_a_round(settings):
    net = TinyNet()
    smaller(net, 0.5)
    optimizer, was = SGD(net.named_parameters(), lr=0.1), factorised(net)
    exchange_parameters_([optimizer], compress_again_(net, lambda n: smaller(n, **settings)).exchanges)
    assert len(factorised(net)) < len(was) or "include" not in settings
    own = {id(p): name for name, p in net.named_parameters()}
    assert sorted(held_by([optimizer])) == sorted(own)
    assert optimizer.param_groups[0]["param_names"] == [own[key] for key in held_by([optimizer])]


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
        assert sorted(held_by([optimizer])) == sorted(id(p) for p in net.parameters())
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
    exchange_parameters_([optimizer], reconcile_(net, plan).exchanges)
    net.load_state_dict(other.state_dict())
    assert factorised(net) == factorised(other)
    assert sorted(held_by([optimizer])) == sorted(id(p) for p in net.parameters())
    kept = list(net.modules())
    assert reconcile_(net, plan) == Rebuilt()
    assert [a is b for a, b in zip(net.modules(), kept, strict=True)]


# --- rounds in a fit ----------------------------------------------------------------------------------------


class Sizes(Callback):
    # Sizes and rates in every batch.
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.sizes.append(count(pl_module))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        assert set(held_by(trainer.optimizers)) == {id(p) for p in pl_module.parameters()}


def test_budgets_are_reached_in_steps_and_schedulers_go_on(make_trainer, loader):
    task, sizes, plain = TinyTask(one_cycle), Sizes(), Sizes()
    dense = count(task)
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


# --- rounds that do not fit into the fit --------------------------------------------------------------------


TOO_SHORT = {
    "epochs": (THREE, {"max_epochs": 2}, 2, 2, 2),
    "steps of the trainer": (THREE, {"max_epochs": -1, "max_steps": 5}, 2, 1.25, 2),
    "steps of a phase": (IN_STEPS | {"phases": [{**IN_STEPS["phases"][0], "steps": 12}, {"budget": {"params": 0.5}}]},
                         {"max_epochs": 3}, 3, 3, 1),
    "plateau": (
        {"phases": [{"budget": {"params": 0.8}, "until_plateau": {"monitor": "train_loss", "patience": 3}},
                    {"budget": {"params": 0.5}}]},
        {"max_epochs": 2}, 4, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("which", TOO_SHORT)
def test_rounds_that_do_not_fit_into_the_fit_are_said_at_its_start_and_end(make_trainer, loader, which):
    schedule, settings, needed, left, reached = TOO_SHORT[which]
    last = schedule["phases"][-1]["budget"]["params"]
    callback = compress(last, schedule=schedule)
    with pytest.warns(CompressionWarning) as seen:
        make_trainer(callback, **settings).fit(TinyTask(), loader)
    start, end = (str(each.message) for each in seen if each.category is CompressionWarning)
    asked = f"params <= {100 * last:g} %"
    assert f"compression to {asked} begins after {needed} epochs at the earliest, and {left:g} are left" in start
    assert f"the fit ended in round {reached} of {len(callback.schedule.budgets)}" in end
    assert f"keeps {callback.plan.budget}, and was not compressed to {asked}" in end


def test_rounds_that_an_early_stop_leaves_out_are_said_at_the_end(make_trainer, loader):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.should_stop = True

    with pytest.warns(CompressionWarning, match=r"ended in round 1 of 3: the module keeps params <= 80 %") as seen:
        make_trainer(compress(schedule=THREE), Stop(), max_epochs=4).fit(TinyTask(), loader)
    assert len([each for each in seen if each.category is CompressionWarning]) == 1


def test_a_trial_run_says_nothing_of_its_length(make_trainer, loader):
    make_trainer(compress(schedule=THREE), fast_dev_run=True).fit(TinyTask(), loader)

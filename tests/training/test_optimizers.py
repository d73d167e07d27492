from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.core.errors import OrphanParameterError, UnsupportedError
from lightning_compress.training.optimizers import optimizer_layout, patch_optimizers_
from tests.support.compressing import compress
from tests.support.nets import TinyNet, TinyTask, TwoManual

# TinyTask has a validation_step; the fits here need no validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader.")


def held_by(optimizers) -> list[int]:
    return [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.factors().values()) if isinstance(layer, FactorisedLayer) else [layer.weight]


class Record(Callback):
    # Losses and, after every batch, the learning rate and momentum of every group.
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[tuple]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        self.rates.append([(group["lr"], group.get("momentum"), group.get("betas")) for group in groups])


# --- what configure_optimizers may return --------------------------------------------------------


def adam(task):
    return Adam(task.parameters(), lr=1e-2)


def decay_groups(task):
    decayed = [p for p in task.parameters() if p.ndim > 1]
    rest = [p for p in task.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def rate_per_layer(task):
    groups = [{"params": layer.parameters(), "lr": 0.01 * (i + 1)} for i, layer in enumerate(task.net.children())]
    return RMSprop(groups)


def named(task):
    return AdamW(task.named_parameters(), lr=1e-2)


def named_groups(task):
    parameters = list(task.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in parameters if p.ndim <= 1]},
    ]
    return AdamW(groups, lr=1e-2)


def one_weight(task):
    return SGD([{"params": weights_of(task.net.fc1), "lr": 0.2}, {"params": weights_of(task.net.conv2)}], lr=0.1)


def head_only(task):
    return SGD(task.net.fc2.parameters(), lr=0.1)


def plateau(task):
    optimizer = decay_groups(task)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0, min_lr=[1e-3, 1e-4])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


def one_cycle(task):
    optimizer = decay_groups(task)
    scheduler = OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def one_cycle_adam(task):
    optimizer = adam(task)
    scheduler = OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lambdas(task):
    optimizer = decay_groups(task)
    scheduler = LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1.0 / (1 + step)])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sequential(task):
    optimizer = rate_per_layer(task)
    parts = [LinearLR(optimizer, 0.1, total_iters=3), ConstantLR(optimizer, 0.5, total_iters=100)]
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": SequentialLR(optimizer, parts, milestones=[3]), "interval": "step"},
    }


def lbfgs(task):
    return torch.optim.LBFGS(task.parameters(), lr=0.1, max_iter=3, history_size=4)


def fused(task):
    return Adam(task.parameters(), lr=1e-2, fused=True)


def maximizing_foreach(task):
    return SGD(task.parameters(), lr=1e-3, momentum=0.5, maximize=True, foreach=True)


CONFIGURATIONS = [
    adam,
    decay_groups,
    rate_per_layer,
    named,
    named_groups,
    one_weight,
    head_only,
    plateau,
    one_cycle,
    one_cycle_adam,
    lambdas,
    sequential,
    lbfgs,
    fused,
    maximizing_foreach,
]


class ReadsTheWeight(TinyTask):
    def configure_optimizers(self):
        return SGD([{"params": [self.net.fc1.weight], "lr": 0.2}, {"params": [self.net.fc1.bias]}], lr=0.1)


class Prebuilt(TinyTask):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = AdamW(self.named_parameters(), lr=1e-2)

    def configure_optimizers(self):
        return self.optimizer


def fit(make_trainer, loader, task, *callbacks):
    record = Record()
    trainer = make_trainer(*callbacks, record, max_epochs=3)
    trainer.fit(task, loader)
    return trainer, record


def require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record) -> None:
    assert record.losses == plain_record.losses
    assert record.rates == plain_record.rates
    ours, theirs = task.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for a, b in zip(trainer.optimizers, plain_trainer.optimizers, strict=True):
        states = [o.state_dict() for o in (a, b)]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        assert list(states[0]["state"]) == list(states[1]["state"])
        torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    assert optimizer_layout(trainer.optimizers, task) == optimizer_layout(plain_trainer.optimizers, plain)


def require_trained(task, dense, plan, optimizers) -> None:
    apply_plan_(dense, plan)
    start = dict(dense.named_parameters())
    now = {id(p): name for name, p in task.named_parameters()}
    held = held_by(optimizers)
    assert len(held) == len(set(held))
    assert set(held) <= set(now)
    factors = {f"{layer.name}." for layer in plan.factorised}
    moved = 0
    for parameter in held:
        name = now[parameter]
        if any(name.startswith(prefix) for prefix in factors) and name.endswith("weight"):
            assert not torch.equal(dict(task.named_parameters())[name], start[name]), name
            moved += 1
    assert moved


@pytest.mark.parametrize("configure", CONFIGURATIONS)
def test_run_equals_one_whose_optimizer_was_built_from_the_factors(make_trainer, loader, configure):
    task = TinyTask(configure)
    plain, dense = copy.deepcopy(task), copy.deepcopy(task)
    callback = compress(0.4 if configure is not head_only else 0.35, kinds=["svd", "spatial_svd", "tucker2"])
    trainer, record = fit(make_trainer, loader, task, callback)
    names = {p.name for p in callback.plan.factorised}
    assert {"net.conv2", "net.fc1"} <= names
    assert len(set(record.losses)) == 12
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    if configure is head_only:
        assert set(held_by(trainer.optimizers)) == {id(p) for p in task.net.fc2.parameters()}
    else:
        require_trained(task, dense, callback.plan, trainer.optimizers)


@pytest.mark.parametrize("configure", [named, named_groups])
def test_parameter_names_follow_the_factors(make_trainer, loader, configure):
    task = TinyTask(configure)
    trainer, _ = fit(make_trainer, loader, task, compress())
    parameters = dict(task.named_parameters())
    seen = []
    for group in trainer.optimizers[0].param_groups:
        assert [id(parameters[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]
        seen += group["param_names"]
    assert sorted(seen) == sorted(parameters)


def test_schedulers_really_changed_the_rates(make_trainer, loader):
    # Guards the comparison above: equal rates mean little if none ever moved.
    for configure in (plateau, one_cycle, one_cycle_adam, lambdas, sequential):
        _, record = fit(make_trainer, loader, TinyTask(configure), compress())
        assert len({tuple(rates) for rates in record.rates}) >= 3, configure.__name__


def test_configure_optimizers_that_reads_a_weight_gets_its_factors(make_trainer, loader):
    task = ReadsTheWeight()
    dense = copy.deepcopy(task)
    plain = TinyTask(
        lambda m: SGD([{"params": weights_of(m.net.fc1), "lr": 0.2}, {"params": [m.net.fc1.bias]}], lr=0.1)
    )
    plain.load_state_dict(task.state_dict())
    callback = compress()
    trainer, record = fit(make_trainer, loader, task, callback)
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    require_trained(task, dense, callback.plan, trainer.optimizers)


def test_optimizer_built_in_the_constructor_gets_the_factors(make_trainer, loader):
    task = Prebuilt()
    plain = TinyTask(named)
    plain.load_state_dict(task.state_dict())
    dense = copy.deepcopy(plain)
    optimizer, callback = task.optimizer, compress()
    trainer, record = fit(make_trainer, loader, task, callback)
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    assert trainer.optimizers == [optimizer]
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    require_trained(task, dense, callback.plan, [optimizer])


def test_two_optimizers_stepped_by_hand_each_get_their_own_factors(make_trainer, loader):
    task = TwoManual()
    plain, dense = copy.deepcopy(task), copy.deepcopy(task)
    callback = compress()
    trainer, record = fit(make_trainer, loader, task, callback)
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    require_trained(task, dense, callback.plan, trainer.optimizers)
    body, head = ({id(p) for p in o.param_groups[0]["params"]} for o in trainer.optimizers)
    assert head == {id(p) for layer in (task.net.fc1, task.net.fc2) for p in layer.parameters()}
    assert body == {id(p) for p in task.parameters()} - head


def test_second_fit_with_a_prebuilt_optimizer_keeps_its_state(make_trainer, loader):
    task = Prebuilt()
    fit(make_trainer, loader, task, compress())
    plain = copy.deepcopy(task)
    assert plain.optimizer is not task.optimizer
    plain.optimizer = AdamW(plain.named_parameters(), lr=1e-2)
    plain.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
    trainer, record = fit(make_trainer, loader, task, compress())
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)


# --- refused optimizers ----------------------------------------------------------------------------


def require_dense_again(task: nn.Module, before) -> None:
    assert {name: id(p) for name, p in task.named_parameters()} == {name: id(p) for name, p in before.parameters}
    assert [(name, id(m)) for name, m in task.named_modules()] == [(name, id(m)) for name, m, _ in before.modules]
    assert all(torch.equal(value, before.state[name]) for name, value in task.state_dict().items())


def stub(name: str) -> type[Optimizer]:
    return type(name, (SGD,), {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "Muon",
            r"Muon trains matrices only and some factors are 4-D.*exclude='Conv2d'.*or train with another",
        ),
        ("ZeroRedundancyOptimizer", r"ZeroRedundancyOptimizer keeps its own parameter shards.*use a plain optimizer"),
    ],
)
def test_optimizers_that_cannot_take_factors_are_refused_and_the_module_is_dense_again(
    make_trainer, loader, unchanged, name, said
):
    task = TinyTask(lambda m: stub(name)(m.parameters(), lr=0.1))
    calls = []
    task.net.fc1.register_forward_hook(lambda module, *_: calls.append(type(module)))
    before = unchanged(task)
    trainer = make_trainer(compress())
    with pytest.raises(UnsupportedError, match=said):
        trainer.fit(task, loader)
    require_dense_again(task, before)
    assert held_by(trainer.optimizers) == [id(p) for p in task.parameters()]
    calls.clear()
    task(torch.zeros(1, 3, 8, 8))
    assert calls == [nn.Linear]
    task.configure = None
    make_trainer(compress()).fit(task, loader)
    assert isinstance(task.net.fc1, FactorisedLayer)


class Matrices(TinyTask):
    # The recipe Muon is made for: matrices to Muon, everything else to Adam.
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim == 2]
        return [torch.optim.Muon(matrices, lr=1e-2), Adam([p for p in self.parameters() if p.ndim != 2], lr=1e-2)]

    training_step = TwoManual.training_step


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@needs_muon
def test_muon_trains_the_factors_of_linear_layers(make_trainer, loader):
    task = Matrices()
    plain, dense = copy.deepcopy(task), copy.deepcopy(task)
    callback = compress(0.9, exclude="Conv2d")
    trainer, record = fit(make_trainer, loader, task, callback)
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    require_trained(task, dense, callback.plan, trainer.optimizers)


@needs_muon
def test_muon_of_the_matrices_does_not_mind_convolutions_in_another_optimizer(make_trainer, loader):
    task = Matrices()
    plain, dense = copy.deepcopy(task), copy.deepcopy(task)
    callback = compress()
    trainer, record = fit(make_trainer, loader, task, callback)
    assert {p.type for p in callback.plan.factorised} == {"Conv2d", "Linear"}
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    require_trained(task, dense, callback.plan, trainer.optimizers)


# --- patch_optimizers_ by itself -----------------------------------------------------------------------


class Deaf(list):
    # A parameter list that ignores being edited in place.
    def __setitem__(self, key, value) -> None:
        pass


class Forgetful(list):
    # A parameter list that loses the last parameter it is given.
    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, value[:-1])


def factorised_net():
    net = TinyNet()
    dense = copy.deepcopy(net)
    plan = search_ranks(dense, Budget(params=0.4), method="exact")
    return net, plan


@pytest.mark.parametrize(
    ("container", "said"),
    [
        (Deaf, r"SGD still holds the dense weight of 'fc1', which the model lost"),
        (Forgetful, r"a factor of 'fc1' did not reach SGD and would never be trained"),
    ],
)
def test_a_patch_that_does_not_hold_is_an_orphan_error(container, said):
    net, plan = factorised_net()
    optimizer = SGD([net.fc1.weight], lr=0.1)
    optimizer.param_groups[0]["params"] = container([net.fc1.weight])
    replacements = apply_plan_(net, plan)
    with pytest.raises(OrphanParameterError, match=said):
        patch_optimizers_([optimizer], replacements)


@pytest.mark.parametrize("container", [Deaf, Forgetful])
def test_a_patch_that_does_not_hold_puts_the_module_back(make_trainer, loader, unchanged, container):
    def configure(task):
        optimizer = SGD([task.net.fc1.weight], lr=0.1)
        optimizer.param_groups[0]["params"] = container([task.net.fc1.weight])
        return optimizer

    task = TinyTask(configure)
    before = unchanged(task)
    with pytest.raises(OrphanParameterError, match=r"'net\.fc1'"):
        make_trainer(compress()).fit(task, loader)
    require_dense_again(task, before)


def test_patch_keeps_groups_hyper_parameters_order_and_the_state_of_survivors():
    net, plan = factorised_net()
    groups = [
        {"params": [net.fc2.weight, net.conv2.weight, net.norm.weight], "lr": 0.3, "mine": "kept"},
        {"params": [net.fc1.bias, net.fc1.weight]},
    ]
    optimizer = Adam(groups, lr=0.1, weight_decay=0.01)
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    lists = [g["params"] for g in optimizer.param_groups]
    norm, bias, dense = net.norm.weight, net.fc1.bias, {n: getattr(net, n).weight for n in ("conv2", "fc1", "fc2")}
    states = {p: copy.deepcopy(optimizer.state[p]) for p in (norm, bias)}
    replacements = apply_plan_(net, plan)
    patch_optimizers_([optimizer], replacements)

    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings
    assert all(g["params"] is kept for g, kept in zip(optimizer.param_groups, lists, strict=True))
    first = [*weights_of(net.fc2), *weights_of(net.conv2), norm]
    assert [id(p) for p in lists[0]] == [id(p) for p in first]
    assert [id(p) for p in lists[1]] == [id(p) for p in [bias, *weights_of(net.fc1)]]
    replaced = {name for name in dense if isinstance(getattr(net, name), FactorisedLayer)}
    assert replaced >= {"conv2", "fc1"}
    assert all(dense[name] not in optimizer.state for name in replaced)
    for parameter, state in states.items():
        torch.testing.assert_close(optimizer.state[parameter], state, rtol=0, atol=0)


def test_patch_keeps_the_parameter_list_that_lbfgs_holds():
    net, plan = factorised_net()
    optimizer = torch.optim.LBFGS(net.parameters())
    assert optimizer._numel() == 2340
    patch_optimizers_([optimizer], apply_plan_(net, plan))
    assert optimizer._params is optimizer.param_groups[0]["params"]
    assert optimizer._numel() == plan.compressed.params
    assert [id(p) for p in optimizer._params] == [id(p) for p in net.parameters()]


def test_patch_of_an_optimizer_without_replaced_weights_changes_nothing():
    net, plan = factorised_net()
    other = nn.Linear(3, 3)
    optimizer = SGD([("a", other.weight), ("b", other.bias)], lr=0.1)
    before = optimizer.state_dict()
    patch_optimizers_([optimizer], apply_plan_(net, plan))
    assert optimizer.state_dict() == before
    assert held_by([optimizer]) == [id(other.weight), id(other.bias)]


def test_refused_patch_changes_no_optimizer():
    net, plan = factorised_net()
    good, bad = SGD([net.fc1.weight], lr=0.1), stub("ZeroRedundancyOptimizer")([net.fc2.weight], lr=0.1)
    held = held_by([good, bad])
    replacements = apply_plan_(net, plan)
    with pytest.raises(UnsupportedError, match="ZeroRedundancyOptimizer"):
        patch_optimizers_([good, bad], replacements)
    assert held_by([good, bad]) == held


def test_muon_is_refused_for_the_factors_it_would_hold_itself():
    net, plan = factorised_net()
    matrices = stub("Muon")([net.fc1.weight, net.fc2.weight], lr=0.1)
    kernels = SGD([net.conv1.weight, net.conv2.weight, net.point.weight], lr=0.1)
    other = copy.deepcopy(net)
    patch_optimizers_([matrices, kernels], apply_plan_(net, plan))
    assert held_by([matrices]) == [id(p) for layer in (net.fc1, net.fc2) for p in weights_of(layer)]
    with pytest.raises(UnsupportedError, match="Muon trains matrices only"):
        patch_optimizers_([stub("Muon")([other.conv2.weight], lr=0.1)], apply_plan_(other, plan))


def test_layout_is_the_parameter_names_of_every_group():
    net = TinyNet()
    first = SGD([{"params": [net.fc2.bias, net.conv1.weight]}, {"params": [net.norm.bias]}], lr=0.1)
    second = Adam([net.fc1.weight, nn.Parameter(torch.zeros(1))])
    assert optimizer_layout([first, second], net) == [
        {"type": "SGD", "groups": [["fc2.bias", "conv1.weight"], ["norm.bias"]]},
        {"type": "Adam", "groups": [["fc1.weight", "?"]]},
    ]
    assert optimizer_layout([], net) == []


def test_patched_layout_is_that_of_an_optimizer_built_from_the_factors():
    net, plan = factorised_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    replacements = apply_plan_(net, plan)
    patch_optimizers_([optimizer], replacements)
    expected = [{"type": "SGD", "groups": [[name for name, _ in net.named_parameters()]]}]
    assert optimizer_layout([optimizer], net) == expected


def test_shared_layer_is_patched_once(make_trainer, loader):
    class Shared(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(24, 24)
            self.twice = nn.Sequential(self.inner, nn.ReLU(), self.inner)
            self.head = nn.Linear(24, 4)

        def forward(self, x):
            return self.head(self.twice(x[:, 0, 0, :].repeat(1, 3)))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return Adam(self.parameters(), lr=1e-2)

    task, callback = Shared(), compress(0.6)
    dense = copy.deepcopy(task)
    trainer = make_trainer(callback)
    trainer.fit(task, loader)
    assert task.inner is task.twice[0] is task.twice[2]
    assert isinstance(task.inner, FactorisedLayer)
    assert held_by(trainer.optimizers) == [id(p) for p in task.parameters()]
    require_trained(task, dense, callback.plan, trainer.optimizers)

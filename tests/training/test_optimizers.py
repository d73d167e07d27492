from __future__ import annotations

import copy
import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.core.errors import OrphanParameterError, UnsupportedError
from lightning_compress.training.optimizers import optimizer_layout
from tests.support import optimizers
from tests.support.compressing import compress
from tests.support.fitting import QUIET, factors_of, held_by, planned, require_dense, require_same_state
from tests.support.nets import TinyNet, TinyTask, TwoManual
from tests.support.optimizers import Prebuilt, weights_of
from tests.support.optimizing import patch_optimizers_
from tests.support.resuming import require_same_optimizers

pytestmark = QUIET


class Record(Callback):
    # Losses and, after every batch, the learning rate and momentum of every group.
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[tuple] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        self.rates.append(tuple((group["lr"], group.get("momentum"), group.get("betas")) for group in groups))


class Matrices(TinyTask):
    # The recipe Muon is made for: matrices to Muon, everything else to Adam.
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim == 2]
        return [torch.optim.Muon(matrices, lr=1e-2), Adam([p for p in self.parameters() if p.ndim != 2], lr=1e-2)]

    training_step = TwoManual.training_step


class Shared(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)
        self.twice = nn.Sequential(self.inner, nn.ReLU(), self.inner)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.twice(x[:, 0, 0, :].repeat(1, 3)))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=1e-2)


SCHEDULED = ("plateau", "one_cycle", "one_cycle_adam", "lambdas", "sequential")
PLAIN = (
    "adam", "nesterov_groups", "rate_per_layer", "named", "named_groups", "one_weight", "lbfgs", "fused",
    "maximizing_foreach",
)  # fmt: skip
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
RUNS = [
    *(
        pytest.param(functools.partial(TinyTask, getattr(optimizers, name)), {}, ("conv2", "fc1"), id=name)
        for name in SCHEDULED + PLAIN
    ),
    pytest.param(functools.partial(TinyTask, optimizers.head_only), {"params": 0.35}, (), id="head_only"),
    pytest.param(Prebuilt, {}, ("conv2", "fc1"), id="prebuilt"),
    pytest.param(TwoManual, {}, ("conv2", "fc1"), id="two stepped by hand"),
    pytest.param(Matrices, {}, ("conv2", "fc1"), id="muon and adam", marks=needs_muon),
    pytest.param(Matrices, {"params": 0.9, "exclude": "Conv2d"}, (), id="muon", marks=needs_muon),
    pytest.param(Shared, {"params": 0.6}, (), id="shared layer"),
]


def fit(make_trainer, loader, task, *callbacks):
    record = Record()
    trainer = make_trainer(*callbacks, record, max_epochs=3)
    trainer.fit(task, loader)
    return trainer, record


def require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record) -> None:
    assert record.losses == plain_record.losses
    assert record.rates == plain_record.rates
    require_same_state(task, plain)
    require_same_optimizers(trainer, plain_trainer)
    assert optimizer_layout(trainer.optimizers, task) == optimizer_layout(plain_trainer.optimizers, plain)


@pytest.mark.parametrize(("make", "settings", "among"), RUNS)
def test_run_equals_one_whose_optimizer_was_built_from_the_factors(
    make_trainer, loader, request, make, settings, among
):
    task = make()
    dense = copy.deepcopy(task)
    plain = TinyTask(optimizers.named) if make is Prebuilt else copy.deepcopy(task)
    plain.load_state_dict(task.state_dict())
    callback = compress(**{"kinds": ["svd", "spatial_svd", "tucker2"], **settings})
    trainer, record = fit(make_trainer, loader, task, callback)
    assert {f"net.{name}" for name in among} <= set(planned(callback))
    assert len(set(record.losses)) == 12
    if request.node.callspec.id in SCHEDULED:  # equal rates mean little if none ever moved
        assert len(set(record.rates)) >= 3
    apply_plan_(plain, callback.plan)
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)
    if make is Prebuilt:
        assert trainer.optimizers == [task.optimizer]
    held = held_by(trainer.optimizers)
    assert len(held) == len(set(held))
    apply_plan_(dense, callback.plan)
    trained = [name for name, p in factors_of(task).items() if id(p) in held]
    assert trained or request.node.callspec.id == "head_only"
    for name in trained:
        assert not torch.equal(task.get_parameter(name), dense.get_parameter(name)), name


@pytest.mark.parametrize("configure", [optimizers.named, optimizers.named_groups])
def test_parameter_names_follow_the_factors(make_trainer, loader, configure):
    task = TinyTask(configure)
    trainer, _ = fit(make_trainer, loader, task, compress())
    seen = [name for group in trainer.optimizers[0].param_groups for name in group["param_names"]]
    assert [id(task.get_parameter(name)) for name in seen] == held_by(trainer.optimizers)
    assert sorted(seen) == sorted(name for name, _ in task.named_parameters())


def test_second_fit_with_a_prebuilt_optimizer_keeps_its_state(make_trainer, loader):
    task = Prebuilt()
    fit(make_trainer, loader, task, compress())
    plain = copy.deepcopy(task)
    assert plain.optimizer is not task.optimizer
    plain.optimizer = optimizers.named(plain)
    plain.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
    trainer, record = fit(make_trainer, loader, task, compress())
    plain_trainer, plain_record = fit(make_trainer, loader, plain)
    require_equal_runs(task, trainer, record, plain, plain_trainer, plain_record)


def stub(name: str) -> type[Optimizer]:
    return type(name, (SGD,), {})


class Deaf(list):
    # A parameter list that ignores being edited in place.
    def __setitem__(self, key, value) -> None:
        pass


class Forgetful(list):
    # A parameter list that loses the last parameter it is given.
    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, value[:-1])


def holding(container):
    def configure(task):
        optimizer = SGD([task.net.fc1.weight], lr=0.1)
        optimizer.param_groups[0]["params"] = container([task.net.fc1.weight])
        return optimizer

    return configure


REFUSED = {
    "Muon": (
        lambda m: stub("Muon")(m.parameters(), lr=0.1),
        UnsupportedError,
        r"Muon trains matrices only and some factors are 4-D.*exclude='Conv2d'.*or train with another",
    ),
    "ZeroRedundancyOptimizer": (
        lambda m: stub("ZeroRedundancyOptimizer")(m.parameters(), lr=0.1),
        UnsupportedError,
        r"ZeroRedundancyOptimizer keeps its own parameter shards.*use a plain optimizer",
    ),
    "deaf": (holding(Deaf), OrphanParameterError, r"SGD still holds the dense weight of 'net\.fc1', which the model"),
    "forgetful": (
        holding(Forgetful),
        OrphanParameterError,
        r"a factor of 'net\.fc1' did not reach SGD and would never be trained",
    ),
}


@pytest.mark.parametrize(("configure", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_optimizers_that_cannot_take_factors_are_refused_and_the_module_is_dense_again(
    make_trainer, loader, unchanged, configure, error, said
):
    task = TinyTask(configure)
    calls = []
    task.net.fc1.register_forward_hook(lambda module, *_: calls.append(type(module)))
    before = unchanged(task)
    trainer = make_trainer(compress())
    with pytest.raises(error, match=said):
        trainer.fit(task, loader)
    require_dense(task, before)
    if error is UnsupportedError:
        assert held_by(trainer.optimizers) == [id(p) for p in task.parameters()]
    calls.clear()
    task(torch.zeros(1, 3, 8, 8))
    assert calls == [nn.Linear]
    task.configure = None
    make_trainer(compress()).fit(task, loader)
    assert isinstance(task.net.fc1, FactorisedLayer)


# --- patch_optimizers_ by itself -----------------------------------------------------------------------


def factorised_net():
    net = TinyNet()
    return net, search_ranks(copy.deepcopy(net), Budget(params=0.4), method="exact")


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

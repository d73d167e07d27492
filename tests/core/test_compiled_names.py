"""What was saved of a model with compiled parts is found without them, and the other way round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, Plan, compress_, load_compressed, load_compressed_checkpoint, save_compressed
from lightning_compress.core.compiled_names import plan_as_named, renaming_for, state_as_named
from lightning_compress.surgery.save import load_weights_
from tests.support.compressing import compress
from tests.support.fitting import QUIET
from tests.support.nets import TinyNet, TinyTask

pytestmark = QUIET


class Outer(nn.Module):
    def __init__(self, *, inner_compiled: bool, outer_compiled: bool) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(8, 8), wrapped(nn.Sequential(nn.Linear(8, 8)), inner_compiled))
        self.net = wrapped(net, outer_compiled)


def wrapped(module: nn.Module, compiled: bool) -> nn.Module:
    return torch.compile(module, backend="eager") if compiled else module


def small(net: nn.Module) -> Plan:
    return compress_(net, Budget(params=0.5), objective="weight", heal=False)


STRUCTURES = [(inner, outer) for inner in (False, True) for outer in (False, True)]


@pytest.mark.parametrize("saved", STRUCTURES)
@pytest.mark.parametrize("now", STRUCTURES)
def test_names_of_either_model_become_those_of_this_one(saved, now):
    there, here = (Outer(inner_compiled=inner, outer_compiled=outer) for inner, outer in (saved, now))
    rename = renaming_for(here)
    for each in ("named_modules", "named_parameters"):
        names = {name for name, _ in getattr(here, each)()}
        found = {rename(name) for name, _ in getattr(there, each)()}
        assert found >= {name for name in names if not name.endswith("_orig_mod") and not is_wrapper(here, name)}
    state = state_as_named(there.state_dict(), rename)
    assert state.keys() == here.state_dict().keys()


def is_wrapper(model: nn.Module, name: str) -> bool:
    module = dict(model.named_modules()).get(name)
    return module is not None and "_orig_mod" in module._modules


def test_plan_without_another_name_stays_itself():
    net = TinyNet()
    plan = small(net)
    assert plan_as_named(plan, renaming_for(net)) is plan
    state = net.state_dict()
    assert state_as_named(state, renaming_for(net)) is state


class Holder(nn.Module):
    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        self.net = wrapped(TinyNet(), compiled)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("compiled", [True, False])
def test_saved_model_loads_with_and_without_the_wrapper(tmp_path, compiled):
    torch.manual_seed(0)
    there, here, x = Holder(compiled=compiled).eval(), Holder(compiled=not compiled).eval(), torch.randn(2, 3, 8, 8)
    small(there)
    save_compressed(there, tmp_path / "small")
    plan = load_compressed(here, tmp_path / "small")
    assert all(("_orig_mod" in layer.name) is not compiled for layer in plan.layers)
    torch.testing.assert_close(here(x), there(x))
    torch.save(there.state_dict(), tmp_path / "weights.pt")
    for p in here.parameters():
        p.data.zero_()
    load_weights_(here, tmp_path / "weights.pt")
    torch.testing.assert_close(here(x), there(x))


class Compiles(TinyTask):
    compiled = True

    def __init__(self) -> None:
        super().__init__()
        self.net = wrapped(self.net, self.compiled)


class Plain(Compiles):
    compiled = False


@pytest.mark.parametrize(("cls", "other"), [(Compiles, Plain), (Plain, Compiles)])
def test_checkpoint_loads_and_resumes_with_and_without_the_wrapper(make_trainer, loader, tmp_path, cls, other):
    task, path = cls(), tmp_path / "last.ckpt"
    trainer = make_trainer(compress())
    trainer.fit(task, loader)
    trainer.save_checkpoint(path)
    x = torch.randn(2, 3, 8, 8)
    loaded = load_compressed_checkpoint(other, path)
    torch.testing.assert_close(loaded.eval()(x), task.eval()(x))
    resumed, again = other(), cls()
    for module in (resumed, again):
        make_trainer(compress(), max_epochs=2).fit(module, loader, ckpt_path=path)
    state = state_as_named(resumed.state_dict(), renaming_for(again))
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())

"""Checkpoints that leave weights out: what they lack is decomposed from the weights the module was built with."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lightning_compress import CompressedCheckpointMixin, apply_plan_, load_compressed_checkpoint
from lightning_compress.core.errors import CompressionWarning, ResumeError
from lightning_compress.surgery.swap import apply_shells_
from lightning_compress.training.unloaded import Shells
from tests.support.compressing import compress
from tests.support.fitting import QUIET, factorised, require_dense
from tests.support.nets import TinyNet, TinyTask
from tests.support.plans import plan_for

pytestmark = QUIET
SAID = r"does not hold all factors of net\.conv2 \(.*they are decomposed from the dense weights that the module was"
FOUND = pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")


class Frozen(TinyTask):
    """Trains its head alone, and saves no more."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        torch.manual_seed(7)  # a backbone that is the same in every run, as pretrained ones are
        self.net = TinyNet()
        self.net.conv1.requires_grad_(False)
        self.net.conv2.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=1e-2)

    def on_save_checkpoint(self, checkpoint) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained or "norm" in name}


class Mixed(CompressedCheckpointMixin, Frozen):
    def on_save_checkpoint(self, checkpoint) -> None:
        super().on_save_checkpoint(checkpoint)
        Frozen.on_save_checkpoint(self, checkpoint)


CHOSEN = {"include": ["net.conv2", "net.fc1", "net.point"], "params": 0.8}


@pytest.fixture
def saved(make_trainer, loader, tmp_path):
    task, callback = Frozen(), compress(**CHOSEN)
    trainer = make_trainer(callback)
    trainer.fit(task, loader)
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    state = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    assert "net.conv2" in factorised(task)
    assert not any("conv2" in name for name in state)
    assert any("fc" in name for name in state)
    return task, tmp_path / "head.ckpt", callback.plan


def require_loaded(loaded, task, plan) -> None:
    expected = Frozen()
    apply_plan_(expected, plan)
    assert factorised(loaded) == factorised(task)
    state, frozen, trained = loaded.state_dict(), expected.state_dict(), task.state_dict()
    for name in state:
        assert torch.equal(state[name], (frozen if "conv" in name else trained)[name]), name
    assert all(bool(f.any()) for m in loaded.modules() if hasattr(m, "factors") for f in m.factors().values())


@pytest.mark.parametrize("with_callback", [True, False])
def test_a_trainer_loads_a_checkpoint_of_the_trained_weights_alone(make_trainer, loader, saved, with_callback):
    task, path, plan = saved
    fresh = Frozen()
    compress().setup(make_trainer(), fresh, "fit")  # a module that was in a fit before
    trainer = make_trainer(*([compress(**CHOSEN)] if with_callback else []))
    with pytest.warns(CompressionWarning, match=SAID):
        result = trainer.test(fresh, loader, ckpt_path=path, verbose=False)
    require_loaded(fresh, task, plan)
    assert result == make_trainer().test(task, loader, verbose=False)


def test_a_fit_goes_on_from_a_checkpoint_of_the_trained_weights_alone(make_trainer, loader, saved):
    task, path, _ = saved
    fresh, again = Frozen(), copy.deepcopy(task)
    with pytest.warns(CompressionWarning, match=SAID):
        make_trainer(compress(**CHOSEN), max_epochs=2).fit(fresh, loader, ckpt_path=path)
    make_trainer(compress(**CHOSEN), max_epochs=2).fit(again, loader, ckpt_path=path)  # its factors are still there
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), again.state_dict().values(), strict=True))
    assert not fresh.net.conv2[0].weight.requires_grad


@FOUND
@pytest.mark.parametrize("strict", [{}, {"strict": False}], ids=["of the class", "given"])
def test_load_compressed_checkpoint_decomposes_what_is_missing(saved, strict):
    task, path, plan = saved
    for load in (Mixed.load_from_checkpoint, lambda *a, **k: load_compressed_checkpoint(Frozen, *a, **k)):
        with pytest.warns(CompressionWarning, match=SAID):
            loaded = load(path, **strict)
        require_loaded(loaded, task, plan)


@FOUND
def test_strictness_is_that_of_the_call(make_trainer, loader, tmp_path):
    task, path = TinyTask(), tmp_path / "all.ckpt"
    trainer = make_trainer(compress(**CHOSEN))
    trainer.fit(task, loader)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    for name in [name for name in checkpoint["state_dict"] if "conv2" in name]:
        del checkpoint["state_dict"][name]
    torch.save(checkpoint, path)
    with pytest.raises(ResumeError, match="Missing key"):
        load_compressed_checkpoint(TinyTask, path)
    torch.manual_seed(3)
    expected = TinyTask()
    apply_plan_(expected, trainer.callbacks[0].plan)
    torch.manual_seed(3)
    with pytest.warns(CompressionWarning, match=SAID):
        loaded = load_compressed_checkpoint(TinyTask, path, strict=False)
    assert torch.equal(loaded.net.conv2.weight, expected.net.conv2.weight)
    assert torch.equal(loaded.net.fc1.weight, task.net.fc1.weight)


# --- some factors of a layer --------------------------------------------------------------------------------


def best_given(weight, *, first=None, last=None) -> torch.Tensor:
    """The nearest product with one factor given, by the projection onto what it spans."""
    weight = weight.detach().double()
    if first is not None:
        basis = torch.linalg.qr(first.detach().double().T)[0]
        return weight @ basis @ basis.T
    basis = torch.linalg.qr(last.detach().double())[0]
    return basis @ basis.T @ weight


@pytest.mark.parametrize("kept", ["reduce", "expand"])
def test_one_factor_of_a_matrix_follows_from_the_other(kept):
    net = TinyNet()
    replacements = apply_shells_(net, plan_for(net, {"fc1": ("svd", (4,)), "point": ("svd", (3,))}))
    shells = Shells(replacements)
    given = {}
    for name in ("fc1", "point"):
        factor = net.get_submodule(f"{name}.{kept}").weight
        given[name] = factor.detach().clone().normal_()
    net.load_state_dict({f"{name}.{kept}.weight": value for name, value in given.items()}, strict=False)
    with pytest.warns(CompressionWarning, match=r"factors of fc1 \(svd, ranks \(4,\)\), point \(svd"):
        shells.fit_unloaded_()
    for r in replacements:
        layer, dense = net.get_submodule(r.aliases[0]), r.dense.weight.flatten(1)
        assert torch.equal(layer.get_submodule(kept).weight, given[r.aliases[0]])
        factor = given[r.aliases[0]].flatten(1)
        expected = best_given(dense, **{"first" if kept == "reduce" else "last": factor})
        torch.testing.assert_close(layer.weight.double().flatten(1), expected, rtol=1e-4, atol=1e-5)


@FOUND
def test_factors_that_do_not_follow_from_the_others_are_an_error(make_trainer, loader, tmp_path, unchanged):
    task, path = TinyTask(), tmp_path / "part.ckpt"
    trainer = make_trainer(compress(kinds=["tucker2"], include="net.conv2", params=0.9))
    trainer.fit(task, loader)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if "conv2" in name and name.endswith(".weight"))
    del checkpoint["state_dict"][name]
    torch.save(checkpoint, path)
    said = r"holds some factors of layer 'net\.conv2' \(tucker2\) and lacks .*save all factors of a layer or none"
    with pytest.raises(ResumeError, match=said):
        load_compressed_checkpoint(TinyTask, path, strict=False)
    fresh = TinyTask()
    fresh.strict_loading = False
    before = unchanged(fresh)
    with pytest.raises(ResumeError, match=said):
        make_trainer(compress()).test(fresh, loader, ckpt_path=path)
    require_dense(fresh, before)


class Projections(nn.Module):
    """Three layers that read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, n) for n in (12, 8, 16))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def joint(net):
    plan = plan_for(net, dict.fromkeys("qkv", ("svd", (5,))))
    return dataclasses.replace(plan, layers=tuple(dataclasses.replace(p, joint_with="q") for p in plan.layers))


@pytest.mark.parametrize("lost", ["q k v", "k.expand", "reduce", "reduce v.expand"])
def test_layers_with_a_common_first_factor(lost):
    net = Projections()
    dense, whole = copy.deepcopy(net), copy.deepcopy(net)
    apply_plan_(whole, joint(whole))
    replacements = apply_shells_(net, joint(net))
    shells = Shells(replacements)
    held = {n: v for n, v in whole.state_dict().items() if not any(part in n for part in lost.split())}
    net.load_state_dict(held, strict=False)
    assert net.q.reduce.weight is net.v.reduce.weight
    with pytest.warns(CompressionWarning, match="does not hold all factors"):
        shells.fit_unloaded_()
    for name in "qkv":
        new, old = net.get_submodule(name), whole.get_submodule(name)
        if lost != "reduce v.expand":  # what is left is of this very decomposition, so that the rest is too
            torch.testing.assert_close(new.weight * 1, old.weight * 1, rtol=1e-4, atol=1e-5)
        assert (dense.get_submodule(name).weight - new.weight).norm() < 0.9 * dense.get_submodule(name).weight.norm()
    for name, value in held.items():
        assert torch.equal(net.state_dict()[name], value), name


def test_tied_layers_are_fitted_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    net = Tied()
    whole = copy.deepcopy(net)
    plan = plan_for(net, {"embed": ("svd", (4,))})
    apply_plan_(whole, plan)
    shells = Shells(apply_shells_(net, plan))
    with pytest.warns(CompressionWarning, match=r"factors of embed"):
        shells.fit_unloaded_()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), whole.state_dict().values(), strict=True))

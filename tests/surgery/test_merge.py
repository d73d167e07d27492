"""merge_: a factorised model as a dense one again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress import Budget, FactorisedLayer, LayerPlan, Plan, apply_plan_, compress_, merge_, search_ranks
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError, ModelError
from lightning_compress.surgery.swap import apply_shells_
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.interruptions import interrupting
from tests.support.nets import TinyNet
from tests.support.plans import RANKS
from tests.support.plans import plan_for as plan_for_net
from tests.support.zoo import LAYERS, factorised, fitting, low_ranks, plan_for

BUDGET = Budget(params=0.5)


def holding(name, kind, *, frozen=False, change=lambda model: model):
    """A model of one factorised layer, and its dense one."""
    dense = change(nn.Sequential(LAYERS[name].layer()))
    dense.requires_grad_(requires_grad=not frozen)
    model = copy.deepcopy(dense)
    apply_plan_(model, plan_for(model[0], kind, low_ranks(model[0], kind)))
    return model, dense


def settings_of(layer):
    """Everything a layer is made with."""
    return {k: v for k, v in vars(layer).items() if not k.startswith("_") or k == "_reversed_padding_repeated_twice"}


@pytest.mark.parametrize(("name", "kind"), fitting())
def test_merged_layer_is_the_dense_one_with_the_weight_of_the_factors(name, kind):
    model, dense = holding(name, kind)
    expected, weight, bias = model[0](*LAYERS[name].call()), model[0].dense_weight(), model[0].bias
    assert merge_(model) == ("0",)
    merged = model[0]
    assert type(merged) is type(dense[0])
    assert settings_of(merged) == settings_of(dense[0])
    assert repr(merged) == repr(dense[0])
    assert list(model.state_dict()) == list(dense.state_dict())
    assert [p.shape for p in model.parameters()] == [p.shape for p in dense.parameters()]
    assert isinstance(merged.weight, nn.Parameter)
    assert merged.weight.is_leaf
    assert getattr(merged, "bias", None) is bias
    torch.testing.assert_close(merged.weight.detach(), weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged(*LAYERS[name].call()), expected, rtol=1e-10, atol=1e-10)
    dense.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(dense[0](*LAYERS[name].call()), expected, rtol=1e-10, atol=1e-10)
    merged(*LAYERS[name].call()).sum().backward()
    assert merged.weight.grad.shape == dense[0].weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "ConvTranspose2d"])
def test_weight_has_the_dtype_of_the_factors_and_is_rounded_once(name, dtype):
    model, _ = holding(name, "tucker2" if "Conv" in name else "svd", change=lambda m: m.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = copy.deepcopy(model).double()[0].dense_weight()
    merge_(model)
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    error = (model[0].weight.double() - exact).abs().max() / exact.abs().max()
    assert error <= 1.01 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Conv2d", torch.channels_last),
        ("ConvTranspose2d", torch.channels_last),
        ("Conv3d", torch.channels_last_3d),
        ("ConvTranspose3d", torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("kind", ["channel_svd", "spatial_svd", "tucker2"])
def test_memory_format_is_inherited_both_ways(name, wanted, kind):
    model, _ = holding(name, kind, change=lambda m: m.to(memory_format=wanted))
    assert all(factor.is_contiguous(memory_format=wanted) for factor in model[0].factors().values())
    assert not all(factor.is_contiguous() for factor in model[0].factors().values())
    merge_(model)
    assert model[0].weight.is_contiguous(memory_format=wanted)
    assert not model[0].weight.is_contiguous()
    plain, _ = holding(name, kind)
    merge_(plain)
    assert plain[0].weight.is_contiguous()
    torch.testing.assert_close(plain[0].weight, model[0].weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_factors_give_a_frozen_weight(frozen):
    model, _ = holding("Conv1d", "channel_svd", frozen=frozen)
    merge_(model)
    assert model[0].weight.requires_grad == model[0].bias.requires_grad == (not frozen)
    model, _ = holding("Conv1d", "channel_svd")
    model[0].reduce.requires_grad_(requires_grad=False)  # one of the factors alone
    merge_(model)
    assert not model[0].weight.requires_grad


def test_whole_model_keeps_everything_else(net, images):
    dense = copy.deepcopy(net)
    net.norm.eval()
    apply_plan_(net, plan_for_net(net))
    net.fc1.eval()
    net.conv1.requires_grad_(requires_grad=False)
    others = {name: module for name, module in net.named_modules() if name in ("norm", "fc2")}
    biases = {name: net.get_submodule(name).bias for name in RANKS}
    copied = copy.deepcopy(net).eval()
    state = torch.get_rng_state()
    assert merge_(net) == tuple(RANKS)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(isinstance(module, FactorisedLayer) for module in net.modules())
    assert list(net.state_dict()) == list(dense.state_dict())
    assert list(dict(net.named_modules())) == list(dict(dense.named_modules()))
    assert all(net.get_submodule(name) is module for name, module in others.items())
    assert all(net.get_submodule(name).bias is bias for name, bias in biases.items())
    assert [name for name, module in net.named_modules() if not module.training] == ["norm", "fc1"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight", "conv1.bias"]
    dense.load_state_dict(net.state_dict(), strict=True)
    for model in (net.eval(), dense.eval()):
        torch.testing.assert_close(model(images), copied(images), rtol=1e-5, atol=1e-6)


def test_hooks_move_back_and_their_handles_work(net, images):
    calls = []
    before = net.conv1.register_forward_hook(lambda *_: calls.append("before"))
    apply_plan_(net, plan_for_net(net))
    after = net.conv1.register_forward_pre_hook(lambda *_: calls.append("after"))
    backward = net.fc1.register_full_backward_hook(lambda *_: calls.append("backward"))
    merge_(net)
    net(images).sum().backward()
    assert sorted(calls) == ["after", "backward", "before"]
    for handle in (before, after, backward):
        handle.remove()
    net(images).sum().backward()
    assert len(calls) == 3


def test_layer_under_several_names_is_one_layer_again():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(16, 16)})
    apply_plan_(model, search_ranks(model, Budget(params=0.7), method="exact"))
    assert isinstance(model["a"], FactorisedLayer)
    names = merge_(model)
    assert names[0] == "a"
    assert "b.0" not in names
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.embed = nn.Linear(16, 60), nn.Embedding(60, 16)  # the layer that follows comes first
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_weight_of_two_layers_is_one_again():
    model, tokens = Language(), torch.tensor([[1, 5, 59]])
    compress_(model, BUDGET, example_input=tokens, **WEIGHTS_ALONE)
    assert isinstance(model.head, FactorisedLayer)
    expected, hidden = model(tokens), model.embed(tokens)
    assert set(merge_(model)) == {"embed", "head"}
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 2
    torch.testing.assert_close(model.embed(tokens), hidden)
    torch.testing.assert_close(model(tokens), expected)
    Language().load_state_dict(model.state_dict(), strict=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).mT, dim=-1) @ self.v(x)


def test_layers_that_share_their_first_factor_part_again():
    model, x = Attention(), torch.randn(2, 5, 16)
    costs = Costs(1, None, 4)
    layers = tuple(LayerPlan(n, "Linear", "svd", (4,), (16, 16), 0.5, 10, 5, joint_with="q") for n in ("q", "k", "v"))
    apply_plan_(model, Plan(layers, costs, costs))
    assert model.q.reduce.weight is model.k.reduce.weight is model.v.reduce.weight
    expected = model(x)
    assert merge_(model) == ("q", "k", "v")
    assert len({id(layer.weight) for layer in (model.q, model.k, model.v)}) == 3
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_meta_model_can_be_merged():
    with torch.device("meta"):
        net = TinyNet()
    apply_shells_(net, plan_for_net(net))
    assert merge_(net) == tuple(RANKS)
    assert all(p.is_meta for p in net.parameters())
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in TinyNet().named_parameters()}


def test_merging_twice_gives_independent_layers(net):
    apply_plan_(net, plan_for_net(net))
    other = copy.copy(net.fc1).to_dense()
    merge_(net)
    assert other.weight is not net.fc1.weight
    assert other._forward_hooks is not net.fc1._forward_hooks


def test_parameters_made_in_inference_mode_can_be_trained(net, images):
    apply_plan_(net, plan_for_net(net))
    with torch.inference_mode():
        merge_(net)
    net(images).sum().backward()
    assert net.conv1.weight.grad is not None


def test_failure_changes_nothing(net, unchanged, monkeypatch):
    apply_plan_(net, plan_for_net(net))
    before = unchanged(net)
    with pytest.raises(KeyboardInterrupt):
        merge_(net, progress=interrupting("merging layers", 0.6))
    before.check()
    monkeypatch.setattr(net.fc1, "to_dense", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_(net)
    before.check()
    steps = []
    monkeypatch.undo()
    merge_(net, progress=lambda what, done: steps.append((what, done)))
    assert steps == [("merging layers", done) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]


def test_model_without_factorised_layers_is_an_error(net, unchanged):
    before = unchanged(net)
    with pytest.raises(ModelError, match=r"^TinyNet holds no factorised layer: merge_ takes a model after compress_"):
        merge_(net)
    before.check()
    with pytest.raises(ConfigurationError, match=r"model=3: expected a torch.nn.Module"):
        merge_(3)


def test_factorised_layer_alone_is_an_error_that_says_what_to_do():
    layer = factorised(LAYERS["Linear"].layer(), "svd")
    with pytest.raises(ModelError, match=r"the model itself is a factorised layer.*call its to_dense"):
        merge_(layer)
    assert type(layer.to_dense()) is nn.Linear

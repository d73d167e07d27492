"""Layers that compute their weight or do something around their operation are factorised by their adapters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress import (
    LayerAdapter,
    LayerPlan,
    Plan,
    apply_plan_,
    load_compressed,
    merge_,
    register_layer_adapter,
    save_compressed,
)
from lightning_compress.analysis.inventory import list_layers
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import CompressionWarning, ConfigurationError
from lightning_compress.layers import adapters
from lightning_compress.layers.unfused import unfused
from tests.support.adapted import (
    ALL,
    SIZE,
    OwnConv2d,
    Patches,
    as_kernel,
    at_full_rank,
    doubled,
    listed,
    made,
    near,
    net_of,
    outputs,
    own_padding,
    own_weight,
    searched,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")  # torch's word on its own function


@pytest.fixture
def registry(monkeypatch):
    """What was registered, forgotten again at the end."""
    monkeypatch.setattr(adapters, "_REGISTERED", {})


@pytest.fixture
def own(registry):
    settings = {"weight": own_weight, "before": own_padding, "after": doubled, "settings": ("reach",)}
    register_layer_adapter(OwnConv2d, LayerAdapter(nn.Conv2d, **settings))


# --- other norms and other classes


def test_orthogonal_weight():
    net = nn.Sequential(parametrizations.orthogonal(nn.Linear(32, 64)), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(5, 32)
    expected = net(x).detach()
    apply_plan_(net, at_full_rank(net, "0", "svd", 32), example_input=(1, 32))
    assert near(net(x).detach(), expected)


def test_transposed_convolution_with_a_norm():
    net = nn.Sequential(parametrizations.weight_norm(nn.ConvTranspose1d(16, 32, 4, 2, 1)), nn.Conv1d(32, 8, 1)).eval()
    x = torch.randn(2, 16, 9)
    with torch.no_grad():
        expected = net(x)
        apply_plan_(net, at_full_rank(net, "0", "channel_svd", 32), example_input=(1, 16, 9))
        assert near(net(x), expected)


def tied_norms():
    net = net_of(ALL["weight_norm"]())
    net.append(parametrizations.weight_norm(nn.Linear(10, 10)))
    net.append(parametrizations.weight_norm(nn.Linear(10, 10)))
    net[8].parametrizations.weight.original1 = net[7].parametrizations.weight.original1
    return net


def test_tied_weights_are_not_folded():
    net = tied_norms()
    reasons = {name: layer.reason for name, layer in listed(net).items()}
    assert reasons["7"] == reasons["8"] == "its weight is tied to another module's, factorising would untie it"
    with unfused(net):
        assert {name: layer.reason for name, layer in listed(net).items()} == reasons


def test_a_weight_on_the_meta_device_cannot_be_computed():
    with torch.device("meta"):
        net = net_of(ALL["weight_norm"]())
    assert listed(net)["2"].reason == "its weight is computed from values, and it is on the meta device"


@pytest.mark.usefixtures("own")
def test_adapter_of_ones_own(tmp_path):
    net = net_of(OwnConv2d)
    expected = outputs(net)
    plan = at_full_rank(net)
    apply_plan_(net, plan, example_input=SIZE)
    assert near(outputs(net), expected)
    assert net[2].reach == 2
    assert near(outputs(pickle.loads(pickle.dumps(net))), expected)
    save_compressed(net, tmp_path)
    other = net_of(OwnConv2d)
    load_compressed(other, tmp_path)
    assert torch.equal(outputs(other), outputs(net))
    merge_(net)
    assert near(outputs(net), expected)
    assert near(outputs(copy.deepcopy(net)), expected)
    assert near(outputs(pickle.loads(pickle.dumps(net))), expected)
    assert listed(net)["2"].type == "OwnConv2d"
    assert searched(net, include=OwnConv2d).factorised == searched(net, include="OwnConv2d").factorised


@pytest.mark.usefixtures("registry")
def test_a_class_that_is_none_of_torchs_with_the_weight_of_one():
    class Net(nn.Sequential):
        pass

    net = Net(nn.Conv2d(3, 32, 3), Patches(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    assert listed(net)["1"].reason == "no kind factorises Patches: say how with register_layer_adapter"
    register_layer_adapter(f"{Patches.__module__}.Patches", LayerAdapter(nn.Conv2d, weight=as_kernel))
    expected = outputs(net)
    apply_plan_(net, at_full_rank(net, "1"), example_input=SIZE)
    assert near(outputs(net), expected)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"before": own_padding}, "it holds parameters (size) that its adapter says nothing of"),
        ({"weight": own_weight, "after": doubled}, "its adapter returns (1, 64, 4, 4) on random values where the"),
        (
            {"weight": own_weight, "before": own_padding, "settings": ("reach",)},
            "its adapter does something else than the layer: on random values they differ by 50.0% in eval mode",
        ),
        (
            {"weight": own_weight, "before": own_padding, "settings": ("rich",)},
            "its adapter fails on random values: AttributeError",
        ),
    ],
)
def test_an_adapter_that_is_wrong_leaves_the_layer_dense(settings, reason):
    register_layer_adapter(OwnConv2d, LayerAdapter(nn.Conv2d, **settings))
    assert listed(net_of(OwnConv2d))["2"].reason.startswith(reason)


class Noisy(nn.Linear):
    def forward(self, input):
        return super().forward(input * 2 if self.training else input)


@pytest.mark.usefixtures("registry")
def test_an_adapter_has_to_be_right_in_training_too():
    register_layer_adapter(Noisy, LayerAdapter(nn.Linear))
    net = nn.Sequential(Noisy(8, 8), nn.Linear(8, 8))
    assert listed(net)["0"].reason.endswith("in training")
    assert net[0].training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerAdapter(nn.LSTM), "plain=<class 'torch.nn.modules.rnn.LSTM'>"),
        (lambda: LayerAdapter(nn.Linear, weight=1), "weight=1"),
        (lambda: LayerAdapter(nn.Linear, settings="eps"), "settings='eps'"),
        (lambda: LayerAdapter(nn.ConvTranspose2d, before=own_padding), "no before and after"),
        (lambda: register_layer_adapter(OwnConv2d, nn.Conv2d), "expected a LayerAdapter"),
        (lambda: register_layer_adapter("OwnConv2d", LayerAdapter(nn.Conv2d)), "'OwnConv2d'"),
        (lambda: register_layer_adapter(nn.Conv2d, LayerAdapter(nn.Conv2d)), "nn.Conv2d"),
        (lambda: register_layer_adapter(Patches, LayerAdapter(nn.Conv2d)), "it is no subclass of nn.Conv2d"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert message in str(caught.value)


def test_a_plan_that_gives_up_a_layer_because_of_unknown_classes_warns():
    class Mine(nn.Conv2d):
        def forward(self, input):
            return super().forward(input)

    net = nn.Sequential(Mine(3, 64, 3), Mine(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 200))
    with pytest.warns(CompressionWarning, match=r"74.9 % of the parameters stay dense .*Mine") as seen:
        searched(net, 0.78)
    assert "layer '4' loses" in str(seen[0].message)


# --- whole nets


def test_nets_of_standardised_convolutions_go_far_below_what_their_classifier_holds():
    net = made("StdConv2d")
    share = 1 - sum(p.numel() for p in net[6].parameters()) / sum(p.numel() for p in net.parameters())
    assert share > 0.9
    plan = searched(net, 0.3)
    assert plan.kept["params"] <= 0.3
    assert {layer.type for layer in plan.factorised} >= {"StdConv2d"}


def test_efficientnet_that_pads_by_itself_is_factorised_in_its_convolutions():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    layers = listed(net)
    assert {layer.reason.split(" (")[0] for layer in layers.values() if layer.reason} == {
        "no kind factorises BatchNorm2d",
        "depthwise convolution",
    }
    open_ = sum(layer.parameters for layer in layers.values() if layer.reason is None)
    assert open_ > 0.9 * sum(p.numel() for p in net.parameters())


# --- packages that need not be installed


def language_models():
    return {
        "bart": ("BartConfig", "BartForConditionalGeneration", BART, "embed_positions"),
        "opt": ("OPTConfig", "OPTForCausalLM", OPT, "embed_positions"),
        "gemma": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA, "embed_tokens"),
        "falcon": ("FalconConfig", "FalconForCausalLM", FALCON, "dense_h_to_4h"),
    }


BART = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "max_position_embeddings": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "scale_embedding": True,
}
OPT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
GEMMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FALCON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("name", language_models())
def test_classes_of_transformers_are_factorised_at_full_rank_to_the_same_outputs(name):
    transformers = pytest.importorskip("transformers")
    config, cls, sizes, of_class = language_models()[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    ids = {"input_ids": torch.randint(3, 300, (1, 8), generator=torch.Generator().manual_seed(1))}
    open_ = [layer for layer in list_layers(model) if layer.reason is None]
    assert any(of_class in layer.name for layer in open_)
    ranks = [(layer, (min(layer.operator.shape[:2]),)) for layer in open_]
    planned = [LayerPlan(la.name, la.type, "svd", rank, la.weight_shape, 0.0, 2, 1) for la, rank in ranks]
    with torch.no_grad():
        expected = model(**ids).logits
        apply_plan_(model, Plan(tuple(planned), Costs(1, None, 4), Costs(1, None, 4)), example_input=ids)
        assert near(model(**ids).logits, expected, 1e-3)
        assert model.double()(**ids).logits.dtype == torch.float64

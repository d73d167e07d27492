"""Every layer with its kinds, or with its reason to stay dense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import list_layers, take_inventory
from lightning_compress.analysis.trace import trace
from lightning_compress.analysis.usable import require_usable_weights
from lightning_compress.core.errors import ModelError, NonFiniteWeightError, NothingToFactoriseError
from lightning_compress.layers.families import layer_type
from lightning_compress.layers.unfused import unfused
from tests.support.selecting import With, chosen_in, layers_of, reasons_of


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class MyBag(nn.EmbeddingBag):
    def rows(self):
        return self.weight


class Named(nn.Conv3d):
    """A convolution in all but its name, such as torchvision's Conv3DSimple."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, kernel_size=3, padding=1)

    @staticmethod
    def get_downsample_stride(stride):
        return stride


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = 2.0


class Mixed(Named):
    weight_norm = property(lambda self: self.weight.norm())


class Sharded(nn.ModuleList, nn.Linear):
    """Of two classes, as fully_shard makes them."""

    def __init__(self):
        nn.Linear.__init__(self, 8, 8)


def more(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


class Conv1D(nn.Module):
    """Of that name, but not the one of transformers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))


def test_every_parameterised_module_is_listed_in_order(net):
    layers = layers_of(net)
    assert list(layers) == ["conv1", "norm", "conv2", "point", "fc1", "fc2"]
    types = [layer.type for layer in layers.values()]
    assert types == ["Conv2d", "BatchNorm2d", "Conv2d", "Conv2d", "Linear", "Linear"]
    assert [layer.parameters for layer in layers.values()] == [224, 16, 1152, 272, 544, 132]
    assert layers["conv1"].kinds == ("channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "cp")
    assert layers["conv2"].kinds == ("channel_svd", "spatial_svd", "tucker2", "tt", "cp3")
    assert layers["point"].kinds == layers["fc1"].kinds == ("svd", "interpolative")
    assert layers["norm"].kinds == ()
    assert layers["norm"].reason == "no kind factorises BatchNorm2d"
    assert layers["conv2"].weight_shape == (16, 8, 3, 3)
    assert layers["fc1"].calls is None


def with_hook(register, on_weight=False):
    layer = nn.Linear(8, 8)
    getattr(layer.weight if on_weight else layer, register)(lambda *_: None)
    return layer


def pruned():
    layer = nn.Linear(8, 8)
    torch.nn.utils.prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def parametrised(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


SUBCLASS = "{} is a subclass of {} and may use its weight in its own way"
COMPUTED = "its weight is computed from other parameters"
RENORMALISED = "its max_norm renormalises the rows it looks up"
DEPTHWISE = "depthwise convolution (groups=8): one channel per group has no low rank"
GRADIENT_HOOK = "its weight carries a gradient hook, which factors would lose"
STATE_HOOKS = "it carries state-dict hooks, which expect a dense weight"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MyLinear(8, 8), SUBCLASS.format("MyLinear", "Linear")),
        (lambda: MyBag(8, 8), SUBCLASS.format("MyBag", "EmbeddingBag")),
        (lambda: nn.PReLU(8), "no kind factorises PReLU"),
        (Conv1D, "no kind factorises Conv1D"),
        (lambda: nn.LayerNorm(8), "no kind factorises LayerNorm"),
        (lambda: nn.Bilinear(8, 8, 8), "no kind factorises Bilinear"),
        (lambda: nn.GRUCell(8, 8), "no kind factorises GRUCell"),
        (lambda: nn.Embedding(8, 8, max_norm=1.0), RENORMALISED),
        (lambda: nn.EmbeddingBag(8, 8, max_norm=1.0), RENORMALISED),
        (lambda: nn.EmbeddingBag(8, 8, mode="max"), "it takes the largest of the rows it looks up (mode='max'), which"),
        (lambda: parametrised(nn.Linear(8, 8)), "it is parametrised (Identity): remove_parametrizations of torch.nn"),
        (pruned, COMPUTED),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), DEPTHWISE),
        (lambda: nn.Conv2d(8, 16, 3, groups=8), DEPTHWISE),
        (lambda: with_hook("register_hook", True), GRADIENT_HOOK),
        (lambda: with_hook("register_post_accumulate_grad_hook", True), GRADIENT_HOOK),
        (lambda: with_hook("register_state_dict_post_hook"), STATE_HOOKS),
        (lambda: with_hook("register_state_dict_pre_hook"), STATE_HOOKS),
        (lambda: with_hook("register_load_state_dict_pre_hook"), STATE_HOOKS),
        (lambda: with_hook("register_load_state_dict_post_hook"), STATE_HOOKS),
        (lambda: more(nn.Linear(8, 8), forward=lambda x: x), "its forward method was replaced on the instance"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its weight is of dtype torch.complex64"),
    ],
)
def test_layers_that_factors_cannot_replace_stay_dense_with_a_reason(make, reason):
    reasons = reasons_of(With(make()))
    assert list(reasons)[:2] == ["other", "layer"]
    assert reasons["other"] is None
    assert reasons["layer"].startswith(reason)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions_do_not_stay_dense(groups):
    assert reasons_of(With(nn.Conv2d(8, 16, 3, groups=groups)))["layer"] is None


def test_gradient_hook_that_is_removed_does_not_matter():
    model = With(nn.Linear(8, 8))
    model.layer.weight.register_hook(lambda *_: None).remove()
    assert reasons_of(model)["layer"] is None


@pytest.mark.parametrize(
    "layer",
    [
        Scaled(8, 8),
        Mixed(8, 8),
        more(Named(8, 8), scale=nn.Parameter(torch.ones(1))),
        more(Named(8, 8), norm=nn.BatchNorm3d(8)),
        Sharded(),
    ],
)
def test_subclasses_with_more_than_a_name_are_of_no_known_type(layer):
    assert layer_type(layer) is None


def test_subclasses_in_nothing_but_the_name_are_factorised():
    model = nn.Sequential(Named(8, 8), nn.ReLU(), Named(8, 4)).eval()
    more(model[0], _is_initialised=True)
    dense = copy.deepcopy(model)
    plan = search_ranks(model, Budget(params=0.5), example_input=(1, 8, 4, 4, 4), objective="weight")
    assert {layer.type for layer in plan.factorised} == {"Named"}
    (replacement, *_) = apply_plan_(model, plan)
    images = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert model(images).shape == dense(images).shape
    assert type(replacement.factorised.to_dense()) is Named


def test_attention_projections_can_be_factorised_once_unfused():
    model = With(nn.MultiheadAttention(8, 2))
    assert reasons_of(model)["layer"] == "no kind factorises MultiheadAttention"
    with unfused(model):
        assert reasons_of(model) == {"other": None, "layer.in_proj": None, "layer.out_proj": None}


def test_tied_weights_stay_dense_and_a_tied_bias_does_not_matter():
    model = nn.ModuleDict({"embed": nn.EmbeddingBag(9, 8), "head": nn.Linear(8, 9), "free": nn.Linear(8, 9)})
    model["head"].weight = model["embed"].weight
    model["free"].bias = model["head"].bias
    reasons = reasons_of(model)
    assert reasons["head"] == "its weight is tied to another module's, factorising would untie it"
    assert reasons["embed"] == reasons["head"]
    assert reasons["free"] is None


def test_the_model_itself_stays_dense():
    with pytest.raises(NothingToFactoriseError, match=r"(?s)Linear holds no layer.*the model itself.*no parent.*wrap"):
        take_inventory(nn.Linear(8, 8))
    assert chosen_in(nn.Sequential(nn.Linear(8, 8))) == ["0"]


def test_factorised_layer_stays_as_it_is(net):
    plan = search_ranks(net, Budget(params=0.85), include="fc1", method="exact")
    apply_plan_(net, plan)
    layer = layers_of(net)["fc1"]
    assert layer.reason == f"already factorised (svd, ranks {plan.factorised[0].ranks})"
    assert layer.parameters == plan.factorised[0].params_after
    assert not any(name.startswith("fc1.") for name in layers_of(net))


class ReadsElsewhere(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.use = use

    def forward(self, x):
        return self.use(self, self.other(x))


ELSEWHERE = "its weight is used outside its own forward"


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda m, x: F.linear(x, m.fc.weight), ELSEWHERE),
        (lambda m, x: F.linear(m.fc(x), weight=m.fc.weight.t()), ELSEWHERE),
        (lambda m, x: m.fc(x) + m.fc.weight.square().sum(), ELSEWHERE),
        (lambda m, x: torch.cat([m.fc(x), m.fc.weight]), ELSEWHERE),
        (lambda m, x: x, "it is not called in the forward pass on the example input"),
        (lambda m, x: m.fc(x).to(m.fc.weight.dtype) * m.fc.weight.shape[0], None),
        (lambda m, x: m.fc(m.fc(x)), None),
    ],
)
def test_trace_finds_weights_used_elsewhere_and_layers_never_called(use, reason):
    model = ReadsElsewhere(use)
    assert reasons_of(model, trace=trace(model, (1, 8))) == {"fc": reason, "other": None}
    assert reasons_of(model) == {"fc": None, "other": None}


def test_shared_module_is_one_layer_with_every_name():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    layers = layers_of(model)
    assert list(layers) == ["a", "c"]
    assert layers["a"].aliases == ("a", "b.0")
    assert layers["a"].reason is None
    assert chosen_in(model, include="b.0") == ["a"]
    assert chosen_in(model, exclude=["b.*"]) == ["c"]


def test_shared_module_counts_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x)[:, :1])

    model = Twice()
    assert [call.rows for call in layers_of(model, trace=trace(model, (1, 5, 8)))["a"].calls] == [5, 1]


def test_general_kinds_that_do_not_apply_are_reasons(net):
    reasons = reasons_of(net, kinds="svd")
    assert reasons["conv1"] == "svd factorises nn.Linear, embeddings and 1x1 convolutions only"
    assert reasons["point"] is None
    both = reasons_of(net, kinds=["tucker2", "spatial_svd"])["fc1"]
    assert both == (
        "tucker2 factorises convolutions only; spatial_svd factorises convolutions over two axes or more only"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv2.weight", "norm.bias"])
def test_non_finite_weight_is_named(net, name, value):
    with torch.no_grad():
        net.get_parameter(name).view(-1)[1] = value
    size = net.get_parameter(name).numel()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(
        NonFiniteWeightError, match=f"parameter '{name}' holds 1 NaN or infinite values of {size}: load"
    ):
        search_ranks(net, Budget(params=0.5))
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch's own
def test_lazy_module_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ModelError, match=r"parameter '0.weight' has no shape yet: run one batch through the model"):
        search_ranks(model, Budget(params=0.5))
    with pytest.raises(ModelError, match=r"parameter '0.weight' has no shape yet"):
        require_usable_weights(model)
    model(torch.zeros(1, 8))
    require_usable_weights(model)
    assert chosen_in(model) == ["0", "1"]


def test_nothing_to_factorise_lists_every_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    with pytest.raises(NothingToFactoriseError) as error:
        take_inventory(model)
    first, *others, last = str(error.value).splitlines()
    assert first == "Sequential holds no layer that can be factorised:"
    assert others == ["  0 (Conv2d): depthwise convolution (groups=4): one channel per group has no low rank"]
    assert last == "  1 (BatchNorm2d): no kind factorises BatchNorm2d"


def test_nothing_to_factorise_is_short_for_a_deep_model():
    with pytest.raises(NothingToFactoriseError) as error:
        take_inventory(nn.Sequential(*[nn.LayerNorm(2) for _ in range(50)]))
    assert len(str(error.value).splitlines()) == 22
    assert str(error.value).endswith("… and 30 more")


def test_model_without_parameters_says_so():
    with pytest.raises(NothingToFactoriseError, match="it has no parameters at all"):
        take_inventory(nn.Sequential(nn.ReLU()))


def test_inventory_does_not_change_the_model(net, unchanged):
    before = unchanged(net)
    take_inventory(net, include="conv*", overrides={"conv1": {"max_rank": 2}}, trace=trace(net, (2, 3, 8, 8)))
    list_layers(net)
    before.check()

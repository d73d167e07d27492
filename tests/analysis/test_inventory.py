from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, Override, apply_plan_, search_ranks
from lightning_compress.analysis.inventory import list_layers, take_inventory
from lightning_compress.analysis.trace import trace
from lightning_compress.analysis.usable import require_usable_weights
from lightning_compress.core.errors import (
    ConfigurationError,
    ModelError,
    NonFiniteWeightError,
    NothingToFactoriseError,
    SelectionError,
)
from lightning_compress.layers.families import layer_type
from lightning_compress.layers.unfused import unfused


class With(nn.Module):
    """One factorisable layer besides the one under test."""

    def __init__(self, layer):
        super().__init__()
        self.other = nn.Linear(8, 8)
        self.layer = layer

    def forward(self, x):
        return self.layer(self.other(x))


def layers_of(model, **settings):
    return {layer.name: layer for layer in take_inventory(model, **settings)}


def reasons_of(model, **settings):
    return {name: layer.reason for name, layer in layers_of(model, **settings).items()}


def chosen_in(model, **settings):
    return [name for name, reason in reasons_of(model, **settings).items() if reason is None]


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
    assert [layer.type for layer in layers.values()] == [
        "Conv2d",
        "BatchNorm2d",
        "Conv2d",
        "Conv2d",
        "Linear",
        "Linear",
    ]
    assert [layer.parameters for layer in layers.values()] == [224, 16, 1152, 272, 544, 132]
    assert layers["conv1"].kinds == ("channel_svd", "spatial_svd", "tucker2", "tt", "cp3", "cp")
    assert layers["conv2"].kinds == ("channel_svd", "spatial_svd", "tucker2", "tt", "cp3")
    assert layers["point"].kinds == layers["fc1"].kinds == ("svd", "interpolative")
    assert layers["norm"].kinds == ()
    assert layers["norm"].reason == "no kind factorises BatchNorm2d"
    assert layers["conv2"].weight_shape == (16, 8, 3, 3)
    assert layers["fc1"].calls is None


@pytest.mark.parametrize(
    "layer",
    [MyLinear(8, 8), MyBag(8, 8), nn.PReLU(8), Conv1D(), nn.LayerNorm(8), nn.Bilinear(8, 8, 8), nn.GRUCell(8, 8)],
)
def test_other_types_and_subclasses_stay_dense(layer):
    reasons = reasons_of(With(layer))
    assert list(reasons) == ["other", "layer"]
    assert reasons["other"] is None
    parent = {MyLinear: "Linear", MyBag: "EmbeddingBag"}.get(type(layer))
    assert reasons["layer"] == (
        f"{type(layer).__name__} is a subclass of {parent} and may use its weight in its own way"
        if parent
        else f"no kind factorises {type(layer).__name__}"
    )


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


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(8, 8, max_norm=1.0), "its max_norm renormalises the rows it looks up"),
        (nn.EmbeddingBag(8, 8, max_norm=1.0), "its max_norm renormalises the rows it looks up"),
        (
            nn.EmbeddingBag(8, 8, mode="max"),
            "it takes the largest of the rows it looks up (mode='max'), which factors cannot",
        ),
    ],
)
def test_lookups_that_do_more_than_look_up_stay_dense(layer, reason):
    assert reasons_of(With(layer))["layer"] == reason


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


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")  # torch's word on its own function
def test_old_weight_norm_stays_dense():
    reason = reasons_of(With(torch.nn.utils.weight_norm(nn.Linear(8, 8))))["layer"]
    assert reason.startswith("its weight is computed from other parameters")


def test_new_weight_norm_and_pruning_stay_dense():
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    reason = "ParametrizedLinear is a subclass of Linear and may use its weight in its own way"
    assert reasons_of(With(normed))["layer"] == reason
    pruned = nn.Linear(8, 8)
    torch.nn.utils.prune.random_unstructured(pruned, "weight", amount=0.5)
    assert reasons_of(With(pruned))["layer"].startswith("its weight is computed from other parameters")


@pytest.mark.parametrize("out", [8, 16])
def test_depthwise_convolution_stays_dense_and_other_groups_do_not(out):
    reason = reasons_of(With(nn.Conv2d(8, out, 3, groups=8)))["layer"]
    assert reason == "depthwise convolution (groups=8): one channel per group has no low rank"
    for groups in (1, 2, 4):
        assert reasons_of(With(nn.Conv2d(8, out, 3, groups=groups)))["layer"] is None


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hook_on_the_weight_keeps_it_dense(register):
    model = With(nn.Linear(8, 8))
    handle = getattr(model.layer.weight, register)(lambda *_: None)
    assert reasons_of(model)["layer"] == "its weight carries a gradient hook, which factors would lose"
    handle.remove()
    assert reasons_of(model)["layer"] is None


def test_replaced_forward_stays_dense():
    model = With(nn.Linear(8, 8))
    model.layer.forward = lambda x: F.linear(x, model.layer.weight)
    assert reasons_of(model)["layer"] == "its forward method was replaced on the instance"


@pytest.mark.parametrize(
    "register",
    [
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_state_dict_hooks_keep_it_dense(register):
    model = With(nn.Linear(8, 8))
    getattr(model.layer, register)(lambda *_: None)
    assert reasons_of(model)["layer"] == "it carries state-dict hooks, which expect a dense weight"


def test_the_model_itself_stays_dense():
    with pytest.raises(NothingToFactoriseError, match=r"(?s)Linear holds no layer.*the model itself.*no parent.*wrap"):
        take_inventory(nn.Linear(8, 8))
    assert chosen_in(nn.Sequential(nn.Linear(8, 8))) == ["0"]


def test_complex_weight_stays_dense():
    assert reasons_of(With(nn.Linear(8, 8, dtype=torch.complex64)))["layer"] == "its weight is of dtype torch.complex64"


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


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda m, x: F.linear(x, m.fc.weight), "its weight is used outside its own forward"),
        (lambda m, x: F.linear(m.fc(x), weight=m.fc.weight.t()), "its weight is used outside its own forward"),
        (lambda m, x: m.fc(x) + m.fc.weight.square().sum(), "its weight is used outside its own forward"),
        (lambda m, x: torch.cat([m.fc(x), m.fc.weight]), "its weight is used outside its own forward"),
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


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("fc1", ["fc1"]),
        ("fc*", ["fc1", "fc2"]),
        ("*1", ["conv1", "fc1"]),
        ("Conv2d", ["conv1", "conv2", "point"]),
        ("nn.Conv2d", ["conv1", "conv2", "point"]),
        ("torch.nn.Linear", ["fc1", "fc2"]),
        (nn.Linear, ["fc1", "fc2"]),
        (["point", nn.Linear], ["point", "fc1", "fc2"]),
        (("conv[12]",), ["conv1", "conv2"]),
    ],
)
def test_include_and_exclude_take_names_globs_types_and_classes(net, pattern, expected):
    every = ["conv1", "conv2", "point", "fc1", "fc2"]
    assert chosen_in(net, include=pattern) == expected
    assert chosen_in(net, exclude=pattern) == [name for name in every if name not in expected]
    reasons = reasons_of(net, include=pattern)
    assert {reasons[name] for name in every if name not in expected} == {"not matched by include"}
    assert {reasons_of(net, exclude=pattern)[name] for name in expected} == {"matched by exclude"}


def test_own_reason_of_a_layer_comes_before_that_of_a_pattern(net):
    reasons = (
        reasons_of(net, exclude="norm"),
        reasons_of(net, include="fc1"),
        reasons_of(net, overrides={"norm": "dense"}),
    )
    assert {r["norm"] for r in reasons} == {"no kind factorises BatchNorm2d"}


def test_exclude_wins_over_include(net):
    assert chosen_in(net, include="fc*", exclude="fc2") == ["fc1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["fc9", "block.*", "Conv3d", "nn.Conv3d", nn.Conv3d])
def test_pattern_without_a_match_is_an_error(net, argument, pattern):
    with pytest.raises(SelectionError, match=rf"^{argument}: .*matches no layer.*named_modules.*such as '") as error:
        take_inventory(net, **{argument: ["fc1", pattern]})
    assert repr(pattern) in str(error.value)


def test_unmatched_override_is_an_error(net):
    with pytest.raises(SelectionError, match=r"overrides: 'fc7' matches no layer.*such as .*'fc1'.*globs"):
        take_inventory(net, overrides={"fc7": "dense"})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, [3], [None], {"fc1": 1}])
def test_pattern_of_a_wrong_type_is_an_error(net, argument, value):
    with pytest.raises(
        ConfigurationError, match=f"^{argument}=.*expected a name, a glob, a layer type, or a list"
    ) as e:
        take_inventory(net, **{argument: value})
    assert repr(value) in str(e.value)


def test_overrides_set_kinds_and_bounds(net):
    layers = layers_of(
        net,
        overrides={
            "conv*": {"kinds": ["tucker2"], "min_rank": 2},
            "fc1": Override(max_rank=3),
            "fc2": "dense",
            "point": {"dense": True},
        },
    )
    assert [layers[name].kinds for name in ("conv1", "conv2")] == [("tucker2",)] * 2
    assert [(layers[name].min_rank, layers[name].max_rank) for name in ("conv1", "fc1")] == [(2, None), (1, 3)]
    assert layers["fc2"].reason == layers["point"].reason == "kept dense by overrides"


def test_later_override_wins_field_by_field(net):
    layers = layers_of(
        net,
        overrides={
            "nn.Conv2d": {"kinds": "channel_svd", "min_rank": 2, "max_rank": 6},
            "conv*": {"max_rank": 4},
            "conv2": {"kinds": "spatial_svd", "min_rank": 1},
            "point": {"kinds": "svd"},
        },
    )
    found = {name: (layers[name].kinds, layers[name].min_rank, layers[name].max_rank) for name in ("conv1", "conv2")}
    assert found == {"conv1": (("channel_svd",), 2, 4), "conv2": (("spatial_svd",), 1, 4)}
    assert (layers["point"].min_rank, layers["point"].max_rank) == (2, 6)


def test_overrides_of_several_patterns_that_cross_are_an_error(net):
    with pytest.raises(ConfigurationError, match=r"min_rank=6, max_rank=4.*min_rank must not exceed max_rank"):
        take_inventory(net, overrides={"Linear": {"min_rank": 6}, "fc1": {"max_rank": 4}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("fc1", "dense")], r"overrides=\[\('fc1', 'dense'\)\]: expected a mapping from patterns"),
        ("fc1", r"overrides='fc1': expected a mapping from patterns"),
        ({"fc1": 5}, r"overrides\['fc1'\]=5: expected a mapping such as"),
        ({"fc1": {"maxrank": 5}}, r"overrides\['fc1'\]: unknown key 'maxrank'. Did you mean 'max_rank'"),
        ({"fc1": {"max_rank": 0}}, r"Override\(max_rank=0\): expected a whole number of at least 1"),
        ({"fc1": {"min_rank": 2.5}}, r"Override\(min_rank=2.5\): expected a whole number"),
        ({"fc1": {"min_rank": True}}, r"Override\(min_rank=True\): expected a whole number"),
        ({"fc1": {"min_rank": 3, "max_rank": 2}}, r"min_rank=3, max_rank=2.*must not exceed"),
        ({"fc1": {"dense": "yes"}}, r"Override\(dense='yes'\): expected true or false"),
        ({"fc1": {"kinds": "tuker2"}}, r"kinds='tuker2': unknown kind 'tuker2'. Did you mean 'tucker2'"),
        ({"fc1": {"kinds": []}}, r"kinds=\[\]: expected 'auto'"),
        (
            {0: "dense"},
            r"overrides: the pattern 0 is no string; quote it, as in \{'0': 'dense'\}",
        ),
    ],
)
def test_malformed_overrides_are_errors(net, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        take_inventory(net, overrides=overrides)


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


def test_excluding_every_layer_leaves_nothing(net):
    with pytest.raises(NothingToFactoriseError, match=r"conv1 \(Conv2d\): matched by exclude"):
        take_inventory(net, exclude=["Conv2d", "Linear"])


def test_inventory_does_not_change_the_model(net, unchanged):
    before = unchanged(net)
    take_inventory(net, include="conv*", overrides={"conv1": {"max_rank": 2}}, trace=trace(net, (2, 3, 8, 8)))
    list_layers(net)
    before.check()

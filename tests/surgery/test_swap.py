from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError, ModelError, NonFiniteWeightError, PlanMismatchError
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.swap import apply_shells_, install, uninstall
from tests.support.nets import TinyNet
from tests.support.plans import RANKS, plan_for


def tampered(plan, index, **fields):
    layers = list(plan.layers)
    layers[index] = dataclasses.replace(layers[index], **fields)
    return dataclasses.replace(plan, layers=tuple(layers))


@pytest.fixture
def plan(net):
    return plan_for(net)


def test_planned_layers_are_replaced_and_the_others_stay(net, plan, images):
    dense = dict(net.named_modules())
    order = list(dict(net.named_children()))
    replacements = apply_plan_(net, plan)
    assert [(r.aliases, r.dense) for r in replacements] == [((name,), dense[name]) for name in RANKS]
    assert all(net.get_submodule(r.aliases[0]) is r.factorised for r in replacements)
    assert {name for name, m in net.named_modules() if isinstance(m, FactorisedLayer)} == set(RANKS)
    assert net.norm is dense["norm"]
    assert net.fc2 is dense["fc2"]
    assert list(dict(net.named_children())) == order
    assert [(net.conv1.kind, net.conv1.ranks), (net.fc1.kind, net.fc1.ranks)] == [RANKS["conv1"], RANKS["fc1"]]
    assert net.conv1.error == 0.5
    assert net(images).shape == (5, 4)


def test_output_is_that_of_the_dense_model_with_the_product_weights(net, plan, images):
    reference = copy.deepcopy(net).eval()
    apply_plan_(net.eval(), plan)
    with torch.no_grad():
        for name in RANKS:
            reference.get_submodule(name).weight.copy_(net.get_submodule(name).weight)
        torch.testing.assert_close(net(images), reference(images), rtol=1e-5, atol=1e-6)


def test_factors_are_the_best_of_their_rank(net, plan):
    weight = net.fc1.weight.detach().double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    apply_plan_(net, plan)
    torch.testing.assert_close(net.fc1.weight.double(), (u[:, :4] * s[:4]) @ v[:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apply", [apply_plan_, apply_shells_])
def test_global_random_state_is_not_used(net, plan, apply):
    state = torch.get_rng_state()
    apply(net, plan)
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_stay_the_same_parameters(net, plan):
    biases = {name: net.get_submodule(name).bias for name in RANKS}
    apply_plan_(net, plan)
    for name, bias in biases.items():
        assert net.get_submodule(name).bias is bias
        assert list(net.get_submodule(name).children())[-1].bias is bias
    assert biases["conv2"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "svd", "type": "Conv2d"}, "fc1"),
        ({"kind": "hosvd"}, "unknown kind 'hosvd'"),
        ({"ranks": (17,)}, "ranks go up to"),
        ({"name": "fc9"}, "'fc9' is not in the model"),
    ],
)
@pytest.mark.parametrize("apply", [apply_plan_, apply_shells_])
def test_plan_with_an_impossible_last_layer_changes_nothing(net, unchanged, plan, fields, message, apply):
    net.norm.eval()
    net.conv1.register_forward_hook(lambda *_: None)
    before = unchanged(net)
    with pytest.raises(PlanMismatchError, match=message):
        apply(net, tampered(plan, -1, **fields))
    before.check()


def test_failure_while_decomposing_changes_nothing(net, unchanged, plan):
    before = unchanged(net)
    steps = []

    def interrupt(what, done):
        steps.append((what, done))
        if done == 0.75:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan_(net, plan, progress=interrupt)
    before.check()
    assert steps == [("factorising layers", done) for done in (0.0, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
    ("index", "fields", "message"),
    [
        (3, {"name": "fc3"}, r"the plan's layer 'fc3' is not in the model. Did you mean 'fc[12]'\? Known: conv1"),
        (3, {"name": "norm"}, r"layer 'norm' cannot be factorised: no kind factorises BatchNorm2d"),
        (
            3,
            {"type": "Conv2d"},
            r"'fc1' is a Linear with weight \(32, 16\) in the model, a Conv2d with weight \(32, 16\)",
        ),
        (
            3,
            {"weight_shape": (32, 17)},
            r"a Linear with weight \(32, 16\) in the model, a Linear with weight \(32, 17\)",
        ),
        (3, {"kind": "svdd"}, r"layer 'fc1' has the unknown kind 'svdd' in the plan. Did you mean 'svd'\? Known: svd"),
        (3, {"kind": "tucker2", "ranks": (2, 2)}, r"'fc1' cannot become tucker2 .*\(2, 2\): tucker2 factorises convol"),
        (
            1,
            {"kind": "svd"},
            r"'conv2' cannot become svd with ranks \(5,\): svd factorises nn.Linear, embeddings and 1x1",
        ),
        (2, {"kind": "channel_svd"}, r"'point' cannot become channel_svd .*: channel_svd of a 1x1 convolution is svd"),
        (3, {"ranks": (17,)}, r"'fc1' cannot become svd with ranks \(17,\): its ranks go up to \(16,\)"),
        (3, {"ranks": (0,)}, r"'fc1' cannot become svd with ranks \(0,\): its ranks go up to \(16,\)"),
        (3, {"ranks": ()}, r"'fc1' cannot become svd with ranks \(\): its ranks go up to \(16,\)"),
        (0, {"ranks": (4,)}, r"'conv1' cannot become tucker2 with ranks \(4,\): its ranks go up to \(8, 3\)"),
        (0, {"ranks": (8, 4)}, r"'conv1' cannot become tucker2 with ranks \(8, 4\): its ranks go up to \(8, 3\)"),
    ],
)
def test_plan_that_does_not_fit_says_what_differs(net, unchanged, plan, index, fields, message):
    before = unchanged(net)
    with pytest.raises(PlanMismatchError, match=message):
        apply_plan_(net, tampered(plan, index, **fields))
    before.check()


def test_misspelt_layer_of_a_deep_model_is_suggested():
    model = nn.ModuleDict({**{f"block{i}": nn.Linear(4, 4) for i in range(12)}, "classifier": nn.Linear(4, 4)})
    plan = tampered(plan_for(model, {"classifier": ("svd", (1,))}), 0, name="clasifier")
    with pytest.raises(PlanMismatchError, match=r"layer 'clasifier' is not in the model\. Did you mean 'classifier'"):
        apply_plan_(model, plan)


def test_second_apply_does_nothing(net, unchanged, plan):
    apply_plan_(net, plan)
    before = unchanged(net)
    assert apply_plan_(net, plan) == ()
    before.check()


def test_rest_of_a_plan_is_applied_to_a_partly_factorised_model(net, plan):
    first = dataclasses.replace(plan, layers=plan.layers[:2])
    apply_plan_(net, first)
    kept = net.conv1
    assert [r.aliases for r in apply_plan_(net, plan)] == [("point",), ("fc1",)]
    assert net.conv1 is kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: tampered(p, 3, ranks=(5,)), r"'fc1' is already factorised \(svd, ranks \(4,\)\), the plan wants svd, ranks \(5,\): apply the plan to the dense model"),  # noqa: E501
        (lambda p: tampered(p, 1, kind="channel_svd"), r"'conv2' is already factorised \(spatial_svd, ranks \(5,\)\), the plan wants channel_svd"),  # noqa: E501
        (lambda p: dataclasses.replace(p, layers=p.layers[:3]), r"layer 'fc1' is factorised in the model \(svd, ranks \(4,\)\) but dense in the plan"),  # noqa: E501
        (lambda p: tampered(p, 3, kind="dense", ranks=()), r"layer 'fc1' is factorised in the model .* but dense in the plan"),  # noqa: E501
    ],
)  # fmt: skip
def test_other_plan_on_a_factorised_model_is_an_error(net, unchanged, plan, change, message):
    apply_plan_(net, plan)
    before = unchanged(net)
    with pytest.raises(PlanMismatchError, match=message):
        apply_plan_(net, change(plan))
    before.check()


@pytest.mark.parametrize("wrong", [None, "plan.json", {"layers": []}, Budget(params=0.5)])
def test_plan_of_a_wrong_type_is_an_error(net, unchanged, wrong):
    before = unchanged(net)
    with pytest.raises(ConfigurationError, match=r"plan=.*: expected a Plan, as search_ranks returns it") as error:
        apply_plan_(net, wrong)
    assert repr(wrong) in str(error.value)
    before.check()


def test_non_finite_and_lazy_models_are_refused(net, plan):
    with torch.no_grad():
        net.fc2.bias[0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=r"parameter 'fc2\.bias' holds 1 NaN or infinite"):
        apply_plan_(net, plan)
    assert not any(isinstance(m, FactorisedLayer) for m in net.modules())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch's own
def test_lazy_model_is_refused(plan):
    with pytest.raises(ModelError, match=r"parameter '0\.weight' has no shape yet: run one batch"):
        apply_plan_(nn.Sequential(nn.LazyLinear(4)), plan)


# --- hooks


def test_forward_hooks_move_with_their_handles(net, plan, images):
    seen = []
    layer = net.fc1
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(("pre", m, args[0].shape))),
        layer.register_forward_pre_hook(lambda m, args, kw: seen.append(("pre kw", m, kw)), with_kwargs=True),
        layer.register_forward_hook(lambda m, args, out: seen.append(("post", m, out.shape))),
        layer.register_forward_hook(lambda m, args, kw, out: seen.append(("post kw", m, kw)), with_kwargs=True),
        layer.register_forward_hook(lambda m, args, out: seen.append(("always", m, out.shape)), always_call=True),
    ]
    apply_plan_(net, plan)
    net(images)
    assert seen == [
        ("pre", net.fc1, (5, 16)),
        ("pre kw", net.fc1, {}),
        ("post", net.fc1, (5, 32)),
        ("post kw", net.fc1, {}),
        ("always", net.fc1, (5, 32)),
    ]
    seen.clear()
    for handle in handles:
        handle.remove()
    net(images)
    assert seen == []


def test_hooks_that_change_values_still_do(net, images):
    plan = plan_for(net, {"fc2": ("svd", (4,))})
    net.eval()
    net.fc2.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    net.fc2.register_forward_hook(lambda m, args, out: out + 1)
    expected = net(images)
    apply_plan_(net, plan)
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)


def test_backward_hooks_move_with_their_handles(net, images):
    plan = plan_for(net, {"fc2": ("svd", (4,))})
    seen = []
    net.eval()
    handles = [
        net.fc2.register_full_backward_pre_hook(lambda m, grad_out: seen.append(("pre", m, grad_out[0]))),
        net.fc2.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(("post", m, grad_in[0]))),
    ]
    net(images).square().sum().backward()
    expected = [(what, value) for what, _, value in seen]
    seen.clear()
    apply_plan_(net, plan)
    net(images).square().sum().backward()
    assert [(what, m) for what, m, _ in seen] == [("pre", net.fc2), ("post", net.fc2)]
    for (_, _, got), (_, wanted) in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    seen.clear()
    for handle in handles:
        handle.remove()
    net(images).sum().backward()
    assert seen == []


# --- what is inherited


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_inherited(net, plan, dtype):
    net.to(dtype)
    apply_plan_(net, plan)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert net.fc1.weight.dtype == dtype


def test_double_precision_factors_are_not_rounded(net):
    net.double()
    weights = {name: net.get_submodule(name).weight.detach().clone() for name in RANKS}
    apply_plan_(
        net, plan_for(net, {"conv1": ("tucker2", (8, 3)), "conv2": ("channel_svd", (16,)), "fc1": ("svd", (16,))})
    )
    for name in ("conv1", "conv2", "fc1"):
        torch.testing.assert_close(net.get_submodule(name).weight, weights[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [("tucker2", (5, 4)), ("spatial_svd", (5,)), ("channel_svd", (5,))])
def test_memory_format_is_inherited(net, images, kind):
    plain, strided = copy.deepcopy(net), net.to(memory_format=torch.channels_last)
    plan = plan_for(net, {"conv2": kind})
    apply_plan_(strided, plan)
    apply_plan_(plain, plan)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in strided.conv2.factors().values())
    assert all(f.is_contiguous() for f in plain.conv2.factors().values())
    assert not all(f.is_contiguous() for f in strided.conv2.factors().values())
    torch.testing.assert_close(strided(images), plain(images))


def test_frozen_weights_and_modes_are_inherited(net, plan):
    net.conv1.weight.requires_grad_(False)
    net.fc1.requires_grad_(False)
    net.conv2.eval()
    apply_plan_(net, plan)
    assert [f.requires_grad for f in net.conv1.factors().values()] == [False] * 3
    assert net.conv1.bias.requires_grad
    assert not any(p.requires_grad for p in net.fc1.parameters())
    assert all(p.requires_grad for p in net.conv2.parameters())
    assert [m.training for m in net.conv2.modules()] == [False] * 3
    assert [m.training for m in net.fc1.modules()] == [True] * 3


def test_factors_are_leaves_that_an_optimizer_can_train(net, plan, images):
    with torch.no_grad():
        apply_plan_(net, plan)
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(images).square().sum().backward()
    optimizer.step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name]) and "bias" not in name] == []


def test_shared_module_is_replaced_under_every_name(images):
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.inner = nn.Sequential(self.a, nn.ReLU())
            self.table = nn.ModuleDict({"x": self.a, "y": self.inner})
            self.items = nn.ModuleList([nn.Linear(2, 2), self.a])

    model = Shares()
    (replacement,) = apply_plan_(model, plan_for(model, {"a": ("svd", (2,))}))
    assert replacement.aliases == ("a", "inner.0", "table.x", "table.y.0", "items.1")
    assert isinstance(model.a, FactorisedLayer)
    assert model.a is model.inner[0] is model.table["x"] is model.items[1]
    assert replacement.dense not in set(model.modules())


def test_plan_may_name_a_shared_module_by_another_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    apply_plan_(model, plan_for(model, {"b": ("svd", (2,))}))
    assert model["a"] is model["b"]
    assert isinstance(model["a"], FactorisedLayer)


def test_uninstall_and_install_are_inverse(net, unchanged, plan):
    before = unchanged(net)
    replacements = apply_plan_(net, plan)
    after = unchanged(net)
    uninstall(net, replacements)
    before.check()
    install(net, replacements)
    after.check()


def test_shells_have_the_structure_and_no_values(net, plan):
    factorised = copy.deepcopy(net)
    apply_plan_(factorised, plan)
    biases = {name: net.get_submodule(name).bias for name in RANKS}
    apply_shells_(net, plan)
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in factorised.state_dict().items()}
    assert all(net.get_submodule(name).bias is bias for name, bias in biases.items())
    assert not any(f.any() for name in RANKS for f in net.get_submodule(name).factors().values())


def test_plan_of_reads_the_plan_off_the_model(net):
    searched = search_ranks(net, Budget(params=0.5), method="exact")
    apply_plan_(net, searched)
    read = embodied_plan(net)
    assert (read.dense, read.compressed) == (searched.dense, searched.compressed)
    assert (read.budget, read.method, read.optimality_gap) == (None, None, None)
    fields = ("name", "type", "kind", "ranks", "error", "params_before", "params_after")
    assert [[getattr(p, f) for f in fields] for p in read.layers] == [
        [getattr(p, f) for f in fields] for p in searched.layers
    ]
    assert [p.weight_shape for p in read.factorised] == [p.weight_shape for p in searched.factorised]
    fresh = TinyNet()
    apply_plan_(fresh, read)
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in net.named_parameters()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_factorised_model_can_be_copied(net, plan, images, copied):
    apply_plan_(net.eval(), plan)
    other = copied(net)
    assert torch.equal(other(images), net(images))
    assert other.fc1.weight is not net.fc1.weight
    assert torch.equal(other.fc1.weight, net.fc1.weight)
    with torch.no_grad():
        other.fc1.reduce.weight.zero_()
    assert net.fc1.reduce.weight.any()
    assert embodied_plan(other) == embodied_plan(net)


# --- code that reads the weight


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_fast_path_works_and_equals_the_slow_one(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 5, 16)
    plan = search_ranks(
        layer, Budget(params=0.8), example_input=(1, 5, 16), include=["linear1", "linear2"], method="uniform"
    )
    assert [p.name for p in plan.factorised] == ["linear1", "linear2"]
    apply_plan_(layer, plan)
    with torch.no_grad():
        with Operators() as fast:
            quick = layer(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with Operators() as slow:
                plain = layer(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert "_transformer_encoder_layer_fwd" in fast.names
    assert "_transformer_encoder_layer_fwd" not in slow.names
    torch.testing.assert_close(quick, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor")  # torch's own remark on batch_first
def test_whole_encoder_runs_in_both_modes():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 16)
    apply_plan_(model, search_ranks(model, Budget(params=0.8), example_input=(1, 5, 16), method="uniform"))
    assert (
        sum(isinstance(m, FactorisedLayer) for m in model.modules()) == 8
    )  # linear1, linear2, in_proj and out_proj of either layer
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-5, atol=1e-5)


def test_factorised_model_can_be_traced_by_fx(net, plan, images):
    apply_plan_(net.eval(), plan)
    assert torch.equal(torch.fx.symbolic_trace(net)(images), net(images))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_export_agrees_with_torch(net, images, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    apply_plan_(net.eval(), plan_for(net))
    torch.onnx.export(net, (images,), tmp_path / "net.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), net(images).detach(), rtol=1e-4, atol=1e-5)


def test_costs_of_the_swapped_model_count_what_is_stored(net, plan):
    before = measure_costs(net)
    apply_plan_(net, plan)
    saved = sum(
        net.get_submodule(name).weight.numel() - sum(f.numel() for f in net.get_submodule(name).factors().values())
        for name in RANKS
    )
    assert measure_costs(net) == Costs(before.params - saved, None, before.bytes - 4 * saved)

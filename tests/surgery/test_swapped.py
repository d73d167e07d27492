"""A factorised model in the user's hands: hooks, copies, exports, fast paths."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress import Budget, FactorisedLayer, apply_plan_, search_ranks
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.plans import plan_for


@pytest.fixture
def plan(net):
    return plan_for(net)


def test_forward_hooks_move_with_their_handles(net, plan, images):
    seen, layer = [], net.fc1
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append(("pre", m, args[0].shape))),
        layer.register_forward_pre_hook(lambda m, args, kw: seen.append(("pre kw", m, kw)), with_kwargs=True),
        layer.register_forward_hook(lambda m, args, out: seen.append(("post", m, out.shape))),
        layer.register_forward_hook(lambda m, args, kw, out: seen.append(("post kw", m, kw)), with_kwargs=True),
        layer.register_forward_hook(lambda m, args, out: seen.append(("always", m, out.shape)), always_call=True),
    ]
    apply_plan_(net, plan)
    net(images)
    sizes = {"pre": (5, 16), "pre kw": {}, "post": (5, 32), "post kw": {}, "always": (5, 32)}
    assert seen == [(what, net.fc1, size) for what, size in sizes.items()]
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


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_encoder_layer_of_torch_is_not_run_in_the_place_of_the_factors(norm_first):
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
    assert "_transformer_encoder_layer_fwd" not in {*fast.names, *slow.names}  # it would run the dense weights
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

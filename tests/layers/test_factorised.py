"""What happens to a factorised layer after compression: compilers, exporters, dtypes, devices, copies and files."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from lightning_compress import FactorisedLayer, apply_plan_
from lightning_compress.core.errors import ModelError, UnsupportedError
from lightning_compress.surgery.swap import apply_shells_
from tests.support.zoo import LAYERS, Conv1D, factorised, fitting, full_ranks, plan_for

EVERY = pytest.mark.parametrize(("name", "kind"), fitting())
FIRST = list({param.values[0]: param for param in reversed(fitting())}.values())
ONE_OF_EACH = pytest.mark.parametrize(("name", "kind"), FIRST)
"""Each type of layer with one kind."""
LEFT = [param for param in fitting() if param not in FIRST]
SWEPT = [pytest.param(*param.values, id=param.id, marks=[pytest.mark.slow, pytest.mark.sweep]) for param in LEFT]
ONE_AND_SWEEP = pytest.mark.parametrize(("name", "kind"), FIRST + SWEPT)
"""The others in the sweep alone."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def fitted(name, kind):
    return factorised(LAYERS[name].layer(), kind)


def single(name, kind):
    """A factorised layer in float32 and arguments of a call."""
    layer, arguments = copy.deepcopy(fitted(name, kind)).float().eval(), LAYERS[name].call()
    return layer, tuple(a.float() if a.is_floating_point() else a for a in arguments)


def relative_error(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=[pytest.mark.slow, pytest.mark.sweep])])
@ONE_AND_SWEEP
def test_compiles_without_a_graph_break(name, kind, backend):
    layer, arguments = single(name, kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), layer(*arguments), **CLOSE)


@ONE_AND_SWEEP
def test_exports(name, kind):
    layer, arguments = single(name, kind)
    program = torch.export.export(layer, arguments)
    assert set(program.state_dict) == set(layer.state_dict())
    torch.testing.assert_close(program.module()(*arguments), layer(*arguments), **CLOSE)


@ONE_AND_SWEEP
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")  # torch's own
def test_traces(name, kind):
    layer, arguments = single(name, kind)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, arguments), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(*arguments), layer(*arguments), **CLOSE)


def run_onnx(file, arguments):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    (output,) = session.run(None, {n: a.numpy() for n, a in zip(names, arguments, strict=False)})
    return torch.from_numpy(output)


@ONE_AND_SWEEP
@pytest.mark.filterwarnings("ignore")  # the old exporter's own
def test_exports_to_onnx_by_tracing(name, kind):
    onnx = pytest.importorskip("onnx")
    layer, arguments = single(name, kind)
    file = io.BytesIO()
    try:
        torch.onnx.export(layer, arguments, file, dynamo=False)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            torch.onnx.export(layer.to_dense(), arguments, io.BytesIO(), dynamo=False)
        pytest.skip("torch cannot export the dense layer either")
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model, full_check=True)
    stored = sum(torch.Size(tensor.dims).numel() for tensor in model.graph.initializer)
    assert stored < sum(factor.numel() for factor in layer.factors().values()) + 64  # not the dense weight
    torch.testing.assert_close(run_onnx(file.getvalue(), arguments), layer(*arguments).detach(), **CLOSE)


@pytest.mark.slow
@ONE_OF_EACH
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_exports_to_onnx(name, kind, tmp_path):
    pytest.importorskip("onnxscript")
    layer, arguments = single(name, kind)
    torch.onnx.export(layer, arguments, tmp_path / "layer.onnx", dynamo=True)
    torch.testing.assert_close(run_onnx(tmp_path / "layer.onnx", arguments), layer(*arguments).detach(), **CLOSE)


# --- formats and dtypes


@EVERY
def test_channels_last_gives_the_same_in_that_format(name, kind):
    layer, (x, *_) = single(name, kind)
    if x.ndim not in (4, 5):
        pytest.skip("no such format")
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim]
    expected = layer(x)
    dense = LAYERS[name].layer().float().to(memory_format=wanted)
    inherited = factorised(dense, kind)  # from the dense layer, not set afterwards
    assert all(factor.is_contiguous(memory_format=wanted) for factor in inherited.factors().values())
    for other in (inherited, layer.to(memory_format=wanted)):
        got = other(x.to(memory_format=wanted))
        torch.testing.assert_close(got, expected, **CLOSE)
        assert got.is_contiguous(memory_format=wanted) or x.ndim > 4  # torch's 1x1x1 convolutions do not keep it


@EVERY
def test_autocast_computes_in_low_precision(name, kind):
    layer, arguments = single(name, kind)
    expected = layer(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(*arguments)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, expected) < 0.03
    got.float().square().sum().backward()
    assert all(factor.grad.dtype == torch.float32 for factor in layer.factors().values())
    assert all(bool(factor.grad.any()) for factor in layer.factors().values())


def check_low_precision(layer, name, kind, dtype, small):
    dense, arguments = single(name, kind)
    assert {p.dtype for p in layer.parameters()} == {layer.weight.dtype} == {dtype}
    got = layer(*(a.to(dtype) if a.is_floating_point() else a for a in arguments))
    assert got.dtype == dtype
    assert relative_error(got, dense(*arguments)) < (0.05 if dtype == torch.bfloat16 else small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_low_precision_weights_give_nearly_the_same(name, kind, dtype):
    check_low_precision(single(name, kind)[0].to(dtype), name, kind, dtype, 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ONE_OF_EACH
def test_low_precision_of_the_dense_layer_is_inherited(name, kind, dtype):
    layer = factorised(LAYERS[name].layer().to(dtype), kind)
    # a rounded weight may lead the sweeps of CP to another fit of the same error
    check_low_precision(layer, name, kind, dtype, 0.02 if kind in ("cp", "cp3") else 0.01)


# --- copies and files


@pytest.fixture
def importable(monkeypatch):
    """The stub of a class of transformers where pickle looks for it."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


@EVERY
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent_and_equal(name, kind, copied, importable):
    layer, arguments = single(name, kind)
    other = copied(layer)
    assert type(other) is type(layer)
    assert (other.kind, other.ranks, other.weight_shape) == (layer.kind, layer.ranks, layer.weight_shape)
    assert torch.equal(other(*arguments), layer(*arguments))
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    assert type(other.to_dense()) is type(layer.to_dense())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(bool(factor.any()) for factor in layer.factors().values())
    assert not other(*arguments).any()


@EVERY
def test_shells_on_the_meta_device_take_the_state_dict(name, kind):
    layer, arguments = single(name, kind)
    with torch.device("meta"):
        model = nn.Sequential(LAYERS[name].make())
    apply_shells_(model, plan_for(model[0], kind, layer.ranks))
    assert isinstance(model[0], FactorisedLayer)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model[0].weight.is_meta
    assert model[0].to_dense().weight.is_meta
    model.to_empty(device="cpu")
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    model[0].load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(model[0](*arguments), layer(*arguments))
    *_, last = layer.factors()
    names = [*(f"{child}.weight" for child in layer.factors()), *([f"{last}.bias"] if layer.bias is not None else [])]
    assert list(layer.state_dict()) == names + [name for name, _ in layer.named_buffers()]
    moved = copy.deepcopy(layer).to("meta")
    assert moved.weight.is_meta
    assert moved(*(a.to("meta") for a in arguments)).shape == layer(*arguments).shape


def test_weights_on_the_meta_device_cannot_be_decomposed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ModelError, match=r"parameter '0.weight' is on the meta device.*has no values"):
        apply_plan_(model, plan_for(model[0], "svd", (2,)))
    assert type(model[0]) is nn.Linear


# --- what it shows


@pytest.mark.parametrize(
    ("kind", "layer", "names"),
    [
        ("svd", nn.Linear(4, 6), ["reduce", "expand"]),
        ("svd", nn.Conv2d(4, 6, 1), ["reduce", "expand"]),
        ("channel_svd", nn.Conv2d(4, 6, 3), ["reduce", "expand"]),
        ("spatial_svd", nn.Conv2d(4, 6, 3), ["reduce", "expand"]),
        ("tucker2", nn.Conv2d(4, 6, 3, bias=False), ["reduce", "core", "expand"]),
    ],
)
def test_factorised_layer_shows_what_it_is(kind, layer, names):
    ranks = (2,) * len(full_ranks(layer, kind))
    model, bias = nn.Sequential(layer), layer.bias
    apply_plan_(model, plan_for(layer, kind, ranks))
    new = model[0]
    assert repr(new).startswith("FactorisedLayer(")
    assert f"kind={kind}, ranks={ranks}" in repr(new)
    assert (new.kind, new.ranks, new.dense_type) == (kind, ranks, type(layer).__name__)
    assert new.bias is bias
    assert list(new.factors()) == names
    assert new.weight.shape == layer.weight.shape == new.weight_shape
    assert torch.equal(new.weight, new.dense_weight())
    assert all(value is getattr(new, name).weight for name, value in new.factors().items())
    convolution = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
    attributes = ["in_features", "out_features"] if isinstance(layer, nn.Linear) else convolution
    assert all(getattr(new, name) == getattr(layer, name) for name in attributes)
    with pytest.raises(UnsupportedError):
        new.weight = new.weight.detach()


def test_it_is_a_list_of_its_factors_and_no_sequential():
    layer = fitted("Conv2d", "tucker2")
    assert not isinstance(layer, nn.Sequential)
    assert list(layer) == list(layer.children())
    assert len(layer) == len(layer.factors())
    assert (layer[0], layer[-1]) == (next(iter(layer)), list(layer)[-1])
    with pytest.raises(IndexError):
        _ = layer[len(layer)]

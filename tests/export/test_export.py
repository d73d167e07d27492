"""Exported files compute what the model computes, at any batch size, and say what they are."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress import export_model, load_exported, save_compressed
from lightning_compress.core.errors import (
    ConfigurationError,
    ExampleInputError,
    OutputFolderError,
    UnsupportedError,
    WeightsError,
)
from lightning_compress.export.api import FORMATS
from lightning_compress.export.int8 import rounded, with_int8_weights
from lightning_compress.export.onnx_slim import shorten_, slim_
from lightning_compress.export.torch_export import compiler
from tests.export.nets import SHAPES, Attention, Named, Recurrent, Tokens, net, small
from tests.support.interruptions import block_imports

NEEDS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxruntime"),
    "executorch": ("executorch",),
}
SLOW = ("onnx", "openvino", "executorch", "aot_inductor")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FORMATS]
QUICK = ["torch_export", "torchscript", "plain"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of runtimes, about themselves


def available(format):
    for package in NEEDS.get(format, ()):
        pytest.importorskip(package)
    if format == "aot_inductor" and compiler() is None:
        pytest.skip("no C++ compiler")


def inputs(name, samples=4, seed=1):
    return torch.randn(samples, *SHAPES[name][1:], generator=torch.Generator().manual_seed(seed))


def outputs(model, *given):
    with torch.no_grad():
        return model(*given)


@pytest.mark.parametrize("format", EACH)
@pytest.mark.parametrize("name", ["cnn", "interpolative"])
def test_file_computes_what_the_model_computes_at_any_batch_size(tmp_path, format, name):
    available(format)
    model = net(name)
    before = copy.deepcopy(model.state_dict())
    done = export_model(model, tmp_path / "model", format=format, example_input=inputs(name, 1))
    assert done.difference < 1e-4
    assert done.int8 == ""
    assert done.dynamic_batch == (format != "executorch")
    assert done.path == tmp_path / f"model{FORMATS[format].ending}"
    run = load_exported(str(done.path))
    for samples in (1, 4, 7):
        given = inputs(name, samples, seed=samples)
        torch.testing.assert_close(run(given), outputs(model, given), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert done.bytes == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".pyc")


@pytest.mark.parametrize("format", ["torch_export", "plain"])
@pytest.mark.parametrize("name", ["mlp", "transposed"])
def test_other_layers(tmp_path, format, name):
    model, given = net(name), inputs(name, 5)
    done = export_model(model, tmp_path / "model", format=format, example_input=inputs(name, 1))
    torch.testing.assert_close(load_exported(done.path)(given), outputs(model, given), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch_export", "plain", "torchscript"])
@pytest.mark.parametrize("made", [Attention, Recurrent, Tokens])
def test_unfused_and_tied_layers(tmp_path, format, made):
    torch.manual_seed(0)
    kinds = {"kinds": ["svd"]} if made is Tokens else {}
    model = small(made(), 0.7, **kinds)
    shapes = {Attention: (2, 5, 32), Recurrent: (2, 5, 24), Tokens: (2, 5)}
    given = torch.randint(60, (2, 5)) if made is Tokens else torch.randn(shapes[made])
    done = export_model(model, tmp_path / "model", format=format, example_input=given)
    torch.testing.assert_close(load_exported(done.path)(given), outputs(model, given), atol=1e-5, rtol=1e-5)


def test_named_arguments_are_given_by_position_and_outputs_are_all_there(tmp_path):
    model = small(Named())
    given = {"x": torch.randn(3, 16), "shift": torch.randn(3, 16)}
    done = export_model(model, tmp_path / "model", format="torch_export", example_input=given)
    found = load_exported(done.path)(*given.values())
    with torch.no_grad():
        expected = model(**given)
    assert [tuple(t.shape) for t in found] == [(3, 16), (3,)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_fixed_batch_takes_no_other(tmp_path):
    model = net("cnn")
    given = {"format": "torch_export", "example_input": inputs("cnn", 2), "dynamic_batch": False}
    done = export_model(model, tmp_path / "model", **given)
    assert not done.dynamic_batch
    run = load_exported(done.path)
    torch.testing.assert_close(run(inputs("cnn", 2)), outputs(model, inputs("cnn", 2)))
    with pytest.raises(Exception, match="2"):
        run(inputs("cnn", 3))


# --- plain torch where this library is not installed

ELSEWHERE = """
import importlib.util, sys
sys.modules["lightning_compress"] = None  # importing it fails
from safetensors.torch import load_file, save_file
spec = importlib.util.spec_from_file_location("model", sys.argv[1] + "/model.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
net = module.load()
try:
    import lightning_compress
except ImportError:
    print(sorted({type(m).__module__.split(".")[0] for m in net.modules()}))
save_file({"y": net(load_file("x.safetensors")["x"]).detach()}, "y.safetensors")
"""


def run_elsewhere(folder, tmp_path, given):
    save_file({"x": given}, tmp_path / "x.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), load_file(tmp_path / "y.safetensors")["y"]


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["cnn", "interpolative", "attention"])
def test_plain_folder_runs_where_the_library_cannot_be_imported(tmp_path, name, int8):
    torch.manual_seed(0)
    model = small(Attention(), 0.7) if name == "attention" else net(name)
    given = torch.randn(3, 5, 32) if name == "attention" else inputs(name, 3)
    export_model(model, tmp_path / "here", format="plain", example_input=given, int8=int8)
    shutil.move(tmp_path / "here", tmp_path / "moved")
    said, found = run_elsewhere(tmp_path / "moved", tmp_path, given)
    assert said in ("['model', 'torch']", "['torch']")
    expected = outputs(model, given)
    tolerance = 0.05 * float(expected.abs().max()) if int8 else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
    assert (tmp_path / "moved" / "model.safetensors").exists() == (name != "attention")


def test_plain_code_names_the_factors_and_layers_of_torch_alone(tmp_path):
    model = net("cnn")
    export_model(model, tmp_path / "model", format="plain", example_input=inputs("cnn"))
    code = (tmp_path / "model" / "model.py").read_text()
    assert "lightning_compress" not in code
    assert "'0.reduce', nn.Conv2d(" in code or "'3.reduce', nn.Conv2d(" in code
    state = load_file(tmp_path / "model" / "model.safetensors")
    own = model.state_dict()
    assert {name: value for name, value in state.items() if "num_batches" not in name}.keys() <= own.keys()
    assert all(torch.equal(value, own[name]) for name, value in state.items())


# --- 8-bit integers

CALIBRATED = [
    pytest.param(format, marks=pytest.mark.slow) for format in ("onnx", "openvino", "torch_export", "executorch")
]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("format", CALIBRATED)
def test_static_int8_is_small_and_close(tmp_path, format):
    available(format)
    if format in ("torch_export", "executorch"):
        pytest.importorskip("torchao")
    model, given = net("cnn"), inputs("cnn", 4)
    batches = [inputs("cnn", 8, seed=s) for s in range(4)]
    done = export_model(model, tmp_path / "q", format=format, example_input=given, int8=True, calibration=batches)
    assert "static" in done.int8
    assert relative(load_exported(done.path)(given), outputs(model, given)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("static", [True, False])
def test_int8_of_onnx_takes_a_quarter(tmp_path, static):
    available("onnx")
    torch.manual_seed(0)
    model = small(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)))
    given = torch.randn(4, 256)
    whole = export_model(model, tmp_path / "f", format="onnx", example_input=given)
    calibration = [torch.randn(16, 256) for _ in range(4)] if static else None
    done = export_model(model, tmp_path / "q", format="onnx", example_input=given, int8=True, calibration=calibration)
    assert done.int8.startswith("static" if static else "dynamic")
    assert done.bytes < 0.27 * whole.bytes
    assert relative(load_exported(done.path)(given), outputs(model, given)) < 0.05


@pytest.mark.parametrize("format", QUICK)
def test_int8_without_inputs_is_of_the_weights(tmp_path, format):
    model, given = net("interpolative"), inputs("interpolative", 4)
    done = export_model(model, tmp_path / "q", format=format, example_input=given, int8=True)
    assert done.int8.startswith("of the weights alone")
    assert 1e-5 < relative(load_exported(done.path)(given), outputs(model, given)) < 0.05


def test_int8_weights_are_within_half_a_step():
    weight = torch.randn(6, 5, 3, 3)
    weight[0] = 0
    for dim in (0, 1):
        integers, scale = rounded(weight, dim)
        assert integers.dtype == torch.int8
        assert scale.numel() == weight.shape[dim]
        assert ((integers * scale - weight).abs() <= scale / 2 + 1e-7).all()
    model = net("cnn")
    twin = with_int8_weights(model)
    held = [m for m in twin.modules() if hasattr(m, "int8_weight")]
    assert held
    assert not any("weight" in m._parameters for m in held)
    assert not any(hasattr(m, "int8_weight") for m in model.modules())


@pytest.mark.parametrize("format", ["openvino", "executorch"])
def test_formats_that_are_quantised_statically_ask_for_inputs(tmp_path, format):
    available(format)
    with pytest.raises(UnsupportedError, match="pass calibration="):
        export_model(net("mlp"), tmp_path / "q", format=format, example_input=inputs("mlp"), int8=True)


def test_save_of_a_quantised_model_names_the_way_that_works(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = net("mlp")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(WeightsError, match=r"export_model\(model, path, format=..., int8=True\)"):
        save_compressed(model, tmp_path)


# --- ONNX without notes


@pytest.mark.slow
def test_onnx_file_tells_nothing_of_this_machine_and_short_names_compute_the_same(tmp_path):
    available("onnx")
    import onnx

    model, given = net("cnn"), inputs("cnn", 3)
    done = export_model(model, tmp_path / "f", format="onnx", example_input=given)
    content = done.path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"lightning_compress" not in content
    short = shorten_(slim_(onnx.load(str(done.path))))
    onnx.checker.check_model(short)
    onnx.save(short, str(tmp_path / "short.onnx"))
    assert (tmp_path / "short.onnx").stat().st_size < done.bytes
    assert torch.equal(load_exported(tmp_path / "short.onnx")(given), load_exported(done.path)(given))


# --- refused

CASES = [
    ({"format": "onxn"}, ConfigurationError, r"format='onxn'.*Did you mean 'onnx'"),
    ({"format": None}, ConfigurationError, "format=None"),
    ({"int8": "yes"}, ConfigurationError, "int8='yes'"),
    ({"dynamic_batch": 1}, ConfigurationError, "dynamic_batch=1"),
    ({"tolerance": -1}, ConfigurationError, "tolerance=-1"),
    ({"path": 5}, ConfigurationError, "path=5"),
    ({"calibration": [torch.zeros(1, 32)]}, ConfigurationError, "calibration= is for int8=True"),
    ({"int8": True, "calibration": [5]}, ExampleInputError, "calibration holds a int, expected the 1 arguments"),
    ({"example_input": (1, 31)}, ExampleInputError, "the model fails on the example input"),
    ({"model": "net"}, ConfigurationError, "'net'"),
]


@pytest.mark.parametrize(("given", "error", "said"), CASES)
def test_wrong_arguments_write_nothing(tmp_path, given, error, said):
    usual = {"model": net("mlp"), "path": tmp_path / "m", "format": "torchscript", "example_input": (1, 32)}
    with pytest.raises(error, match=said):
        export_model(**{**usual, **given})
    assert list(tmp_path.iterdir()) == []


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + torch.rand_like(x)


@pytest.mark.parametrize("format", ["torch_export", "torchscript"])
def test_file_that_computes_something_else_is_an_error(tmp_path, format):
    with pytest.raises(UnsupportedError, match=r"computes something else than the model: its outputs differ by"):
        export_model(Random(), tmp_path / "m", format=format, example_input=(1, 8))


class ByValue(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_exported_is_an_error_of_our_own(tmp_path):
    with pytest.raises(UnsupportedError, match=r"torch.export of ByValue fails: .*Try another format"):
        export_model(ByValue(), tmp_path / "m", format="torch_export", example_input=(1, 8))


@pytest.mark.parametrize(
    ("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino"), ("executorch", "executorch")]
)
def test_missing_package_names_its_extra(tmp_path, monkeypatch, format, package):
    block_imports(monkeypatch, package)
    with pytest.raises(UnsupportedError, match=rf"needs '{package}': pip install 'lightning_compress\[{format}\]'"):
        export_model(net("mlp"), tmp_path / "m", format=format, example_input=inputs("mlp"))


def test_without_a_compiler_there_is_no_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnsupportedError, match="there is no compiler: install"):
        export_model(net("mlp"), tmp_path / "m", format="aot_inductor", example_input=inputs("mlp"))


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="cannot write the model"):
        export_model(net("mlp"), tmp_path / "file" / "m", format="torchscript", example_input=inputs("mlp"))


def test_loading_what_is_no_export_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match="there is no"):
        load_exported(tmp_path / "m.onnx")
    (tmp_path / "m.txt").write_text("")
    with pytest.raises(WeightsError, match="is nothing that export_model wrote"):
        load_exported(tmp_path / "m.txt")
    with pytest.raises(WeightsError, match="is nothing that export_model wrote"):
        load_exported(tmp_path)
    (tmp_path / "m.pt2").write_text("no archive")
    with pytest.raises(UnsupportedError, match=r"torch.export.load of .*m.pt2"):
        load_exported(tmp_path / "m.pt2")

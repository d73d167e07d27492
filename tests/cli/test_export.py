"""lightning-compress-export and lightning-compress-eval on the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

from lightning_compress.cli import evaluate, export
from lightning_compress.cli.app import run
from lightning_compress.cli.demo.models import SmallCNN
from lightning_compress.cli.evaluate import evaluate_run
from lightning_compress.cli.export import export_run
from lightning_compress.cli.run_folder import RunFolder, open_run
from lightning_compress.core.errors import ConfigurationError, UnsupportedError, WeightsError
from tests.support.cli import TINY_CNN, compose, measure_quickly

pytestmark = pytest.mark.filterwarnings("ignore")  # of runtimes, about themselves


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run from known weights, as Hydra leaves it."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("run")
    safetensors.torch.save_file(SmallCNN(width=8).state_dict(), folder / "dense.safetensors")
    cfg = compose(*TINY_CNN, f"model.weights={folder / 'dense.safetensors'}", "plot=false")
    with pytest.MonkeyPatch.context() as patch:
        measure_quickly(patch)
        run(cfg, folder / "out")
    (folder / "out" / ".hydra").mkdir()
    OmegaConf.save(cfg, folder / "out" / ".hydra" / "config.yaml")
    return folder / "out"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(export, "SECONDS", 0.002)


def test_command_writes_tests_and_times_a_file(folder, tmp_path):
    columns = export_run(folder, format="plain", int8=True, file=str(tmp_path / "small"))
    assert [each.name for each in columns] == ["dense float32", "compressed float32", "compressed int8"]
    report = json.loads((folder / "report.json").read_text())
    dense, whole, small = columns
    assert dict(dense.metrics) == report["dense"]["metrics"]
    assert dict(whole.metrics) == pytest.approx(report["fine_tuned"]["metrics"], abs=1e-5)
    assert abs(small.metrics["accuracy"] - whole.metrics["accuracy"]) < 0.05
    assert dense.exported.bytes > whole.exported.bytes > small.exported.bytes
    assert all(each.latency > 0 and each.faster > 0 for each in columns)
    assert (dense.faster, dense.exported.int8, whole.exported.int8) == (1.0, "", "")
    assert small.exported.int8.startswith("of the weights alone")
    assert (whole.exported.path, small.exported.path) == (tmp_path / "small", tmp_path / "small_int8")
    content = json.loads((tmp_path / "export_plain.json").read_text())
    assert content["columns"]["compressed int8"]["bytes"] == small.exported.bytes
    evaluated = evaluate_run(folder, small.exported.path, seconds=0.002).report
    assert evaluated.fine_tuned.metrics == pytest.approx(dict(small.metrics), abs=1e-6)
    assert evaluated.fine_tuned.costs.bytes == small.exported.bytes


def test_a_file_gets_arguments_by_name_in_the_order_in_which_it_was_exported(folder, monkeypatch):
    monkeypatch.setattr(RunFolder, "inputs", lambda *_, **__: [{"tokens": 0, "mask": 0}])
    called = open_run(folder)._by_position(lambda *args: args)
    assert called(mask=2, tokens=1) == called(1, mask=2) == (1, 2)
    assert called(mask=2, tokens=1, other=3) == (1, 2, 3)


@pytest.mark.slow
def test_onnx_file_is_calibrated_on_validation_data(folder, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export.main([str(folder), "format=onnx", "int8=true", "calibration=32"])
    out = capsys.readouterr().out
    for row in ("file, bytes", "smaller", "latency, batch 1", "faster", "accuracy", "difference from torch"):
        assert row in out
    assert "int8 static, by onnxruntime on 32 inputs, one scale per" in " ".join(out.split())
    evaluate.main([str(folder), f"file={folder / 'export' / 'model_onnx_int8.onnx'}"])
    table = capsys.readouterr().out
    assert "model_onnx_int8.onnx on the test data of the run" in " ".join(table.split())
    assert "kept / change" in table


def test_saved_model_is_tested_again(folder, capsys):
    report = json.loads((folder / "report.json").read_text())
    evaluated = evaluate_run(folder, seconds=0.002)
    assert dict(evaluated.report.fine_tuned.metrics) == pytest.approx(report["fine_tuned"]["metrics"], abs=1e-6)
    assert evaluated.report.fine_tuned.costs.bytes == report["fine_tuned"]["bytes"]
    assert [row[0] for row in evaluated.report.rows()][:4] == ["parameters", "MACs", "bytes", "latency, batch 1"]


def test_inputs_of_the_network_are_images_of_the_asked_number(folder):
    opened = open_run(folder)
    batches = opened.inputs(70, stage="fit")
    assert sum(len(batch) for batch in batches) <= 70
    assert all(batch.shape[1:] == (1, 8, 8) for batch in batches)
    assert opened.inputs(3, stage="test")[0].shape == (3, 1, 8, 8)


def test_without_a_compiler_only_the_archive_is_made(folder, monkeypatch, capsys):
    monkeypatch.setattr(export, "compiler", lambda: None)
    export.main([str(folder), "format=torch_export"])
    assert "no AOTInductor package: there is no C++ compiler" in capsys.readouterr().out
    assert (folder / "export" / "model_torch_export.pt2").is_file()


# --- refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected one folder of a run, got 0: nothing"),
        (["a", "b"], "expected one folder of a run, got 2: a b"),
        (["FOLDER", "fromat=onnx"], "unknown setting 'fromat'. Did you mean 'format'?"),
        (["FOLDER", "int8=yes_please"], "int8='yes_please': expected true or false"),
        (["FOLDER", "calibration=few"], "calibration='few': expected a whole number"),
        (["FOLDER", "calibration=-1"], "calibration=-1: expected a whole number of at least 0"),
        (["FOLDER", "format=tflite"], "format='tflite': no such format"),
        (["/nowhere"], "RUN_FOLDER='/nowhere': expected the folder of a finished run"),
    ],
)
def test_wrong_words_end_the_command_with_what_to_do(folder, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        export.main([str(folder) if word == "FOLDER" else word for word in words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_eval_of_what_is_no_file_or_no_setting_is_an_error(folder):
    with pytest.raises(WeightsError, match=r"there is no '/nowhere\.onnx'"):
        evaluate_run(folder, "/nowhere.onnx")
    with pytest.raises(SystemExit):
        evaluate.main([str(folder), "format=onnx"])
    with pytest.raises(ConfigurationError, match="RUN_FOLDER"):
        evaluate_run(Path("/nowhere"))


@pytest.mark.parametrize("command", [export, evaluate])
def test_help_says_how_the_command_is_called(command, capsys):
    command.main(["--help"])
    assert capsys.readouterr().out.startswith("lightning-compress-e")


def test_openvino_in_8_bits_without_inputs_is_refused(folder):
    pytest.importorskip("openvino")
    with pytest.raises(UnsupportedError, match="pass calibration="):
        export_run(folder, format="openvino", int8=True, calibration=0)

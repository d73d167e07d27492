from __future__ import annotations

import email
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra

import lightning_compress
from hydra_plugins.lightning_compress_searchpath import LightningCompressSearchPath
from lightning_compress.cli.app import main
from lightning_compress.cli.config import CONFIG_FOLDER
from lightning_compress.core.settings import Budget
from lightning_compress.training.callback import Compress
from tests.support.cli import compose, make

ROOT = Path(__file__).resolve().parent.parent
CONF = sorted(str(path.relative_to(CONFIG_FOLDER)) for path in CONFIG_FOLDER.rglob("*.yaml"))


# --- our groups in another Hydra application ---------------------------------------------------


@pytest.fixture
def app_folder(tmp_path):
    """The configuration of somebody's own application, with nothing of ours in it."""
    folder = tmp_path / "their_conf"
    folder.mkdir()
    (folder / "theirs.yaml").write_text("defaults:\n  - _self_\n  - compression: params_20\nseed: 11\nname: theirs\n")
    return folder


def theirs(folder, *overrides, name="theirs"):
    return compose(*overrides, folder=folder, name=name)


def test_own_application_composes_our_compression(app_folder):
    cfg = theirs(app_folder)
    assert set(cfg) == {"compression", "seed", "name"}
    callback = make(cfg.compression)
    assert type(callback) is Compress
    assert callback.budget == Budget(params=0.2)
    assert callback.settings.seed == 11


def test_own_application_switches_our_options_and_needs_no_seed_of_its_own(app_folder):
    (app_folder / "bare.yaml").write_text("name: theirs\n")
    assert theirs(app_folder, "compression=edge").compression.rank_multiple == 4
    assert theirs(app_folder, "+compression=ratio_5x", name="bare").compression.budget == {"ratio": "5x"}
    callback = make(theirs(app_folder, "+compression=params_20", name="bare").compression)
    assert callback.budget == Budget(params=0.2)


def test_own_options_of_the_same_name_come_first(app_folder):
    (app_folder / "compression").mkdir()
    (app_folder / "compression" / "params_20.yaml").write_text("budget:\n  params: 0.123\n")
    assert theirs(app_folder).compression == {"budget": {"params": 0.123}}
    assert theirs(app_folder, "compression=params_50").compression.budget.params == 0.5


def test_search_path_is_appended_once_with_the_configuration_folder(app_folder):
    with hydra.initialize_config_dir(str(app_folder), version_base="1.3"):
        path = GlobalHydra.instance().config_loader().get_search_path()
    ours = path.get_path()[path.find_last_match(SearchPathQuery("lightning_compress", None))]
    assert ours.path == f"file://{CONFIG_FOLDER}"
    assert [entry.provider for entry in path.get_path()].count("lightning_compress") == 1
    assert path.find_last_match(SearchPathQuery("main", None)) < path.get_path().index(ours)


def test_plugin_does_nothing_when_the_package_is_gone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    appended = []

    class Recorder:
        def append(self, **entry):
            appended.append(entry)

    LightningCompressSearchPath().manipulate_search_path(Recorder())
    assert appended == []


def test_own_application_in_its_own_process(app_folder):
    script = app_folder.parent / "their_app.py"
    script.write_text(
        "import sys, hydra\n"
        "@hydra.main(version_base='1.3', config_path='their_conf', config_name='theirs')\n"
        "def main(cfg):\n"
        "    print(cfg.compression.budget, 'torch' in sys.modules)\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "compression=params_28", "hydra.run.dir=run"],
        cwd=app_folder.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'params': 0.28} False\n"  # finding our groups must not import torch


# --- metadata ----------------------------------------------------------------------------------


def test_console_script_and_version_of_the_metadata_are_the_packages():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="lightning-compress")
    assert script.value == "lightning_compress.cli.app:main"
    assert script.load() is main
    assert importlib.metadata.version("lightning_compress") == lightning_compress.__version__


def test_every_public_name_can_be_imported():
    for name in lightning_compress.__all__:
        assert getattr(lightning_compress, name).__module__.startswith("lightning_compress")
    assert set(lightning_compress.__all__) <= set(dir(lightning_compress))
    assert sorted(lightning_compress.__all__) == lightning_compress.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lightning_compress' has no attribute 'Compres'"):
        lightning_compress.Compres  # noqa: B018


def test_importing_the_package_is_cheap():
    code = "import sys, lightning_compress; print(sorted({'torch', 'lightning', 'hydra', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# --- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the repository")
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_package_the_configuration_and_the_plugins_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    code = [path for top in ("lightning_compress", "hydra_plugins") for path in (ROOT / top).rglob("*.py")]
    launchers = (ROOT / "lightning_compress" / "cli" / "conf").rglob("*.yaml")
    assert sorted(names) == sorted(
        [
            *(path.relative_to(ROOT).as_posix() for path in (*code, *launchers)),
            "lightning_compress/py.typed",
            *(f"lightning_compress/conf/{name}" for name in CONF),
            *(f"lightning_compress/weights/{path.name}" for path in (ROOT / "benchmarks" / "weights").iterdir()),
        ]
    )
    assert "hydra_plugins/__init__.py" not in names  # a namespace package, shared with other plugins


@pytest.mark.slow
def test_wheel_says_what_it_is(wheel):
    version = lightning_compress.__version__
    assert wheel.name == f"lightning_compress-{version}-py3-none-any.whl"
    info = f"lightning_compress-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert scripts.splitlines()[0] == "[console_scripts]"
    assert dict(line.split(" = ") for line in scripts.splitlines()[1:]) == {
        "lightning-compress": "lightning_compress.cli.app:main",
        "lightning-compress-eval": "lightning_compress.cli.evaluate:main",
        "lightning-compress-export": "lightning_compress.cli.export:main",
        "lightning-compress-sweep": "lightning_compress.cli.sweep_callback:main",
    }
    assert (metadata["Version"], metadata["License-Expression"]) == (version, "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.10"
    extras = "plots demo vision onnx openvino executorch torchao pretrained dev"
    engines = "joblib optuna ray submitit huggingface sweeps docs"
    assert set(metadata.get_all("Provides-Extra")) == {*extras.split(), *engines.split()}


def command(unpacked, cwd, *arguments):
    return subprocess.run(
        [sys.executable, "-P", "-m", "lightning_compress", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_wheel_finds_its_own_configuration(unpacked, tmp_path):
    done = command(unpacked, tmp_path, "--info", "searchpath")
    assert done.returncode == 0, done.stderr
    found = dict(line.strip(" |").split("|", 1) for line in done.stdout.splitlines() if "file://" in line)
    assert {provider.strip(): path.strip() for provider, path in found.items()} == {
        "main": f"file://{unpacked}/lightning_compress/conf",
        "lightning_compress": f"file://{unpacked}/lightning_compress/conf",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_wheel_composes_the_job(unpacked, tmp_path):
    done = command(unpacked, tmp_path, "--cfg", "job", "compression=edge", "experiment=fashion_resnet20")
    assert done.returncode == 0, done.stderr
    cfg = yaml.safe_load(done.stdout)
    assert cfg["compression"]["_target_"] == "lightning_compress.Compress"
    assert cfg["compression"]["budget"] == {"params": 0.25, "macs": 0.3, "bytes": 0.3}
    assert cfg["model"]["net"]["_target_"] == "lightning_compress.cli.demo.models.ResNet20"
    assert cfg["finetune"] == {"epochs": 4, "lr": 0.05}
    assert list(tmp_path.iterdir()) == []

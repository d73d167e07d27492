"""The blocks of README and documentation: Python runs, YAML is read, commands compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[Path, str]]:
    return [(page, text) for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == language]


def pages_with(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in dict.fromkeys(page for page, _ in blocks(language))]


@pytest.mark.slow
@pytest.mark.usefixtures("less_work")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py", "fit", *cli_arguments(page, tmp_path)])
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(page)
    seen = 0
    for example in document.examples():
        example.evaluate()
        seen += 1
    assert seen >= len([text for where, text in blocks("python") if where == page])


def cli_arguments(page: Path, folder: Path) -> list[str]:
    """Writes the YAML of the page that is a command line's configuration, and returns what names it."""
    found = [text for where, text in blocks("yaml") if where == page and text.startswith("# config.yaml")]
    if not found:
        return []
    (folder / "config.yaml").write_text(found[0])
    return ["--config", "config.yaml"]


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_is_read(page, text):
    assert isinstance(yaml.safe_load(text), dict)


def commands() -> list:
    """The lines that call the application."""
    lines = [(page, line) for page, text in blocks("") for line in text.splitlines()]
    lines += [(page, cell) for page in PAGES for cell in re.findall(r"`(lightning-compress [^`]*)`", page.read_text())]
    found = [(page, line.split("  #")[0]) for page, line in lines if line.startswith("lightning-compress ")]
    return [pytest.param(line, id=f"{page.name}: {line}") for page, line in dict.fromkeys(found)]


@pytest.mark.parametrize("line", commands())
def test_command_composes(line):
    words = shlex.split(line)[1:]
    overrides = [word.replace("'", "") for word in words if word != "-m"]
    values = [re.sub(r"=(interval\()([^,]*),.*", r"=\2", word) for word in overrides]
    values = [word.replace("FOLDER", "folder").replace("FILE", "file") for word in values]
    engines = [word for word in values if word.startswith(("hydra/", "hydra."))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        swept = [word.split(",")[0] if "-m" in words and "[" not in word else word for word in values]
        config = compose("config", [word for word in swept if word not in engines])
    assert config.compression._target_ == "lightning_compress.Compress"

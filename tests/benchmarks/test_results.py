from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import common, document

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables_in(text):
    """Every Markdown table, as its lines."""
    return re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)


def cells_of(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for the files of benchmarks, in the place of the repository's."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


# --- the page and README -----------------------------------------------------------------------


def test_page_is_what_the_command_writes_and_shows_every_file_and_plot():
    page = PAGE.read_text(encoding="utf-8")
    assert page == document.page(), "run: python -m benchmarks.document"
    for path in (*common.RESULTS.glob("*.json"), *common.RESULTS.glob("*.png")):
        assert f"(../benchmarks/results/{path.name})" in page


IN_README = {
    "VGG": ("zero_shot_vgg", None, "uniform", "end_to_end + healing"),
    "ResNet-20": ("zero_shot_resnet20", None, "uniform", "end_to_end + healing"),
    "depthwise-separable net": ("other_networks", "depthwise", "uniform svd", "default"),
    "1-D convolutions on noisy tones": ("other_networks", "tones", "uniform svd", "default"),
    "GRU on bytes of source code": ("other_networks", "byte_gru", "uniform svd", "default, not healed"),
    "transformer on the same": ("other_networks", "byte_transformer", "uniform svd", "default, not healed"),
}
"""Network of README's table to file, network and methods."""


def test_readmes_table_of_figures_is_that_of_the_files():
    _pages, table = tables_in(README)
    _names, _line, *rows = map(cells_of, table.splitlines())
    assert [network.partition(",")[0] for network, *_ in rows] == list(IN_README)
    for network, kept, *figures in rows:
        file, own, *methods = IN_README[network.partition(",")[0]]
        content = json.loads((common.RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        found = {(f"{100 * r['keep']:.0f} %", r["method"]): r for r in content["rows"] if r.get("network") == own}
        of_both = [found[kept, method] for method in methods]
        scores = [row.get("score", row.get("accuracy")) for row in of_both]
        expected = [of_both[0].get("dense", content.get("dense")), *scores]
        digits = len(figures[0].partition(".")[2])
        assert figures == [f"{value:.{digits}f}" for value in expected]


def test_links_of_page_and_readme_lead_somewhere():
    for folder, text in ((ROOT, README), (PAGE.parent, PAGE.read_text(encoding="utf-8"))):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (folder / target).exists(), target


def test_tables_of_the_page_have_no_gaps_and_no_nan():
    page = PAGE.read_text(encoding="utf-8")
    assert len(tables_in(page)) > len(list(common.RESULTS.glob("*.json")))
    for table in tables_in(page):
        rows = [cells_of(line) for line in table.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}
        assert all(cell and "nan" not in cell and "None" not in cell for row in rows for cell in row)


def test_every_file_says_what_machine_and_commit_it_is_of():
    for path in common.RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["machine"]["processor"], path
        assert re.fullmatch(r"(published in )?[0-9a-f]{7,40}( with changes)?", content["commit"]), path


# --- what the page is made of ------------------------------------------------------------------


def test_values_are_written_as_their_column_wants():
    written = {
        ("keep", 0.05): "5 %",
        ("gap", 0.00075): "0.07 %",
        ("change", -0.0014): "-0.14 points",
        ("change", -1e-9): "+0.00 points",
        ("smaller", 5.006): "5.01x",
        ("seconds", 144.3): "144",
        ("seconds", 0.8776): "0.878",
        ("params", 1234567): "1,234,567",
        ("identical", True): "yes",
        ("kept", float("nan")): "–",
        ("accuracy", None): "–",
        ("status", "a | b"): "a \\| b",
    }
    assert {key: document.cell(*key) for key in written} == written


def test_file_belongs_to_the_module_whose_name_it_begins_with(tmp_path):
    names = {"zero_shot_vgg": "zero_shot", "kinds_healed": "kinds", "digits": "digits"}
    assert {name: document.benchmark_of(Path(f"{name}.json")) for name in names} == names
    (tmp_path / "zero_shots.json").write_text("{}")
    with pytest.raises(ValueError, match=r"zero_shots\.json is of no benchmark"):
        document.page(tmp_path)


def test_rows_kept_from_an_earlier_run_keep_its_commit_on_the_page(results, monkeypatch):
    rows = {
        kind: {"network": "vgg", "keep": 0.1, "kind": kind, "seeds": 1, "accuracy": 0.5, "spread": 0.0} for kind in "ab"
    }
    monkeypatch.setattr(common, "COMMIT", "aaaaaaa1")
    common.publish("kinds", "Kinds", list(rows.values()))
    monkeypatch.setattr(common, "COMMIT", "bbbbbbb2")
    common.publish("kinds", "Kinds", [*common.earlier_rows("kinds")[:1], rows["b"]])
    page = document.page(results)
    summary = [cells_of(line) for line in page.splitlines() if re.match(r"\| [ab] ", line)]
    assert [(row[0], row[-1]) for row in summary] == [("a", "`aaaaaaa1`"), ("b", "`bbbbbbb2`")]
    assert "; `bbbbbbb2` (rows: 1), `aaaaaaa1` (rows: 1)." in page


# --- the commit --------------------------------------------------------------------------------


def test_published_file_holds_the_packages_commit(results, monkeypatch):
    monkeypatch.setattr(common, "COMMIT", "abc1234 with changes")
    common.publish("digits", "Digits", [{"seed": 0}], shown=[{"shown": "other"}], ratio=0.5)
    content = json.loads((results / "digits.json").read_text())
    assert content.pop("machine")["cores"]
    assert content == {"title": "Digits", "commit": "abc1234 with changes", "ratio": 0.5, "rows": [{"seed": 0}]}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_marked_where_the_package_was_changed_and_none_without_git(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package, beside = tmp_path / "package", tmp_path / "beside.py"
    package.mkdir()
    (package / "module.py").write_text("1")
    assert common.commit_of(package) is None
    git("init", "--quiet")
    assert common.commit_of(package) is None
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    beside.write_text("what is not of the package does not matter")
    assert common.commit_of(package) == head
    (package / "module.py").write_text("2")
    assert common.commit_of(package) == f"{head} with changes"
    monkeypatch.setenv("PATH", "")
    assert common.commit_of(package) is None

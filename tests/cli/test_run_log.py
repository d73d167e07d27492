"""The log file of a run has what the terminal shows, and more; the terminal shows nothing twice."""

from __future__ import annotations

import io
import logging
import warnings

import pytest

from lightning_compress.cli.run_log import keep_log, log, say

LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")


@pytest.fixture
def warned():
    return []


@pytest.fixture
def streams():
    """What the handlers of the root logger and of Lightning write to a terminal."""
    return {"terminal": io.StringIO(), "lightning": io.StringIO()}


@pytest.fixture
def logged(tmp_path, monkeypatch, warned, streams):
    """A root logger as Hydra sets it up for a job; gives the text of the file."""
    root = logging.getLogger()
    file, terminal = (
        logging.FileHandler(tmp_path / "app.log", encoding="utf-8"),
        logging.StreamHandler(streams["terminal"]),
    )
    own = logging.StreamHandler(streams["lightning"])
    levels = {name: logging.getLogger(name).level for name in ("", *LIGHTNING)}
    propagate = {name: logging.getLogger(name).propagate for name in LIGHTNING}
    monkeypatch.setattr(root, "handlers", [terminal, file])
    for name in LIGHTNING:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [own] if name == "lightning.pytorch" else [])
    monkeypatch.setattr(warnings, "showwarning", lambda *args: warned.append(str(args[0])))
    root.setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    keep_log()
    keep_log()  # as each job of a multirun does
    yield lambda: (tmp_path / "app.log").read_text("utf-8")
    file.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in LIGHTNING:
        logging.getLogger(name).propagate = propagate[name]


def test_stages_are_printed_and_logged_once_without_markup(logged, streams, capsys):
    say("[bold]1/4[/] training\n12 steps")
    log("| a | table of 20 %s |")
    shown = capsys.readouterr()
    assert shown.out == "1/4 training\n12 steps\n"
    assert shown.err == streams["terminal"].getvalue() == ""
    assert logged() == "1/4 training\n12 steps\n| a | table of 20 %s |\n"


def test_errors_go_to_the_error_stream(logged, capsys):
    say("[red]Error:[/] no", error=True)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "Error: no\n")
    assert logged() == "Error: no\n"


def test_warnings_are_shown_as_before_and_logged_once(logged, warned):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("mind the gap", UserWarning, stacklevel=1)
    assert warned == ["mind the gap"]
    assert logged().startswith("UserWarning: mind the gap (")
    assert logged().count("mind the gap") == 1


def test_lightning_says_little_on_the_terminal_and_all_in_the_log(logged, streams):
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.info("some detail")
    lightning.warning("something odd")
    assert streams["lightning"].getvalue() == "something odd\n"
    assert streams["terminal"].getvalue() == ""
    assert logged() == "some detail\nsomething odd\n"


def test_without_handlers_of_lightning_the_terminal_shows_its_warnings(logged, streams, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [])
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.info("some detail")
    lightning.warning("something odd")
    assert streams["terminal"].getvalue() == "something odd\n"
    assert logged() == "some detail\nsomething odd\n"


def test_others_are_left_alone(logged, streams):
    logging.getLogger("somebody").info("hello")
    assert streams["terminal"].getvalue() == logged() == "hello\n"

"""How far a compression is, in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightning_compress.core import progress
from lightning_compress.core.progress import bar


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_bar_is_shown_in_a_terminal_alone(monkeypatch, terminal, shown):
    written = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=written, force_terminal=terminal, force_jupyter=False)
    )
    with bar(shown_at_all=shown) as report:
        report("fitting layers", 0.5)
    assert ("Compress: fitting layers" in written.getvalue()) == (terminal and shown)

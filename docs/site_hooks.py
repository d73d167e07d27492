"""For mkdocs: files of the repository that pages link to are part of the site, the changelog too.

Beside the pages on disk `../examples/…` is right, so they say that; on the site the files lie below them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("examples", "benchmarks/results")


def on_files(files: Any, config: Any) -> Any:
    """Adds what lies outside the folder of the pages."""
    for folder in FOLDERS:
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, content=path.read_bytes()))
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links out of the folder of the pages into links to what was added."""
    return markdown.replace("](../", "](")

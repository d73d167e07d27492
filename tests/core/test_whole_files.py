"""Files written whole or not at all, and a folder of them that stays small enough."""

from __future__ import annotations

import os

import pytest

from lightning_compress.core.whole_files import make_room, whole_file


def test_a_file_is_as_before_until_all_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with whole_file(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    with pytest.raises(TypeError), whole_file(path) as part:
        part.write_text(3)
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="absent"), whole_file(tmp_path / "absent" / "file"):
        pass


def test_the_least_recently_used_files_make_room(tmp_path):
    for age, name in enumerate(("old", "middle", "new")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (age, age))
    make_room(tmp_path.iterdir(), 50, 350)
    assert len(list(tmp_path.iterdir())) == 3
    make_room(tmp_path.iterdir(), 51, 250)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]

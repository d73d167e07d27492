"""Freed memory is kept while a model is run, and given back."""

from __future__ import annotations

import os

import pytest

from lightning_compress.core import memory
from lightning_compress.core.memory import KEPT, USUAL, freed_memory_kept


class Library:
    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, parameter: int, value: int) -> None:
        self.values[parameter] = value

    def malloc_trim(self, _pad: int) -> None:
        self.trimmed += 1


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(memory, "_library", lambda: found)
    return found


def test_memory_is_given_back_when_the_outermost_ends(library):
    with freed_memory_kept():
        with freed_memory_kept():
            assert library.values == KEPT
        assert library.values == KEPT
        assert not library.trimmed
    assert library.values == USUAL
    assert library.trimmed == 1


def test_memory_is_given_back_after_an_error(library):
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        1 / 0  # noqa: B018
    assert library.values == USUAL
    with freed_memory_kept():
        assert library.values[memory.M_MMAP_MAX] == 0


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_an_allocator_set_by_the_environment_is_left_alone(monkeypatch, name):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    for other in [own for own in os.environ if own == "GLIBC_TUNABLES" or own.startswith("MALLOC_")]:
        monkeypatch.delenv(other)
    assert memory._library() is not None
    monkeypatch.setenv(name, "1")
    assert memory._library() is None
    with freed_memory_kept():
        pass


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert memory._library() is None

"""What is kept on disk between compressions: found again where nothing changed, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_compress import Budget, search_ranks
from lightning_compress.analysis import synthetic
from lightning_compress.core import store
from lightning_compress.kinds import registry
from tests.support.nets import trained_like

SHAPE = (1, 3, 16, 16)


@pytest.fixture(autouse=True)
def folder(real_store):
    return real_store


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_entries_come_back_by_their_key(folder):
    key = store.key_of("thing", torch.arange(3.0), 2, "text")
    assert key == store.key_of("thing", torch.arange(3.0), 2, "text")
    others = [(torch.arange(3.0), 2, "other"), (torch.arange(3), 2, "text"), (torch.arange(3.0)[:, None], 2, "text")]
    assert len({key, *(store.key_of("thing", *other) for other in others)}) == 4
    assert store.find(key) is None
    shared = torch.randn(6)  # factors may be parts of one tensor
    value = {"a": torch.randn(3, 4).T, "b": torch.tensor(3), "c": shared[:3], "d": shared[3:], "e": shared}
    store.keep(key, value)
    assert all(torch.equal(value[name], found) for name, found in store.find(key).items())
    (folder / f"{key}.safetensors").write_bytes(b"damaged")
    assert store.find(key) is None
    store.keep(key, value)
    assert store.find(key) is not None
    assert names(folder) == [f"{key}.safetensors"]


def test_the_least_recently_used_make_room_and_too_large_ones_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(store, "LIMIT", 3000)
    monkeypatch.setattr(store, "LARGEST", 2000)
    for number in range(3):
        store.keep(f"entry-{number}", {"a": torch.zeros(200)})
        store.os.utime(folder / f"entry-{number}.safetensors", (number, number))
    assert store.find("entry-0") is not None  # and now it was used last
    store.keep("entry-3", {"a": torch.zeros(200)})
    assert store.find("entry-1") is None
    assert store.find("entry-0") is not None
    store.keep("large", {"a": torch.zeros(600)})
    assert store.find("large") is None


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(store.CACHE, str(tmp_path / "file" / "cache"))
    store.keep("entry", {"a": torch.zeros(2)})
    assert store.find("entry") is None


def test_what_cannot_be_written_ends_nothing(folder, monkeypatch):
    def fail(*_):
        raise store.SafetensorError("no space left")

    monkeypatch.setattr(store, "save_file", fail)
    store.keep("entry", {"a": torch.zeros(2)})
    assert names(folder) == []


def test_off_keeps_nothing(monkeypatch):
    monkeypatch.setenv(store.CACHE, "off")
    assert not store.is_kept()


def searched(model):
    settings = {"target": None, "kinds": ["cp3", "svd"], "objective": "moments", "example_input": SHAPE}
    return search_ranks(model, Budget(params=0.5), **settings)


@pytest.mark.usefixtures("less_work")
def test_the_second_search_of_a_model_makes_nothing_again_and_finds_the_same(folder, monkeypatch):
    model = trained_like()
    first = searched(model)
    assert {name.partition("-")[0] for name in names(folder)} == {"inputs", "profiles", "fit"}
    before = names(folder)

    def never(*_, **__):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_match", never)
        patch.setattr(
            registry, "_fitted", lambda *args: never() if args[2] is not None and kind_of(args) else real(*args)
        )
        again = searched(copy.deepcopy(model))
    assert again.layers == first.layers
    assert names(folder) == before
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.01)
    searched(changed)
    assert len([name for name in names(folder) if name.startswith("inputs")]) == 2


real = registry._fitted


def kind_of(arguments) -> bool:
    in_a_metric = arguments[2] is not None
    return in_a_metric and "cp" in getattr(getattr(arguments[3], "__self__", None), "kind", "")

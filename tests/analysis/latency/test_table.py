"""Tables of times: kept, found again, damaged, foreign, and measured elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_compress import Budget, LatencyTable, search_ranks
from lightning_compress.analysis.latency.table import STEP
from lightning_compress.core.errors import CompressionWarning, TargetError
from lightning_compress.core.store import cache_folder

SETTINGS = {"example_input": (1, 3, 8, 8), "objective": "weight"}


def filled(identity, **entries):
    table = LatencyTable.of(identity)
    table.times(list(entries), lambda: [[seconds] for seconds in entries.values()])
    table.keep()
    return table


@pytest.mark.usefixtures("stand_in")
def test_times_are_rounded_kept_and_found_again():
    table = filled({"backend": "a"}, one=1.0042, two=0.5)
    assert table.entries["one"][0] == pytest.approx(1.0042, rel=STEP)
    again = LatencyTable.of({"backend": "a"})
    assert again.entries == table.entries
    assert again.times(["one"], lambda: pytest.fail("measured again")) == [table.entries["one"]]
    near = filled({"backend": "b"}, one=1.0041)
    assert near.entries["one"] == table.entries["one"]  # what noise does not tell apart is the same


@pytest.mark.usefixtures("stand_in")
def test_other_targets_have_tables_of_their_own():
    filled({"backend": "a", "threads": 1}, one=1.0)
    assert LatencyTable.of({"backend": "a", "threads": 2}).entries == {}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("damage", ["not json", "changed number", "foreign", "empty"])
def test_damaged_table_is_noticed_and_measured_again(damage):
    path = filled({"backend": "a"}, one=1.0).path
    content = json.loads(path.read_text())
    if damage == "changed number":
        content["entries"]["one"] = [2.0]
    text = {"not json": "{", "foreign": json.dumps({"format": "other"}), "empty": ""}
    path.write_text(text.get(damage, json.dumps(content)))
    with pytest.warns(CompressionWarning, match="It is measured again"):
        assert LatencyTable.of({"backend": "a"}).entries == {}
    with pytest.raises(TargetError, match=str(path)):
        LatencyTable.load(path)


def test_cache_folder_that_cannot_be_written_is_a_warning_and_the_plan_is_found(net, stand_in, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(CompressionWarning, match="Set LIGHTNING_COMPRESS_CACHE to a folder that can be written"):
        plan = search_ranks(net, Budget(params=0.5), **SETTINGS)
    assert plan.compressed.latency < plan.dense.latency


def test_folder_is_that_of_the_environment_else_of_the_users_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LIGHTNING_COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning_compress"


def test_second_search_measures_nothing_and_finds_the_same_plan(net, stand_in):
    first = search_ranks(net, Budget(latency=0.6), **SETTINGS)
    assert {"dense", "parts", "whole"} <= set(stand_in.asked)
    stand_in.asked.clear()
    second = search_ranks(net, Budget(latency=0.6), **SETTINGS)
    assert stand_in.asked == []
    assert second.layers == first.layers
    assert second.target == first.target


@pytest.mark.parametrize("held", [{"dtype": torch.float64}, {"memory_format": torch.channels_last}], ids=str)
def test_the_same_model_held_otherwise_is_measured_for_itself(net, stand_in, held):
    search_ranks(net, Budget(latency=0.6), **SETTINGS)
    stand_in.asked.clear()
    search_ranks(net.to(**held), Budget(latency=0.6), **SETTINGS)
    assert {"dense", "parts", "whole"} <= set(stand_in.asked)


def test_table_of_a_plan_gives_the_same_plan_where_the_target_is_not(net, stand_in, monkeypatch, tmp_path):
    first = search_ranks(net, Budget(latency=0.6), **SETTINGS)
    LatencyTable.of_plan(first).save(tmp_path / "table.json")
    stand_in.asked.clear()
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path / "another machine"))
    second = search_ranks(net, Budget(latency=0.6), target=tmp_path / "table.json", **SETTINGS)
    assert stand_in.asked == []
    assert second.layers == first.layers
    assert second.target == first.target
    assert second.compressed.latency == first.compressed.latency
    with pytest.raises(TargetError, match="are not in the cache"):
        LatencyTable.of_plan(first)
    with pytest.raises(TargetError, match="was found without times"):
        LatencyTable.of_plan(search_ranks(net, Budget(params=0.5)))


@pytest.mark.usefixtures("stand_in")
def test_table_of_another_model_says_what_it_lacks(net, tmp_path):
    LatencyTable({"backend": "phone"}).save(tmp_path / "table.json")
    with pytest.raises(TargetError, match=r"lacks 'model .* dense' and 0 more: it was measured for another model"):
        search_ranks(net, Budget(latency=0.6), target=str(tmp_path / "table.json"), **SETTINGS)
    with pytest.raises(TargetError, match="cannot read the table of latencies"):
        search_ranks(net, Budget(latency=0.6), target=str(tmp_path / "none.json"), **SETTINGS)

"""One check for one argument, at every entrance: wrong types are errors of our own tree before anything is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import (
    Budget,
    Compress,
    LatencyTable,
    apply_plan_,
    compress_,
    load_compressed_checkpoint,
    merge_,
    search_ranks,
)
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core.errors import (
    ConfigurationError,
    ExampleInputError,
    LightningCompressError,
    TargetError,
    WeightsError,
)
from lightning_compress.surgery.repair import heal_
from tests.support.nets import TinyNet, TinyTask

BUDGET = Budget(params=0.8)
WEIGHT = {"method": "exact", "kinds": "svd", "objective": "weight"}


def search(model, **arguments):
    return search_ranks(model, BUDGET, **WEIGHT, **arguments)


def compress(model, **arguments):
    return compress_(model, BUDGET, **{"heal": False, **WEIGHT, **arguments})


def callback(_model, **arguments):
    return Compress(BUDGET, **arguments)


def statistics_of(model, **arguments):
    return gather_statistics(model, **{"example_input": (1, 3, 8, 8), **arguments})


def apply(model, **arguments):
    return apply_plan_(model, search(model), **arguments)


def plan_for(model, **arguments):
    return Compress(BUDGET, **WEIGHT).plan_for(model, **arguments)


def merge(model, **arguments):
    compress(model)
    return merge_(model, **arguments)


def heal(model, **arguments):
    return heal_(model, model, [], None, **arguments)


CALIBRATIONS = [
    5,
    "batches",
    torch.zeros(2, 3, 8, 8),
    {"x": 1},
    [],
    [5],
    ["x"],
    [[torch.zeros(1, 3, 8, 8), 1]],
    object(),
]
STATISTICS = [5, "moments", {}, [], object()]
PROGRESS = [5, "yes", [], object(), True]
EXAMPLES = ["x", 5, [], [1.5], b"x", object(), True]
PATTERNS = [5, [5], b"fc1", {"fc1": 1}.items(), object(), [None], True]
OVERRIDES = [5, ["fc1"], "fc1", {5: "dense"}, {"fc1": 5}, {"fc1": {"most": 1}}, object()]
FLAGS = ["no", 0, 1, None, [], "false"]

ENTRANCES = {
    "calibration": (CALIBRATIONS, [search, compress, callback, statistics_of], ExampleInputError),
    "statistics": (STATISTICS, [search, compress, apply], ConfigurationError),
    "progress": (PROGRESS, [search, compress, statistics_of, apply, plan_for, merge, heal], ConfigurationError),
    "example_input": (EXAMPLES, [search, compress, callback, statistics_of, apply, plan_for], ExampleInputError),
    "include": (PATTERNS, [search, compress, callback, plan_for], ConfigurationError),
    "exclude": (PATTERNS, [search, compress, callback, plan_for], ConfigurationError),
    "overrides": (OVERRIDES, [search, compress, callback, plan_for], ConfigurationError),
    "heal": (FLAGS, [compress, callback], ConfigurationError),
    "require_used": (FLAGS, [callback], ConfigurationError),
}
CASES = [
    pytest.param(name, entrance, value, error, id=f"{name}-{entrance.__name__}-{index}")
    for name, (values, entrances, error) in ENTRANCES.items()
    for entrance in entrances
    for index, value in enumerate(values)
]


@pytest.mark.parametrize(("name", "entrance", "value", "error"), CASES)
def test_wrong_argument_is_an_error_and_nothing_is_done(net, unchanged, name, entrance, value, error):
    before = unchanged(net)
    with pytest.raises(error, match=rf"^{name}|calibration holds"):
        entrance(net, **{name: value})
    if entrance is not merge:  # which needs a compressed model
        before.check()


@pytest.mark.parametrize("entrance", [search, compress, statistics_of, plan_for, apply])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (t,), lambda t: {"x": t}, lambda t: (torch.zeros(1), t)])
def test_example_input_on_the_meta_device_has_no_values(net, unchanged, entrance, wrap):
    before = unchanged(net)
    with pytest.raises(ExampleInputError, match="an input is on the meta device, which has no values: pass its shape"):
        entrance(net, example_input=wrap(torch.zeros(1, 3, 8, 8, device="meta")))
    before.check()


def test_calibration_on_the_meta_device_has_no_values(net):
    with pytest.raises(ExampleInputError, match="on the meta device"):
        gather_statistics(net, calibration=[torch.zeros(1, 3, 8, 8, device="meta")])


def test_generators_and_loaders_are_taken_and_not_begun(net):
    taken = []

    def batches():
        taken.append(1)
        yield torch.randn(2, 3, 8, 8)

    search(net, calibration=batches())  # the weights alone: no inputs are needed
    Compress(BUDGET, calibration=batches())
    assert taken == []


@pytest.mark.parametrize("call", [LatencyTable.load, lambda value: LatencyTable({}).save(value)])
@pytest.mark.parametrize("value", [5, b"table", ["table"], "", "a\0b"])
def test_path_of_a_table_that_is_none_is_an_error(call, value):
    with pytest.raises(ConfigurationError, match=r"path=.*: expected a path"):
        call(value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_in_the_place_of_a_table_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "table.json")
    with pytest.raises(TargetError, match=r"cannot read the table of latencies .*: it is no file"):
        LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(LightningCompressError, match="it is no file"):
        search_ranks(nn.Sequential(nn.Linear(8, 8)), BUDGET, example_input=(1, 8), target=str(tmp_path / "table.json"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_in_the_place_of_a_checkpoint_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "last.ckpt")
    for path in (tmp_path / "last.ckpt", str(tmp_path / "last.ckpt")):
        with pytest.raises(WeightsError, match=r"cannot read the checkpoint .*: it is no file"):
            load_compressed_checkpoint(TinyTask, path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_endless_device_in_the_place_of_a_table_is_an_error():
    with pytest.raises(TargetError, match="cannot read the table of latencies '/dev/zero': it is no file"):
        LatencyTable.load("/dev/zero")


# --- layers without entries

EMPTY = {
    "Linear(0, 16)": lambda: nn.Linear(0, 16),
    "Linear(16, 0)": lambda: nn.Linear(16, 0),
    "Linear(0, 0)": lambda: nn.Linear(0, 0, bias=False),
    "Embedding(0, 8)": lambda: nn.Embedding(0, 8),
    "Embedding(8, 0)": lambda: nn.Embedding(8, 0),
    "EmbeddingBag(0, 4)": lambda: nn.EmbeddingBag(0, 4),
    "Conv2d(4, 0)": lambda: nn.Conv2d(4, 0, 3),
    "ConvTranspose2d(0, 4)": lambda: nn.ConvTranspose2d(0, 4, 3),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's own
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("kinds", ["auto", "svd"])
def test_layer_without_entries_stays_dense(empty, kinds):
    torch.manual_seed(0)
    model = TinyNet()
    model.cond = EMPTY[empty]()
    expected = {name: value.clone() for name, value in model.cond.state_dict().items()}
    plan = compress_(model, Budget(params=0.7), heal=False, kinds=kinds, objective="weight", method="exact")
    (entry,) = [layer for layer in plan.layers if layer.name == "cond"] or [None]
    if entry is not None:  # without any parameter it is no layer at all
        assert entry.is_dense
        assert entry.reason == f"its weight is empty, of shape {tuple(model.cond.weight.shape)}"
    assert plan.factorised
    assert plan.kept["params"] <= 0.7
    assert all(torch.equal(value, expected[name]) for name, value in model.cond.state_dict().items())
    assert "cond" in str(plan)

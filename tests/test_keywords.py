"""Functions that take a model find it whatever the order their arguments come in."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import lightning_compress
from lightning_compress import (
    apply_plan_,
    compress_,
    compress_checkpoint,
    export_model,
    load_compressed,
    merge_,
    save_compressed,
    search_ranks,
)
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.analysis.trace import trace
from lightning_compress.core.settings import Budget, SearchSettings
from lightning_compress.search.api import search_with_statistics
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.repair import heal_

SHAPE = (1, 4, 8)
SEARCH = {"objective": "moments", "kinds": "svd", "method": "exact"}
TIMES = ("seconds", "timings")
"""Fields that differ from run to run."""


def dense():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1), nn.GRU(8, 8, batch_first=True)).eval()


def compressed():
    model = dense()
    return model, apply_plan_(model, plan())


def plan():
    return search_ranks(dense(), Budget(params=0.7), objective="weight", kinds="svd", method="exact")


def batches():
    return [torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def statistics():
    return gather_statistics(dense(), calibration=batches())


def saved(folder):
    save_compressed(compressed()[0], folder)
    return folder


def checkpoint(folder):
    beside = folder.with_name(f"{folder.name} dense")
    beside.mkdir(exist_ok=True)
    save_model(dense(), str(beside / "model.safetensors"))
    return beside


ARGUMENTS = {
    apply_plan_: lambda _: {"model": dense(), "plan": plan(), "statistics": statistics()},
    compress_: lambda _: {
        "model": dense(),
        "budget": Budget(params=0.7),
        "example_input": SHAPE,
        "calibration": batches(),
        "heal": False,
        **SEARCH,
    },
    compress_checkpoint: lambda folder: {
        "folder_in": checkpoint(folder),
        "folder_out": folder,
        "budget": Budget(params=0.7),
        "model": dense,
        "kinds": "svd",
    },
    export_model: lambda folder: {
        "model": compressed()[0],
        "path": folder / "model",
        "format": "onnx",
        "example_input": batches()[0],
    },
    gather_statistics: lambda _: {"model": dense(), "example_input": SHAPE, "calibration": batches(), "seed": 1},
    heal_: lambda _: {
        "dense": dense(),
        **dict(zip(("model", "replacements"), compressed(), strict=True)),
        "statistics": statistics(),
        "steps": 20,
    },
    load_compressed: lambda folder: {"model": dense(), "folder": saved(folder)},
    measure_costs: lambda _: {"model": dense(), "example_input": SHAPE},
    merge_: lambda _: {"model": compressed()[0], "progress": lambda *_: None},
    embodied_plan: lambda _: {"model": compressed()[0], "example_input": SHAPE},
    save_compressed: lambda folder: {"model": compressed()[0], "folder": folder},
    search_ranks: lambda _: {
        "model": dense(),
        "budget": Budget(params=0.7),
        "example_input": SHAPE,
        "calibration": batches(),
        **SEARCH,
    },
    search_with_statistics: lambda _: {
        "model": dense(),
        "budget": Budget(params=0.7),
        "settings": SearchSettings(**SEARCH),
        "calibration": batches(),
    },
    trace: lambda _: {"model": dense(), "example_input": SHAPE},
}
"""Of every function that takes a model, in the order of its signature; made anew for each call, with its folder."""


def plain(value):
    """What can be compared with ==."""
    if isinstance(value, nn.Module):
        return [(name, type(m).__name__) for name, m in value.named_modules()], plain(value.state_dict())
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in (*TIMES, "path")
        }
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def outcome(function, folder, order=None):
    """What a call returns, the model after it, and what it has written; by position without an order."""
    folder.mkdir()
    arguments, known = ARGUMENTS[function](folder), inspect.signature(function).parameters
    usual = inspect.Parameter.POSITIONAL_OR_KEYWORD
    by_position = [name for name in arguments if order is None and name in known and known[name].kind is usual]
    by_name = [name for name in order or arguments if name not in by_position]
    found = function(*map(arguments.get, by_position), **{name: arguments[name] for name in by_name})
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    return plain(found), plain(arguments["model"]), written


def test_public_functions_that_take_a_model_are_all_tried():
    public = [getattr(lightning_compress, name) for name in lightning_compress.__all__]
    takers = {f for f in public if inspect.isfunction(f) and "model" in inspect.signature(f).parameters}
    assert takers - set(ARGUMENTS) == set()


@pytest.mark.slow
@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_keywords_in_any_order_do_what_positions_do(function, tmp_path):
    names = tuple(ARGUMENTS[function](tmp_path))
    expected = outcome(function, tmp_path / "by position")
    first_once = [names[index:] + names[:index] for index in range(len(names))]
    for index, order in enumerate(dict.fromkeys([*first_once, names[::-1]])):
        assert outcome(function, tmp_path / str(index), order) == expected, order


def test_statistics_by_keyword_know_the_projections():
    moments = gather_statistics(calibration=batches(), model=dense()).moments
    assert {"0.layers.0.self_attn.in_proj", "0.layers.0.self_attn.out_proj", "1.ih_l0", "1.hh_l0"} <= set(moments)

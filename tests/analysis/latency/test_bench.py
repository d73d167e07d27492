"""Measuring with the clock of this machine: what is run, and that nothing of it is left; never how long it takes."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import nn

from lightning_compress import Budget, compress_, search_ranks
from lightning_compress.analysis.inspection import inspect_model
from lightning_compress.analysis.latency.bench import PRESERVED, TorchBench
from lightning_compress.analysis.latency.compare import measure_latency
from lightning_compress.analysis.latency.devices import DeviceBench
from lightning_compress.analysis.latency.shells import Form
from lightning_compress.core.errors import CompressionWarning, ExampleInputError, TargetError
from lightning_compress.core.target import Target
from lightning_compress.layers.memory_format import CHANNELS_LAST
from lightning_compress.layers.unfused import unfused
from tests.support.nets import TinyNet
from tests.support.unchanged import Unchanged

pytestmark = pytest.mark.usefixtures("real_clock")
EXAMPLE = (1, 3, 8, 8)


class Viewing(nn.Module):
    """Code that takes the order of numbers in memory for granted."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, images):
        return self.head(self.conv(images).view(len(images), -1))


def classifier():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.mark.parametrize(
    ("model", "formats"),
    [
        (classifier(), (PRESERVED, CHANNELS_LAST)),
        (Viewing(), (PRESERVED,)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)), (PRESERVED,)),  # its images would come out otherwise
        (classifier().to(memory_format=torch.channels_last), (PRESERVED,)),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Linear(32, 4)), (PRESERVED,)),
    ],
    ids=["classifier", "view", "images", "channels last", "no convolutions"],
)
def test_formats_are_those_the_model_works_in(model, formats):
    assert TorchBench(model, (), EXAMPLE, Target()).formats == formats


def test_format_that_is_asked_for_and_does_not_work_is_an_error():
    with pytest.raises(TargetError, match="memory_format='channels_last' changes what the model's code"):
        TorchBench(Viewing(), (), EXAMPLE, Target(memory_format="channels_last"))


def test_model_that_fails_at_the_batch_size_of_the_target_is_an_error():
    with pytest.raises(ExampleInputError, match=r"the model fails on the inputs of Target\(.*batch=2.*one at a time"):
        TorchBench(OneAtATime(3, 4, 3), (), EXAMPLE, Target(batch=2))


class OneAtATime(nn.Conv2d):
    def forward(self, images):
        if len(images) > 1:
            msg = "one at a time"
            raise ValueError(msg)
        return super().forward(images)


def bench_of(model, example, **target):
    inspection = inspect_model(model, {"kinds": ["svd", "tucker2"]}, example)
    return TorchBench(model, inspection.chosen, example, Target(**target))


@pytest.mark.parametrize("target", [{}, {"batch": 3, "threads": 2}, {"dtype": "bfloat16"}], ids=str)
def test_layers_are_timed_by_stage_inside_the_model_and_all_is_as_before(target):
    net, threads = TinyNet(), torch.get_num_threads()
    before = Unchanged(net)
    bench = bench_of(net, EXAMPLE, **target)
    for memory_format in bench.formats:
        parts = bench.parts(
            {"conv2": Form("tucker2", (3, 4)), "fc1": Form("svd", (2,)), "conv1": Form("dense")}, memory_format
        )
        assert {name: len(times) for name, times in parts.items()} == {"conv2": 4, "fc1": 3, "conv1": 1}
        assert all(0 < seconds < 10 for times in parts.values() for seconds in times)
        whole = bench.whole({"conv2": Form("tucker2", (3, 4))}, memory_format)
        assert 0 < whole.seconds < 10
        assert math.isfinite(whole.spread)
    before.check()
    assert torch.get_num_threads() == threads


def test_tied_and_unfused_layers_are_timed_too():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(40, 16), nn.LSTM(16, 16), nn.Linear(16, 40, bias=False)
            self.attention = nn.MultiheadAttention(16, 2)
            self.head.weight = self.embed.weight

        def forward(self, index):
            hidden = self.lstm(self.embed(index))[0]
            return self.head(self.attention(hidden, hidden, hidden)[0])

    model = Language()
    with unfused(model):
        bench = bench_of(model, torch.zeros(5, 1, dtype=torch.int64))
        forms = {name: Form("svd", (3,)) for name in bench.layers}
        parts = bench.parts(forms, PRESERVED)
        assert parts.keys() == bench.layers.keys()
        assert {layer.whole for layer in bench.layers.values()} == {(), ("lstm",), ("attention",)}
        assert bench.unfused(PRESERVED).seconds > 0
        assert bench.whole(forms, PRESERVED).seconds > 0
    assert type(model.lstm) is nn.LSTM


def test_batch_that_cannot_be_made_is_an_error():
    with pytest.raises(ExampleInputError, match="target: batch=4 cannot be made of the example input"):
        TorchBench(Two(), (), (torch.zeros(1, 6), torch.zeros(2, 6)), Target(batch=4))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, one, other):
        return self.linear(one).sum() + other.sum()


def test_own_device_takes_arguments_by_position():
    with pytest.raises(ExampleInputError, match=r"called with keyword arguments \(one, other\)"):
        DeviceBench(Two(), (), {"one": torch.zeros(1, 6), "other": torch.zeros(1, 6)}, None, Target())


def test_model_that_takes_too_long_to_time_is_searched_without_time(try_only):
    try_only(timing_limit=1e-6)
    net = TinyNet()
    with pytest.warns(CompressionWarning, match="time is left out of the search: one forward pass takes"):
        plan = search_ranks(net, Budget(params=0.5), example_input=EXAMPLE, objective="weight")
    assert plan.target is None


@pytest.mark.slow
def test_default_on_the_clock_plans_measures_and_applies():
    net = TinyNet()
    plan = compress_(net, Budget(params=0.5), example_input=EXAMPLE, heal=False, kinds=["svd", "tucker2"])
    assert plan.kept["params"] <= 0.5
    assert 0 < plan.compressed.latency < 10
    assert plan.target["threads"] == torch.get_num_threads()
    assert net(torch.zeros(EXAMPLE)).shape == (1, 4)


def test_models_are_measured_in_turns():
    times = measure_latency([classifier(), Viewing()], EXAMPLE, target=Target(batch=2, threads=1), seconds=0.01)
    assert len(times) == 2
    assert all(0 < seconds < 10 for seconds in times)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_are_timed_on_a_gpu_by_its_own_events():
    net = TinyNet().cuda()
    bench = bench_of(net, EXAMPLE)
    parts = bench.parts({"conv2": Form("tucker2", (3, 4))}, PRESERVED)
    assert all(0 < seconds < 10 for seconds in parts["conv2"])
    assert 0 < bench.whole({"conv2": Form("tucker2", (3, 4))}, PRESERVED).seconds < 10
    assert bench.identity["gpu"] == torch.cuda.get_device_name()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_whole_models_are_timed_compiled():
    bench = bench_of(TinyNet(), EXAMPLE, compiled=True)
    assert 0 < bench.whole({"conv2": Form("tucker2", (3, 4))}, PRESERVED).seconds < 10
    assert bench.parts({"conv2": Form("tucker2", (3, 4))}, PRESERVED).keys() == {"conv2"}


@pytest.mark.slow
def test_onnxruntime_times_layers_and_models():
    pytest.importorskip("onnxruntime")
    plan = search_ranks(TinyNet(), Budget(params=0.5), example_input=EXAMPLE, target="onnxruntime", objective="weight")
    assert plan.target["backend"].startswith("onnxruntime")
    assert 0 < plan.compressed.latency < 10
    assert plan.memory_format is None

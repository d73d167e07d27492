"""Saves and loads are whole: damaged values, failures and kills on the way leave what was there."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress import Budget, compress_, load_compressed, save_compressed
from lightning_compress.core.errors import ConfigurationError, OutputFolderError, WeightsError
from lightning_compress.surgery import stored
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.save import PLAN_FILE, WEIGHTS_FILE, load_weights_, read_plan
from lightning_compress.surgery.stored import CHECKSUM
from tests.support.compressing import CLOSED_FORM, WEIGHTS_ALONE
from tests.support.interruptions import spoil
from tests.support.nets import TinyNet

SETTINGS = {"method": "exact", "kinds": CLOSED_FORM, **WEIGHTS_ALONE}


def compressed(params=0.5, seed=0):
    torch.manual_seed(seed)
    net = TinyNet()
    compress_(net, Budget(params=params), **SETTINGS)
    return net


@pytest.fixture
def folder(tmp_path):
    save_compressed(compressed(), tmp_path / "out")
    return tmp_path / "out"


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def rewritten(path, change, **metadata):
    """The file with changed tensors, as another writer would write it."""
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file({**tensors, **change(tensors)}, path, metadata or None)


def first_factor(tensors):
    return next(name for name in tensors if name.startswith("fc1") and name.endswith("weight"))


# --- values


VALUES = {
    "whole numbers": (
        lambda t: t.to(torch.int32),
        r"whole numbers \(torch.int32\) in the file, floating-point numbers",
    ),
    "truth values": (lambda t: t != 0, r"truth values \(torch.bool\) in the file, floating-point numbers"),
    "complex numbers": (lambda t: t.to(torch.complex64), r"complex numbers \(torch.complex64\) in the file"),
    "NaN": (lambda t: t.clone().fill_(float("nan")), r"holds \d+ NaN or infinite values of \d+"),
    "one infinity": (lambda t: t.index_fill(0, torch.tensor([0]), float("inf")), r"holds \d+ NaN or infinite values"),
    "too large": (lambda t: t.double() * 1e300, r"holds \d+ NaN or infinite values of \d+"),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "pick", [first_factor, lambda _: "norm.weight", lambda _: "fc2.bias"], ids=["factor", "norm", "bias"]
)
def test_values_that_no_parameter_holds_are_refused_and_the_model_untouched(folder, unchanged, value, pick):
    change, message = VALUES[value]
    path = folder / WEIGHTS_FILE
    plan = metadata_of(path)["lightning_compress/plan"]
    rewritten(path, lambda t: {pick(t): change(t[pick(t)])}, **{"lightning_compress/plan": plan})
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=rf"do not fit the model \(TinyNet\): [\w.]+ {message}"):
        load_compressed(model, folder)
    before.check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("value", VALUES)
def test_load_weights_refuses_the_same(net, unchanged, tmp_path, suffix, value):
    change, message = VALUES[value]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["fc2.bias"] = change(state["fc2.bias"])
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    before = unchanged(net)
    with pytest.raises(WeightsError, match=rf"do not fit the model \(TinyNet\): fc2.bias {message}"):
        load_weights_(net, path)
    before.check()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(1.5), "floating-point numbers .* in the file, whole numbers"),
        (torch.tensor(True), "truth values .* in the file, whole numbers"),
    ],
)
def test_buffers_of_whole_numbers_take_nothing_else(net, unchanged, tmp_path, value, message):
    state = {**{k: v.clone() for k, v in net.state_dict().items()}, "norm.num_batches_tracked": value}
    save_file(state, tmp_path / "w.safetensors")
    before = unchanged(net)
    with pytest.raises(WeightsError, match=rf"norm.num_batches_tracked {message}"):
        load_weights_(net, tmp_path / "w.safetensors")
    before.check()


def test_whole_numbers_that_are_too_large_are_refused(tmp_path):
    model = nn.Module()
    model.register_buffer("places", torch.zeros(3, dtype=torch.int32))
    save_file({"places": torch.tensor([1, 2, 2**40])}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"places has values beyond those of torch.int32"):
        load_weights_(model, tmp_path / "w.safetensors")
    save_file({"places": torch.tensor([1, 2, 2**30])}, tmp_path / "w.safetensors")
    load_weights_(model, tmp_path / "w.safetensors")
    assert model.places.tolist() == [1, 2, 2**30]


class Masked(nn.Module):
    """Infinities where a mask has them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.bias = nn.Parameter(torch.full((3,), -torch.inf), requires_grad=False)


def test_infinities_of_masks_come_back(tmp_path):
    model = Masked()
    save_compressed(model, tmp_path)
    fresh = Masked()
    fresh.mask.zero_()
    load_compressed(fresh, tmp_path)
    assert torch.equal(fresh.mask, model.mask)
    assert torch.equal(fresh.bias, model.bias)


def test_model_without_memory_is_an_error(folder):
    with torch.device("meta"):
        model = TinyNet()
    with pytest.raises(WeightsError, match=r"is on the meta device in the model, give it memory with model.to_empty"):
        load_compressed(model, folder)
    with pytest.raises(WeightsError, match=r"holds '[\w.]+', which is on the meta device"):
        save_compressed(model, folder)
    assert isinstance(model.fc1, nn.Linear)


def test_tensor_that_cannot_be_copied_leaves_the_model_as_it_was(net, unchanged, tmp_path):
    """The first tensors are in the model when torch refuses the last one, of which many entries are one number."""
    net.fc2.last = nn.Parameter(torch.zeros(1).expand(4))
    state = {name: value.clone() + 1 for name, value in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    before = unchanged(net)
    with pytest.raises(WeightsError, match=r"(?s)cannot be copied into the model \(TinyNet\): .*fc2.last"):
        load_weights_(net, tmp_path / "w.safetensors")
    before.check()


def test_interrupted_copy_leaves_the_model_as_it_was(folder, unchanged, monkeypatch):
    model = TinyNet()
    before = unchanged(model)
    real, calls = nn.BatchNorm2d._load_from_state_dict, []

    def interrupt(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.BatchNorm2d, "_load_from_state_dict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_compressed(model, folder)
    assert calls
    before.check()


def test_tensors_that_share_memory_are_saved_and_loaded(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        whole = torch.randn(10)
        model.register_buffer("part", whole[2:5])
        model.register_buffer("other", whole[4:])
        model.register_buffer("same", model[0].bias.data)
        return model

    model, fresh = make(0), make(1)
    compress_(model, Budget(params=0.8), include=["1"], **SETTINGS)
    save_compressed(model, tmp_path)
    load_compressed(fresh, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


# --- the checksum


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
@pytest.mark.parametrize("bit", [0, 5])
def test_flipped_bit_is_found(folder, unchanged, place, bit):
    path = folder / WEIGHTS_FILE
    tensors = sum(value.nbytes for value in load_file(path).values())
    index = path.stat().st_size - tensors + int(place * tensors)
    spoil(path, lambda data: data[:index] + bytes([data[index] ^ (1 << bit)]) + data[index + 1 :])
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=r"the weights '.*model.safetensors' are damaged: .*its checksum differs"):
        load_compressed(model, folder)
    before.check()


def test_flipped_digit_of_the_plan_is_found(folder):
    path = folder / WEIGHTS_FILE
    spoil(path, lambda data: data.replace(b'params_before\\": 1', b'params_before\\": 2', 1))
    with pytest.raises(WeightsError, match="its checksum differs"):
        load_compressed(TinyNet(), folder)


def test_file_of_another_writer_needs_no_checksum(folder):
    expected = {name: value.clone() for name, value in load_file(folder / WEIGHTS_FILE).items()}
    assert CHECKSUM in metadata_of(folder / WEIGHTS_FILE)
    rewritten(folder / WEIGHTS_FILE, lambda _: {})
    assert metadata_of(folder / WEIGHTS_FILE) == {}
    model = TinyNet()
    plan = load_compressed(model, folder)
    assert plan == read_plan(folder / PLAN_FILE) == embodied_plan(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_same_model_gives_the_same_bytes(folder, tmp_path):
    for _ in range(4):
        save_compressed(compressed(), tmp_path / "again")
        for name in (WEIGHTS_FILE, PLAN_FILE):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_alone_are_a_whole_save(folder):
    (folder / PLAN_FILE).unlink()
    model = TinyNet()
    assert load_compressed(model, folder) == embodied_plan(model)


# --- kills


class Killed(BaseException):
    """The process ends here."""


class Killing:
    """Counts what is done to files and ends the process before or in the middle of one of these operations.

    Nothing of what a dead process would have done later is done: all further operations fail too.
    """

    def __init__(self, monkeypatch, at):
        self.at, self.count = at, 0
        for owner, name in (
            (pathlib.Path, "mkdir"),
            (pathlib.Path, "write_text"),
            (pathlib.Path, "replace"),
            (pathlib.Path, "unlink"),
            (pathlib.Path, "open"),
            (os, "fsync"),
            (stored, "save_file"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name), name))

    def wrapped(self, real, name):
        def operation(*args, **kwargs):
            self.count += 1
            if self.count > self.at:
                if self.count == self.at + 1 and name in {"write_text", "save_file"}:  # half of it is there
                    real(*args, **kwargs)
                    path = args[0] if name == "write_text" else args[1]
                    os.truncate(path, path.stat().st_size // 2)
                raise Killed
            return real(*args, **kwargs)

        return operation


def state_after(folder):
    model = TinyNet()
    plan = load_compressed(model, folder)
    assert plan == embodied_plan(model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_kill_between_any_two_operations_leaves_the_old_or_the_new_save(tmp_path):
    old, new = compressed(0.5), compressed(0.4, seed=3)
    seen = set()
    for at in range(40):
        folder = tmp_path / str(at)
        save_compressed(old, folder)
        with pytest.MonkeyPatch.context() as patch:
            killing = Killing(patch, at)
            try:
                save_compressed(new, folder)
                finished = True
            except Killed:
                finished = False
        state = state_after(folder)
        which = [name for name, model in (("old", old), ("new", new)) if equal(state, dict(model.state_dict()))]
        assert len(which) == 1
        seen.add(which[0])
        if finished:
            break
    assert finished
    assert killing.count == at
    assert at > 6
    assert seen == {"old", "new"}
    assert sorted(path.name for path in folder.iterdir()) == sorted([PLAN_FILE, WEIGHTS_FILE])


def test_kill_in_the_first_save_leaves_nothing_or_all_of_it(tmp_path):
    model = compressed()
    for at in range(40):
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            Killing(patch, at)
            try:
                save_compressed(model, folder)
                break
            except Killed:
                pass
        if (folder / WEIGHTS_FILE).exists():
            assert equal(state_after(folder), dict(model.state_dict()))
        else:
            with pytest.raises(WeightsError):
                load_compressed(TinyNet(), folder)
        save_compressed(model, folder)  # what the kill left is in nobody's way
        assert equal(state_after(folder), dict(model.state_dict()))


def test_failed_write_leaves_the_old_save_and_no_other_file(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OutputFolderError, match="No space left on device"):
        save_compressed(compressed(0.4), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- paths


@pytest.mark.parametrize("value", [5, None, b"out", ["out"], "", "a\0b", object()])
@pytest.mark.parametrize(
    "call",
    [
        lambda value: save_compressed(TinyNet(), value),
        lambda value: load_compressed(TinyNet(), value),
        lambda value: load_weights_(TinyNet(), value),
        read_plan,
    ],
    ids=["save_compressed", "load_compressed", "load_weights_", "read_plan"],
)
def test_what_is_no_path_is_an_error(call, value):
    with pytest.raises(ConfigurationError, match=r"(folder|path)=.*: expected a path, as a string or a pathlib.Path"):
        call(value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [WEIGHTS_FILE, PLAN_FILE, "weights.pt"])
def test_pipe_in_the_place_of_a_file_does_not_block(folder, unchanged, name):
    rewritten(folder / WEIGHTS_FILE, lambda _: {})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=r"cannot read the (weights|plan) .*: it is no file"):
        load_weights_(model, folder / name) if name.endswith(".pt") else load_compressed(model, folder)
    before.check()


@pytest.mark.skipif(not pathlib.Path("/dev/zero").exists(), reason="no such device here")
@pytest.mark.parametrize("read", [lambda p: load_weights_(TinyNet(), p), read_plan])
def test_endless_device_is_an_error(read):
    with pytest.raises(WeightsError, match=r"cannot read the (weights|plan) '/dev/zero': it is no file"):
        read("/dev/zero")

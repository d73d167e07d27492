"""Weights from files of every format; what does not fit or cannot be read."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file, save_model

from lightning_compress.core.errors import WeightsError
from lightning_compress.surgery.save import load_weights_
from tests.support.interruptions import spoil
from tests.support.nets import Tied


@pytest.mark.parametrize("how", ["safetensors", "state dict", "checkpoint"])
def test_weights_are_loaded_from_every_format(net, tmp_path, how):
    path = tmp_path / ("weights.safetensors" if how == "safetensors" else "weights.pt")
    state = {name: value + 1 for name, value in net.state_dict().items()}
    content = {"state_dict": state, "epoch": 3, "lr": [0.1]} if how == "checkpoint" else state
    save_file(state, path) if how == "safetensors" else torch.save(content, path)
    kept = dict(net.named_parameters())
    load_weights_(net, str(path))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p is kept[name] for name, p in net.named_parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_of_tied_weights_is_enough(tmp_path, suffix):
    model, path = Tied(), tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        names = dict(model.named_parameters())  # each tied one under its first name
        torch.save({name: p.detach() for name, p in names.items()}, path)
        assert "head.weight" not in names
    else:
        save_model(model, str(path))
    torch.manual_seed(5)
    fresh = Tied()
    load_weights_(fresh, path)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.head.weight, model.head.weight)
    assert torch.equal(fresh.b.weight, model.a.weight)


UNREADABLE = {
    "missing": None,
    "empty": lambda _: b"",
    "text": lambda _: b"garbage",
    "lines": lambda _: b"hello world\n" * 20,
    "a dot": lambda _: b".",
    "pickle cut": lambda _: b"\x80\x02",
    "an empty pickle": lambda _: b"\x80\x02}q\x00.",
    "zip cut": lambda _: b"PK\x03\x04abc",
    "binary": lambda _: b"\xe4\xf5\x86" * 30,
    **{f"cut to {part}": lambda b, part=part: b[: int(part * len(b))] for part in (0.1, 0.5, 0.99)},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", UNREADABLE)
def test_unreadable_weights_are_an_error(net, unchanged, tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    if UNREADABLE[content] is not None:
        save_file(net.state_dict(), path) if suffix == ".safetensors" else torch.save(net.state_dict(), path)
        spoil(path, UNREADABLE[content])
    before = unchanged(net)
    with pytest.raises(WeightsError, match="cannot read the weights") as error:
        load_weights_(net, path)
    assert str(path) in str(error.value)
    before.check()


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("should-not-exist",))


def test_pickled_code_is_not_run(net, unchanged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": net.state_dict(), "extra": Evil()}, tmp_path / "evil.pt")
    before = unchanged(net)
    with pytest.raises(WeightsError, match=r"(?s)cannot read the weights '.*evil\.pt'.*Expected a state dict"):
        load_weights_(net, tmp_path / "evil.pt")
    assert not (tmp_path / "should-not-exist").exists()
    before.check()


@pytest.mark.parametrize(
    "content", [[1, 2], 5, torch.zeros(3), {"state_dict": 5}, {"state_dict": [1]}, {"epoch": 1}, {}]
)
def test_file_without_a_state_dict_is_an_error(net, unchanged, tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    before = unchanged(net)
    with pytest.raises(WeightsError, match=r"weights\.pt'"):
        load_weights_(net, tmp_path / "weights.pt")
    before.check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("lost", "more", "message"),
    [
        ("conv1.bias", {}, r"missing: conv1.bias\."),
        (None, {"more": torch.zeros(1)}, r"unexpected: more\."),
        (None, {"fc2.bias": torch.zeros(5)}, r"of another shape: fc2.bias \(5,\) in the file, \(4,\) in the"),
        ("norm.running_mean", {"more": torch.zeros(1)}, r"missing: norm.running_mean; unexpected: more\."),
    ],
)
def test_weights_that_do_not_fit_are_an_error(net, unchanged, tmp_path, suffix, lost, more, message):
    path = tmp_path / f"weights{suffix}"
    tensors = {**{name: value + 1 for name, value in net.state_dict().items() if name != lost}, **more}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    before = unchanged(net)
    with pytest.raises(WeightsError, match=rf"weights\{suffix}' do not fit the model \(TinyNet\): {message}"):
        load_weights_(net, path)
    before.check()

from __future__ import annotations

import copy
import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from lightning_compress import Budget, FactorisedLayer, Plan, compress_, load_compressed, save_compressed
from lightning_compress.core.errors import (
    LightningCompressError,
    OutputFolderError,
    PlanFormatError,
    PlanMismatchError,
    WeightsError,
)
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.save import PLAN_FILE, WEIGHTS_FILE, load_weights_, read_plan
from tests.support.compressing import CLOSED_FORM, WEIGHTS_ALONE
from tests.support.nets import TinyNet

BUDGET = Budget(params=0.5)


@pytest.fixture
def compressed(net, images):
    net(images)  # running statistics that differ from the initial ones
    compress_(net, BUDGET, method="exact", kinds=CLOSED_FORM, **WEIGHTS_ALONE)
    return net.eval()


@pytest.fixture
def folder(compressed, tmp_path):
    save_compressed(compressed, tmp_path / "out")
    return tmp_path / "out"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.a = nn.Linear(12, 12)
        self.b = self.a
        self.c = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.c(self.b(self.a(self.embed(tokens)))))


def test_round_trip_gives_equal_state_and_outputs(compressed, folder, images):
    torch.manual_seed(5)
    fresh = TinyNet().eval()
    plan = load_compressed(fresh, folder)
    state = compressed.state_dict()
    assert list(fresh.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert torch.equal(fresh(images), compressed(images))
    assert plan == embodied_plan(compressed) == embodied_plan(fresh)
    assert fresh.fc1.error == compressed.fc1.error


def test_loading_uses_no_random_numbers_and_keeps_modes(folder):
    fresh = TinyNet()
    fresh.norm.eval()
    state = torch.get_rng_state()
    load_compressed(fresh, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh.training
    assert not fresh.norm.training
    assert all(m.training for m in fresh.conv2.modules())


def test_loading_into_the_same_compressed_model_again(compressed, folder):
    state = copy.deepcopy(compressed.state_dict())
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.zero_()
    load_compressed(compressed, folder)
    assert all(torch.equal(value, state[name]) for name, value in compressed.state_dict().items())


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to(memory_format=torch.channels_last)]
)
def test_round_trip_of_other_dtypes_and_memory_formats(change, tmp_path):
    net = change(TinyNet())
    compress_(net, BUDGET, method="exact", kinds=CLOSED_FORM, **WEIGHTS_ALONE)
    save_compressed(net, tmp_path)
    fresh = change(TinyNet())
    load_compressed(fresh, tmp_path)
    for (name, value), (other, wanted) in zip(fresh.state_dict().items(), net.state_dict().items(), strict=True):
        assert (name, value.dtype) == (other, wanted.dtype)
        assert torch.equal(value, wanted)


def test_folder_holds_tensors_and_json_and_no_pickle(folder, compressed):
    assert sorted(path.name for path in folder.iterdir()) == sorted([PLAN_FILE, WEIGHTS_FILE])
    assert (
        Plan.from_json((folder / PLAN_FILE).read_text()) == embodied_plan(compressed) == read_plan(folder / PLAN_FILE)
    )
    for path in folder.iterdir():
        assert not zipfile.is_zipfile(path)
        assert path.read_bytes()[:1] != b"\x80"  # how pickles start
    assert load_file(folder / WEIGHTS_FILE).keys() == compressed.state_dict().keys()
    stored = sum(t.numel() * t.element_size() for t in load_file(folder / WEIGHTS_FILE).values())
    assert stored == embodied_plan(compressed).compressed.bytes


@pytest.mark.parametrize("name", ["a", "embed"])
def test_tied_and_shared_weights_stay_so(name, tmp_path):
    model, tokens = Tied(), torch.arange(6)[None]
    settings = {"include": [name], "method": "exact", **WEIGHTS_ALONE}
    compress_(model, Budget(params=0.9), example_input=(tokens,), **settings)
    assert isinstance(model.get_submodule(name), FactorisedLayer)
    save_compressed(model, tmp_path)
    torch.manual_seed(5)
    fresh = Tied()
    load_compressed(fresh, str(tmp_path))
    if name == "a":
        assert fresh.head.weight is fresh.embed.weight
    else:
        assert fresh.head.expand.weight is fresh.embed.reduce.weight
        assert fresh.head.reduce.weight is fresh.embed.expand.weight
    assert fresh.a is fresh.b
    assert torch.equal(fresh(tokens), model(tokens))


def test_dense_model_can_be_saved_too(net, images, tmp_path):
    save_compressed(net.eval(), tmp_path)
    fresh = TinyNet().eval()
    assert load_compressed(fresh, tmp_path).factorised == ()
    assert torch.equal(fresh(images), net(images))


def test_saving_again_replaces_the_files(folder, net):
    second = TinyNet()
    compress_(second, Budget(params=0.7), method="exact", kinds=CLOSED_FORM, **WEIGHTS_ALONE)
    save_compressed(second, folder)
    fresh = TinyNet()
    assert load_compressed(fresh, folder) == embodied_plan(second)
    assert torch.equal(fresh.fc2.bias, second.fc2.bias)


def test_missing_parents_are_made(compressed, tmp_path):
    save_compressed(compressed, tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / WEIGHTS_FILE).is_file()


@pytest.mark.parametrize("where", ["file", "file/inside"])
def test_folder_that_cannot_be_made_is_an_error(compressed, unchanged, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    before = unchanged(compressed)
    with pytest.raises(OutputFolderError, match=r"cannot write the compressed model to '.*'.*Choose a folder") as error:
        save_compressed(compressed, tmp_path / where)
    assert str(tmp_path / where) in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    before.check()


@pytest.mark.parametrize("name", [WEIGHTS_FILE, PLAN_FILE])
def test_file_that_cannot_be_written_is_an_error(compressed, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OutputFolderError, match="cannot write the compressed model to"):
        save_compressed(compressed, tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder_is_an_error(compressed, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputFolderError, match=r"locked.*Choose a folder you can write"):
        save_compressed(compressed, tmp_path / "locked")


# --- loading what does not fit


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("fresh", [TinyNet, Tied])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), WeightsError, r"cannot read the plan '.*plan\.json'.*Expected a folder that save_compressed wrote"),  # noqa: E501
        (lambda f: (f / PLAN_FILE).unlink(), WeightsError, r"cannot read the plan '.*plan\.json': .*No such file"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), WeightsError, r"cannot read the weights '.*model\.safetensors'.*Expected a folder"),  # noqa: E501
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b[:-1]), WeightsError, r"cannot read the weights '.*model\.saf"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b[: len(b) // 2]), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b[:4]), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b""), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b"\xff" * 64), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / PLAN_FILE, lambda b: b[:50]), PlanFormatError, r"plan\.json': the plan is damaged"),
        (lambda f: spoil(f / PLAN_FILE, lambda b: b"{}"), PlanFormatError, r"plan\.json': this is no plan"),
        (lambda f: spoil(f / PLAN_FILE, lambda b: b.replace(b'"schema": 1', b'"schema": 9')), PlanFormatError, r"plan\.json': the plan has schema 9"),  # noqa: E501
        (lambda f: spoil(f / PLAN_FILE, lambda b: b"\xff\xfe\xff"), WeightsError, r"cannot read the plan '.*plan\.js"),
    ],
    ids=["no folder", "no plan", "no weights", "cut by one", "cut in half", "four bytes", "empty", "noise", "plan cut", "foreign plan", "newer plan", "binary plan"],  # noqa: E501
)  # fmt: skip
def test_damaged_folder_is_an_error_and_the_model_untouched(folder, unchanged, fresh, damage, error, message):
    damage(folder)
    model = fresh()
    before = unchanged(model)
    with pytest.raises(error, match=message) as caught:
        load_compressed(model, folder)
    assert str(folder) in str(caught.value)
    before.check()


def test_plan_of_another_model_is_an_error(folder, unchanged):
    model = Tied()
    before = unchanged(model)
    with pytest.raises(PlanMismatchError, match=r"the plan's layer '\w+' is not in the model.*Known: embed"):
        load_compressed(model, folder)
    before.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.running_mean"), r"missing: norm.running_mean\."),
        (lambda t: t.update(more=torch.zeros(1)), r"unexpected: more\."),
        (
            lambda t: t.update({"fc2.bias": torch.zeros(5)}),
            r"of another shape: fc2.bias \(5,\) in the file, \(4,\) in the",
        ),
        (lambda t: t.clear(), r"missing: .*, .*, .*, .*, .* …"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error_and_the_model_untouched(folder, unchanged, change, message):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=rf"model\.safetensors' do not fit the model \(TinyNet\): {message}"):
        load_compressed(model, folder)
    before.check()


def test_dense_weights_in_a_compressed_folder_do_not_fit(folder, unchanged):
    save_model(TinyNet(), str(folder / WEIGHTS_FILE))
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=r"missing: .*\.reduce\.weight.*unexpected: .*weight"):
        load_compressed(model, folder)
    before.check()


def test_plan_with_other_ranks_than_the_tensors_is_an_error(folder, unchanged):
    data = json.loads((folder / PLAN_FILE).read_text())
    layer = next(entry for entry in data["layers"] if entry["ranks"])
    layer["ranks"][0] = 1 if layer["ranks"][0] > 1 else 2
    (folder / PLAN_FILE).write_text(json.dumps(data))
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=rf"of another shape: {layer['name']}\.\w+\.weight .* in the file"):
        load_compressed(model, folder)
    before.check()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch's own
def test_lazy_model_is_refused(folder):
    with pytest.raises(LightningCompressError, match=r"0\.weight"):
        load_compressed(nn.Sequential(nn.LazyLinear(4)), folder)


# --- load_weights_


@pytest.mark.parametrize("how", ["safetensors", "state dict", "checkpoint", "safetensors of save_compressed"])
def test_weights_are_loaded_from_every_format(compressed, folder, tmp_path, how):
    path = tmp_path / ("weights.safetensors" if "safetensors" in how else "weights.pt")
    if how == "safetensors":
        save_file(compressed.state_dict(), path)
    elif how == "state dict":
        torch.save(compressed.state_dict(), path)
    elif how == "checkpoint":
        torch.save({"state_dict": compressed.state_dict(), "epoch": 3, "lr": [0.1]}, path)
    else:
        path = folder / WEIGHTS_FILE
    other = copy.deepcopy(compressed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7)
    kept = dict(other.named_parameters())
    load_weights_(other, str(path))
    assert all(torch.equal(value, compressed.state_dict()[name]) for name, value in other.state_dict().items())
    assert all(p is kept[name] for name, p in other.named_parameters())


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


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "."])
def test_missing_weights_are_an_error(net, unchanged, tmp_path, name):
    before = unchanged(net)
    with pytest.raises(WeightsError, match="cannot read the weights") as error:
        load_weights_(net, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    before.check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"hello world\n" * 20,
        b".",
        b"\x80\x02",
        b"\x80\x02}q\x00.",
        b"PK\x03\x04abc",
        b"\xe4\xf5\x86" * 30,
    ],
)
def test_corrupt_weights_are_an_error(net, unchanged, tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    before = unchanged(net)
    with pytest.raises(WeightsError, match="cannot read the weights") as error:
        load_weights_(net, path)
    assert str(path) in str(error.value)
    before.check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_cut_weights_are_an_error(net, unchanged, tmp_path, suffix, part):
    path = tmp_path / f"weights{suffix}"
    save_file(net.state_dict(), path) if suffix == ".safetensors" else torch.save(net.state_dict(), path)
    spoil(path, lambda content: content[: int(part * len(content))])
    before = unchanged(net)
    with pytest.raises(WeightsError, match="cannot read the weights"):
        load_weights_(net, path)
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
    ("change", "message"),
    [
        (lambda t: t.pop("conv1.bias"), r"missing: conv1.bias\."),
        (lambda t: t.update(more=torch.zeros(1)), r"unexpected: more\."),
        (
            lambda t: t.update({"fc2.bias": torch.zeros(5)}),
            r"of another shape: fc2.bias \(5,\) in the file, \(4,\) in the",
        ),
        (
            lambda t: (t.pop("conv1.bias"), t.update(more=torch.zeros(1))),
            r"missing: conv1.bias; unexpected: more\.",
        ),
    ],
)
def test_weights_that_do_not_fit_are_an_error(net, unchanged, tmp_path, suffix, change, message):
    path, tensors = tmp_path / f"weights{suffix}", {k: v + 1 for k, v in net.state_dict().items()}
    change(tensors)
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    before = unchanged(net)
    with pytest.raises(WeightsError, match=rf"weights\{suffix}' do not fit the model \(TinyNet\): {message}"):
        load_weights_(net, path)
    before.check()

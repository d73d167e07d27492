"""Folders of save_compressed, written and loaded."""

from __future__ import annotations

import copy
import json
import os
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

from lightning_compress import Budget, FactorisedLayer, Plan, compress_, load_compressed, save_compressed
from lightning_compress.core.errors import OutputFolderError, PlanFormatError, PlanMismatchError, WeightsError
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.save import PLAN_FILE, WEIGHTS_FILE, read_plan
from tests.support.compressing import CLOSED_FORM, WEIGHTS_ALONE
from tests.support.interruptions import spoil
from tests.support.nets import Tied, TinyNet

BUDGET = Budget(params=0.5)
SETTINGS = {"method": "exact", "kinds": CLOSED_FORM, **WEIGHTS_ALONE}


@pytest.fixture
def compressed(net, images):
    net(images)  # running statistics that differ from the initial ones
    compress_(net, BUDGET, **SETTINGS)
    return net.eval()


@pytest.fixture
def folder(compressed, tmp_path):
    save_compressed(compressed, tmp_path / "out")
    return tmp_path / "out"


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
    net, fresh = change(TinyNet()), change(TinyNet())
    compress_(net, BUDGET, **SETTINGS)
    save_compressed(net, tmp_path)
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
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # what Hugging Face's libraries ask for
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
    compress_(second, Budget(params=0.7), **SETTINGS)
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


def of_another_writer(folder):
    """Takes what the weights' file says of itself away: the plan is then in plan.json alone."""
    path = folder / WEIGHTS_FILE
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # not of the file that is replaced
    save_file(tensors, path)


def lose_plan(folder):
    of_another_writer(folder)
    (folder / PLAN_FILE).unlink()


def spoil_plan(folder, change):
    of_another_writer(folder)
    spoil(folder / PLAN_FILE, change)


@pytest.mark.parametrize("fresh", [TinyNet, Tied])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), WeightsError, r"cannot read the plan '.*plan\.json'.*Expected a folder that save_compressed wrote"),  # noqa: E501
        (lose_plan, WeightsError, r"cannot read the plan '.*plan\.json': .*No such file"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), WeightsError, r"cannot read the weights '.*model\.safetensors'.*Expected a folder"),  # noqa: E501
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b[:-1]), WeightsError, r"cannot read the weights '.*model\.saf"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b[: len(b) // 2]), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b[:4]), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b""), WeightsError, r"cannot read the weights"),
        (lambda f: spoil(f / WEIGHTS_FILE, lambda b: b"\xff" * 64), WeightsError, r"cannot read the weights"),
        (lambda f: spoil_plan(f, lambda b: b[:50]), PlanFormatError, r"plan\.json': the plan is damaged"),
        (lambda f: spoil_plan(f, lambda b: b"{}"), PlanFormatError, r"plan\.json': this is no plan"),
        (lambda f: spoil_plan(f, lambda b: b.replace(b'"schema": 1', b'"schema": 9')), PlanFormatError, r"plan\.json': the plan has schema 9"),  # noqa: E501
        (lambda f: spoil_plan(f, lambda b: b"\xff\xfe\xff"), WeightsError, r"cannot read the plan '.*plan\.js"),
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


def of_other_ranks(folder):
    of_another_writer(folder)
    data = json.loads((folder / PLAN_FILE).read_text())
    layer = next(entry for entry in data["layers"] if entry["ranks"])
    layer["ranks"][0] = 1 if layer["ranks"][0] > 1 else 2
    (folder / PLAN_FILE).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: save_file({"more": torch.zeros(1)}, f / WEIGHTS_FILE), r"missing: .*, .*, .*, .*, .* ….*more\."),
        (lambda f: save_model(TinyNet(), str(f / WEIGHTS_FILE)), r"missing: .*\.reduce\.weight.*unexpected: .*weight"),
        (of_other_ranks, r"of another shape: \w+\.\w+\.weight .* in the file"),
    ],
    ids=["foreign tensors", "a dense model", "other ranks"],
)
def test_tensors_that_do_not_fit_are_an_error_and_the_model_untouched(folder, unchanged, change, message):
    change(folder)
    model = TinyNet()
    before = unchanged(model)
    with pytest.raises(WeightsError, match=rf"model\.safetensors' do not fit the model \(TinyNet\): .*{message}"):
        load_compressed(model, folder)
    before.check()

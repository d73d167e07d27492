"""Checkpoints on disk, compressed layer by layer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from lightning_compress import Budget, apply_plan_, compress_checkpoint, load_compressed, search_ranks
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    InfeasibleBudgetError,
    ModelError,
    NonFiniteWeightError,
    NothingToFactoriseError,
    OutputFolderError,
    SelectionError,
    WeightsError,
)
from lightning_compress.kinds.base import singular_energies, tail_errors
from lightning_compress.on_disk import files, layerwise, matrices
from lightning_compress.surgery.save import PLAN_FILE, read_plan
from lightning_compress.surgery.shards import INDEX_FILE, WEIGHTS_FILE
from tests.support.interruptions import interrupting
from tests.support.nets import Tied, TinyNet

BUDGET = Budget(params=0.5)
KINDS = ("svd", "interpolative", "tucker2")
"""No iterative fits."""


class Mixed(nn.Module):
    """A table, convolutions, a norm with statistics, linear layers and a tied output; inputs (B, n) of indices < 40."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 20, 3, padding=1)
        self.norm = nn.BatchNorm1d(20)
        self.point = nn.Conv1d(20, 20, 1)
        self.up = nn.Linear(20, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        h = self.table(tokens).transpose(1, 2)
        h = self.point(self.norm(self.conv(h)).relu()).mean(dim=2)
        return self.head(self.down(self.up(h).relu()))


class Fused(nn.Module):
    """Attention and a recurrent layer, which are unfused; inputs (B, n) of indices < 20."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.memory = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens):
        return self.head(self.memory(self.encoder(self.table(tokens)))[0])


INPUTS = {
    Mixed: lambda: torch.randint(0, 40, (4, 7)),
    Fused: lambda: torch.randint(0, 20, (3, 5)),
    Tied: lambda: torch.randint(0, 20, (3, 5)),
    TinyNet: lambda: torch.randn(2, 3, 8, 8),
}


def write(model: nn.Module, folder: Path, shards: int = 1) -> Path:
    """A checkpoint of a model, as Hugging Face's libraries write it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"name": "small"}')
    if shards == 1:
        save_model(model, str(folder / WEIGHTS_FILE))
        return folder
    seen, names = set(), []
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            names.append(name)
    where = {}
    for shard in range(shards):
        own = {name: state[name].detach() for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(own, str(folder / file))
        where.update(dict.fromkeys(own, file))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def meta(make, dtype=torch.float32):
    with torch.device("meta"):
        return make().to(dtype)


def in_memory(model, budget=BUDGET, **settings):
    return search_ranks(model, budget, method="exact", objective="weight", target=None, **settings)


def ranks_of(plan):
    return [(layer.name, layer.kind, layer.ranks) for layer in plan.layers]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def mixed(tmp_path):
    return write(Mixed(), tmp_path / "in")


@pytest.fixture(params=[False, True], ids=["by kinds", "as matrices"])
def as_matrices(request, monkeypatch):
    """Whether small layers too take the way of large matrices."""
    if request.param:
        monkeypatch.setattr(matrices, "LEAST", 4)
    return request.param


# --- the same as in memory ---------------------------------------------------------------------


@pytest.mark.parametrize("make", INPUTS)
def test_plan_and_outputs_are_those_of_the_search_in_memory(make, as_matrices, tmp_path):
    net, inputs = make().eval(), INPUTS[make]()
    write(net, tmp_path / "in", shards=2)
    plan = compress_checkpoint(tmp_path / "in", tmp_path / "out", BUDGET, model=make, kinds=KINDS)
    expected = in_memory(net, kinds=KINDS)
    assert ranks_of(plan) == ranks_of(expected)
    assert (plan.dense, plan.compressed, plan.budget) == (expected.dense, expected.compressed, expected.budget)
    for own, other in zip(plan.layers, expected.layers, strict=True):
        assert own.error == pytest.approx(other.error, abs=1e-12)
        assert (own.reason, own.params_after) == (other.reason, other.params_after)
    fresh = make().eval()
    assert load_compressed(fresh, tmp_path / "out") == plan == read_plan(tmp_path / "out" / PLAN_FILE)
    apply_plan_(net, expected)
    torch.testing.assert_close(fresh(inputs), net(inputs), rtol=1e-4, atol=1e-5)
    assert list(fresh.state_dict()) == list(net.state_dict())


def test_auto_is_svd_and_interpolative_for_matrices_and_all_kinds_for_kernels(tmp_path):
    write(TinyNet(), tmp_path / "in")
    plan = compress_checkpoint(tmp_path / "in", tmp_path / "out", Budget(params=0.7), model=TinyNet, effort="fast")
    assert ranks_of(plan) == ranks_of(in_memory(load(TinyNet(), tmp_path / "in"), Budget(params=0.7), effort="fast"))
    assert {layer.kind for layer in plan.layers if layer.type == "Linear"} <= {"svd", "interpolative", "dense"}


def load(model, folder):
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model


def test_settings_say_what_is_factorised(mixed, tmp_path):
    settings = {
        "kinds": "svd",
        "exclude": "table",
        "overrides": {"up": {"max_rank": 5}, "point": "dense"},
        "rank_multiple": 2,
        "effort": "fast",
    }
    plan = compress_checkpoint(mixed, tmp_path / "out", {"bytes": 0.8}, model=meta(Mixed), **settings)
    net = Mixed()
    net.load_state_dict(load_file(mixed / WEIGHTS_FILE), strict=False)
    assert ranks_of(plan) == ranks_of(in_memory(net, {"bytes": 0.8}, **settings))


def test_bounds_on_ranks_hold_for_matrices_too(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "LEAST", 4)
    bounds = {
        "kinds": ("svd", "interpolative"),
        "rank_multiple": 4,
        "overrides": {"up": {"min_rank": 8, "max_rank": 8}},
    }
    plan = compress_checkpoint(mixed, tmp_path / "out", Budget(params=0.9), model=Mixed, **bounds)
    assert {rank % 4 for layer in plan.factorised for rank in layer.ranks} == {0}
    with pytest.raises(ConfigurationError, match="layer 'up': no rank is a multiple of 4 between min_rank=5"):
        compress_checkpoint(
            mixed,
            tmp_path / "other",
            BUDGET,
            model=Mixed,
            **{**bounds, "overrides": {"up": {"min_rank": 5, "max_rank": 7}}},
        )


def test_model_is_as_it_was(mixed, tmp_path):
    model = meta(Mixed)
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=model, kinds=KINDS)
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert model.head.weight is model.table.weight


# --- language models -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_llama_in_half_precision_and_in_shards(tied, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(matrices, "LEAST", 16)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    net = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    net.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    assert (tmp_path / "in" / INDEX_FILE).exists()
    model = meta(lambda: transformers.LlamaForCausalLM(config), torch.bfloat16)
    plan = compress_checkpoint(tmp_path / "in", tmp_path / "out", BUDGET, model=model, shard_bytes=30_000)
    expected = in_memory(net, kinds=("svd", "interpolative"))
    assert ranks_of(plan) == ranks_of(expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()
    assert (tmp_path / "out" / INDEX_FILE).exists()
    fresh = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    load_compressed(fresh, tmp_path / "out")
    assert {value.dtype for value in fresh.parameters()} == {torch.bfloat16}
    apply_plan_(net, expected)
    tokens = torch.randint(0, 96, (2, 6))
    ours, theirs = fresh.float()(tokens).logits, net.float()(tokens).logits
    assert (ours - theirs).norm() < 0.05 * theirs.norm()  # rounding errors of eight bits
    if tied:
        assert fresh.lm_head.factors()["expand"] is fresh.model.embed_tokens.factors()["reduce"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_errors_are_those_of_the_factors(dtype, as_matrices, tmp_path):
    net = Mixed().to(dtype)
    write(net, tmp_path / "in")
    kinds = ("svd", "interpolative", "channel_svd")  # those whose errors are no bounds
    plan = compress_checkpoint(tmp_path / "in", tmp_path / "out", BUDGET, model=meta(Mixed, dtype), kinds=kinds)
    fresh = Mixed().to(dtype)
    load_compressed(fresh, tmp_path / "out")
    assert {value.dtype for value in fresh.parameters()} == {dtype}
    assert plan.compressed.bytes == sum(value.nbytes for value in unique(fresh.state_dict(keep_vars=True)))
    for layer in plan.factorised:
        dense = net.get_submodule(layer.name).weight.double()
        found = fresh.get_submodule(layer.name).double().dense_weight()
        lost = (found - dense).detach().square().sum() / dense.detach().square().sum()
        assert float(lost) == pytest.approx(layer.error, rel=0.02, abs=1e-4)
    assert bool((fresh.table.factors()["reduce"][0] == 0).all())  # that of padding_idx


def unique(state):
    return {id(value): value for value in state.values()}.values()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 260), (260, 700)])
def test_errors_of_all_ranks_of_a_matrix_with_a_steep_spectrum(dtype, shape):
    torch.manual_seed(1)
    n = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64))[0] for size in shape)
    weight = (left * torch.logspace(0, -2, n) @ right.T).to(dtype)
    module = nn.Linear(*shape[::-1], bias=False, dtype=dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    basis = matrices.decompose(layer_of(module))
    expected = tail_errors(singular_energies(weight.double()))
    found = tail_errors(basis.energies)
    kept = expected > 1e-5
    assert kept.sum() > 0.9 * n
    error = abs(found[kept] / expected[kept] - 1).max()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-9)
    vectors = basis.vectors.double()
    assert (vectors @ vectors.T - torch.eye(n)).abs().max() < 1e-5


def layer_of(module):
    from lightning_compress.analysis.inventory import take_inventory

    return take_inventory(nn.Sequential(module), kinds=("svd", "interpolative"))[0]


def test_matrix_without_full_rank_is_interpolated(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "LEAST", 4)
    net = nn.Sequential(nn.Linear(24, 32, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(32, 3) @ torch.randn(3, 24))
    dense = net[0].weight.detach().clone()
    write(net, tmp_path / "in")
    settings = {"kinds": "interpolative", "overrides": {"0": {"min_rank": 8}}}
    plan = compress_checkpoint(
        tmp_path / "in",
        tmp_path / "out",
        Budget(params=0.6),
        model=lambda: nn.Sequential(nn.Linear(24, 32, bias=False)),
        **settings,
    )
    load_compressed(net, tmp_path / "out")
    assert plan.layers[0].ranks[0] >= 8
    torch.testing.assert_close(net[0].dense_weight(), dense, rtol=1e-4, atol=1e-4)


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3000, 10**9])
def test_shards_are_no_larger_than_asked_unless_one_tensor_is(most, mixed, tmp_path):
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=Mixed, shard_bytes=most, kinds=KINDS)
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {}
    for path in paths:
        tensors = load_file(path)
        found.update(tensors)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= most
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "out" / INDEX_FILE).exists() == (len(paths) > 1)
    if len(paths) > 1:
        index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
        assert set(index["weight_map"]) == set(found)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    fresh = Mixed()
    load_compressed(fresh, tmp_path / "out")
    for name, value in fresh.state_dict().items():
        assert name not in found or torch.equal(value, found[name])


def test_small_other_files_come_along_and_nothing_else_is_left(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_compress.on_disk.source.OTHER_FILES", 100)
    for name, size in {
        "tokenizer.json": 50,
        "large.txt": 101,
        "pytorch_model.bin": 5,
        ".hidden": 5,
        "plan.json": 5,
    }.items():
        (mixed / name).write_bytes(b"x" * size)
    (mixed / "folder").mkdir()
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=Mixed, kinds=KINDS)
    assert names_in(tmp_path / "out") == ["config.json", WEIGHTS_FILE, PLAN_FILE, "tokenizer.json"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot read the index"),
        ("[]", "cannot read the index"),
        ('{"weight_map": {}}', "is no index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is no index"),
        ('{"weight_map": {"a": 3}}', "is no index"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors, which the folder does not hold"),
    ],
)
def test_damaged_index_is_an_error_and_the_model_stays(text, match, mixed, tmp_path):
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=Mixed, kinds=KINDS, shard_bytes=3000)
    (tmp_path / "out" / INDEX_FILE).write_text(text)
    net = Mixed()
    before = list(net.state_dict())
    with pytest.raises(WeightsError, match=match):
        load_compressed(net, tmp_path / "out")
    assert list(net.state_dict()) == before


def test_shard_that_lacks_a_tensor_is_an_error_and_the_model_stays(mixed, tmp_path):
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=Mixed, kinds=KINDS, shard_bytes=3000)
    first = min((tmp_path / "out").glob("model-*.safetensors"))
    save_file(dict(list(load_file(first).items())[1:]), first)
    net = Mixed()
    before = list(net.state_dict())
    with pytest.raises(WeightsError, match="missing: "):
        load_compressed(net, tmp_path / "out")
    assert list(net.state_dict()) == before


# --- broken off ------------------------------------------------------------------------------------

PHASES = ("decomposing layers", "factorising layers", "writing the checkpoint")


@pytest.fixture
def done(monkeypatch):
    """What was worked out, in order."""
    seen = []

    def counting(name):
        real = getattr(layerwise, name)

        def counted(layer, *args, **kwargs):
            seen.append((name, layer.name))
            return real(layer, *args, **kwargs)

        monkeypatch.setattr(layerwise, name, counted)

    for name in ("tabulate", "decompose", "build_layer", "build_from"):
        counting(name)
    return seen


ARGUMENTS = {"budget": BUDGET, "model": Mixed, "kinds": KINDS, "shard_bytes": 3000}
LAYERS = ["conv", "down", "point", "table", "up"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A checkpoint, and what is made of it with layers taken as small ones and as large ones."""
    torch.manual_seed(3)
    place, made = tmp_path_factory.mktemp("uninterrupted"), []
    source = write(Mixed(), place / "in")
    for least in (256, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matrices, "LEAST", least)
            compress_checkpoint(source, place / str(least), **ARGUMENTS)
        made.append(contents(place / str(least)))
    return source, made


@pytest.mark.parametrize(("phase", "after"), [*((p, a) for p in PHASES[:2] for a in (-1, 0.5)), (PHASES[2], -1)])
def test_broken_off_and_started_again(phase, after, as_matrices, done, uninterrupted, tmp_path):
    source, made = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(source, tmp_path / "out", **ARGUMENTS, progress=interrupting(phase, after))
    assert names_in(tmp_path / "out") == [".work"]
    compress_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert sorted(name for what, name in done if what in {"tabulate", "decompose"}) == LAYERS  # none twice
    assert sorted(name for what, name in done if what.startswith("build")) == LAYERS
    assert contents(tmp_path / "out") == made[as_matrices]


@pytest.mark.parametrize("call", [1, 4, 8, 11])
def test_broken_off_while_a_file_is_written(call, done, uninterrupted, tmp_path, monkeypatch):
    source, made = uninterrupted
    real, calls = Path.replace, []

    def replace(path, target):
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert names_in(tmp_path / "out") == [".work"]
    assert not list((tmp_path / "out").rglob("*.part"))
    compress_checkpoint(source, tmp_path / "out", **ARGUMENTS)
    assert len(done) <= 2 * len(LAYERS) + 1
    assert contents(tmp_path / "out") == made[0]


def test_broken_off_while_files_come_into_place(mixed, tmp_path, monkeypatch):
    arguments = {"model": Mixed, "kinds": KINDS, "shard_bytes": 3000}
    real = Path.replace

    def replace(path, target):
        if target.parent == tmp_path / "out" and target.name.startswith("model-00002"):
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(mixed, tmp_path / "out", BUDGET, **arguments)
    assert PLAN_FILE not in names_in(tmp_path / "out")
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, **{**arguments, "shard_bytes": 10**9})
    assert names_in(tmp_path / "out") == ["config.json", WEIGHTS_FILE, PLAN_FILE]  # no shards of the broken-off run
    load_compressed(Mixed(), tmp_path / "out")


def test_another_budget_goes_on_with_the_same_tables(done, mixed, tmp_path):
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable"):
        compress_checkpoint(mixed, tmp_path / "out", Budget(params=0.001), model=Mixed, kinds=KINDS)
    tables = [name for name, _ in done].count("tabulate")
    compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=Mixed, kinds=KINDS)
    assert [name for name, _ in done].count("tabulate") == tables == 5


def test_another_weight_or_setting_is_worked_out_anew(done, mixed, tmp_path):
    def broken_off(**settings):
        done.clear()
        stop = interrupting("factorising layers", -1)
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(
                mixed, tmp_path / "out", BUDGET, model=Mixed, **{"kinds": KINDS, **settings}, progress=stop
            )
        return len(done)

    assert [broken_off(), broken_off(), broken_off(rank_multiple=2), broken_off(kinds="svd")] == [
        5,
        0,
        5,
        3,
    ]  # svd is all that the table had
    os.utime(mixed / WEIGHTS_FILE, (1, 1))
    assert broken_off() == 5


def test_bytes_do_not_depend_on_threads(mixed, as_matrices, tmp_path):
    compress_checkpoint(mixed, tmp_path / "one", BUDGET, model=Mixed, kinds=KINDS)
    torch.set_num_threads(2)
    try:
        compress_checkpoint(mixed, tmp_path / "two", BUDGET, model=Mixed, kinds=KINDS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_progress_is_said(mixed, tmp_path):
    seen = []
    compress_checkpoint(
        mixed, tmp_path / "out", BUDGET, model=Mixed, kinds=KINDS, progress=lambda *said: seen.append(said)
    )
    for phase in PHASES:
        fractions = [done for what, done in seen if what == phase]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)


# --- refused ---------------------------------------------------------------------------------------


def spoiled(change):
    """A checkpoint of which the state dict was changed."""

    def spoil(folder):
        state = load_file(folder / WEIGHTS_FILE)
        save_file(change(dict(state)), folder / WEIGHTS_FILE)

    return spoil


def damaged(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-8])


def not_finite(name):
    def change(state):
        state[name].view(-1)[1] = float("nan")
        return state

    return spoiled(change)


class Real(nn.Module):
    """Has a parameter on the CPU whatever the default device is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, device="cpu"))


class Extra(Mixed):
    def get_extra_state(self):
        return {"a": 1}


REFUSED = {
    "no folder": ({}, shutil.rmtree, WeightsError, "is no folder"),
    "no weights": ({}, lambda f: (f / WEIGHTS_FILE).unlink(), WeightsError, "holds neither model.safetensors nor"),
    "damaged": ({}, damaged, WeightsError, "cannot read the weights"),
    "prefix": (
        {},
        spoiled(lambda state: {f"model.{name}": value for name, value in state.items()}),
        WeightsError,
        r"missing: table.weight, .*unexpected: model\.",
    ),
    "missing": (
        {},
        spoiled(lambda s: {k: v for k, v in s.items() if k != "up.bias"}),
        WeightsError,
        "missing: up.bias",
    ),
    "unexpected": ({}, spoiled(lambda s: {**s, "more": torch.zeros(1)}), WeightsError, "unexpected: more"),
    "shape": ({}, spoiled(lambda s: {**s, "up.bias": torch.zeros(3)}), WeightsError, r"up.bias \(3,\) in the file"),
    "dtype": (
        {},
        spoiled(lambda s: {**s, "up.bias": s["up.bias"].half()}),
        WeightsError,
        r"up.bias float16 in the file, float32 in the model.*model.to\(torch.bfloat16\)",
    ),
    "two values of one tensor": (
        {},
        spoiled(lambda s: {**s, "head.weight": torch.ones(40, 16), "table.weight": torch.zeros(40, 16)}),
        WeightsError,
        "'table.weight' and 'head.weight' are one tensor",
    ),
    "weight not finite": ({}, not_finite("up.weight"), NonFiniteWeightError, "'up.weight' holds 1 NaN or infinite"),
    "bias not finite": ({}, not_finite("up.bias"), NonFiniteWeightError, "'up.bias' holds 1 NaN or infinite"),
    "macs": ({"budget": Budget(macs=0.5)}, None, BudgetError, "MACs, latency or max_error"),
    "latency": ({"budget": Budget(latency=0.5)}, None, BudgetError, "MACs, latency or max_error"),
    "milliseconds": ({"budget": Budget(latency_ms=5.0)}, None, BudgetError, "MACs, latency or max_error"),
    "max_error": ({"budget": {"max_error": 0.1}}, None, BudgetError, "MACs, latency or max_error"),
    "infeasible": ({"budget": {"params": 1e-4}}, None, InfeasibleBudgetError, "smallest reachable"),
    "no budget": ({"budget": 0.5}, None, BudgetError, "expected a Budget"),
    "method": ({"method": "continuous"}, None, ConfigurationError, "method='continuous'.*with method='exact'"),
    "objective": ({"objective": "moments"}, None, ConfigurationError, "objective='auto' or 'weight'"),
    "target": ({"target": "torch"}, None, ConfigurationError, "target=None"),
    "setting": ({"kind": "svd"}, None, ConfigurationError, "unknown argument 'kind'. Did you mean 'kinds'"),
    "kinds": ({"kinds": "svds"}, None, ConfigurationError, "unknown kind 'svds'"),
    "include": ({"include": "absent"}, None, SelectionError, "matches no layer"),
    "time_limit": ({"time_limit": 60}, None, ConfigurationError, "time_limit=60: what a checkpoint takes is not cut"),
    "parallel": ({"parallel": "rays"}, None, ConfigurationError, "parallel='rays' is unknown"),
    "shard_bytes": ({"shard_bytes": 0}, None, ConfigurationError, "shard_bytes=0"),
    "progress": ({"progress": 3}, None, ConfigurationError, "progress=3: expected a function"),
    "path": ({"folder_in": 3}, None, ConfigurationError, "folder_in=3: expected a path"),
    "no model": ({"model": 3}, None, ConfigurationError, "expected a torch.nn.Module"),
    "function of no model": ({"model": lambda: 3}, None, ConfigurationError, "expected a torch.nn.Module"),
    "real parameters": ({"model": Mixed()}, None, ConfigurationError, "'table.weight' of the model is on cpu"),
    "one real parameter": ({"model": Real}, None, ConfigurationError, "'b' of the model is on cpu"),
    "extra state": ({"model": Extra}, None, WeightsError, "_extra_state"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_an_error_and_leaves_no_output(case, mixed, tmp_path):
    changed, spoil, error, match = REFUSED[case]
    if spoil is not None:
        spoil(mixed)
    arguments = {"folder_in": mixed, "folder_out": tmp_path / "out", "budget": BUDGET, "model": Mixed, "kinds": KINDS}
    with pytest.raises(error, match=f"(?s){match}"):
        compress_checkpoint(**{**arguments, **changed})
    assert names_in(tmp_path / "out") in ([], [".work"])


def test_nothing_to_factorise_is_an_error(tmp_path):
    write(nn.Sequential(nn.LayerNorm(4)), tmp_path / "in")
    with pytest.raises(NothingToFactoriseError):
        compress_checkpoint(tmp_path / "in", tmp_path / "out", BUDGET, model=lambda: nn.Sequential(nn.LayerNorm(4)))
    assert not (tmp_path / "out").exists()


def test_output_folder_must_be_another_one_that_is_free_and_can_be_written(mixed, tmp_path):
    with pytest.raises(ConfigurationError, match="is the input folder"):
        compress_checkpoint(mixed, mixed / ".." / "in", BUDGET, model=Mixed)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputFolderError, match="cannot write to"):
            compress_checkpoint(mixed, folder, BUDGET, model=Mixed)
    other = write(Mixed(), tmp_path / "other")
    with pytest.raises(OutputFolderError, match=r"holds a model already \(model.safetensors\)"):
        compress_checkpoint(mixed, other, BUDGET, model=Mixed)
    assert names_in(other) == ["config.json", WEIGHTS_FILE]
    assert names_in(mixed) == ["config.json", WEIGHTS_FILE]


def test_full_disk_is_an_error_of_ours_and_what_is_done_stays(mixed, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OutputFolderError, match="No space left"):
            compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=Mixed, kinds=KINDS)
    assert names_in(tmp_path / "out") == [".work"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda where: {**where, "more": next(iter(where.values()))}, "says that 'more' is in model-0000"),
        (lambda where: dict(zip(where, reversed(where.values()), strict=True)), "where it is not"),
    ],
)
def test_index_that_does_not_fit_its_shards_is_an_error(change, match, tmp_path):
    folder = write(Mixed(), tmp_path / "in", shards=2)
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": change(index["weight_map"])}))
    with pytest.raises(WeightsError, match=match):
        compress_checkpoint(folder, tmp_path / "out", BUDGET, model=Mixed)


def test_tensor_in_two_shards_is_an_error(tmp_path):
    folder = write(Mixed(), tmp_path / "in", shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(WeightsError, match=r"is in model-00001-of-00002.safetensors and in model-00002-of-00002"):
        compress_checkpoint(folder, tmp_path / "out", BUDGET, model=Mixed)


def test_file_that_shrinks_meanwhile_is_an_error(mixed, tmp_path):
    stored = files.read_header(mixed / WEIGHTS_FILE)["up.weight"]
    (mixed / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"cannot read 'up.weight'.*shorter than its header says"):
        stored.load()
    with pytest.raises(WeightsError, match=r"cannot read 'up.weight'.*shorter than its header says"):
        list(stored.pieces())


def test_weight_outside_the_state_dict_is_an_error(mixed, tmp_path):
    def hide():
        model = Mixed()
        model.up._register_state_dict_hook(lambda module, state, prefix, _: state.pop(f"{prefix}bias"))
        return model

    state = load_file(mixed / WEIGHTS_FILE)
    state.pop("up.bias")
    save_file(state, mixed / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="not in the model's state dict"):
        compress_checkpoint(mixed, tmp_path / "out", BUDGET, model=hide, kinds=KINDS)

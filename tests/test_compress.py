from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_compress
from lightning_compress import (
    Budget,
    Compress,
    FactorisedLayer,
    LightningCompressError,
    Plan,
    apply_plan_,
    compress_,
    load_compressed,
    save_compressed,
    search_ranks,
)
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core import errors as error_tree
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    ExampleInputError,
    InfeasibleBudgetError,
    NonFiniteWeightError,
    SelectionError,
)
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.nets import TinyNet

SHAPE = (1, 3, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "example", "source"),
    [
        ("auto", SHAPE, "batch norm"),
        ("moments", SHAPE, "batch norm"),
        ("weight", SHAPE, None),
        ("auto", None, None),
    ],
)
def test_compress_without_healing_is_search_and_swap(net, images, objective, example, source):
    torch.manual_seed(0)
    other = TinyNet()
    plan = compress_(net, Budget(params=0.5), example_input=example, objective=objective, heal=False)
    searched = search_ranks(other, Budget(params=0.5), example_input=example, objective=objective)
    statistics = gather_statistics(other, example) if source is not None else None
    apply_plan_(other, searched, statistics=statistics)
    assert isinstance(plan, Plan)
    assert plan.layers == searched.layers
    assert (plan.method, plan.source) == ("continuous", source or "weight")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    assert measure_costs(net, example) == plan.compressed
    assert plan.kept["params"] <= 0.5
    assert torch.equal(net.eval()(images), other.eval()(images))


def test_compress_passes_every_setting_on(net):
    seen = []
    plan = compress_(
        net,
        {"params": 0.85},
        method="exact",
        **WEIGHTS_ALONE,
        kinds=["svd"],
        include=["fc1", "fc2"],
        exclude="fc2",
        overrides={"fc1": {"max_rank": 4}},
        rank_multiple=2,
        seed=9,
        progress=lambda what, done: seen.append(what),
    )
    assert [(p.name, p.kind) for p in plan.factorised] == [("fc1", "svd")]
    assert plan.factorised[0].ranks in {(2,), (4,)}
    assert (plan.method, plan.seed) == ("exact", 9)
    assert "exact search" in seen


@pytest.mark.parametrize("settings", [WEIGHTS_ALONE, {"example_input": (1, 24)}], ids=["weights alone", "defaults"])
def test_nearly_low_rank_model_survives_compression(settings):
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6))
    with torch.no_grad():
        for layer, rank in ((net[0], 4), (net[2], 3)):
            out, in_ = layer.weight.shape
            left, right = (torch.randn(n, rank, generator=generator) for n in (out, in_))
            layer.weight.copy_(left @ right.T / in_)
    x = torch.randn(50, 24, generator=generator)
    expected = net(x)
    plan = compress_(net, Budget(params=0.4), **settings)
    assert plan.kept["params"] <= 0.4
    assert {p.name: p.ranks for p in plan.factorised if p.name != "4"} == {"0": (4,), "2": (3,)}
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_compressed_model_trains_saves_and_loads(net, images, tmp_path):
    compress_(net, Budget(params=0.5), method="exact", **WEIGHTS_ALONE)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    labels = torch.tensor([0, 1, 2, 3, 0])
    first = F.cross_entropy(net(images), labels).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    save_compressed(net, tmp_path)
    fresh = TinyNet()
    load_compressed(fresh, tmp_path)
    assert torch.equal(fresh.eval()(images), net.eval()(images))


@pytest.mark.parametrize(
    ("budget", "settings", "error", "message"),
    [
        (
            Budget(params=0.01),
            {},
            InfeasibleBudgetError,
            "no plan keeps params <= 1 %: the smallest reachable is params=",
        ),
        (Budget(macs=0.5), {}, ExampleInputError, r"a budget in MACs \(macs <= 50 %\) needs example_input"),
        (Budget(macs=0.5), {"example_input": (1, 7)}, ExampleInputError, r"the model fails on example_input \(1, 7\)"),
        (0.5, {}, ConfigurationError, "budget=0.5: expected a Budget or a mapping"),
        (Budget(params=0.5), {"method": "x"}, ConfigurationError, "search method 'x' is unknown"),
    ],
)
def test_error_leaves_the_model_as_it_was(net, unchanged, budget, settings, error, message):
    before = unchanged(net)
    with pytest.raises(error, match=message):
        compress_(net, budget, **WEIGHTS_ALONE, **settings)
    before.check()


@pytest.mark.parametrize(
    ("budget", "settings", "error", "message"),
    [
        (0.5, {}, BudgetError, "budget=0.5: expected a Budget or a mapping"),
        ({"param": 0.5}, {}, ConfigurationError, "budget: unknown key 'param'"),
        (Budget(params=0.5), {"method": "x"}, ConfigurationError, "search method 'x' is unknown"),
        (Budget(params=0.5), {"kinds": "tuker2"}, ConfigurationError, "unknown kind 'tuker2'"),
        (Budget(params=0.5), {"include": "nope"}, SelectionError, "include: 'nope' matches no layer"),
        (
            Budget(params=0.5),
            {"rank_multiples": 8},
            ConfigurationError,
            "compress_: unknown argument 'rank_multiples'.*'rank_multiple'",
        ),
        (
            Budget(params=0.5),
            {"method": "exact", "objective": "end_to_end"},
            ConfigurationError,
            "objective='end_to_end' is nothing for method='exact'",
        ),
    ],
)
def test_wrong_argument_is_an_error_before_synthetic_inputs_are_made(net, unchanged, budget, settings, error, message):
    calls = []
    net.fc1.register_forward_hook(lambda *_: calls.append(1))
    before = unchanged(net)
    with pytest.raises(error, match=message):
        compress_(net, budget, example_input=SHAPE, **settings)
    before.check()
    assert len(calls) <= 1  # at most the trace


@pytest.mark.parametrize(
    ("entrance", "call"),
    [
        ("search_ranks", lambda net, **settings: search_ranks(net, Budget(params=0.5), **settings)),
        ("compress_", lambda net, **settings: compress_(net, Budget(params=0.5), **settings)),
        ("Compress", lambda net, **settings: Compress(Budget(params=0.5), **settings)),
    ],
)
@pytest.mark.parametrize(
    ("settings", "meant"),
    [({"seeds": 1}, "seed"), ({"metod": "exact"}, "method"), ({"example_inputs": SHAPE}, "example_input")],
)
def test_misspelt_setting_is_our_own_error_with_a_suggestion_whatever_the_entrance(
    net, unchanged, entrance, call, settings, meant
):
    before = unchanged(net)
    (name,) = settings
    with pytest.raises(ConfigurationError, match=rf"^{entrance}: unknown argument '{name}'\. Did you mean '{meant}'\?"):
        call(net, **settings)
    before.check()


@pytest.mark.parametrize("settings", [WEIGHTS_ALONE, {"example_input": SHAPE}], ids=["weights alone", "defaults"])
def test_non_finite_model_is_left_as_it_was(net, settings):
    with torch.no_grad():
        net.fc1.weight[0, 0] = float("inf")
    modules = list(net.modules())
    with pytest.raises(NonFiniteWeightError, match=r"parameter 'fc1\.weight' holds 1 NaN or infinite values of 512"):
        compress_(net, Budget(params=0.5), **settings)
    assert list(net.modules()) == modules


def test_zero_weights_do_not_matter(images):
    net = TinyNet()
    with torch.no_grad():
        net.conv2.weight.zero_()
        net.fc1.weight.zero_()
    expected = net.eval()(images)
    plan = compress_(net, Budget(params=0.35), method="exact", **WEIGHTS_ALONE)
    assert {p.name: p.error for p in plan.layers if p.name in {"conv2", "fc1"}} == {"conv2": 0, "fc1": 0}
    assert isinstance(net.conv2, FactorisedLayer)
    assert torch.equal(net(images)[0], net(images)[1])
    assert torch.isfinite(expected).all()
    assert torch.isfinite(net(images)).all()


# --- the package


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_is_cheap():
    heavy = ("torch", "lightning", "numpy", "scipy", "tensorly", "hydra", "rich", "safetensors")
    code = f"import sys, lightning_compress; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_settings_and_errors_need_no_torch():
    code = (
        "import sys; from lightning_compress import Budget, LightningCompressError, Schedule, Distill, Override;"
        "print(Budget(ratio='4x').params, 'torch' in sys.modules)"
    )
    assert run(code) == "0.25 False"


def test_search_needs_no_lightning():
    code = (
        "import sys; from lightning_compress import search_ranks, compress_, save_compressed;"
        "print([m for m in ('lightning', 'hydra') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_every_public_name_resolves():
    assert set(lightning_compress.__all__) == {
        "Budget",
        "Compress",
        "CompressedCheckpointMixin",
        "Distill",
        "FactorisedLayer",
        "LayerPlan",
        "LightningCompressError",
        "Override",
        "Phase",
        "Plan",
        "Plateau",
        "Schedule",
        "apply_plan_",
        "compress_",
        "load_compressed",
        "load_compressed_checkpoint",
        "merge_",
        "save_compressed",
        "search_ranks",
    }
    for name in lightning_compress.__all__:
        value = getattr(lightning_compress, name)
        assert value.__name__ == name
        assert value.__module__.startswith("lightning_compress.")
        assert name in dir(lightning_compress)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_compress' has no attribute 'compres'"):
        _ = lightning_compress.compres
    assert not hasattr(lightning_compress, "__wrapped__")


def test_every_error_is_in_the_tree():
    classes = [v for v in vars(error_tree).values() if isinstance(v, type) and not issubclass(v, Warning)]
    assert [v for v in vars(error_tree).values() if isinstance(v, type) and v not in classes] == [
        error_tree.CompressionWarning
    ]
    assert issubclass(error_tree.CompressionWarning, UserWarning)
    assert all(issubclass(c, LightningCompressError) for c in classes)
    drawn = {line.split("(")[0].strip(" │├└─") for line in error_tree.__doc__.splitlines() if "Error" in line}
    assert {c.__name__ for c in classes} == drawn
    assert issubclass(error_tree.ConfigurationError, ValueError)
    assert issubclass(error_tree.UnsupportedError, NotImplementedError)

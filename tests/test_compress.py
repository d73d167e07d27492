"""compress_ in one call, and the package as a whole."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

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
from lightning_compress.analysis.draws import LEAST_SIDE
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.core import errors as error_tree
from lightning_compress.core.errors import (
    BudgetError,
    CompressionWarning,
    ConfigurationError,
    ExampleInputError,
    InfeasibleBudgetError,
    NonFiniteWeightError,
    SelectionError,
)
from tests.support.compressing import WEIGHTS_ALONE, compressed_model
from tests.support.nets import IMAGE, SHAPE, TinyNet, pooled, trained_like
from tests.support.plans import plan_for
from tests.support.searching import mlp


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "example", "source"),
    [("auto", SHAPE, "batch norm"), ("moments", SHAPE, "batch norm"), ("weight", SHAPE, None), ("auto", None, None)],
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


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "reached"), [("auto", "moments"), ("weight", "weight")])
def test_compress_heals_in_one_call_and_is_deterministic(objective, reached):
    first, again = trained_like(), trained_like()
    plan = compress_(first, Budget(params=0.3), example_input=SHAPE, objective=objective)
    done = compressed_model(again, Budget(params=0.3), example_input=SHAPE, objective=objective, heal=True)
    assert plan.objective == done.plan.objective == reached
    assert done.healing.after < done.healing.before
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_without_an_example_input_a_warning_says_there_is_no_healing(net):
    other = copy.deepcopy(net)
    with pytest.warns(CompressionWarning, match=r"the factors are not healed\. Pass an example_input, or heal=False"):
        done = compressed_model(net, Budget(params=0.5))
    assert (done.healing, done.plan.objective) == (None, "weight")
    compress_(other, Budget(params=0.5), heal=False)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("heal", [1, "yes", None])
def test_heal_is_true_or_false(heal):
    with pytest.raises(ConfigurationError, match=f"heal={heal!r}: expected true or false"):
        Compress(Budget(params=0.4), heal=heal)


def test_factors_are_repaired_on_small_images(try_only):
    try_only(work=10**8)
    assert compressed_model(pooled(), Budget(params=0.6), example_input=IMAGE).healing is not None


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["auto", "weight"])
def test_factors_are_not_repaired_on_scarce_inputs_and_a_warning_says_so(scarce, objective):
    net, statistics = scarce
    settings = {"statistics": statistics} if objective == "auto" else {"objective": objective}
    example = torch.empty(1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE)
    healed, plain = copy.deepcopy(net), copy.deepcopy(net)
    with pytest.warns(CompressionWarning, match="not healed.*calibration"):
        done = compressed_model(healed, Budget(params=0.6), example_input=example, **settings)
    assert done.healing is None
    compressed_model(plain, Budget(params=0.6), example_input=example, heal=False, **settings)
    for own, other in zip(healed.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_calibration_heals_too():
    net = mlp()
    plan = compress_(net, Budget(params=0.6), calibration=iter(torch.randn(4, 16, 6)))
    assert (plan.source, plan.data_free) == ("real", False)
    assert any(isinstance(m, FactorisedLayer) for m in net.modules())


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


@pytest.mark.parametrize(
    ("budget", "settings", "error", "message"),
    [
        ({"params": 0.01}, WEIGHTS_ALONE, InfeasibleBudgetError, "no plan keeps params <= 1 %: the smallest reachable"),
        ({"macs": 0.5}, {"example_input": None}, ExampleInputError, r"in MACs \(macs <= 50 %\) needs example_input"),
        ({"macs": 0.5}, {"example_input": (1, 7)}, ExampleInputError, r"the model fails on example_input \(1, 7\)"),
        (0.5, {}, BudgetError, "budget=0.5: expected a Budget or a mapping"),
        ({"param": 0.5}, {}, ConfigurationError, "budget: unknown key 'param'"),
        ({"params": 0.5}, {"method": "x"}, ConfigurationError, "search method 'x' is unknown"),
        ({"params": 0.5}, {"include": "nope"}, SelectionError, "include: 'nope' matches no layer"),
    ],
)
def test_error_comes_before_synthetic_inputs_are_made_and_leaves_the_model(
    net, unchanged, budget, settings, error, message
):
    calls = []
    net.fc1.register_forward_hook(lambda *_: calls.append(1))
    before = unchanged(net)
    with pytest.raises(error, match=message):
        compress_(net, budget, **{"example_input": SHAPE, **settings})
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


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # torch's own
@pytest.mark.parametrize("entrance", ["search_ranks", "compress_", "compress_ with inputs", "apply_plan_", "load"])
def test_models_without_usable_weights_are_refused_whatever_the_entrance(net, tmp_path, entrance):
    plan = plan_for(net)
    save_compressed(net, tmp_path)
    enter = {
        "search_ranks": lambda model: search_ranks(model, Budget(params=0.5)),
        "compress_": lambda model: compress_(model, Budget(params=0.5), **WEIGHTS_ALONE),
        "compress_ with inputs": lambda model: compress_(model, Budget(params=0.5), example_input=SHAPE),
        "apply_plan_": lambda model: apply_plan_(model, plan),
        "load": lambda model: load_compressed(model, tmp_path),
    }[entrance]
    with pytest.raises(LightningCompressError, match=r"'?0\.weight"):
        enter(nn.Sequential(nn.LazyLinear(4)))
    if entrance == "load":
        return  # what is loaded takes the place of any weight
    with torch.no_grad():
        net.fc1.weight[0, 0] = float("inf")
    modules = list(net.modules())
    with pytest.raises(NonFiniteWeightError, match=r"parameter 'fc1\.weight' holds 1 NaN or infinite values of 512"):
        enter(net)
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


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import lightning_compress", "torch lightning numpy scipy tensorly hydra rich safetensors"),
        ("from lightning_compress import Budget, Distill, Override, Schedule; Budget(ratio='4x')", "torch"),
        ("from lightning_compress import search_ranks, compress_, save_compressed", "lightning hydra"),
    ],
)
def test_importing_the_package_is_cheap(code, absent):
    assert run(f"import sys; {code}; print([m for m in {absent.split()} if m in sys.modules])") == "[]"


PUBLIC = """
Budget Compress CompressedCheckpointMixin CompressionRatio Distill Exported FactorisedLayer LatencyTable LayerAdapter
LayerPlan LightningCompressError Override Phase Plan Plateau RelativeError Schedule Target TeacherAgreement apply_plan_
compress_ compress_checkpoint export_model load_compressed load_compressed_checkpoint load_exported load_pretrained
merge_ register_layer_adapter save_compressed search_ranks
"""


def test_every_public_name_resolves():
    assert set(lightning_compress.__all__) == set(PUBLIC.split())
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

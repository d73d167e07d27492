"""Every layer type as one operator: its rows, layout, factors, costs and moments, and whole models of it."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, FactorisedLayer, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import gather_statistics, input_moments, output_moments
from lightning_compress.analysis.trace import trace
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.kinds.metric import OUTPUT_FLOOR, Metric
from lightning_compress.kinds.registry import DECOMPOSITIONS, factorise_in, multiplied_out, profile_in, weighted_energy
from lightning_compress.layers.families import (
    canonical,
    family_of,
    known_types,
    layer_type,
    operator_of,
    own_layout,
)
from lightning_compress.surgery.swap import apply_shells_, plan_of
from tests.conftest import WEIGHTS_ALONE, error_in
from tests.layer_zoo import (
    LAYERS,
    Conv1D,
    factorised,
    fitting,
    full_ranks,
    kinds_for,
    low_ranks,
    normal,
    plan_for,
    randomised,
    with_weight,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own

SIZES = (9, 8, 7)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
ITERATIVE = ("cp", "cp3")  # fitted by sweeps that stop at a relative error of 1e-7; their predictions are bounds
SLOW = pytest.mark.slow
GROUPED = [kind for kind in DECOMPOSITIONS if kind != "tt_embedding"]  # tables have no groups


def convolutions(dims):
    """Every geometry of a convolution, an even kernel among them."""
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    paddings, modes = [0, (1, 0, 2)[:dims], "same", "valid"], ["zeros", "reflect", "replicate", "circular"]
    kernels, strides, dilations = [(3, 2, 1)[:dims], (1, 3, 2)[:dims]], [1, (2, 1, 3)[:dims]], [1, (1, 2, 1)[:dims]]
    every = itertools.product(kernels, strides, paddings, dilations, (1, 2, 4), modes, (True, False))
    for index, (kernel, stride, padding, dilation, groups, mode, bias) in enumerate(every):
        if padding != "same" or stride == 1:  # torch refuses it
            layer = cls(8, 12, kernel, stride, padding, dilation, groups, bias, mode)
            yield randomised(layer, seed=index)


def transposed_convolutions(dims):
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    kernels, strides = [(3, 2, 1)[:dims], (1, 4, 2)[:dims]], [1, (3, 2, 1)[:dims], 2]
    paddings, dilations, groups = [0, (1, 0, 1)[:dims]], [1, (1, 2, 1)[:dims]], (1, 2, 4)
    every = itertools.product(kernels, strides, paddings, (0, 1), dilations, groups, (True, False))
    for index, (kernel, stride, padding, more, dilation, group, bias) in enumerate(every):
        both = [v if isinstance(v, tuple) else (v,) * dims for v in (stride, dilation)]
        steps = [max(step) for step in zip(*both, strict=True)]
        output_padding = tuple(min(more, step - 1) for step in steps)  # torch refuses more
        yield randomised(cls(8, 12, kernel, stride, padding, output_padding, group, bias, dilation), seed=index)


def geometries(dims, every):
    """All of them, or a sample: the step shares no factor with the number of any setting."""
    return itertools.islice(itertools.chain(convolutions(dims), transposed_convolutions(dims)), 0, None, every)


def images(dims, channels=8, batch=2):
    return normal(batch, channels, *SIZES[:dims], seed=99)


def applied(layer, x):
    """What the family says the layer does: canonical weight times rows, by group, plus the bias."""
    operator, weight = operator_of(layer), canonical(layer, layer.weight).detach()
    rows = family_of(layer).rows(layer, x)
    blocks = weight.reshape(operator.groups, -1, weight[0].numel())
    assert blocks.shape[1:] == (operator.shape[0], np.prod(operator.shape[1:]))
    found = torch.einsum("god,gnd->ngo", blocks, rows).flatten(1)
    return found if layer.bias is None else found + layer.bias.detach()


# --- rows and layouts


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weight_times_rows_is_the_output_for_every_geometry(dims):
    seen = 0
    x = images(dims)
    for layer in geometries(dims, {1: 5, 2: 11, 3: 13}[dims]):
        for inputs in (x, x[0]):  # without a batch dimension too
            output = layer(inputs).detach()
            torch.testing.assert_close(applied(layer, inputs), family_of(layer).output_rows(layer, output), **TIGHT)
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_last_inputs_give_the_same_rows(cls):
    layer, x = randomised(cls(8, 12, 3, 2, 1, groups=2)), images(2)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    got = family_of(other).rows(other, x.to(memory_format=torch.channels_last))
    assert torch.equal(got, family_of(layer).rows(layer, x))
    assert torch.equal(canonical(other, other.weight), canonical(layer, layer.weight))


@pytest.mark.parametrize("name", ["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_rows_of_linear_layers(name, shape):
    layer, x = LAYERS[name].layer(), normal(*shape, seed=3)
    if shape == (8,) and name == "Conv1D":  # addmm wants rows
        x = x[None]
    output = layer(x).detach()
    torch.testing.assert_close(applied(layer, x), family_of(layer).output_rows(layer, output), **TIGHT)
    assert family_of(layer).call(layer, x, output).rows == output.numel() // 6


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_lookups_have_no_rows(name):
    layer, arguments = LAYERS[name].layer(), LAYERS[name].call()
    assert family_of(layer).rows(layer, arguments[0]) is None
    assert operator_of(layer).lookup
    call = family_of(layer).call(layer, arguments[0], layer(*arguments))
    assert (call.positions, call.rows) == (0, {"Embedding": 10, "EmbeddingBag": 3}[name])


@pytest.mark.parametrize("name", LAYERS)
def test_layouts_are_inverse_of_each_other(name):
    layer = LAYERS[name].layer()
    weight, operator = layer.weight.detach(), operator_of(layer)
    whole = canonical(layer, weight)
    assert whole.shape == (operator.groups * operator.shape[0], *operator.shape[1:])
    assert torch.equal(own_layout(layer, whole), weight)
    other = normal(*whole.shape, seed=5)
    assert torch.equal(canonical(layer, own_layout(layer, other)), other)


def test_canonical_form_has_outputs_first_and_inputs_second():
    embedding, conv1d = LAYERS["Embedding"].layer(), LAYERS["Conv1D"].layer()
    assert canonical(embedding, embedding.weight)[4, 7] == embedding.weight[7, 4]
    assert canonical(conv1d, conv1d.weight)[4, 7] == conv1d.weight[7, 4]
    conv = randomised(nn.ConvTranspose2d(8, 12, (3, 2), groups=2))  # own: (in, out / groups, 3, 2)
    whole = canonical(conv, conv.weight)
    for group, out, in_ in itertools.product(range(2), range(6), range(4)):
        assert torch.equal(whole[group * 6 + out, in_], conv.weight[group * 4 + in_, out])


def test_known_types_are_exact():
    for name, example in LAYERS.items():
        assert layer_type(example.make()) is not None
        assert name.split()[0] in known_types() or name == "Conv1D"

    class Own(nn.Conv1d):
        def forward(self, x):
            return super().forward(x) + 1

    assert layer_type(Own(8, 8, 3)) is None


# --- the factorised layer


def check_factorised(layer, kind, arguments):
    """At low ranks it computes what the dense layer with the product of its factors does, at full ones the original."""
    low, full = factorised(layer, kind), factorised(layer, kind, full_ranks(layer, kind))
    assert low.weight.shape == layer.weight.shape
    torch.testing.assert_close(low(*arguments), with_weight(layer, low.dense_weight())(*arguments), **TIGHT)
    largest = 1e-6 if kind in ITERATIVE else 1e-9
    for got, wanted in ((full(*arguments), layer(*arguments)), (full.dense_weight(), layer.weight)):
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < largest


@pytest.mark.parametrize(("name", "kind"), fitting())
def test_factors_compute_what_the_dense_layer_with_their_product_does(name, kind):
    check_factorised(LAYERS[name].layer(), kind, LAYERS[name].call())


def check_geometries(dims, every):
    seen = 0
    for index, layer in enumerate(geometries(dims, every)):
        kinds = kinds_for(layer)
        check_factorised(layer, kinds[index % len(kinds)], (images(dims)[0] if index % 3 else images(dims),))
        seen += 1
    return seen


@pytest.mark.parametrize(("dims", "every"), [(1, 29), (2, 41), (3, 71)])
def test_geometries_are_passed_on_to_the_factors(dims, every):
    assert check_geometries(dims, every) >= 9


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize(("dims", "every"), [(1, 1), (2, 1), (3, 5)])
def test_every_geometry_is_passed_on_to_the_factors(dims, every):
    assert check_geometries(dims, every) > 150


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_arguments_of_a_bag_reach_its_lookup(mode, last):
    layer = randomised(nn.EmbeddingBag(12, 6, mode=mode, include_last_offset=last, padding_idx=3))
    new = factorised(layer, "svd", (6,))
    indices, offsets = torch.tensor([3, 0, 7, 7, 2, 1, 8]), torch.tensor([0, 3, 5, 7] if last else [0, 3, 5])
    for args, kwargs in (((indices, offsets), {}), ((indices,), {"offsets": offsets}), ((indices[:6].view(2, 3),), {})):
        if args[0].ndim == 2 and last:
            continue
        torch.testing.assert_close(new(*args, **kwargs), layer(*args, **kwargs), **TIGHT)
    if mode == "sum":
        weights = normal(7, seed=4)
        settings = {"offsets": offsets, "per_sample_weights": weights}
        torch.testing.assert_close(new(indices, **settings), layer(indices, **settings), **TIGHT)


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_row_of_the_padding_index_stays_zero_and_untrained(name):
    layer = LAYERS[name].layer()
    new = factorised(layer, "svd")
    assert new.reduce.padding_idx == new.padding_idx == 0
    torch.testing.assert_close(new.weight[0], torch.zeros(6, dtype=torch.float64), rtol=0, atol=0)
    new(*LAYERS[name].call()).square().sum().backward()
    assert not new.reduce.weight.grad[0].any()
    assert new.reduce.weight.grad[7].any()


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_of_lookups_stay_sparse(cls):
    new = factorised(randomised(cls(12, 6, sparse=True)), "svd")
    new(torch.tensor([[1, 2], [2, 5]])).sum().backward()
    assert new.reduce.weight.grad.is_sparse
    assert sorted(set(new.reduce.weight.grad._indices()[0].tolist())) == [1, 2, 5]
    assert not new.expand.weight.grad.is_sparse


# --- costs


@pytest.mark.parametrize(("name", "kind"), fitting())
def test_parameters_and_macs_are_those_of_the_built_layers(name, kind):
    layer, arguments = LAYERS[name].layer(), LAYERS[name].call()
    if "Bag" not in name:
        arguments = (arguments[0][:1],)  # a call is counted at batch 1
    call, operator = family_of(layer).call(layer, arguments[0], layer(*arguments)), operator_of(layer)
    rows = call.rows if "Bag" in name else arguments[0][0].numel() if operator.lookup else call.rows
    assert call.rows == rows
    every = DECOMPOSITIONS[kind].profile(normal(*operator.shape)).ranks
    ranks = every[:: max(1, len(every) // 4)]
    parameters = DECOMPOSITIONS[kind].parameters(operator.shape, ranks) * operator.groups
    macs = DECOMPOSITIONS[kind].macs(operator.shape, ranks, call) * operator.groups
    for index, row in enumerate(ranks.tolist()):
        model = nn.Sequential(copy.deepcopy(layer))
        apply_shells_(model, plan_for(layer, kind, tuple(row)))
        assert parameters[index] == sum(factor.numel() for factor in model[0].factors().values())
        with FlopCounterMode(display=False) as counter:
            model[0](*arguments)
        assert macs[index] * 2 == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        layer(*arguments)
    assert layer.weight.numel() * call.positions * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in LAYERS if "Bag" not in name])
def test_plan_read_off_the_model_has_the_costs_of_both(name):
    model, arguments = nn.Sequential(LAYERS[name].layer()), LAYERS[name].call()
    before = trace(model, arguments).macs
    plan = search_ranks(model, Budget(params=0.9), example_input=arguments, objective="weight", method="exact")
    apply_plan_(model, plan)
    read = plan_of(model, arguments)
    assert read.dense == plan.dense
    assert read.compressed == plan.compressed == measure_costs(model, arguments)
    assert read.dense.macs == before
    assert read.factorised[0].macs_before == plan.factorised[0].macs_before == before


# --- moments


def unfolded(conv, x):
    """The patches of each group by torch's own unfold, (groups, n, D)."""
    columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (B, C * k, L)
    return [block.transpose(1, 2).flatten(0, 1).numpy() for block in columns.chunk(conv.groups, dim=1)]


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_of_the_inputs_are_those_of_the_patches_of_each_group(groups):
    conv = randomised(nn.Conv2d(8, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups))
    x = images(2)
    found = input_moments(nn.Sequential(conv), [((x,), {})], ["0"])["0"]
    second = np.stack([rows.T @ rows / len(rows) for rows in unfolded(conv, x)])
    mean = np.stack([rows.mean(axis=0) for rows in unfolded(conv, x)])
    assert found.second.shape == ((48, 48) if groups == 1 else (2, 24, 24))
    assert found.mean.shape == ((48,) if groups == 1 else (2, 24))
    np.testing.assert_allclose(found.second.reshape(second.shape), second, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.mean.reshape(mean.shape), mean, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    "name", ["Conv1d", "Conv2d grouped", "Conv3d", "ConvTranspose2d grouped", "Linear", "Embedding"]
)
def test_moments_of_the_outputs_are_those_of_the_gradients_of_each_group(name):
    layer, arguments = LAYERS[name].layer(), LAYERS[name].call()
    found = output_moments(nn.Sequential(layer), [(arguments, {})], ["0"], seed=7)["0"]
    output, generator = layer(*arguments), torch.Generator().manual_seed(7)
    groups, expected = getattr(layer, "groups", 1), 0
    axis = 1 if "Conv" in name else output.ndim - 1
    for _ in range(2):  # the layer is the last: its gradient is the random direction itself
        direction = (torch.randn(output.shape, generator=generator) / output.detach().float().std()).numpy()
        flat = np.moveaxis(direction, axis, -1).reshape(-1, output.shape[axis])
        expected = expected + np.stack([g.T @ g for g in np.split(flat, groups, axis=1)])
    assert found.shape == (expected.shape if groups > 1 else expected.shape[1:])
    found = found.reshape(expected.shape).numpy()
    found = found * (expected.trace(axis1=1, axis2=2) / found.trace(axis1=1, axis2=2))[:, None, None]  # of any scale
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# --- groups


def of_groups(shape, groups, seed=0, known=(True, True)):
    """A weight and a metric of several groups, one of them with far larger inputs."""
    weight = normal(groups * shape[0], *shape[1:], seed=seed)
    size = int(np.prod(shape[1:]))
    roots = normal(groups, size, size, seed=seed + 1) * torch.tensor([1.0, 3.0, 0.3])[:groups, None, None]
    gradients = normal(groups, shape[0], shape[0], seed=seed + 2)
    return weight, Metric(roots @ roots.mT if known[0] else None, gradients @ gradients.mT if known[1] else None)


def blocks_of(weight, metric, groups):
    """Each group's weight (out, D) and the roots of its G, floored as the metric says, and S; by numpy."""
    for group, block in enumerate(np.split(weight.flatten(1).numpy(), groups)):
        inputs, outputs = np.eye(block.shape[1]), np.eye(len(block))
        if metric is not None and metric.inputs is not None:
            inputs = metric.inputs[group].numpy()
        if metric is not None and metric.outputs is not None:
            own = metric.outputs[group].numpy()
            outputs = (1 - OUTPUT_FLOOR) * own * len(own) / np.trace(own) + OUTPUT_FLOOR * outputs
        yield block, np.linalg.cholesky(outputs), np.linalg.cholesky(inputs)


KNOWN = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(
    ("kind", "shape"), [("svd", (5, 4)), ("channel_svd", (4, 3, 2)), ("channel_svd", (4, 2, 3, 2))]
)
def test_errors_of_groups_are_those_of_all_spectra_together(kind, shape, known):
    weight, metric = of_groups(shape, 3, known=known)
    metric = metric if any(known) else None
    spectra = []
    for block, outputs, inputs in blocks_of(weight, metric, 3):
        spectra.append(np.square(np.linalg.svd(outputs.T @ block @ inputs, compute_uv=False)))
    total = np.sum(spectra)
    assert weighted_energy(weight, metric, 3) == pytest.approx(total)
    profile = profile_in(kind, weight, metric, 3)
    for (rank,), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        assert error == pytest.approx(sum(s[rank:].sum() for s in spectra) / total, abs=1e-9)


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=SLOW) if k in ITERATIVE else k for k in GROUPED])
def test_factors_of_groups_attain_the_predicted_error(kind, known):
    shapes = [(5, 4, 3, 2), (5, 4)]
    fits = (s for s in shapes if DECOMPOSITIONS[kind].unsupported(operator_of(of_shape(s))) is None)
    shape = next(fits, shapes[0])
    weight, metric = of_groups(shape, 2, known=known)
    metric = metric if any(known) else None
    profile = profile_in(kind, weight, metric, 2)
    for row in range(0, len(profile.ranks), max(1, len(profile.ranks) // 5)):
        factors = factorise_in(kind, weight, tuple(profile.ranks[row].tolist()), metric, 2)
        product = multiplied_out(DECOMPOSITIONS[kind], factors, shape, 2)
        lost = total = 0.0
        for (block, outputs, inputs), new in zip(
            blocks_of(weight, metric, 2), np.split(product.flatten(1).numpy(), 2), strict=True
        ):
            lost += np.square(outputs.T @ (block - new) @ inputs).sum()
            total += np.square(outputs.T @ block @ inputs).sum()
        assert lost / total <= profile.errors[row] * (1.05 if kind in ITERATIVE else 1) + 1e-5
        if kind in ("svd", "channel_svd", "spatial_svd"):
            assert lost / total == pytest.approx(profile.errors[row], abs=1e-5)


def of_shape(shape):
    out, in_, *kernel = shape
    return nn.Conv2d(in_, out, tuple(kernel)) if kernel else nn.Linear(in_, out)


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_are_factorised_each_on_its_own(kind):
    layer = randomised(nn.Conv2d(16, 12, 3, groups=2)) if kind != "svd" else randomised(nn.Conv2d(16, 12, 1, groups=2))
    if DECOMPOSITIONS[kind].unsupported(operator_of(layer)) is not None:
        pytest.skip("does not fit")
    ranks, whole = low_ranks(layer, kind), factorised(layer, kind).dense_weight()
    for index, block in enumerate(layer.weight.detach().chunk(2)):
        alone = randomised(nn.Conv2d(8, 6, layer.kernel_size))
        alone = with_weight(alone, block)
        torch.testing.assert_close(factorised(alone, kind, ranks).dense_weight(), whole.chunk(2)[index], **TIGHT)


# --- transposed convolutions that are told their output's size


class Upsampling(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1)
        self.settings = settings

    def forward(self, x):
        return self.up(self.down(x), **{name: x.shape[2:] if value else None for name, value in self.settings.items()})


def test_call_with_an_output_size_keeps_the_layer_dense():
    told, plain = Upsampling(output_size=True), Upsampling(output_size=False)
    reasons = {layer.name: layer.reason for layer in take_inventory(told, trace=trace(told, (1, 3, 8, 8)))}
    assert reasons == {
        "down": None,
        "up": "it is called with output_size=torch.Size([8, 8]), which its factors would not know",
    }
    plan = compress_(told, Budget(params=0.8), example_input=(1, 3, 8, 8), **WEIGHTS_ALONE)
    assert [p.name for p in plan.factorised] == ["down"]
    assert told(torch.randn(1, 3, 8, 8)).shape == (1, 8, 8, 8)
    assert not any(layer.reason for layer in take_inventory(plain, trace=trace(plain, (1, 3, 8, 8))))


def test_factors_called_with_an_output_size_say_so():
    told = Upsampling(output_size=True)
    compress_(told, Budget(params=0.5), **WEIGHTS_ALONE)
    assert isinstance(told.up, FactorisedLayer)
    message = r"ConvTranspose2d cannot be called with output_size=torch.Size\(\[8, 8\]\)"
    with pytest.raises(UnsupportedError, match=message):
        told(torch.randn(1, 3, 8, 8))
    told.settings = {"output_size": False}
    assert told(torch.randn(1, 3, 8, 8)).shape == (1, 8, 7, 7)


def test_second_plan_leaves_all_factorised_classes_alone():
    bag, up, head = nn.EmbeddingBag(40, 16), nn.ConvTranspose1d(16, 16, 4), nn.Linear(16, 16)
    net = nn.ModuleDict({"bag": bag, "up": up, "head": head})
    apply_plan_(
        net, search_ranks(net, Budget(params=0.7), include=["bag", "up"], kinds=["svd", "channel_svd"], method="exact")
    )
    assert [layer.type for layer in take_inventory(net)] == ["FactorisedLayer", "FactorisedLayer", "Linear"]
    apply_plan_(net, search_ranks(net, Budget(params=0.9), method="exact"))
    assert all(isinstance(module, FactorisedLayer) for module in net.values())


# --- whole models


class Audio(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 24, 5, dilation=2, padding="same")
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean(dim=2))


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(2, 12, 3, (1, 2, 2), 1),
            nn.BatchNorm3d(12),
            nn.ReLU(),
            nn.Conv3d(12, 16, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean(dim=(2, 3, 4)))


class Grouped(nn.Module):
    """One block of ResNeXt, with a depthwise convolution behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.split = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.split(x))
        return self.head(torch.relu(self.depthwise(x)).mean(dim=(2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inc, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        skip = torch.relu(self.norm(self.inc(x)))
        return self.out(torch.cat([skip, torch.relu(self.up(torch.relu(self.down(skip))))], dim=1))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16, padding_idx=0)
        self.mix, self.head = nn.Linear(16, 24), nn.Linear(24, 7)

    def forward(self, tokens):
        return self.head(torch.relu(self.mix(self.embed(tokens))))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.EmbeddingBag(60, 16, mode="mean", padding_idx=0)
        self.mix, self.head = nn.Linear(16, 24), nn.Linear(24, 7)

    def forward(self, tokens):
        return self.head(torch.relu(self.mix(self.embed(tokens))))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.c_fc, self.c_proj = Conv1D(48, 16), Conv1D(16, 48)
        self.head = nn.Linear(16, 40)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.c_proj(F.gelu(self.c_fc(self.norm(x)))))


def words():
    return (torch.tensor([[3, 0, 7, 7, 2, 9, 0, 1], [1, 8, 0, 0, 11, 4, 5, 6]]),)


MODELS = {
    "audio": (Audio, lambda: (torch.randn(2, 2, 40),), {"body.0", "body.3"}),
    "video": (Video, lambda: (torch.randn(2, 2, 4, 6, 6),), {"body.0", "body.3"}),
    "grouped": (Grouped, lambda: (torch.randn(2, 3, 8, 8),), {"stem", "split"}),
    "u-net": (UNet, lambda: (torch.randn(2, 1, 8, 8),), {"down", "up"}),
    "text": (Text, words, {"embed"}),
    "bag": (Bag, words, {"embed"}),
    "gpt": (Gpt, words, {"c_fc", "c_proj", "embed"}),
}


def check_compressed(name, settings):
    make, inputs, expected = MODELS[name]
    net, inputs = make(), inputs()
    frozen = next(iter(sorted(expected)))
    net.get_submodule(frozen).requires_grad_(requires_grad=False)
    wanted = net(*inputs).shape
    plan = compress_(net, Budget(params=0.5), example_input=inputs, **settings)
    chosen = {p.name for p in plan.factorised}
    assert expected & chosen
    assert "depthwise" not in chosen
    assert sum(p.numel() for p in net.parameters()) <= 0.5 * sum(p.numel() for p in make().parameters())
    assert measure_costs(net, inputs) == plan.compressed
    output = net.eval()(*inputs)
    assert output.shape == wanted
    assert bool(torch.isfinite(output).all())
    for layer in net.modules():
        if isinstance(layer, FactorisedLayer) and layer.operator.lookup and layer.padding_idx is not None:
            assert not layer.weight[layer.padding_idx].any()
    for key, parameter in net.named_parameters():
        assert parameter.requires_grad == (not key.startswith(f"{frozen}."))
    return plan


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_is_compressed_by_its_weights(name):
    assert check_compressed(name, {**WEIGHTS_ALONE, "method": "exact"}).objective == "weight"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_whole_model_is_compressed_and_healed(name):
    assert check_compressed(name, {}).objective == "end_to_end"


@pytest.mark.parametrize("name", ["grouped", "u-net"])
def test_whole_model_in_a_metric_has_the_errors_of_its_plan(name):
    make, inputs, _ = MODELS[name]
    net, x = make(), inputs()
    statistics = gather_statistics(net, calibration=[x])
    settings = {"example_input": x, "objective": "moments", "statistics": statistics}
    plan = search_ranks(net, Budget(params=0.5), kinds=["channel_svd", "svd"], **settings)
    dense = copy.deepcopy(net)
    apply_plan_(net, plan, statistics=statistics)
    for planned in plan.factorised:
        layer, new = dense.get_submodule(planned.name), net.get_submodule(planned.name)
        metric, groups = statistics.metric(planned.name), new.operator.groups
        blocks = zip(canonical(layer, layer.weight).chunk(groups), new.canonical_weight().chunk(groups), strict=True)
        lost = whole = 0.0
        for index, (before, after) in enumerate(blocks):
            own = metric if groups == 1 else metric.group(index)
            energy = weighted_energy(before.detach().double(), own)
            lost, whole = lost + error_in(own, before, after) * energy, whole + energy
        unseen = metric.unseen(groups)
        error = np.array([lost / whole])
        assert float((error if unseen is None else unseen.at(error))[0]) == pytest.approx(
            planned.error, rel=1e-3, abs=1e-6
        )

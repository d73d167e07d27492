"""Second moments of each group of a layer, and factors fitted in them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Budget, apply_plan_, search_ranks
from lightning_compress.analysis.moments import input_moments, output_moments
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.kinds.metric import OUTPUT_FLOOR, Metric
from lightning_compress.kinds.registry import rank_errors, weighted_energy
from lightning_compress.layers.families import canonical
from tests.support.architectures import CASES
from tests.support.errors import error_in
from tests.support.geometries import images
from tests.support.zoo import LAYERS, factorised, kinds_for, low_ranks, normal, randomised, with_weight


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


# --- errors and factors


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
    profile = rank_errors(kind, weight, metric, 3)
    for (rank,), error in zip(profile.ranks.tolist(), profile.errors.tolist(), strict=True):
        assert error == pytest.approx(sum(s[rank:].sum() for s in spectra) / total, abs=1e-9)


@pytest.mark.parametrize("kernel", [1, 3])
def test_groups_are_factorised_each_on_its_own(kernel):
    layer = randomised(nn.Conv2d(16, 12, kernel, groups=2))
    kinds = kinds_for(layer)
    assert len(kinds) >= (1 if kernel == 1 else 5)
    for kind in kinds:
        ranks, whole = low_ranks(layer, kind), factorised(layer, kind).dense_weight()
        for index, block in enumerate(layer.weight.detach().chunk(2)):
            alone = with_weight(nn.Conv2d(8, 6, kernel), block)
            expected = factorised(alone, kind, ranks).dense_weight()
            torch.testing.assert_close(expected, whole.chunk(2)[index], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnext", "u-net"])
def test_whole_model_in_a_metric_has_the_errors_of_its_plan(name):
    net, x = CASES[name].make().eval(), (CASES[name].example,)
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

"""Each kind in a whole model: searched, swapped in, saved, loaded and exported."""

from __future__ import annotations

import pytest
import torch

from lightning_compress import Budget, compress_, load_compressed, save_compressed
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.compressing import DEFAULTS, WEIGHTS_ALONE
from tests.support.nets import SHAPE, TinyNet
from tests.support.zoo import normal


@pytest.mark.parametrize(
    ("kind", "heal"),
    [
        *((kind, False) for kind in ("svd", "interpolative", "channel_svd", "spatial_svd", "tucker2")),
        *((kind, False) for kind in ("tt", "cp", "cp3")),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("tt", "cp", "cp3", "interpolative")),
    ],
)
def test_model_is_compressed_saved_and_loaded(kind, heal, tmp_path):
    net, x = TinyNet().eval(), normal(2, 3, 8, 8).float()
    plan = compress_(net, Budget(params=0.75), example_input=SHAPE, kinds=kind, **(DEFAULTS if heal else WEIGHTS_ALONE))
    assert {p.kind for p in plan.factorised} == {kind}
    assert measure_costs(net, SHAPE) == plan.compressed
    assert [(p.name, p.ranks, p.params_after, p.macs_after) for p in embodied_plan(net, SHAPE).factorised] == [
        (p.name, p.ranks, p.params_after, p.macs_after) for p in plan.factorised
    ]
    save_compressed(net, tmp_path)
    again = TinyNet().eval()
    load_compressed(again, tmp_path)
    assert torch.equal(again(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))

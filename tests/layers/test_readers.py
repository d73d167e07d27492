"""Code of others that reads or sets the weight of a layer: fusion with batch norms, norm loggers, sparse lookups."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_compress import Budget, FactorisedLayer, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.inventory import list_layers
from lightning_compress.core.errors import CompressionWarning, UnsupportedError

ALONE = {"method": "exact", "objective": "weight", "target": None}


@pytest.fixture
def normed():
    net = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    apply_plan_(net.eval(), search_ranks(net, Budget(params=0.8), kinds="channel_svd", include=["0"], **ALONE))
    assert isinstance(net[0], FactorisedLayer)
    return net


def test_fusion_with_a_batch_norm_says_that_the_last_factor_takes_it(normed):
    x = torch.randn(2, 8, 9, 9)
    expected = normed[1](normed[0](x))
    with pytest.raises(UnsupportedError, match=r"fused into its last factor: .*fuse_conv_bn_eval\(layer\[-1\], norm\)"):
        fuse_conv_bn_eval(normed[0], normed[1])
    torch.testing.assert_close(normed[1](normed[0](x)), expected)
    fused = copy.deepcopy(normed[0])
    fused.expand = fuse_conv_bn_eval(fused[-1], normed[1])
    torch.testing.assert_close(fused(x), expected)


def test_fusion_of_a_whole_graph_fuses_the_last_factor(normed):
    x = torch.randn(2, 8, 9, 9)
    fused = optimization.fuse(normed)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), normed(x))


@pytest.fixture
def trained():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    apply_plan_(net, search_ranks(net, Budget(params=0.5), include=["0"], **ALONE))
    return net


def test_norm_loggers_are_told_where_the_gradients_are(trained):
    assert trained[0].weight.grad is None
    trained(torch.randn(4, 64)).sum().backward()
    message = r"factorised Linear has no gradient .*\(layer\.\w+\.weight\.grad, layer\.\w+\.weight\.grad\)"
    with pytest.warns(CompressionWarning, match=message) as seen:
        found = {name: m.weight.grad for name, m in trained.named_modules() if hasattr(m, "weight")}
    assert seen[0].filename == __file__
    assert found.pop("0") is None
    assert found
    assert all(gradient is not None for gradient in found.values())


def test_the_norms_of_lightning_are_those_of_the_factors(trained):
    trained(torch.randn(4, 64)).sum().backward()
    norms = grad_norm(trained, 2)
    assert set(norms) == {f"grad_2.0_norm/{name}" for name, _ in trained.named_parameters()} | {"grad_2.0_norm_total"}
    for name, factor in trained[0].named_parameters():
        assert norms[f"grad_2.0_norm/0.{name}"] == pytest.approx(float(factor.grad.norm()), rel=1e-3)


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_lookups_stay_dense_and_train_with_their_optimizer(cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = cls(200, 32, sparse=True)
            self.head = nn.Linear(32, 64)

        def forward(self, x):
            return self.head(self.table(x))

    net = Net()
    reasons = {layer.name: layer.reason for layer in list_layers(net)}
    assert reasons["table"].startswith("its gradients are sparse, as SparseAdam needs")
    plan = compress_(net, Budget(params=0.95), heal=False, **ALONE)
    assert [layer.name for layer in plan.factorised] == ["head"]
    sparse, dense = torch.optim.SparseAdam(net.table.parameters()), torch.optim.Adam(net.head.parameters())
    before = net.table.weight.detach().clone()
    net(torch.tensor([[1, 2], [2, 5]])).square().sum().backward()
    for optimizer in (sparse, dense):
        optimizer.step()
    changed = (net.table.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 2, 5]


def test_a_lookup_whose_gradients_are_made_dense_is_factorised():
    net = nn.Sequential(nn.Embedding(200, 32, sparse=True), nn.Linear(32, 8))
    net[0].sparse = False
    apply_plan_(net, search_ranks(net, Budget(params=0.5), **ALONE))
    assert isinstance(net[0], FactorisedLayer)
    net(torch.tensor([[1, 2]])).sum().backward()
    torch.optim.Adam(net.parameters()).step()

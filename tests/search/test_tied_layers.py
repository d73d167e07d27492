"""Embeddings and output layers of one weight, factorised as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress import Budget, apply_plan_, compress_, search_ranks
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.surgery.embodied import embodied_plan
from tests.support.optimizing import patch_optimizers_

VOCABULARY, WIDTH = 300, 48


class Language(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, *, embeddings: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, WIDTH, padding_idx=0) for _ in range(embeddings))
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        for module in (*self.embeddings, self.head):
            module.weight = self.embeddings[0].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = sum(embedding(tokens) for embedding in self.embeddings)
        return self.head(torch.relu(self.body(hidden)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Language()
    with torch.no_grad():  # of low rank, with noise, as trained embeddings are
        low = torch.randn(VOCABULARY, 8) @ torch.randn(8, WIDTH)
        model.head.weight.copy_(low + 0.1 * torch.randn(VOCABULARY, WIDTH))
        model.head.weight[0] = 0
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"objective": "weight"}, {"heal": False}])
def test_both_uses_become_factors_of_the_same_parameters(model, tokens, settings):
    dense = copy.deepcopy(model)
    plan = compress_(model, Budget(params=0.4), example_input=tokens, **settings)
    first, head = model.embeddings[0], model.head
    assert isinstance(first, FactorisedLayer)
    assert isinstance(head, FactorisedLayer)
    assert head.expand.weight is first.reduce.weight
    assert head.reduce.weight is first.expand.weight
    assert parameters(model) == plan.compressed.params <= 0.4 * parameters(dense)
    torch.testing.assert_close(first.dense_weight(), head.dense_weight())
    assert (model(tokens) - dense(tokens)).norm() / dense(tokens).norm() < 0.3
    assert head.bias is not None


def test_output_of_each_is_that_of_the_dense_layer_with_the_multiplied_out_weight(model, tokens):
    compress_(model, Budget(params=0.4), example_input=tokens, heal=False)
    hidden = torch.randn(3, 5, WIDTH)
    head, first = model.head, model.embeddings[0]
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T + head.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first(tokens), first.weight[tokens], rtol=1e-4, atol=1e-4)
    assert not first(torch.zeros(1, dtype=torch.long)).any()  # the padding


def test_plan_names_the_layer_that_follows(model, tokens):
    plan = search_ranks(model, Budget(params=0.4), example_input=tokens)
    by_name = {layer.name: layer for layer in plan.layers}
    assert by_name["embeddings.0"].kind == "svd"
    assert by_name["head"].is_dense
    assert by_name["head"].reason == "its weight is that of 'embeddings.0' and is factorised with it"


def test_other_kinds_cannot_share(model):
    plan = search_ranks(model, Budget(params=0.99), kinds=["channel_svd", "svd"], overrides={"embeddings.0": "dense"})
    assert {layer.name for layer in plan.factorised} <= {"body"}


def test_macs_count_both_uses_and_applying_again_changes_nothing(model, tokens):
    plan = search_ranks(model, Budget(params=0.4), example_input=tokens)
    apply_plan_(model, plan)
    assert apply_plan_(model, plan) == ()
    read = embodied_plan(model, tokens)
    assert (read.dense, read.compressed) == (plan.dense, plan.compressed)
    rank, body = model.embeddings[0].ranks[0], model.body
    inner = sum(f.numel() for f in body.factors().values()) if isinstance(body, FactorisedLayer) else WIDTH**2
    assert plan.compressed.macs == 7 * (rank * WIDTH + inner + rank * (WIDTH + VOCABULARY))


def test_optimizer_holds_each_factor_once(model, tokens):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replacements = apply_plan_(model, search_ranks(model, Budget(params=0.4), example_input=tokens))
    patch_optimizers_([optimizer], replacements)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.slow
def test_several_embeddings_and_an_output_layer(tokens):
    torch.manual_seed(0)
    model = Language(embeddings=3, bias=False).eval()
    compress_(model, Budget(params=0.5), example_input=tokens)
    holders = [*model.embeddings, model.head]
    assert all(isinstance(holder, FactorisedLayer) for holder in holders)
    assert {id(holder.reduce.weight) for holder in model.embeddings} == {id(model.head.expand.weight)}


@pytest.mark.usefixtures("unshrunk")
def test_metric_of_the_weight_takes_both_uses_into_account(model, tokens):
    statistics = gather_statistics(model, tokens)
    assert "head" not in statistics.moments
    metric = statistics.metric("embeddings.0")
    assert metric.inputs is None
    assert metric.outputs.shape == (WIDTH, WIDTH)
    hidden = []
    model.head.register_forward_pre_hook(lambda _m, args: hidden.append(args[0].detach().reshape(-1, WIDTH).double()))
    with torch.no_grad():
        for args, kwargs in statistics.batches:
            model(*args, **kwargs)
    second = torch.cat(hidden).T @ torch.cat(hidden)
    left = metric.outputs - second / second.trace()  # what the embedding's own gradients add
    assert left.trace() == pytest.approx(1)
    assert torch.linalg.eigvalsh(left).min() > -1e-9


def test_tied_weight_with_a_gradient_hook_stays_dense(tokens):
    model = Language().eval()
    model.head.weight.register_hook(lambda grad: grad)
    plan = search_ranks(model, Budget(params=0.99), example_input=tokens)
    assert "gradient hook" in next(layer.reason for layer in plan.layers if layer.name == "head")

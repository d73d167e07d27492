"""Layers with a computed weight or padding, folded, factorised, saved, multiplied out and trained."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    Budget,
    Compress,
    FactorisedLayer,
    apply_plan_,
    compress_,
    compress_checkpoint,
    load_compressed,
    merge_,
    save_compressed,
    search_ranks,
)
from lightning_compress.analysis.costs import measure_costs
from lightning_compress.core.errors import UnsupportedError
from lightning_compress.layers.folding import folded, weight_parameters
from lightning_compress.layers.unfused import unfused
from lightning_compress.surgery.swap import uninstall
from tests.support.adapted import (
    ALL,
    ALONE,
    COMPUTED,
    PADDED,
    SIZE,
    at_full_rank,
    image,
    listed,
    made,
    near,
    net_of,
    outputs,
    searched,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")  # torch's word on its own function


# --- what is known of the layers


@pytest.mark.parametrize("name", ALL)
def test_a_layer_is_open_with_all_its_parameters(name):
    net = made(name)
    layer = listed(net)["2"]
    assert layer.reason is None
    assert layer.parameters == sum(p.numel() for p in net[2].parameters())
    assert layer.weight_shape == (64, 32, 3, 3)
    assert layer.type == (name if name in PADDED or "Conv2d" in name else "Conv2d")
    assert [each for each in listed(net) if each.startswith("2")] == ["2"]


@pytest.mark.parametrize("name", COMPUTED)
def test_a_folded_layer_computes_what_the_layer_does_and_the_layer_stays_as_it_is(name):
    net = made(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plain = folded(net[2].train())
    net.eval()
    x = torch.randn(2, 32, 9, 12)
    with torch.no_grad():
        assert near(plain(x), net[2](x), 1e-6)
    assert plain.bias is net[2].bias
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", COMPUTED)
def test_a_model_is_folded_for_a_while(name):
    net = made(name)
    layer, expected, costs = net[2], outputs(net), measure_costs(net)
    with unfused(net):
        assert net[2] is not layer
        assert near(outputs(net), expected, 1e-6)
        assert type(net[2]).__name__ in {"Conv2d", "FoldedConv2d"}
        assert measure_costs(net) == costs
    assert net[2] is layer


@pytest.mark.parametrize("name", ALL)
def test_costs_of_the_dense_and_of_the_compressed_model_are_exact(name):
    net = made(name)
    dense = sum(p.numel() for p in net.parameters())
    stored = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    plan = searched(net)
    assert (plan.dense.params, plan.dense.bytes) == (dense, stored)
    apply_plan_(net, plan, example_input=SIZE)
    assert plan.compressed == measure_costs(net, SIZE)
    assert plan.compressed.params == sum(p.numel() for p in net.parameters()) <= 0.5 * dense


# --- swapped


@pytest.mark.parametrize("name", ALL)
def test_factors_of_full_rank_compute_what_the_layer_did(name):
    net = made(name)
    expected = outputs(net)
    apply_plan_(net, at_full_rank(net), example_input=SIZE)
    assert isinstance(net[2], FactorisedLayer)
    assert net[2].dense_type == (name if name in PADDED or "Std" in name else "Conv2d")
    assert near(outputs(net), expected)
    assert near(outputs(copy.deepcopy(net)), expected)
    assert near(outputs(net.double(), torch.float64), expected.double())


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_into_a_model_of_other_weights(name, tmp_path):
    net = made(name)
    apply_plan_(net, searched(net))
    save_compressed(net, tmp_path)
    other = net_of(ALL[name]())
    load_compressed(other, tmp_path)
    assert torch.equal(outputs(other), outputs(net))


@pytest.mark.parametrize("name", ALL)
def test_multiplied_out_it_computes_the_same_and_can_be_compressed_again(name):
    net = made(name)
    state, kind = list(net.state_dict()), type(net[2])
    apply_plan_(net, searched(net))
    merged = copy.deepcopy(net)
    merge_(merged)
    assert near(outputs(merged), outputs(net))
    if name in PADDED:  # the weight is one of its own
        assert list(merged.state_dict()) == state
        assert type(merged[2]) is kind
    again = searched(merged, 0.3)
    fresh = made(name)
    apply_plan_(fresh, again)  # what a checkpoint of a later round does
    apply_plan_(merged, again, example_input=SIZE)
    assert type(fresh[2]) is type(merged[2])


@pytest.mark.parametrize("name", ALL)
def test_merged_layers_run_as_the_dense_ones(name):
    net = made(name)
    apply_plan_(net, searched(net))
    expected = outputs(net)
    net[2].merged = True
    assert near(outputs(net), expected)


def test_a_failure_puts_the_layer_itself_back():
    net = made("weight_norm")
    layer, state = net[2], {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    (replacement, *_) = apply_plan_(net, at_full_rank(net))
    assert replacement.dense is layer
    uninstall(net, [replacement])
    assert net[2] is layer
    assert {key: id(value) for key, value in net.state_dict(keep_vars=True).items()} == state


def test_hooks_move_along_and_those_of_a_norm_do_not():
    net, seen = made("weight_norm of old"), []
    net[2].register_forward_hook(lambda *_: seen.append(1))
    apply_plan_(net, at_full_rank(net))
    outputs(net)
    assert seen == [1]


def test_a_spectral_norm_is_not_moved_by_the_search():
    net = made("spectral_norm").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    searched(net, objective="moments")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["StdConv2dSame", "Conv2dStaticSamePadding"])
def test_the_whole_method_with_moments_and_repair(name):
    net = made(name)
    expected = outputs(net)
    plan = compress_(net, Budget(params=0.5), example_input=SIZE, target=None, kinds=["channel_svd", "svd"])
    assert plan.source != "weight"
    assert near(outputs(net), expected, 0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")  # of a dense layer
@pytest.mark.parametrize("name", ["StdConv2dSame", "Conv2dStaticSamePadding"])
def test_compiled_traced_and_exported(name):
    net = made(name)
    apply_plan_(net, at_full_rank(net))
    expected = outputs(net)
    assert near(outputs(torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)), expected)
    assert near(outputs(torch.export.export(net, (image(3),)).module()), expected)
    with torch.no_grad():
        assert near(outputs(torch.jit.trace(net, image(3))), expected)
    with pytest.raises(UnsupportedError, match=rf"cannot compile a factorised {name}.*torch\.jit\.trace"):
        torch.jit.script(net)


@pytest.mark.parametrize("name", ["StdConv2dSame", "Conv2dStaticSamePadding"])
def test_timed_on_the_target(name):
    net = made(name)
    plan = search_ranks(net, Budget(params=0.5), example_input=SIZE, method="exact", objective="weight")
    assert plan.compressed.latency is not None
    apply_plan_(net, plan, example_input=SIZE)


def test_a_checkpoint_on_disk_keeps_computed_weights(tmp_path):
    net = made("weight_norm")
    (tmp_path / "in").mkdir()
    save_file(net.state_dict(), tmp_path / "in" / "model.safetensors")
    with torch.device("meta"):
        empty = net_of(ALL["weight_norm"]())
    plan = compress_checkpoint(tmp_path / "in", tmp_path / "out", Budget(params=0.995), model=empty)
    assert [layer.name for layer in plan.factorised] == ["6"]
    load_compressed(other := net_of(ALL["weight_norm"]()), tmp_path / "out")
    assert torch.equal(other[2].weight, net[2].weight)


# --- trained


class Fitted(L.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net = made(name).train()
        self.example_input_array = image()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(module, folder, epochs, **settings):
    data = TensorDataset(image(8), torch.arange(8))
    callback = Compress(Budget(params=0.5), heal=False, **ALONE)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=4), **settings)
    return trainer


@pytest.mark.parametrize("name", ["weight_norm", "ScaledStdConv2d", "Conv2dStaticSamePadding"])
def test_a_fit_trains_the_factors_alone_and_is_resumed(name, tmp_path):
    module = Fitted(name)
    trainer = fit(module, tmp_path, 1)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert isinstance(module.net[2], FactorisedLayer)
    assert set(trainer.optimizers[0].state) == set(module.parameters())
    resumed = Fitted(name)
    fit(resumed, tmp_path, 2, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert isinstance(resumed.net[2], FactorisedLayer)


@pytest.mark.parametrize("name", COMPUTED)
def test_what_a_weight_is_computed_from(name):
    layer = made(name)[2]
    names = [key for key, _ in weight_parameters(layer)]
    assert set(names) | {"bias"} == {key for key, _ in layer.named_parameters()}
    assert "bias" not in names

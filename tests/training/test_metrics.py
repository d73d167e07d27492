"""CompressionRatio, RelativeError, TeacherAgreement: values, parts of batches, processes, devices, copies."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressionRatio, RelativeError, TeacherAgreement, compress_
from lightning_compress.analysis.distance import OutputDistance
from lightning_compress.core.errors import ConfigurationError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 10))


def compressed():
    model = net()
    compress_(model, {"params": 0.5}, objective="weight", method="exact", heal=False, target=None)
    return model


def outputs(samples=12, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(samples, classes, generator=generator)
    return target + 0.5 * torch.randn(samples, classes, generator=generator), target


def merged(first, second):
    """A metric whose states are those of two processes, reduced as torchmetrics reduces them."""
    both = copy.deepcopy(first)
    for name, reduce in first._reductions.items():
        setattr(both, name, reduce(torch.stack([getattr(first, name), getattr(second, name)])))
    return both


# --- values


@pytest.mark.parametrize("resource", ["params", "bytes", "macs"])
def test_ratio_is_that_of_dense_and_compressed_model(resource):
    model, dense = compressed(), net()
    metric = CompressionRatio(resource, example_input=(1, 32))
    metric.update(model)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (dense, model)]
    if resource == "macs":
        sizes = [sum(p.numel() for p in each.parameters() if p.ndim == 2) for each in (dense, model)]
    elif resource == "bytes":
        sizes = [sum(t.numel() * t.element_size() for t in each.state_dict().values()) for each in (dense, model)]
    assert float(metric.compute()) == pytest.approx(sizes[0] / sizes[1])
    other = CompressionRatio(resource, example_input=(1, 32))
    other.update(model, dense)
    assert other.compute() == metric.compute()


def test_ratio_of_a_dense_model_is_one():
    metric = CompressionRatio()
    metric.update(net())
    assert metric.compute() == 1


def test_error_is_the_distance_of_search_and_repair():
    preds, target = outputs()
    metric, distance = RelativeError(), OutputDistance()
    for part in (slice(0, 5), slice(5, 6), slice(6, None)):
        metric.update(preds[part], target[part])
        distance.add([preds[part]], [target[part]])
    assert float(metric.compute()) == pytest.approx(distance.value, rel=1e-5)
    expected = (preds - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_error_of_the_mean_is_one_and_of_the_same_zero():
    _, target = outputs()
    metric = RelativeError()
    assert float(metric(target.mean(0).expand_as(target), target)) == pytest.approx(1)
    assert float(RelativeError()(target, target)) == 0


def test_error_where_outputs_do_not_vary_is_the_squared_error():
    metric = RelativeError()
    metric.update(torch.zeros(3, 2), torch.full((3, 2), 0.1))
    assert float(metric.compute()) == pytest.approx(6 * 0.01)


def test_agreement_counts_classes_at_every_place():
    target = torch.eye(4)
    preds = target[[0, 1, 3, 3]]
    metric = TeacherAgreement()
    assert float(metric(preds, target)) == 0.75
    tokens = TeacherAgreement(dim=-1)
    assert float(tokens(preds[None], target[None], torch.tensor([[1, 1, 1, 0]]))) == pytest.approx(2 / 3)
    images = TeacherAgreement()
    assert float(images(preds.T[None], target.T[None])) == 0.75


# --- processes, copies, devices


@pytest.mark.parametrize("make", [RelativeError, TeacherAgreement])
def test_two_processes_together_are_one_with_all_samples(make):
    preds, target = outputs()
    whole, parts = make(), [make(), make()]
    whole.update(preds, target)
    parts[0].update(preds[:3], target[:3])
    parts[1].update(preds[3:], target[3:])
    assert float(merged(*parts).compute()) == pytest.approx(float(whole.compute()), rel=1e-9)


def test_two_processes_with_the_same_model_have_its_ratio():
    metric = CompressionRatio()
    metric.update(compressed())
    assert merged(metric, metric).compute() == metric.compute()


@pytest.mark.parametrize("metric", [CompressionRatio(), RelativeError(), TeacherAgreement()])
def test_metrics_are_pickled_copied_reset_and_moved(metric):
    given = (compressed(),) if isinstance(metric, CompressionRatio) else outputs()
    metric.update(*given)
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert twin.compute() == metric.compute()
    moved = copy.deepcopy(metric).to("meta")
    assert all(getattr(moved, name).is_meta for name in moved._defaults)
    again = metric.clone()
    again.reset()
    again.update(*given)
    assert again.compute() == metric.compute()


def test_lightning_module_logs_them():
    dense, small = net().eval(), compressed().eval()

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.dense = small, dense
            self.ratio, self.error, self.agreement = CompressionRatio(), RelativeError(), TeacherAgreement()

        def test_step(self, batch, batch_idx):
            preds, target = self.net(batch[0]), self.dense(batch[0])
            self.error(preds, target)
            self.agreement(preds, target)
            self.log_dict({"error": self.error, "agreement": self.agreement}, on_epoch=True)

        def on_test_epoch_end(self):
            self.ratio.update(self.net)
            self.log("ratio", self.ratio)

    images = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.test(Module(), DataLoader(TensorDataset(images), 8), verbose=False)
    with torch.no_grad():
        preds, target = small(images), dense(images)
    expected = (preds - target).square().sum() / (target - target.mean(0)).square().sum()
    assert found["error"] == pytest.approx(float(expected), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((preds.argmax(1) == target.argmax(1)).float().mean()))
    assert found["ratio"] == pytest.approx(
        sum(p.numel() for p in dense.parameters()) / sum(p.numel() for p in small.parameters())
    )


# --- bad input


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: CompressionRatio("flops"), "resource='flops'"),
        (lambda: CompressionRatio("macs"), "pass example_input="),
        (lambda: CompressionRatio().update("net"), "model='net'"),
        (lambda: CompressionRatio().update(net(), "net"), "dense='net'"),
        (lambda: TeacherAgreement(dim="x"), "dim='x'"),
        (lambda: TeacherAgreement(dim=2).update(*outputs()), r"dim=2.*shape \(12, 5\)"),
        (lambda: TeacherAgreement().update(*outputs(), torch.ones(3)), r"mask is of shape \(3,\), expected \(12,\)"),
        (lambda: RelativeError().update(outputs()[0], outputs(6)[0]), r"preds \(12, 5\) and target \(6, 5\)"),
        (lambda: RelativeError().update(torch.tensor(1.0), torch.tensor(1.0)), "of one shape"),
    ],
)
def test_wrong_arguments_are_errors_that_repeat_them(call, said):
    with pytest.raises(ConfigurationError, match=said):
        call()


def test_outputs_of_another_shape_need_another_metric():
    metric = RelativeError()
    metric.update(*outputs(classes=5))
    with pytest.raises(ConfigurationError, match=r"outputs of shape \(3,\) after \(5,\)"):
        metric.update(*outputs(classes=3))

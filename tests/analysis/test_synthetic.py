"""Synthetic inputs: what they match, how many, and that the model comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.analysis.drawing import leaves, noise, textured
from lightning_compress.analysis.draws import LEAST_SIDE
from lightning_compress.analysis.statistics import gather_statistics
from lightning_compress.analysis.synthetic import LEAST_COUNT, LEAST_STEPS, affordable, synthesise
from lightning_compress.core.effort import EFFORTS
from tests.support.interruptions import failing_at
from tests.support.nets import IMAGE, SHAPE, TinyNet, pooled, trained_like
from tests.support.unchanged import Unchanged

WORK = EFFORTS["balanced"].work


def mismatch(net: TinyNet, images: torch.Tensor) -> float:
    with torch.no_grad():
        inputs = net.conv1(images)
    variance, mean = torch.var_mean(inputs, (0, 2, 3), unbiased=False)
    running = net.norm.running_var + net.norm.eps
    spread = ((variance + net.norm.eps).sqrt() / running.sqrt() - 1).square()
    return float(((mean - net.norm.running_mean).square() / running + spread).mean())


def test_synthetic_images_match_the_running_statistics():
    net = trained_like()
    made = synthesise(net, SHAPE, count=64, steps=60)
    ((images,), kwargs) = made.batches[0]
    assert made.source == "batch norm"
    assert kwargs == {}
    assert images.shape == (64, 3, 8, 8)
    assert made.mismatch == pytest.approx(mismatch(net, images), rel=1e-4)
    assert made.mismatch < 0.02 * mismatch(net, torch.randn(64, 3, 8, 8))


def test_synthetic_images_are_deterministic_under_the_seed():
    net = trained_like()
    first, again, other = (synthesise(net, SHAPE, count=8, steps=3, seed=s).batches[0][0][0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_model_comes_back_as_it_was_after_an_interruption():
    net = trained_like().train()
    with net.conv2.register_forward_pre_hook(failing_at(4, KeyboardInterrupt)):
        before = Unchanged(net)
        with pytest.raises(KeyboardInterrupt):
            synthesise(net, SHAPE, count=8, steps=10)
        before.check()


def test_without_batch_norm_the_inputs_are_noise():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    made = synthesise(net, SHAPE, count=70)
    assert (made.source, made.mismatch) == ("noise", None)
    assert [args[0].shape[0] for args, _ in made.batches] == [64, 6]
    assert torch.cat([args[0] for args, _ in made.batches]).std() == pytest.approx(1, abs=0.1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens, scale):
        return self.head(self.embedding(tokens)) * scale[:, None, None]


def test_tokens_are_drawn_from_the_vocabulary():
    example = {"tokens": torch.zeros(1, 5, dtype=torch.long), "scale": torch.ones(1)}
    made = synthesise(Tokens(), example, count=32)
    (args, kwargs) = made.batches[0]
    assert made.source == "tokens"
    assert args == ()
    assert kwargs["tokens"].shape == (32, 5)
    assert set(kwargs["tokens"].unique().tolist()) == set(range(11))
    metric = gather_statistics(Tokens(), example).metric("head")
    assert (metric.inputs.shape, metric.outputs.shape) == ((6, 6), (3, 3))


@pytest.mark.parametrize(
    ("macs", "expected"),
    [(10**6, (256, 40)), (WORK // (3 * 100 * 40), (100, 40)), (WORK // (3 * 16 * 20), (16, 20)), (WORK, (16, 10))],
)
def test_work_of_the_synthesis_is_bounded(macs, expected):
    assert affordable(macs, 256, 40, WORK) == expected
    assert affordable(macs, 8, 5, WORK) == (8, 5)
    assert (LEAST_COUNT, LEAST_STEPS) == (16, 10)


@pytest.mark.parametrize("draw", [noise, leaves, textured])
def test_drawn_images_are_of_unit_scale_and_of_the_generator_alone(draw):
    images, again, other = (draw((6, 3, 40, 32), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert images.shape == (6, 3, 40, 32)
    assert bool(torch.isfinite(images).all())
    assert 0.9 < float(images.std()) < 1.1
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_textured_images_have_a_spectrum_nearer_to_photographs_than_noise():
    def slope(images: torch.Tensor) -> float:
        power = torch.fft.rfft2(images).abs().square().mean(dim=(0, 1))[0, 1:33].log()
        return float(np.polyfit(np.log(np.arange(1, 33)), power.numpy(), 1)[0])

    white = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slope(textured((32, 3, 64, 64), torch.Generator().manual_seed(0))) < -1.2 < slope(white)


@pytest.mark.slow
def test_images_are_smaller_where_as_many_large_ones_are_too_dear(try_only):
    net, shape = pooled(), (1, 3, 2 * LEAST_SIDE, 2 * LEAST_SIDE)
    small = synthesise(net, shape, count=8, steps=2)
    assert small.batches[0][0][0].shape[2:] == shape[2:]
    assert small.drawn == ()
    try_only(work=10**9)
    made = synthesise(net, shape, count=64, steps=2)
    assert made.batches[0][0][0].shape[2:] == (LEAST_SIDE, LEAST_SIDE)
    assert made.drawn
    assert {batch[0][0].shape[2:] for batch in made.drawn} == {(LEAST_SIDE, LEAST_SIDE)}

    class Flat(nn.Sequential):
        """Takes images of one size alone."""

    flat = Flat(nn.Conv2d(3, 2, 3, stride=8), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 24 * 24, 4)).eval()
    whole = synthesise(flat, shape, count=64, steps=2)
    assert whole.batches[0][0][0].shape[2:] == shape[2:]


def test_small_images_are_not_drawn(try_only):
    try_only(work=10**8)
    made = synthesise(pooled(), IMAGE)
    assert made.source == "batch norm"
    assert sum(len(batch[0][0]) for batch in made.batches) < EFFORTS["balanced"].inputs
    assert made.drawn == ()

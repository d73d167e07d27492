"""Reference networks of other kinds."""

from __future__ import annotations

import pytest
import torch

from benchmarks.references import REFERENCES, WEIGHTS, trained

TEXTS_AND_TONES = ("byte_transformer", "byte_gru", "tones")


@pytest.mark.parametrize("name", REFERENCES)
def test_weights_are_there_and_are_small(name):
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 8 * 2**20
    model = trained(name)
    assert not model.training
    example = REFERENCES[name].example
    inputs = example if isinstance(example, torch.Tensor) else torch.zeros(example)
    assert bool(torch.isfinite(model(inputs)).all())


@pytest.mark.parametrize("name", TEXTS_AND_TONES)
def test_parts_of_the_data_are_always_the_same_and_apart(name):
    batches = {part: [next(REFERENCES[name].batches(part, 4)) for _ in range(2)] for part in ("choose", "test")}
    for one, again in batches.values():
        assert torch.equal(one[0], again[0])
        assert torch.equal(one[1], again[1])
    assert not torch.equal(batches["choose"][0][0], batches["test"][0][0])


@pytest.mark.parametrize(("name", "least", "most"), [("tones", 0.8, 1.0), ("byte_gru", 1.5, 2.2)])
def test_networks_do_what_they_were_trained_for(monkeypatch, name, least, most):
    reference = REFERENCES[name]
    monkeypatch.setattr(
        "benchmarks.references.Reference.batches", lambda self, part: [self.draw(part, 100, torch.Generator())]
    )
    assert least < reference.score(trained(name), "test") < most

"""Methods of Hugging Face models after compression; skipped where transformers is not installed."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_compress import Budget, FactorisedLayer, compress_, load_pretrained, merge_
from lightning_compress.core.errors import CompressionWarning, ConfigurationError, UnsupportedError, WeightsError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(8)[None] * 7


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=120, n_positions=16, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    compress_(
        model,
        Budget(params=0.6),
        example_input={"input_ids": IDS},
        heal=False,
        objective="weight",
        target=None,
        include=["transformer.wte", "lm_head", "*.mlp.*"],
        kinds="svd",
    )
    assert isinstance(model.transformer.wte, FactorisedLayer)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("cls", [transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM])
def test_a_saved_model_comes_back_in_one_call(model, tmp_path, cls):
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(cls, tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not loaded.training
    assert loaded.generation_config.eos_token_id == 0
    loaded.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(logits(load_pretrained(cls, tmp_path / "again")), expected)
    with pytest.raises(OSError, match=r"model\.safetensors"):  # in the place of random weights
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_copies_save_themselves(model, tmp_path):
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.transformer.wte.parameters()).mul_(2)
    other.save_pretrained(tmp_path)
    loaded = load_pretrained(transformers.GPT2LMHeadModel, tmp_path)
    assert torch.equal(logits(loaded), logits(other))
    assert not torch.equal(logits(other), logits(model))


def test_tying_leaves_factors_as_they_are(model):
    expected = logits(model)
    before = [id(p) for p in model.parameters()]
    model.tie_weights()
    model.tie_weights(recompute_mapping=True)
    assert [id(p) for p in model.parameters()] == before
    assert torch.equal(logits(model), expected)
    shared = {id(p) for p in model.transformer.wte.parameters()} & {id(p) for p in model.lm_head.parameters()}
    assert bool(shared) == model.config.tie_word_embeddings


@pytest.mark.parametrize("size", [130, 100])
def test_resized_embeddings_stay_factorised_and_keep_their_rows(model, size):
    expected, rank = logits(model), model.transformer.wte.ranks
    embedding = model.resize_token_embeddings(size)
    assert embedding is model.get_input_embeddings()
    assert isinstance(embedding, FactorisedLayer)
    assert embedding.ranks == rank
    assert embedding.weight_shape == (size, 32)
    assert model.config.vocab_size == size
    kept = min(size, 120)
    torch.testing.assert_close(logits(model)[..., :kept], expected[..., :kept], rtol=1e-3, atol=1e-4)
    assert logits(model).shape[-1] == size
    shared = {id(p) for p in model.transformer.wte.parameters()} & {id(p) for p in model.lm_head.parameters()}
    assert bool(shared) == model.config.tie_word_embeddings
    model.save_pretrained  # noqa: B018 (still there)


def test_an_embedding_that_gets_too_small_for_its_ranks_stays_dense(model):
    size = model.transformer.wte.ranks[0] - 1
    with pytest.warns(
        CompressionWarning, match=r"'(transformer\.wte|lm_head)' stays dense: its weight .* is too small"
    ):
        model.resize_token_embeddings(size)
    assert type(model.transformer.wte) is torch.nn.Embedding
    assert logits(model, IDS % size).shape[-1] == size


def test_a_merged_model_has_its_own_methods_again(model, tmp_path):
    merge_(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()), expected)
    with pytest.raises(WeightsError, match="holds no compressed model"):
        load_pretrained(transformers.GPT2LMHeadModel, tmp_path)


def test_what_cannot_be_said_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"save_pretrained\(max_shard_size=…\)"):
        model.save_pretrained(tmp_path, max_shard_size="1GB")
    with pytest.raises(ConfigurationError, match="expected a class of Hugging Face models"):
        load_pretrained(torch.nn.Linear, tmp_path)
    assert not list(tmp_path.iterdir())

"""Tokens: which arguments are indices of what, and sequences that a model generates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import Budget, compress_
from lightning_compress.analysis import tokens as tokens_module
from lightning_compress.analysis.synthetic import synthesise
from lightning_compress.analysis.tokens import generated, generates, vocabularies

WORDS, LENGTH = 7, 12
EXAMPLE = torch.zeros(1, LENGTH, dtype=torch.int64)


class Markov(nn.Module):
    """The next token by the one before alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits)

    def forward(self, tokens):
        return self.table(tokens)


class Language(nn.Module):
    """A recurrent network that looks back, with more arguments than tokens."""

    def __init__(self, *, both_ways: bool = False, rows: int = WORDS, heads: int = WORDS) -> None:
        super().__init__()
        self.words, self.types, self.places = nn.Embedding(rows, 8), nn.Embedding(2, 8), nn.Embedding(LENGTH, 8)
        self.gru = nn.GRU(8, 16, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(32 if both_ways else 16, heads)

    def forward(self, tokens, types=None, places=None, mask=None):
        x = self.words(tokens)
        x = x if types is None else x + self.types(types)
        x = x if places is None else x + self.places(places)
        x = x if mask is None else x * mask[..., None]
        return {"logits": self.head(self.gru(x)[0])}


def whole(*shape: int, top: int = 1) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64) + (top - 1)


def test_arguments_are_indices_of_the_table_that_they_enter():
    kwargs = {"tokens": whole(1, LENGTH), "types": whole(1, LENGTH), "mask": whole(1, LENGTH, top=2)}
    assert list(vocabularies(Language(), ((), kwargs)).values()) == [WORDS, 2]


def test_positions_stay_as_they_are():
    kwargs = {"tokens": whole(1, LENGTH), "places": torch.arange(LENGTH)[None]}
    found = vocabularies(Language(), ((), kwargs))
    assert list(found.values()) == [WORDS]
    made = synthesise(Language(), kwargs, count=4)
    assert (made.batches[0][1]["places"] == torch.arange(LENGTH)).all()


def test_tokens_that_count_upwards_are_tokens_where_there_is_nothing_else():
    assert vocabularies(Language(), ((torch.arange(6)[None],), {})) == {0: WORDS}


def test_indices_that_are_copied_first_are_of_the_first_table():
    class Copying(Language):
        def forward(self, tokens):
            return super().forward(tokens + 0)

    assert vocabularies(Copying(), ((EXAMPLE,), {})) == {0: WORDS}


@pytest.mark.parametrize("example", [torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)])
def test_other_arguments_are_no_indices(example):
    assert vocabularies(nn.Sequential(nn.Identity()), ((example,), {})) == {}


def test_masks_are_not_drawn_and_types_stay_within_their_table():
    example = {"tokens": whole(1, LENGTH), "types": whole(1, LENGTH), "mask": whole(1, LENGTH, top=2)}
    made = synthesise(Language(both_ways=True), example, count=32)
    (_, kwargs), *_ = made.batches
    assert made.source == "tokens"
    assert set(kwargs["tokens"].unique().tolist()) == set(range(WORDS))
    assert set(kwargs["types"].unique().tolist()) == {0, 1}
    assert (kwargs["mask"] == 1).all()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Language, True),
        (lambda: Language(both_ways=True), False),
        (lambda: Language(heads=2), False),
        (lambda: Language(rows=40, heads=38), True),
        (lambda: Language(heads=WORDS + 1), False),
        (lambda: nn.Sequential(nn.Embedding(WORDS, 4), nn.Flatten(), nn.Linear(4 * LENGTH, WORDS)), False),
    ],
    ids=["causal", "both ways", "few classes", "padded table", "more logits", "one output"],
)
def test_causal_language_models_are_told_from_others(model, expected):
    model = model().eval()
    batch = ((torch.randint(WORDS, (4, LENGTH)),), {})
    assert generates(model, batch, vocabularies(model, batch)) is expected


def test_sequences_follow_the_models_probabilities():
    logits = torch.randn(WORDS, WORDS)
    batch = ((torch.randint(WORDS, (256, 64)),), {})
    ((tokens,), _) = generated(Markov(logits), batch, {0: WORDS}, 63, 0)
    counts = torch.zeros(WORDS, WORDS)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.ones(256 * 63), accumulate=True)
    found = counts / counts.sum(dim=1, keepdim=True)
    assert float((found - logits.softmax(dim=1)).abs().max()) < 0.05
    assert torch.equal(tokens[:, 0], batch[0][0][:, 0])


def test_enough_passes_are_ordinary_sampling_with_the_same_random_numbers():
    model = Language().eval()
    batch = ((torch.randint(WORDS, (4, LENGTH)),), {})
    ((tokens,), _) = generated(model, batch, {0: WORDS}, LENGTH - 1, 3)
    ((again,), _) = generated(model, ((tokens,), {}), {0: WORDS}, 1, 3)
    assert torch.equal(tokens, again)
    ((other,), _) = generated(model, batch, {0: WORDS}, LENGTH - 1, 4)
    assert not torch.equal(tokens, other)


def test_large_vocabularies_are_sampled_in_parts(monkeypatch):
    model, sizes = Language().eval(), []
    monkeypatch.setattr(tokens_module, "NUMBERS", 2 * LENGTH * WORDS)
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ((tokens,), _) = generated(model, ((torch.randint(WORDS, (5, LENGTH)),), {}), {0: WORDS}, 2, 0)
    assert tokens.shape == (5, LENGTH)
    assert sizes == [2, 2, 2, 2, 1, 1]


def test_logits_that_are_not_finite_generate_nothing():
    model = Markov(torch.full((WORDS, WORDS), torch.nan))
    assert generated(model, ((EXAMPLE.expand(2, -1),), {}), {0: WORDS}, 3, 0) is None


def test_inputs_of_a_language_model_are_its_own_sequences():
    logits = torch.full((WORDS, WORDS), -20.0)
    logits[torch.arange(WORDS), (torch.arange(WORDS) + 1) % WORDS] = 20.0  # always the next one
    made = synthesise(Markov(logits), EXAMPLE, count=20)
    assert made.source == "generated"
    for (tokens,), _ in (*made.batches, *made.judging):
        assert (tokens.diff(dim=1) % WORDS == 1).all()


def test_tokens_are_drawn_where_generating_them_is_too_dear(try_only):
    try_only(work=1)
    assert synthesise(Language(), EXAMPLE, count=4).source == "tokens"


def test_plan_says_that_inputs_were_generated():
    model = nn.Sequential(nn.Embedding(WORDS, 24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, WORDS))
    plan = compress_(model, Budget(params=0.8), example_input=EXAMPLE, target=None)
    assert plan.source == "generated"
    assert " generated" in str(plan)

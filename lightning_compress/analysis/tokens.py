"""Token inputs: which arguments are looked up in which tables, and sequences that a language model itself generates.

A model that returns the next token's logits at every place, and sees no later ones, says what its inputs look like.
Sequences are sampled from it at all places at once, again and again with the same random numbers: after n passes the
first n tokens are those of ordinary sampling, and the others already have much of their surroundings (the Jacobi
iteration of Song et al. 2021, "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import Arguments, hooked, inference, input_of, output_tensors
from lightning_compress.core.compat import tree_flatten, tree_unflatten

PASSES = 32
"""Of the generation, at most: a GRU over 128 bytes gains little from more."""
FEWEST = 2
"""Fewer are not worth it."""
NUMBERS = 2**26
"""Logits at a time (256 MB)."""
PADDED = 0.9
"""Share of the rows of its table that a language model has a logit of at least: tables are padded."""


def vocabularies(model: nn.Module, example: Arguments) -> dict[int, int]:
    """Returns the sizes of the tables in which arguments are looked up, by their places among the leaves.

    Arguments that count upwards beside others are left out: they are positions. Where no argument is seen to enter an
    `nn.Embedding` as it is, all whole numbers are taken for indices of the first one.

    Args:
        model: Any module that runs on the example.
        example: Arguments of its forward pass.
    """
    leaves, _ = tree_flatten(example)
    whole = {place: leaf for place, leaf in enumerate(leaves) if _is_indices(leaf)}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not whole or not tables:
        return {}
    found: dict[int, int] = {}

    def note(table: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entered = input_of(args, kwargs)
        for place, leaf in whole.items():
            if entered.data_ptr() == leaf.data_ptr() and entered.numel() == leaf.numel():
                size = cast(nn.Embedding, table).num_embeddings
                found[place] = min(size, found.get(place, size))

    with hooked(table.register_forward_pre_hook(note, with_kwargs=True) for table in tables), inference(model):
        model(*example[0], **example[1])
    if not found:
        return dict.fromkeys(whole, tables[0].num_embeddings)
    others = {place: size for place, size in found.items() if not _counts_upwards(whole[place])}
    return others or found


def generates(model: nn.Module, batch: Arguments, tables: Mapping[int, int]) -> bool:
    """Returns whether a model is a causal language model: it returns logits of the next token, and sees no later ones.

    Args:
        model: Any module.
        batch: As it was drawn.
        tables: See `vocabularies`.
    """
    place = _place_of_tokens(batch, tables)
    return place is not None and _is_causal(model, batch, place, tables[place])


def generated(
    model: nn.Module, batch: Arguments, tables: Mapping[int, int], passes: int, seed: int
) -> Arguments | None:
    """Returns a batch whose tokens the model has generated, None if its logits are not finite.

    Args:
        model: One that `generates`.
        batch: As it was drawn; the first token of each sequence stays.
        tables: See `vocabularies`.
        passes: Of the generation.
        seed: Of everything random.
    """
    place = cast(int, _place_of_tokens(batch, tables))
    leaves, spec = tree_flatten(batch)
    tokens: Tensor = leaves[place]
    size = max(1, NUMBERS // (tokens.shape[1] * tables[place]))
    done = []
    for start in range(0, len(tokens), size):
        part = _rows(leaves, slice(start, start + size), len(tokens))
        for _ in range(min(passes, tokens.shape[1] - 1)):
            logits = _logits(model, tree_unflatten(part, spec), place, tables[place])
            if logits is None or not bool(torch.isfinite(logits).all()):
                return None
            sampled = _sampled(logits[:, :-1], seed + start)
            part[place] = torch.cat([part[place][:, :1], sampled.to(part[place])], dim=1)
        done.append(part[place])
    leaves[place] = torch.cat(done)
    return cast(Arguments, tree_unflatten(leaves, spec))


def _is_indices(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.dtype in {torch.int32, torch.int64}


def _counts_upwards(leaf: Tensor) -> bool:
    return leaf.shape[-1] > 1 and bool((leaf.diff(dim=-1) == 1).all())


def _place_of_tokens(batch: Arguments, tables: Mapping[int, int]) -> int | None:
    """Returns the place of the one argument that holds sequences of tokens, (B, T); None if there is no such one."""
    leaves, _ = tree_flatten(batch)
    largest = [place for place, size in tables.items() if size == max(tables.values())]
    if len(largest) != 1 or leaves[largest[0]].ndim != 2 or leaves[largest[0]].shape[1] < 2:  # noqa: PLR2004
        return None
    return largest[0]


def _logits(model: nn.Module, batch: Arguments, place: int, table: int) -> Tensor | None:
    """Returns the logits of the next tokens, (B, T, tokens); None if no output looks like them."""
    tokens: Tensor = tree_flatten(batch)[0][place]
    with inference(model):
        outputs = output_tensors(model(*batch[0], **batch[1]))
    for output in outputs:
        if output.shape[:-1] == tokens.shape and PADDED * table <= output.shape[-1] <= table:
            return output
    return None


def _is_causal(model: nn.Module, batch: Arguments, place: int, table: int) -> bool:
    """Returns whether the logits at each place are those of the same sequence with another last token."""
    leaves, spec = tree_flatten(batch)
    few = _rows(leaves, slice(2), len(leaves[place]))
    other = list(few)
    other[place] = few[place].clone()
    other[place][:, -1] = (other[place][:, -1] + 1) % table
    one, two = (_logits(model, tree_unflatten(each, spec), place, table) for each in (few, other))
    if one is None or two is None:
        return False
    scale = float(one.float().square().mean().sqrt())
    return bool((one[:, :-1].float() - two[:, :-1].float()).abs().max() <= 1e-3 * max(scale, 1e-12))


def _sampled(logits: Tensor, seed: int) -> Tensor:
    """Returns tokens sampled by logits (B, T, tokens), with the same random numbers under the same seed."""
    generator = torch.Generator().manual_seed(seed)
    races = torch.empty(logits.shape).exponential_(generator=generator).log_().to(logits.device)
    return (logits.float() - races).argmax(dim=-1)


def _rows(leaves: Sequence[Any], rows: slice, count: int) -> list[Any]:
    """Returns leaves with some of `count` samples; those that hold no samples as they are."""
    return [leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else leaf for leaf in leaves]

"""Optimizers of a model that was factorised outside of a fit."""

from __future__ import annotations

from lightning_compress.training.optimizers import exchange_parameters_, exchanges_of


def patch_optimizers_(optimizers, replacements) -> None:
    exchange_parameters_(optimizers, exchanges_of(replacements))

"""A later round of compression: factors multiplied out, searched again on the trained weights, exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_compress.compress import Compression
from lightning_compress.core.plan import Plan
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.merge import Merged, merge_layers_
from lightning_compress.surgery.swap import Replacement, apply_shells_, uninstall
from lightning_compress.training.optimizers import Exchange, dense_weight, exchanges_of, factor_weights


@dataclass(frozen=True)
class Round:
    """What was done to a model.

    Attributes:
        done: The compression of the merged model.
        merged: What the layers were before.
        exchanges: For `exchange_parameters_`.
    """

    done: Compression
    merged: Merged
    exchanges: tuple[Exchange, ...]

    def undo_(self, model: nn.Module) -> None:
        """Puts back the layers that the round began with, and everything else as it was before the repair."""
        self.done.undo_(model)
        self.merged.undo_(model)


def compress_again_(model: nn.Module, compress: Callable[[nn.Module], Compression]) -> Round:
    """Multiplies the factors out and compresses the dense model they make, in place.

    The merged model has the architecture and so the costs of the original dense one: fractions of
    the one are fractions of the other.

    Args:
        model: A model with factorised layers.
        compress: Compresses a dense model in place.

    Raises:
        LightningCompressError: As `compress` does; the model is then as it was, factors and all.
    """
    merged = merge_layers_(model)
    try:
        done = compress(model)
    except BaseException:
        merged.undo_(model)
        raise
    return Round(done, merged, tuple(exchanges_between(merged, done.replacements)))


def exchanges_between(merged: Merged, replacements: Sequence[Replacement]) -> list[Exchange]:
    """Returns what becomes of the Parameters of all layers that were factorised before or are now.

    Optimizers may hold the factors of before, or the dense weights in between.
    """
    before = {r.aliases[0]: r for r in merged.replacements}
    after = {r.aliases[0]: r for r in replacements}
    exchanges = exchanges_of([r for name, r in after.items() if name not in before])
    for name, was in before.items():
        new = after.get(name)
        dense = dense_weight(was.dense)
        old = factor_weights(was.factorised)
        last = _bias_name(was.factorised)
        if new is None:
            exchanges.append(Exchange(name, old, dense, was.factorised.bias, ("bias", last)))
            continue
        names = sorted({last, _bias_name(new.factorised), "bias"}, key=len, reverse=True)
        exchanges.append(
            Exchange(
                name,
                (*old, *dense),
                factor_weights(new.factorised),
                was.factorised.bias,
                (_bias_name(new.factorised), *names),
            )
        )
    return exchanges


@dataclass(frozen=True)
class Rebuilt:
    """How a model was given the structure of a plan.

    Attributes:
        replacements: What was replaced by what, dense layers by shells.
        exchanges: What that means for optimizers.
        merged: What the layers were before if the model was factorised in another way.
    """

    replacements: tuple[Replacement, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    merged: Merged | None = None

    def undo_(self, model: nn.Module) -> None:
        """Puts back the layers that were there."""
        uninstall(model, self.replacements)
        if self.merged is not None:
            self.merged.undo_(model)


def reconcile_(model: nn.Module, plan: Plan) -> Rebuilt:
    """Gives a model the structure of a plan, with factors of zeros, whatever structure it has.

    A model that is factorised in another way, as in an earlier or later round, becomes dense first. One that is
    already factorised as planned stays as it is.

    Raises:
        PlanError: If the plan does not fit the model; it is then as it was.
    """
    if not any(isinstance(module, FactorisedLayer) for module in model.modules()) or _embodies(model, plan):
        replacements = apply_shells_(model, plan)
        return Rebuilt(replacements, tuple(exchanges_of(replacements)))
    merged = merge_layers_(model)
    try:
        replacements = apply_shells_(model, plan)
    except BaseException:
        merged.undo_(model)
        raise
    return Rebuilt(replacements, tuple(exchanges_between(merged, replacements)), merged)


def has_factors(model: nn.Module) -> bool:
    """Returns whether any layer of a model is factorised."""
    return any(isinstance(module, FactorisedLayer) for module in model.modules())


def make_dense_(model: nn.Module) -> Rebuilt:
    """Makes a model dense if it is not."""
    if not has_factors(model):
        return Rebuilt()
    merged = merge_layers_(model)
    return Rebuilt((), tuple(exchanges_between(merged, ())), merged)


def _embodies(model: nn.Module, plan: Plan) -> bool:
    """Returns whether exactly the planned layers are factorised, as planned."""
    own, wanted = (
        {(p.name, p.kind, p.ranks, p.joint_with) for p in each.factorised} for each in (embodied_plan(model), plan)
    )
    return own == wanted


def _bias_name(layer: FactorisedLayer) -> str:
    return f"{list(layer.factors())[-1]}.bias"

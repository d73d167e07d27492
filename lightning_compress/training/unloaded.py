"""Factors that a checkpoint does not hold: fitted to the dense weights that the module was built with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_compress.core.errors import CompressionWarning, ResumeError
from lightning_compress.kinds.base import threads_for
from lightning_compress.kinds.joint_svd import joint_factors
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.layers.families import canonical, canonical_factors
from lightning_compress.surgery.swap import Replacement

_MOST_NAMED = 5


class Shells:
    """Layers whose factors are zeros until weights are loaded into them.

    Args:
        replacements: The shells with the dense layers that they stand for.
    """

    def __init__(self, replacements: Iterable[Replacement]) -> None:
        self._replacements = tuple(replacements)
        factors = (factor for r in self._replacements for factor in r.factorised.factors().values())
        self._empty = {id(factor): (factor, factor._version) for factor in factors}

    def fit_unloaded_(self) -> None:
        """Fits the factors that nothing was loaded into, and says of which layers they are.

        Raises:
            ResumeError: If some factors of a layer were loaded and the others do not follow from them.
        """
        missing = {r.aliases[0]: self._missing(r.factorised) for r in self._replacements}
        unloaded = [r for r in self._replacements if missing[r.aliases[0]]]
        for group in _sharing(self._replacements):
            if self._missing(group[0].factorised)[:1] == [next(iter(group[0].factorised.factors()))]:
                loaded = [r for r in group if len(missing[r.aliases[0]]) == 1]
                _fit_shared_(loaded or group, all_of_it=not loaded)
        for replacement in unloaded:
            still = self._missing(replacement.factorised)
            if still:
                _fit_(replacement, still)
        if unloaded:
            _tell(unloaded)

    def _missing(self, layer: FactorisedLayer) -> list[str]:
        """Returns the names of the factors that nothing was written into."""
        return [
            name
            for name, factor in layer.factors().items()
            if id(factor) in self._empty and factor._version == self._empty[id(factor)][1]
        ]


def _tell(unloaded: Sequence[Replacement]) -> None:
    named = [f"{r.aliases[0]} ({r.factorised.kind}, ranks {r.factorised.ranks})" for r in unloaded]
    more = f" … ({len(named)} layers)" if len(named) > _MOST_NAMED else ""
    msg = (
        f"the checkpoint does not hold all factors of {', '.join(named[:_MOST_NAMED])}{more}: they are decomposed from "
        "the dense weights that the module was built with. What the fit that saved it had done to them, by healing or "
        "training, is not in them: save them too to have it back."
    )
    rank_zero_warn(msg, category=CompressionWarning, stacklevel=6)


def _sharing(replacements: Sequence[Replacement]) -> list[list[Replacement]]:
    """Returns the layers that have their first factor in common."""
    groups: dict[int, list[Replacement]] = {}
    for replacement in replacements:
        if replacement.factorised.shares_first:
            groups.setdefault(id(next(iter(replacement.factorised.factors().values()))), []).append(replacement)
    return list(groups.values())


def _fit_shared_(group: Sequence[Replacement], *, all_of_it: bool) -> None:
    """Fits the first factor of some layers, and their last ones too unless those were loaded."""
    weights = [_dense_matrix(r) for r in group]
    first, last = group[0].factorised.factors()
    with threads_for(weights[0]):
        if all_of_it:
            reduce, expand = joint_factors(weights, [None] * len(group), group[0].factorised.ranks[0])
        else:
            expand = [_matrices(r.factorised)[last] for r in group]
            sizes = [weight.norm().clamp_min(torch.finfo(weight.dtype).tiny) for weight in weights]  # as joint_factors
            both = [torch.cat([m / size for m, size in zip(of, sizes, strict=True)]) for of in (expand, weights)]
            reduce = _solved(*both)
    for replacement, own in zip(group, expand, strict=True):
        replacement.factorised.load_factors({first: reduce, last: own})


def _fit_(replacement: Replacement, missing: Sequence[str]) -> None:
    """Fits the missing factors of a layer, given the others."""
    layer = replacement.factorised
    if len(missing) == len(layer) or (layer.shares_first and missing == [list(layer.factors())[-1]]):
        layer.set_weight_(_weight_of(replacement))
        return
    if layer.kind != "svd" or layer.operator.groups > 1:
        msg = (
            f"the checkpoint holds some factors of layer {replacement.aliases[0]!r} ({layer.kind}) and lacks "
            f"{', '.join(missing)}, which do not follow from the others: save all factors of a layer or none."
        )
        raise ResumeError(msg)
    weight, kept = _dense_matrix(replacement), _matrices(layer)
    first, last = kept
    with threads_for(weight):
        if missing == [last]:
            kept[last] = _solved(kept[first].T, weight.T).T
        else:
            kept[first] = _solved(kept[last], weight)
    layer.load_factors(kept)


def _solved(matrix: Tensor, wanted: Tensor) -> Tensor:
    """Returns the X for which ‖matrix X − wanted‖ is least."""
    solution: Tensor = torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution
    return solution


def _dense_matrix(replacement: Replacement) -> Tensor:
    whole = canonical(replacement.factorised.template, _weight_of(replacement)).detach()
    return whole.to("cpu", torch.float64).flatten(1)


def _matrices(layer: FactorisedLayer) -> dict[str, Tensor]:
    found: Mapping[str, Tensor] = canonical_factors(dict(layer.named_children()))
    return {name: factor.detach().to("cpu", torch.float64).flatten(1) for name, factor in found.items()}


def _weight_of(replacement: Replacement) -> Tensor:
    return cast(Tensor, replacement.dense.weight)

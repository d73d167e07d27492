"""Hands the factors to optimizers that were built for the dense weights.

Param groups are patched in place: groups, hyper-parameters and order stay, so that schedulers,
closures and aliases keep working. Adding groups or building the optimizers again would break
several schedulers (LambdaLR, OneCycleLR, ReduceLROnPlateau) or leave prebuilt optimizers stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from lightning_compress.errors import OrphanParameterError, UnsupportedError
from lightning_compress.swap import Replacement

_MATRIX_ONLY = "Muon"
_SHARDED = "ZeroRedundancyOptimizer"


def require_patchable(optimizers: Iterable[Optimizer], replacements: Sequence[Replacement]) -> None:
    """Checks that every optimizer can take over the factors of the weights it holds.

    Raises:
        UnsupportedError: If an optimizer shards its parameters, or accepts matrices only and
            some factor it would receive is none.
    """
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        factors = [f for r in replacements if id(r.dense.weight) in held for f in factor_parameters(r)]
        matrices_only = all(factor.ndim == 2 for factor in factors)  # noqa: PLR2004
        name = type(optimizer).__name__
        if name == _SHARDED:
            msg = f"{name} keeps its own parameter shards and cannot take over factors: use a plain optimizer."
            raise UnsupportedError(msg)
        if name == _MATRIX_ONLY and not matrices_only:
            msg = (
                f"{name} trains matrices only and some factors are 4-D convolution weights: exclude the convolutions "
                "(exclude='Conv2d') or train with another optimizer."
            )
            raise UnsupportedError(msg)


def patch_optimizers_(optimizers: Sequence[Optimizer], replacements: Sequence[Replacement]) -> None:
    """Puts the factors in place of their dense weights, in every param group of every optimizer.

    The state of a replaced weight is dropped, that of all other parameters kept; `param_names`
    follow. Biases are the same Parameters as before and need nothing.

    Raises:
        UnsupportedError: If an optimizer cannot take over factors; nothing is changed then.
        OrphanParameterError: If a factor did not reach the optimizer that held its weight.
    """
    require_patchable(optimizers, replacements)
    by_weight: dict[int, Replacement] = {}
    for replacement in replacements:
        by_weight.setdefault(id(replacement.dense.weight), replacement)  # layers of one weight have the same factors
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    for optimizer in optimizers:
        seen: set[int] = set()
        for group in optimizer.param_groups:
            _patch_group(group, by_weight, seen)
        for replacement in replacements:
            optimizer.state.pop(cast(nn.Parameter, replacement.dense.weight), None)
        if hasattr(optimizer, "_numel_cache"):  # LBFGS counts its parameters once
            optimizer._numel_cache = None
    _require_no_orphans(optimizers, held, replacements)


def factor_parameters(replacement: Replacement) -> list[nn.Parameter]:
    """Returns the factors' weights of one replaced layer, in forward order."""
    return [cast(nn.Parameter, factor) for factor in replacement.factorised.factors().values()]


def optimizer_layout(optimizers: Sequence[Optimizer], model: nn.Module) -> list[dict[str, Any]]:
    """Returns class and parameter names by group of each optimizer; "?" for one the model lacks."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {
            "type": type(optimizer).__name__,
            "groups": [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups],
        }
        for optimizer in optimizers
    ]


def _patch_group(group: dict[str, Any], by_weight: Mapping[int, Replacement], seen: set[int]) -> None:
    """Replaces the weights in one group; `seen` holds the factors some group of the optimizer has."""
    old_names: list[str | None] = list(group.get("param_names", [None] * len(group["params"])))
    params: list[nn.Parameter] = []
    names: list[str | None] = []
    biases = {id(bias): r for r in by_weight.values() if (bias := getattr(r.dense, "bias", None)) is not None}
    for parameter, name in zip(group["params"], old_names, strict=True):
        replacement = by_weight.get(id(parameter))
        if replacement is None:
            params.append(parameter)
            owner = biases.get(id(parameter))
            names.append(_renamed(name, "bias", _last(owner)) if owner is not None else name)
            continue
        for child, factor in zip(replacement.factorised.factors(), factor_parameters(replacement), strict=True):
            if id(factor) not in seen:  # layers may share a factor
                params.append(factor)
                names.append(_renamed(name, "weight", child))
                seen.add(id(factor))
    group["params"][:] = params  # the same list object: LBFGS and others hold an alias of it
    if "param_names" in group:
        group["param_names"][:] = names


def _last(replacement: Replacement) -> str:
    return list(replacement.factorised.factors())[-1]


def _renamed(name: str | None, leaf: str, child: str) -> str | None:
    return f"{name.removesuffix(leaf)}{child}.{leaf}" if name is not None else None


def _require_no_orphans(
    optimizers: Sequence[Optimizer], held: Sequence[set[int]], replacements: Sequence[Replacement]
) -> None:
    for optimizer, before in zip(optimizers, held, strict=True):
        now = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for replacement in replacements:
            name = replacement.aliases[0]
            if id(replacement.dense.weight) in now:
                msg = f"{type(optimizer).__name__} still holds the dense weight of {name!r}, which the model lost."
                raise OrphanParameterError(msg)
            if id(replacement.dense.weight) in before and not all(id(f) in now for f in factor_parameters(replacement)):
                msg = f"a factor of {name!r} did not reach {type(optimizer).__name__} and would never be trained."
                raise OrphanParameterError(msg)

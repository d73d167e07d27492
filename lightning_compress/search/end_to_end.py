"""The continuous search with the model's own outputs in its loss.

Every layer's weight becomes a mixture of its kinds, each gated by monotone soft gates over its ordered
components,

    W(ρ, z) = Σ_k softmax(z)_k B_k diag(g(ρ_k)) A_k,    g_i = σ((ρ − i + ½) / T),

and the composite compression loss

    L(ρ, z) = log D(f_{ρ,z}(x̃), f(x̃)) + Σ_l ε_l(ρ_l, z_l) + Σ_b [ λ_b v_b + (μ/2) max(0, v_b)² ]

is descended on synthetic inputs x̃ with D the normalised distance of the outputs, T annealed towards
hard gates, and λ the least-squares multipliers (Nocedal and Wright, "Numerical Optimization", equation
18.21). It starts from the exact optimum of the separable objective, and ends there if the outputs are nearer than
`NEGLIGIBLE`: log D would go on trading for what no real input shows. The projection onto whole ranks is
the exact solver's on the separable objective whose stationary point this is: that with every layer's
term weighted by w_l = 1 + (∂ log D / ∂ρ_l) / (∂ε_l / ∂ρ_l). The result is kept if its own L is below
that of the start.

Memory: inputs go through the model in small groups; their gradients by the mixed weights are summed
and sent back through the gates once. Extends arXiv 2409.03555 by the outputs and strict budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lightning_compress.analysis.distance import NEGLIGIBLE, squared_error
from lightning_compress.core.effort import current_effort
from lightning_compress.core.parallel import in_threads
from lightning_compress.core.plan import DENSE
from lightning_compress.kinds.base import Ints
from lightning_compress.kinds.registry import DECOMPOSITIONS, Operator, gated_weight
from lightning_compress.search.exact import solve
from lightning_compress.search.outputs import GROUP, OutputEvaluator, output_distance, outputs_with
from lightning_compress.search.problem import Problem
from lightning_compress.search.space import Space, around

LEARNING_RATE = 0.05
TEMPERATURES = (0.1, 0.01)
"""First and last T, as a fraction of a path's ranks."""
LEAST_TEMPERATURE = 0.25
"""In ranks."""
PENALTY = 20.0
NEAR = 0.05
"""Fraction of a bound within which it counts."""
RETRACTIONS = 3
REACH = 1.5
"""Ranks are searched up to this factor above and below the start."""
START_LOGIT = 3.0
LARGEST_LOGIT = 10.0
WINDOW = 8
WEIGHTS = (0.2, 5.0)
"""Bounds of w_l."""


def search_outputs(problem: Problem, outputs: OutputEvaluator, start: Ints, progress: Callable[[float], None]) -> Ints:
    """Returns the choice that the composite loss leads to, or the start if that is better or loses next to nothing.

    Args:
        problem: The separable problem.
        outputs: Of the model.
        start: A choice that keeps every budget.
        progress: Called with the fraction done.

    Raises:
        RuntimeError: If the model cannot be differentiated.
    """
    if output_distance(outputs, problem, start) < NEGLIGIBLE:
        return start
    with torch.inference_mode(mode=False), torch.enable_grad():  # whatever the caller is in
        paths = _Paths.of(problem, outputs, start)
        log_sizes, weights = _descend(paths, outputs, progress)
    rows = around(paths.space, log_sizes, WINDOW)
    rows = [np.union1d(kept, [row]).astype(np.int64) for kept, row in zip(rows, start, strict=True)]
    weighted = replace(problem.restricted(rows), weights=tuple(float(w) for w in weights))
    local = solve(weighted).choice
    if local is None:
        return start
    choice = np.array([kept[row] for kept, row in zip(rows, local, strict=True)])
    if (choice == start).all():
        return start
    losses = [composite_loss(problem, outputs, candidate) for candidate in (start, choice)]
    return choice if losses[1] < losses[0] else start


def composite_loss(problem: Problem, outputs: OutputEvaluator, choice: Ints) -> float:
    """Returns log D + Σ_l ε_l of whole ranks, over all synthetic inputs."""
    return math.log(max(output_distance(outputs, problem, choice), 1e-12)) + problem.loss_of(choice)


@dataclass(frozen=True)
class _Paths:
    """The space around the start, and every path's factors.

    Attributes:
        space: Of the problem.
        start: Log-sizes, (P,).
        low: The smallest log-sizes, (P,).
        high: The largest, (P,).
        logits: Of the kinds at the start, (P,).
        factors: Of every path but the dense ones, up to its largest ranks.
    """

    space: Space
    start: Tensor
    low: Tensor
    high: Tensor
    logits: Tensor
    factors: tuple[dict[str, Tensor] | None, ...]

    @classmethod
    def of(cls, problem: Problem, outputs: OutputEvaluator, choice: Ints) -> _Paths:
        space = Space.of(problem)
        sizes = torch.from_numpy(
            np.array([(problem.costs(i)[row] / np.maximum(problem.limits, 1.0)).mean() for i, row in enumerate(choice)])
        )[space.layer_of]
        chosen = torch.tensor(
            [
                kind == problem.layers[int(i)].kinds[choice[int(i)]]
                for kind, i in zip(space.kinds, space.layer_of, strict=True)
            ]
        )
        least, most = space.sizes[:, 0].log(), space.sizes[:, -1].log()
        start = sizes.log().clamp(least, most)
        low, high = ((start + sign * math.log(REACH)).clamp(least, most) for sign in (-1, 1))
        ranks = space.at(high)[2]

        def factors_of(path: int) -> dict[str, Tensor] | None:
            kind, layer = space.kinds[path], int(space.layer_of[path])
            if kind == DENSE:
                return None
            limits = DECOMPOSITIONS[kind].max_ranks(outputs.units[layer].operator.shape)
            largest = tuple(min(m, math.ceil(r) + 1) for m, r in zip(limits, ranks[path].tolist(), strict=False))
            return outputs.factors(layer, kind, largest, draft=True)

        factors = in_threads(factors_of, range(len(space.kinds)))
        logits = START_LOGIT * chosen.double()
        dense = torch.tensor([kind == DENSE for kind in space.kinds])
        logits[dense & ~chosen] = -LARGEST_LOGIT  # as good as off: a share of the dense weight would hide all errors
        return cls(space, start, low, high, logits, tuple(factors))

    def weights(
        self, outputs: OutputEvaluator, ranks: Tensor, probability: Tensor, temperature: float
    ) -> dict[int, Tensor]:
        """Returns the mixed weight of every layer that has more than its dense path."""
        mixed: dict[int, Tensor] = {}
        for path, factors in enumerate(self.factors):
            layer = int(self.space.layer_of[path])
            unit = outputs.units[layer]
            if factors is not None:
                weight = _gated(self.space.kinds[path], factors, ranks[path], temperature, unit.operator)
            else:
                weight = unit.canonical_weight().detach()
            part = probability[path].to(weight.dtype) * weight
            mixed[layer] = mixed[layer] + part if layer in mixed else part
        return mixed


def _gated(kind: str, factors: dict[str, Tensor], ranks: Tensor, temperature: float, operator: Operator) -> Tensor:
    """Returns the canonical weight with soft gates on its components."""
    return gated_weight(kind, factors, operator, lambda rank, count: _gates(ranks[rank], count, temperature))


def _gates(rank: Tensor, count: int, temperature: float) -> Tensor:
    """Returns g_i = σ((ρ − i + ½) / T), (count,)."""
    scale = max(LEAST_TEMPERATURE, temperature * count)
    return torch.sigmoid((rank - torch.arange(1, count + 1, device=rank.device) + 0.5) / scale)


def _descend(paths: _Paths, outputs: OutputEvaluator, progress: Callable[[float], None]) -> tuple[Tensor, Tensor]:
    """Returns the log-sizes (P,) and the weight w_l of every layer's separable term (L,)."""
    space = paths.space
    log_sizes, logits = paths.start.clone().requires_grad_(), paths.logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([log_sizes, logits], lr=LEARNING_RATE, betas=(0.9, 0.99))
    slopes, separable_slopes = (torch.zeros(space.layers, dtype=log_sizes.dtype) for _ in range(2))
    steps = current_effort().descent_steps
    for step in range(steps):
        done = step / steps
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** done
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done) ** 0.5
        loss, cost, ranks = space.at(log_sizes)
        probability = space.softmax(logits)
        mixed = paths.weights(outputs, ranks, probability, temperature)
        by_weight = _gradient_of_log_distance(outputs, mixed, step)
        through = sum((mixed[layer] * gradient).sum() for layer, gradient in by_weight.items())
        separable, violation = (probability * loss).sum(), (probability[:, None] * cost).sum(dim=0) - 1
        variables = [log_sizes, logits]
        of_distance = _flat(through, variables)
        of_separable = _flat(separable, variables)
        of_cost = torch.stack([_flat(v, variables) for v in violation])  # (b, 2 P)
        objective = of_distance + of_separable
        of_cost = of_cost * (violation.detach() > -NEAR)[:, None]  # what is far from its bound has no multiplier
        normal = of_cost @ of_cost.T + 1e-12 * torch.eye(len(of_cost), dtype=of_cost.dtype)
        multipliers = torch.linalg.solve(normal, -(of_cost @ objective)).clamp_min(0)
        gradient = objective + (multipliers + PENALTY * violation.detach().clamp_min(0)) @ of_cost
        log_sizes.grad, logits.grad = gradient[: len(log_sizes)], gradient[len(log_sizes) :]
        optimizer.step()
        with torch.no_grad():
            for _ in range(RETRACTIONS):  # back onto the budgets: costs are nearly proportional to the sizes
                worst = (space.softmax(logits)[:, None] * space.at(log_sizes)[1]).sum(dim=0).amax()
                log_sizes.copy_(torch.minimum(torch.maximum(log_sizes - worst.log(), paths.low), paths.high))
            if done >= 0.5:  # noqa: PLR2004
                slopes.index_add_(0, space.layer_of, of_distance[: len(log_sizes)])
                separable_slopes.index_add_(0, space.layer_of, of_separable[: len(log_sizes)])
        progress(done)
    ratio = torch.where(separable_slopes < 0, slopes / separable_slopes.clamp_max(-1e-12), torch.zeros(()))
    weights = (1 + ratio).clamp(*WEIGHTS)
    return log_sizes.detach(), weights


def _flat(value: Tensor | int, variables: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(cast(Tensor, value), variables, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(v) if g is None else g for g, v in zip(gradients, variables, strict=True)])


def _gradient_of_log_distance(outputs: OutputEvaluator, mixed: dict[int, Tensor], step: int) -> dict[int, Tensor]:
    """Returns ∂ log D / ∂ W of every mixed weight, group by group."""
    leaves = {layer: weight.detach().requires_grad_() for layer, weight in mixed.items()}
    sums = {layer: torch.zeros_like(weight) for layer, weight in leaves.items()}
    lost = 0.0
    number = step % len(outputs.statistics.batches)
    for index, group in enumerate(outputs.groups(step)):
        targets = outputs.targets((number, GROUP, index), group)
        error = squared_error(outputs_with(outputs, leaves, group), targets)
        gradients = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
        lost += float(error.detach())
        for layer, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                sums[layer] += gradient
    return {layer: value / max(lost, 1e-30) for layer, value in sums.items()}

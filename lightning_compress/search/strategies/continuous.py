"""The default: a differentiable search over kinds and ranks in a continuous space.

Every layer carries one log-rank per kind and logits over its kinds (the dense layer among
them). Between two neighbouring ranks loss and cost are interpolated, so that the composite
compression loss

    L(ρ, z) = Σ_l ε_l(ρ_l, z_l) + Σ_b [ λ_b v_b + (μ/2) max(0, v_b)² ],
    v_b = C_b(ρ, z) / B_b − 1,

with ε = −log(1 − e) and the small term of `Problem` for what the layer writes, is differentiable in all
of them. The kinds' softmax is annealed to a hard choice, and the multipliers λ_b are raised by dual ascent
until the budgets are met (augmented Lagrangian; Nocedal and Wright, "Numerical Optimization", chapter 17).
The result is projected onto whole ranks: the best combination of candidates around the continuous solution
that keeps every budget, or the exact optimum where that is better: times go up and down with the ranks, as
processors work on blocks of channels, and a path that is convex in the ranks leads past them. The model's
outputs are added to this loss by `end_to_end`.

Extends the continuous rank search of arXiv 2409.03555 (its loss is a product without a budget)
by strict budgets and several kinds per layer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.progress import Progress
from lightning_compress.kinds.base import Ints
from lightning_compress.search.exact import smallest, solve
from lightning_compress.search.problem import Problem
from lightning_compress.search.space import Space, around
from lightning_compress.search.strategies.registry import register_strategy

STEPS = 300
LEARNING_RATE = 0.1
TEMPERATURES = (0.5, 0.01)
"""First and last temperature of the softmax over kinds; annealed geometrically."""
PENALTIES = (5.0, 100.0)
"""First and last μ, likewise."""
LEAST_SHARE = 0.05
LARGEST_LOGIT = 4.0
DUAL_RATE = 0.05
WINDOWS = (4, 16, 64)
"""Candidates on either side of the continuous ranks that the projection may use."""
SETTLED = 1e-3
"""The projection stops when a larger window lowers the objective by less than this fraction."""


@register_strategy("continuous", objectives=("weight", "moments", "end_to_end"), thorough=True)
def search_continuous(problem: Problem, *, progress: Progress) -> Ints:
    """Returns the projection of the continuous optimum of the composite loss."""
    with torch.inference_mode(mode=False), torch.enable_grad():  # whatever the caller is in
        space = Space.of(problem)
        log_sizes = _descend(space, progress)
    found, best = _project(problem, space, log_sizes), solve(problem).choice
    if best is None or problem.loss_of(found) <= problem.loss_of(best) * (1 + SETTLED):
        return found
    return best


def _project(problem: Problem, space: Space, log_sizes: Tensor) -> Ints:
    """Returns the best whole ranks around the continuous ones that keep every budget.

    The neighbourhood grows until a larger one no longer helps, or none is left.
    """
    best, loss = smallest(problem), np.inf
    for window in WINDOWS:
        rows = around(space, log_sizes, window)
        local = solve(problem.restricted(rows), rel_gap=SETTLED).choice
        if local is None:
            continue
        choice = np.array([kept[row] for kept, row in zip(rows, local, strict=True)])
        settled = problem.loss_of(choice) > loss * (1 - SETTLED)
        if problem.loss_of(choice) < loss:
            best, loss = choice, problem.loss_of(choice)
        if settled:
            break
    return best


def _descend(space: Space, progress: Progress) -> Tensor:
    """Returns the log-sizes (P,) that minimise the composite loss."""
    low, high = space.sizes[:, 0].log(), space.sizes[:, -1].log()
    log_sizes = ((low + high) / 2).requires_grad_()
    logits = torch.zeros_like(low).requires_grad_()
    multipliers = torch.zeros(space.costs.shape[2], dtype=low.dtype)
    optimizer = torch.optim.Adam([log_sizes, logits], lr=LEARNING_RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        done = step / STEPS
        temperature, penalty = (_anneal(*ends, done) for ends in (TEMPERATURES, PENALTIES))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done) ** 0.5
        loss, cost, _ = space.at(log_sizes)
        probability = space.softmax(logits)
        violation = (probability[:, None] * cost).sum(dim=0) - 1  # (b,)
        price = (multipliers + penalty * violation.clamp_min(0)).detach()
        value = loss + cost @ price  # (P,), the Lagrangian of each path
        entropy = -(probability * probability.clamp_min(1e-12).log()).sum()
        total = (probability * value.detach()).sum() - temperature * entropy
        total = total + (probability.detach().clamp_min(LEAST_SHARE) * value).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            multipliers = (multipliers + DUAL_RATE * penalty * violation.detach()).clamp_min(0)
            log_sizes.clamp_(low, high)
            logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
        if step % 20 == 0:
            progress("continuous rank search", done)
    progress("continuous rank search", 1.0)
    return log_sizes.detach()


def _anneal(first: float, last: float, done: float) -> float:
    return float(first * (last / first) ** done)

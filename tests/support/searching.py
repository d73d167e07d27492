"""Problems with a known optimum, and what plans are compared by."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from torch import nn

from lightning_compress import Plan, apply_plan_
from lightning_compress.analysis.inventory import take_inventory
from lightning_compress.analysis.statistics import Statistics
from lightning_compress.analysis.trace import trace
from lightning_compress.core.settings import RESOURCES
from lightning_compress.search.candidates import Candidates, tabulate
from lightning_compress.search.problem import TIME_WEIGHT, Problem

METHODS = ["continuous", "energy", "exact", "paper", "uniform"]
VECTOR = (1, 6)


def running_net(seed, width=12):
    """Layers of different spectra, for inputs (B, 3, 8, 8)."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, (5, 3), stride=(2, 1)),
        nn.BatchNorm2d(2 * width),
        nn.Conv2d(2 * width, width, 1),
        nn.Flatten(),
        nn.Linear(width * 2 * 6, 24),
        nn.Linear(24, 10),
    )
    # Spectra of different decay, as trained layers have
    with torch.no_grad():
        for index, layer in enumerate(m for m in net if hasattr(m, "weight") and m.weight.ndim > 1):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            decay = torch.exp(-torch.arange(len(s)) * (0.05 + 0.1 * ((index + seed) % 4)))
            layer.weight.copy_((u * s * decay @ v).view_as(layer.weight))
    return net


def table_of(layer, *, compared=("params",), example=None, metric=None, **selection):
    """The candidates of a layer that is alone in its model."""
    model = nn.Sequential(layer)
    (entry,) = take_inventory(model, trace=trace(model, example) if example else None, **selection)
    return tabulate(entry, compared=compared, metric=metric)


def candidates(name, costs, errors, seconds=None):
    """The last row is the dense layer."""
    costs = np.atleast_2d(np.asarray(costs, dtype=float).T).T
    columns = np.zeros((len(costs), len(RESOURCES)))
    columns[:, : costs.shape[1]] = costs
    rows = len(costs)
    kinds = ("svd",) * (rows - 1) + ("dense",)
    errors = np.asarray(errors, float)
    ranks = (*((r + 1,) for r in range(rows - 1)), ())
    if seconds is not None:
        columns[:, RESOURCES.index("latency")] = seconds
    return Candidates(name, kinds, ranks, errors, 1.0, columns)


def random_problem(seed, *, layers=5, rows=5, scale=1000, budgeted=("params",), keep=0.5, timing=None):
    rng = np.random.default_rng(seed)
    tables = []
    for index in range(layers):
        costs = np.sort(rng.integers(1, scale, size=(rows, len(budgeted))), axis=0)
        errors = np.append(np.sort(rng.random(rows - 1))[::-1], 0.0)
        seconds = np.append(np.random.default_rng((seed, index)).random(rows - 1), 0.0)
        tables.append(candidates(str(index), costs, errors, None if "latency" in budgeted else seconds))
    limits = np.floor(keep * np.sum([t.costs[-1, : len(budgeted)] for t in tables], axis=0))
    return Problem(tuple(tables), budgeted, limits, timing=timing)


def brute_force(problem):
    """The least objective of all choices that keep every budget, by enumeration; inf if none does."""
    columns = [RESOURCES.index(name) for name in problem.budgeted]
    choices = np.array(list(itertools.product(*(range(len(table)) for table in problem.layers))))
    cost = sum(table.costs[:, columns][choices[:, i]] for i, table in enumerate(problem.layers))
    loss = sum(-np.log1p(-np.minimum(t.errors, 1 - 1e-9))[choices[:, i]] for i, t in enumerate(problem.layers))
    seconds = sum(t.costs[:, RESOURCES.index("latency")][choices[:, i]] for i, t in enumerate(problem.layers))
    objective = loss if problem.timing is None else loss + TIME_WEIGHT / problem.timing.best * seconds
    return float(np.where((cost <= problem.limits).all(axis=1), objective, np.inf).min())


def mlp(*, wrap=None) -> nn.Module:
    """Four linear layers of inputs (B, 6), outputs (B, 5); `wrap` goes between the second and the third."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
        wrap or nn.Tanh(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 5),
    ).eval()


def ranks_of(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    return [(layer.kind, layer.ranks) for layer in plan.layers]


def distance_after(model: nn.Module, plan: Plan, statistics: Statistics) -> float:
    """D of the model with the plan applied, in float64 over all inputs at once."""
    compressed = copy.deepcopy(model)
    apply_plan_(compressed, plan, statistics=statistics)
    with torch.no_grad():
        pairs = [(model(*args, **kwargs), compressed(*args, **kwargs)) for args, kwargs in statistics.batches]
    target, output = (torch.cat(tensors).double() for tensors in zip(*pairs, strict=True))
    return float((target - output).square().sum() / (target - target.mean(dim=0)).square().sum())

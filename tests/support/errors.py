"""Errors of a weight in a metric, by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_compress import apply_plan_

BOUNDED = {"tucker2", "tt", "cp", "cp3"}
"""Kinds whose planned error is an upper bound of that of the fitted factors."""


def error_in(metric, weight, new) -> float:
    """‖G^½ (W − Ŵ) S^½‖² / ‖G^½ W S^½‖² by its traces, G with its share of the identity; ‖W − Ŵ‖² / ‖W‖² in None."""
    weight, lost = weight.detach().double().flatten(1), (new - weight).detach().double().flatten(1)
    inputs, outputs = (torch.eye(n, dtype=torch.float64) for n in (weight.shape[1], len(weight)))
    if metric is not None:
        inputs = metric.inputs
    if metric is not None and metric.outputs is not None:
        outputs = 0.95 * metric.outputs * len(weight) / metric.outputs.trace() + 0.05 * outputs
    kept, whole = (torch.einsum("ij,ik,kl,jl->", m, outputs, m, inputs) for m in (lost, weight))
    return float(kept / whole)


def planned_error(metric, weight, new) -> float:
    """Returns what a plan says of a layer of one group: what unseen inputs show where the fit loses `error_in`."""
    error = error_in(metric, weight, new)
    unseen = metric.unseen() if metric is not None else None
    return error if unseen is None else float(unseen.at(np.array([error]))[0])


def require_planned_errors(model, plan, statistics=None) -> None:
    """Applies the plan; the error of every layer must be the one of its factors, or be above it."""
    dense = {layer.name: model.get_submodule(layer.name).weight.detach().clone() for layer in plan.factorised}
    assert dense
    apply_plan_(model, plan, statistics=statistics)
    for layer in plan.factorised:
        metric = statistics.metric(layer.name) if statistics is not None else None
        error = planned_error(metric, dense[layer.name], model.get_submodule(layer.name).weight)
        if layer.kind in BOUNDED:
            assert error <= layer.error * 1.05 + 1e-5
        else:
            assert error == pytest.approx(layer.error, rel=1e-3, abs=1e-5)

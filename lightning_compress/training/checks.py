"""Whether settings of the callback fit together, and whether they fit a module that is factorised already."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.core.errors import BudgetError, ConfigurationError, UnsupportedError
from lightning_compress.core.fine_tuning import Distill, Schedule
from lightning_compress.core.plan import Plan, percent
from lightning_compress.core.settings import Budget
from lightning_compress.search.part import kept_of
from lightning_compress.surgery.embodied import embodied_plan


def check_schedule(schedule: Schedule, budget: Budget, distill: Distill | None) -> None:
    """Checks that a schedule ends at the budget, and that there is something to distil where it says so.

    Raises:
        ConfigurationError: If not.
    """
    for number, phase in enumerate(schedule.phases):
        if phase.distill and distill is None:
            msg = f"phase {number} of the schedule has distill=true: say what to distil, as in distill='logits'."
            raise ConfigurationError(msg)
    bounds = budget.bounds
    for last in schedule.budgets[-1:]:
        if (
            not bounds
            or last.of != budget.of
            or any(last.bounds.get(name, math.inf) > bound for name, bound in bounds.items())
        ):
            msg = f"the schedule ends at {last}, which does not keep the budget of the callback, {budget}."
            raise BudgetError(msg)


def plan_of_factorised(
    module: nn.Module, budget: Budget, distill: Distill | None, example_input: ExampleInput | None
) -> Plan:
    """Returns the plan that a module embodies, which is fine-tuned as it is, and says so.

    Args:
        module: A factorised module.
        budget: The budget; bounds on time are left out, as there is no dense model to measure them against.
        distill: What to distil, which needs a dense module.
        example_input: What MACs are counted on.

    Raises:
        UnsupportedError: If it does not keep the budget, or something is to be distilled.
        ExampleInputError: If it fails on the example input.
    """
    plan = embodied_plan(module, example_input)
    for resource in [name for name in budget.limits() if name != "latency"]:
        kept, limit = kept_of(plan, resource, budget.of), budget.limits()[resource]
        if kept is None or kept > limit:
            msg = (
                f"the module is already factorised with {percent(kept)} of its {resource} kept, the budget is "
                f"{budget}: start from the dense module to compress it further."
            )
            raise UnsupportedError(msg)
    if distill is not None:
        msg = "distill= needs the dense module as its teacher: the module given to fit is already factorised."
        raise UnsupportedError(msg)
    rank_zero_info(
        f"Compress: the module is already factorised ({percent(plan.kept['params'])} of its parameters kept); "
        "fine-tuning."
    )
    return plan

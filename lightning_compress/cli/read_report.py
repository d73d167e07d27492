"""A report read back from the folder it was saved to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_compress.cli.report import STAGES, Figures, Report, Round
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import PlanFormatError
from lightning_compress.core.plan import Plan
from lightning_compress.core.settings import Budget


def read_report(folder: str | Path) -> Report:
    """Returns the report in a folder.

    Args:
        folder: With report.json and plan.json, as `Report.save` wrote them.

    Raises:
        PlanFormatError: If one of the two is missing or damaged.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "report.json").read_text("utf-8"))
        plan = Plan.from_json((folder / "plan.json").read_text("utf-8"))
        dense, zero_shot, fine_tuned = (_figures(content[name]) for name in STAGES)
        asked = _budget(content.get("budget_asked", content["budget"]))
        rounds = [Round(_budget(each["budget"]), each["epochs"], _figures(each)) for each in content.get("rounds", ())]
        return Report(plan, dense, zero_shot, fine_tuned, content["seconds"], asked, rounds)
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"no whole report is in {str(folder)!r}: {error}. Run the job again."
        raise PlanFormatError(msg) from error


def _budget(limits: Mapping[str, Any]) -> Budget | None:
    return Budget(**limits) if limits else None


def _figures(content: Mapping[str, Any]) -> Figures:
    latency = content["latency_ms"]
    costs = Costs(**{name: content[name] for name in ("params", "macs", "bytes")})
    return Figures(costs, None if latency is None else latency / 1e3, content["throughput"], content["metrics"])

"""What a job is judged by: a metric of its test, or what it keeps of the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from omegaconf import OmegaConf

from lightning_compress.cli.report import Report
from lightning_compress.core.checks import did_you_mean
from lightning_compress.core.errors import ConfigurationError

KEPT = ("params", "macs", "bytes", "latency")
"""Names of kept fractions; less is better."""
_SMALLER_IS_BETTER = ("loss", "error", "mse", "mae", "rmse", "perplexity", "wer", "cer")


def objectives_of(report: Report, names: str | Sequence[str] | None) -> tuple[float, ...]:
    """Returns what a sweeper gets of a finished job, in the order of the names.

    Args:
        report: Of the job.
        names: `optimized_metric` of the configuration: metrics of the test, or params, macs, bytes or latency for the
            kept fraction; None for the main metric.

    Raises:
        ConfigurationError: If there is no such metric, or it was not measured.
    """
    metrics = report.fine_tuned.metrics
    if names is None:
        return (metrics[main_metric(metrics)],) if metrics else ()
    values = []
    for name in [names] if isinstance(names, str) else names:
        value = metrics[name] if name in metrics else report.kept[name] if name in KEPT else None
        if value is None or not math.isfinite(value):
            what = "was not measured" if value is None and name in KEPT else f"is {value}"
            known = did_you_mean(str(name), [*metrics, *KEPT])
            said = f"the test logs no such metric.{known}" if name not in (*metrics, *KEPT) else f"it {what}."
            msg = f"optimized_metric={name!r}: {said}"
            raise ConfigurationError(msg)
        values.append(float(value))
    return tuple(values)


def main_metric(metrics: Mapping[str, float] | Iterable[str]) -> str:
    """Returns the metric that people look at: an accuracy, else the first that is no loss, else the first."""
    names = list(metrics)
    if not names:
        msg = "the test logs no metric: let test_step log one, as in self.log('accuracy', …)."
        raise ConfigurationError(msg)
    accuracies = [name for name in names if "acc" in name.lower()]
    others = [name for name in names if not is_smaller_better(name)]
    return [*accuracies, *others, *names][0]


def is_smaller_better(name: str) -> bool:
    """Returns whether a metric of this name is better where it is smaller."""
    parts = name.lower().replace("/", "_").split("_")
    return name in KEPT or any(word in parts for word in _SMALLER_IS_BETTER)


def names_of(setting: object) -> list[str]:
    """Returns the names in `optimized_metric`."""
    if setting is None:
        return []
    return [setting] if isinstance(setting, str) else [str(name) for name in OmegaConf.to_object(setting)]  # type: ignore[union-attr]

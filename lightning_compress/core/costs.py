"""What a model costs, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_compress.core.checks import is_count, is_number, shown
from lightning_compress.core.errors import ConfigurationError


@dataclass(frozen=True)
class Costs:
    """Costs of a whole model.

    Attributes:
        params: Number of parameters, each tied one counted once.
        macs: Multiply-accumulates at batch 1, None where no forward pass was possible.
        bytes: Size of parameters and persistent buffers, which the state dict holds.
        latency: Seconds of one forward pass on the target, None where it was not measured; not compared, as no
            time is the same twice.

    Raises:
        ConfigurationError: If a count is no whole number of at least 0, or a time no number of at least 0.
    """

    params: int
    macs: int | None
    bytes: int
    latency: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("params", "macs", "bytes"):
            value = getattr(self, name)
            if not is_count(value) and not (name == "macs" and value is None):
                msg = f"Costs({name}={shown(value)}): expected a whole number of at least 0."
                raise ConfigurationError(msg)
        if self.latency is not None and not (is_number(self.latency) and self.latency >= 0):
            msg = f"Costs(latency={shown(self.latency)}): expected seconds, a number of at least 0."
            raise ConfigurationError(msg)

    def kept_of(self, dense: Costs) -> dict[str, float | None]:
        """Returns the fraction of each dense cost that is kept."""
        macs = self.macs / dense.macs if self.macs is not None and dense.macs else None
        latency = self.latency / dense.latency if self.latency is not None and dense.latency else None
        return {
            "params": self.params / dense.params if dense.params else None,
            "macs": macs,
            "bytes": self.bytes / dense.bytes if dense.bytes else None,
            "latency": latency,
        }

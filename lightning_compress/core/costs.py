"""What a model costs, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Costs:
    """Costs of a whole model.

    Attributes:
        params: Number of parameters, each tied one counted once.
        macs: Multiply-accumulates at batch 1, None where no forward pass was possible.
        bytes: Size of parameters and persistent buffers, which the state dict holds.
        latency: Seconds of one forward pass on the target, None where it was not measured; not compared, as no
            time is the same twice.
    """

    params: int
    macs: int | None
    bytes: int
    latency: float | None = field(default=None, compare=False)

    def kept_of(self, dense: Costs) -> dict[str, float | None]:
        """Returns the fraction of each dense cost that is kept."""
        macs = self.macs / dense.macs if self.macs is not None and dense.macs else None
        latency = self.latency / dense.latency if self.latency is not None and dense.latency else None
        return {
            "params": self.params / dense.params,
            "macs": macs,
            "bytes": self.bytes / dense.bytes,
            "latency": latency,
        }

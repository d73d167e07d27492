"""Time and optimality of the rank search on the two reference networks, on the weights alone.

python -m benchmarks.search

The signal loss is Σ −log(1 − e) over the relative errors e of the weights. Gap and seconds are those of the continuous
search: the gap is that to the lower bound of the exact optimum, seconds are the median of three runs. Uniform ranks and
one energy threshold for all layers are the usual choices.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.common import IMAGE, NETWORKS, publish, reference
from lightning_compress import Budget, search_ranks
from lightning_compress.search.strategies import STRATEGIES

KEEP = (0.5, 0.3, 0.2, 0.1)
REPEATS = 3


def main() -> None:
    """Prints one row per network, budget and strategy; seconds are the median of the repeats."""
    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        net = reference(name)
        for keep in KEEP:
            for method in STRATEGIES:
                seconds = []
                for _ in range(REPEATS):
                    start = time.perf_counter()
                    plan = search_ranks(
                        net, Budget(params=keep), example_input=IMAGE, method=method, objective="weight"
                    )
                    seconds.append(time.perf_counter() - start)
                rows.append(
                    {
                        "network": name,
                        "keep": keep,
                        "method": method,
                        "seconds": statistics.median(seconds),
                        "signal loss": plan.signal_loss,
                        "gap": plan.optimality_gap,
                        "params kept": plan.kept["params"],
                        "MACs kept": plan.kept["macs"],
                    }
                )
    publish("search", "Rank search, params budget; gap to the lower bound of the exact optimum", rows)


if __name__ == "__main__":
    main()

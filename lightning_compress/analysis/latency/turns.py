"""Things that are run in turns, and what their times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TURNS = 5
"""Of whole models, at least."""
LAYER_TURNS = 3
"""Of a model whose layers are timed."""
TURN_SECONDS = 0.02
"""About how long one model runs before another one has its turn."""
MOST_RUNS = 20
"""In one turn."""
SLOW = 0.05
"""Seconds of a forward pass above which one run warms up and two turns are enough: it is short ones that are noisy."""
NOISY = 0.15
"""Spread of a time above which it says little."""
CERTAIN = 0.005
"""Standard error of a ratio of whole models' times that is small enough."""
MEDIAN_ERROR = 1.86
"""Standard error of the median of n normal values, in their spread (see `Reading`) over √n: √(π/2) / 0.6745."""


@dataclass(frozen=True)
class Reading:
    """A measured time.

    Attributes:
        seconds: Of one forward pass, the median of all turns.
        spread: Half the range that the middle half of the turns is in, relative to it.
    """

    seconds: float
    spread: float = 0.0

    @classmethod
    def of(cls, turns: Sequence[float]) -> Reading:
        """Returns the reading of the medians of some turns."""
        middle = statistics.median(turns)
        if len(turns) < 2:  # noqa: PLR2004
            return cls(middle)
        low, _, high = statistics.quantiles(turns, n=4, method="inclusive")
        return cls(middle, (high - low) / (2 * middle) if middle > 0 else 0.0)


def in_turns(
    runs: Sequence[Callable[[], float]], seconds: float, least: int = TURNS, *, certain: float = 0.0, rarer: int = 1
) -> list[list[float]]:
    """Returns the median seconds of each turn for each of some things that are run in turns.

    A machine whose speed drifts slows all of them alike: use ratios within one turn.

    Args:
        runs: Each runs once and returns its seconds.
        seconds: How long the turns of each take together at least, if their ratios are not known before.
        least: Turns of each at least.
        certain: Standard error of the ratios to the first one at which they are known; 0 takes all turns.
        rarer: By which the first one runs less often in a turn, where it only says how the machine drifts.
    """
    once = [run() for run in runs]  # warms up
    if max(once) < SLOW:
        once = [run() for run in runs]
    elif least == LAYER_TURNS:
        least -= 1
    counts = [max(1, min(MOST_RUNS, round(TURN_SECONDS / max(t, 1e-9)))) for t in once]
    rounds = max(least, round(seconds / max(t * n for t, n in zip(once, counts, strict=True))))
    counts[0] = max(1, counts[0] // rarer)
    found: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + 4 * len(runs) * max(seconds, least * max(once))
    for done in range(rounds):
        if done >= least and (time.perf_counter() > deadline or _are_certain(found, certain)):
            break
        for run, count, turns in zip(runs, counts, found, strict=True):
            turns.append(statistics.median(run() for _ in range(count)))
    return found


def _are_certain(found: Sequence[Sequence[float]], error: float) -> bool:
    """Returns whether the ratios of turns to those of the first thing have a standard error below that."""
    first, *others = found
    ratios = [[own / max(one, 1e-12) for one, own in zip(first, turns, strict=True)] for turns in others]
    return all(MEDIAN_ERROR * Reading.of(each).spread < error * len(each) ** 0.5 for each in ratios or [list(first)])

"""How long a compression will take, part by part, and the seconds that it may take at most.

What each part is expected to take is known once the model has been looked at (`analysis.forecast`). Where that is more
than a limit, every part that can be cut gets its share of the time that is left when its turn comes, so that what one
part saves or overruns the later ones gain or lose. Without a limit nothing depends on the clock.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from warnings import warn

from lightning_compress.core.effort import Effort, current_effort
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.core.parallel import from_first

INPUTS, MOMENTS, DECOMPOSING, TIMING = "synthetic inputs", "moments", "decomposing layers", "timing layers"
FITTING, MEASURING, SEARCHING = "fitting layers", "measuring layers", "searching"
FACTORISING, HEALING = "factorising layers", "healing"
PARTS = (INPUTS, MOMENTS, DECOMPOSING, TIMING, FITTING, MEASURING, SEARCHING, FACTORISING, HEALING)
"""In the order in which they are done."""
_NAMED = {"timing": TIMING, "healing:": HEALING, "healing": HEALING, "merging": FACTORISING}
"""Parts by the first word of what a `Progress` is told; other words are of the search."""
RESERVE = 0.05
"""Share of a limit that is kept for what no part says of itself."""
LATE = 1.1
"""By which a compression may exceed its limit without a word."""
LEAST_FITS = 0.1
"""Share of the sweeps of iterative fits that are made at least."""
LEAST_SHARE = 0.2
"""Share of what decomposing layers is expected to take below which kinds that are fitted in sweeps are left out."""


class Forecast:
    """How long a compression will take.

    Args:
        limit: Seconds from now that it may take; None for any number.

    Attributes:
        limit: The same.
        heals: Whether the factors are repaired in the end.
        tried: The effort after cuts, None as long as none was needed.
        cut: What was cut short to keep the limit, and how, by part.
        speed: Multiply-accumulates per second of the model's forward pass; infinite as long as it is not known.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.heals = False
        self.tried: Effort | None = None
        self.cut: dict[str, str] = {}
        self.speed = math.inf
        self._start = time.perf_counter()
        self._expected: dict[str, float] = {}
        self._reached = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def is_wanted(self) -> bool:
        """Whether anything depends on it: a limit, or a bar that shows it."""
        return self.limit is not None or _WATCHED.get()

    @property
    def expected(self) -> Mapping[str, float]:
        """Seconds by part, empty as long as nothing is known."""
        return self._expected

    def expect(self, seconds: Mapping[str, float], speed: float) -> None:
        """Notes what each part is expected to take, and how fast the model runs."""
        self._expected, self.speed = {part: max(0.0, seconds.get(part, 0.0)) for part in PARTS}, speed

    def grant(self, part: str, *, everywhere: bool = False) -> float:
        """Returns the seconds that a part may take from now on, infinite without a limit.

        Args:
            part: One of `PARTS`.
            everywhere: Whether all processes that share the work ask, so that they must get the same answer.
        """
        if self.limit is None:
            return math.inf
        left = max(0.0, (1 - RESERVE) * self.limit - self.elapsed)
        later = sum(self._expected.get(name, 0.0) for name in PARTS[PARTS.index(part) :])
        own = left * self._expected.get(part, 0.0) / later if later else left
        return from_first("the time left", own) if everywhere else own

    def work(self, part: str, *, everywhere: bool = False) -> int:
        """Returns the MACs that a part which runs the model may take: `Effort.work`, or what the limit grants."""
        most, granted = current_effort().work, self.grant(part, everywhere=everywhere)
        return most if math.isinf(granted) or math.isinf(self.speed) else min(most, max(1, int(granted * self.speed)))

    def effort(self) -> Effort:
        """Returns the current effort with as many sweeps of iterative fits, and as patient a solver, as there is time.

        What has been fitted with it is found again with it alone, hence `tried`. All processes that share the work must
        ask.
        """
        own, granted = current_effort(), self.grant(DECOMPOSING, everywhere=True)
        share = min(1.0, granted / max(self._expected.get(DECOMPOSING, 0.0), 1e-9))
        if share == 1:
            return own
        fits = own.fits * max(LEAST_FITS, share)
        self.cut.setdefault(DECOMPOSING, f"{fits / own.fits:.0%} of the sweeps")
        self.tried = replace(own, fits=fits, solver_seconds=max(1.0, own.solver_seconds * share))
        return self.tried

    def leaves_out_fits(self) -> bool:
        """Returns whether there is too little time for kinds that are fitted in sweeps; it is then the other parts'.

        All processes that share the work must ask.
        """
        if self.grant(DECOMPOSING, everywhere=True) >= LEAST_SHARE * self._expected.get(DECOMPOSING, 0.0):
            return False
        self._expected |= {FITTING: 0.0, DECOMPOSING: LEAST_SHARE * self._expected[DECOMPOSING]}
        return True

    def note(self, part: str, how: str) -> None:
        """Notes that a part was cut short."""
        if self.limit is not None:
            self.cut[part] = how

    def fraction(self, what: str, done: float) -> float:
        """Returns how much of the whole is done, from what a `Progress` is told; it never falls.

        Where nothing is forecast that is the fraction of the part.
        """
        total = sum(self._expected.values())
        if not total:
            return done
        part = what if what in PARTS else _NAMED.get(what.partition(" ")[0], SEARCHING)
        before = sum(self._expected[name] for name in PARTS[: PARTS.index(part)])
        self._reached = max(self._reached, (before + done * self._expected[part]) / total)
        return self._reached


_NONE = Forecast()
_CURRENT: ContextVar[Forecast] = ContextVar("forecast", default=_NONE)
_WATCHED: ContextVar[bool] = ContextVar("watched", default=False)


def current_forecast() -> Forecast:
    """Returns the forecast of the running compression."""
    return _CURRENT.get()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Has forecasts made inside that somebody looks at; each costs two forward passes of the model."""
    token = _WATCHED.set(True)
    try:
        yield
    finally:
        _WATCHED.reset(token)


@contextlib.contextmanager
def forecasting(limit: float | None = None) -> Iterator[Forecast]:
    """Forecasts what runs inside, and warns where it took longer than the limit; inside another one it is that one."""
    if _CURRENT.get() is not _NONE:
        yield _CURRENT.get()
        return
    token = _CURRENT.set(Forecast(limit))
    try:
        yield _CURRENT.get()
        _warn_if_late(_CURRENT.get())
    finally:
        _CURRENT.reset(token)


def _warn_if_late(forecast: Forecast) -> None:
    limit, took = forecast.limit, forecast.elapsed
    if limit is not None and took > LATE * limit:
        msg = (
            f"the compression took {took:.0f} s, time_limit={limit:g}: what cannot be cut takes longer on this model. "
            "Pass objective='weight', fewer kinds, effort='fast', target=None or heal=False."
        )
        warn(msg, CompressionWarning, stacklevel=5)

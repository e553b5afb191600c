"""When events happen and to whom: arrival patterns as gaps from a rate, and keys skewed by Zipf's law."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import numpy as np

from streaming.producing.columns import CHUNK
from streaming.records import Floats, Ints
from streaming.simulators.arrival import HOUR_US, MINUTE_US, SECOND_US

START = datetime(2026, 1, 5, tzinfo=UTC)
DAY_US = 24 * HOUR_US
BURST_PERIOD_US = MINUTE_US
BURST_US = 3 * SECOND_US
BURST_SHARE = 0.7
"""Of all events lie in bursts, at a rate about 45 times that between them."""
DIURNAL_SWING = 0.8
"""By how much the rate rises above its mean at 18:00 UTC and falls below it at 06:00."""
_TABLE_STEPS = 24 * 60


Draw = Callable[[int, np.random.Generator], Ints]
"""So many entities, drawn with a generator."""


class Pattern(StrEnum):
    """How events follow one another; each keeps the mean rate that is asked for."""

    STEADY = "steady"
    POISSON = "poisson"
    BURSTS = "bursts"
    DIURNAL = "diurnal"


@dataclass(frozen=True)
class Shape:
    """How generated events lie in time and over keys; None is what is usual for their source.

    Attributes:
        pattern: How they follow one another.
        rate_hz: Events a second of event time, on average.
        entities: Number of different keys.
        skew: Exponent of Zipf's law over them.
        start: Event time before the first one.
    """

    pattern: Pattern = Pattern.POISSON
    rate_hz: float | None = None
    entities: int | None = None
    skew: float | None = None
    start: datetime = START

    def times_us(self, count: int, usual_rate_hz: float, seed: int) -> Iterator[Ints]:
        """Event times in chunks.

        Raises:
            ValueError: the rate is no positive number.
        """
        rate_hz = usual_rate_hz if self.rate_hz is None else self.rate_hz
        if not 0 < rate_hz < np.inf:
            raise ValueError(f"--events-per-second is {rate_hz}: give a number above 0.")
        draw = np.random.default_rng([seed, 1])
        return times_us(self.pattern, rate_hz, count, int(self.start.timestamp() * SECOND_US), draw)


USUAL = Shape()


def gaps_us(pattern: Pattern, rate_hz: float, count: int, draw: np.random.Generator, since_us: int = 0) -> Floats:
    """Microseconds between events: [count] from each to the one before it, the first to `since_us`.

    Bursts and the day's swing are Poisson arrivals whose rate varies: unit-rate gaps, mapped through the inverse of the
    cumulative rate. `since_us` is a time since 1970 UTC, so that a day's peak stays at its hour and chunks continue
    each other.
    """
    if pattern is Pattern.STEADY:
        return np.full(count, SECOND_US / rate_hz)
    passed = draw.standard_exponential(count)
    if pattern is Pattern.POISSON:
        return passed * (SECOND_US / rate_hz)
    period_us, moments_us, masses = _cycle(pattern)
    a_period = rate_hz * period_us / SECOND_US
    rest_us = since_us % period_us
    mass = float(np.interp(rest_us, moments_us, masses)) + np.cumsum(passed) / a_period
    whole = np.floor(mass)
    offsets_us = whole * period_us + np.interp(mass - whole, masses, moments_us) - rest_us
    return np.diff(np.maximum.accumulate(np.maximum(offsets_us, 0.0)), prepend=0.0)


def times_us(
    pattern: Pattern, rate_hz: float, count: int, start_us: int, draw: np.random.Generator, chunk: int = CHUNK
) -> Iterator[Ints]:
    """Event times in chunks, never decreasing, the first one gap after `start_us`; whole milliseconds, as JSON has."""
    base_us, passed_us = start_us, 0.0
    for done in range(0, count, chunk):
        size = min(chunk, count - done)
        exact = np.cumsum(gaps_us(pattern, rate_hz, size, draw, base_us + round(passed_us))) + passed_us
        yield (base_us + exact.astype(np.int64)) // 1000 * 1000
        base_us, passed_us = base_us + int(exact[-1]), float(exact[-1] % 1)


def skewed(entities: int, skew: float) -> Draw:
    """Draws of entities 0..entities-1, of which the k-th busiest has a share in proportion to 1 / k^skew.

    A skew of 0 makes all equally busy.
    """
    if entities < 1:
        raise ValueError(f"--entities is {entities}: give a number above 0.")
    if skew < 0:
        raise ValueError(f"--skew is {skew}: give 0 (all equally busy) or more.")
    if skew == 0:
        return lambda count, draw: draw.integers(0, entities, count)
    weights = 1.0 / np.arange(1, entities + 1) ** skew
    cumulative = np.cumsum(weights / weights.sum())
    return lambda count, draw: np.searchsorted(cumulative, draw.random(count)).clip(max=entities - 1)


def _cycle(pattern: Pattern) -> tuple[int, Floats, Floats]:
    """A period, and the share of its events (rising from 0 to 1) that lie before moments of it."""
    if pattern is Pattern.BURSTS:
        start_us = BURST_PERIOD_US // 2
        stop_us = start_us + BURST_US
        quiet = (1 - BURST_SHARE) / (BURST_PERIOD_US - BURST_US)
        before = quiet * start_us
        return (
            BURST_PERIOD_US,
            np.array([0.0, start_us, stop_us, BURST_PERIOD_US]),
            np.array([0.0, before, before + BURST_SHARE, 1.0]),
        )
    at = np.linspace(0.0, 1.0, _TABLE_STEPS + 1)
    masses = at + DIURNAL_SWING / (2 * np.pi) * (np.sin(2 * np.pi * (at - 0.75)) - 1)
    return DAY_US, at * DAY_US, masses

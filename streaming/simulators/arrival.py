"""From events in the order they happened to events in the order they arrive: a pure pipeline of iterators.

`disturb` injects faults from a seed: events out of order, duplicates, late events, poison. Every event leaves it
exactly once as itself; duplicates and poison come on top, and both carry the key of the event they are made from, so
that they meet it in its partition. `paced` holds arrivals back until they are due.
"""

import heapq
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import orjson

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US

DISORDER_US = 4 * MINUTE_US
"""The longest that an out-of-order event is held back: less than the five minutes the feature views wait."""
LATE_US = 3 * HOUR_US
"""The shortest that a late event is held back: every window of an hour it belongs to is closed by then."""
LATE_SPREAD_US = HOUR_US


class Event(NamedTuple):
    """One event as it happened."""

    time_us: int
    key: bytes
    value: bytes


class Kind(StrEnum):
    """What an arrival is, for the count at the end."""

    EVENT = "events"
    DUPLICATE = "duplicates"
    LATE = "late"
    POISON = "poison"


class Arrival(NamedTuple):
    """One message; `due_us` is the event time at which it arrives, never decreasing along the pipeline."""

    due_us: int
    kind: Kind
    key: bytes
    value: bytes


@dataclass(frozen=True)
class Faults:
    """The share of events that each fault strikes, in [0, 1], and the seed of the draws."""

    disorder: float = 0.0
    duplicates: float = 0.0
    late: float = 0.0
    poison: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a share outside of [0, 1], and late and disordered shares that together exceed 1."""
        for name in ("disorder", "duplicates", "late", "poison"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"--{name} is {share}: give a fraction between 0 and 1.")
        if self.disorder + self.late > 1.0:
            raise ValueError(f"--disorder {self.disorder} and --late {self.late} exceed 1 together: lower one of them.")


def disturb(events: Iterable[Event], faults: Faults) -> Iterator[Arrival]:
    """Turn events, in time order, into arrivals; equal seeds give equal arrivals.

    A struck event that is out of order arrives within `DISORDER_US`, a late one after `LATE_US`. What is still held
    back when the events end arrives at the end, in order; a late event that then overtakes its time counts as an
    event, because nobody downstream would find it late.
    """
    draw = random.Random(faults.seed)  # noqa: S311 - a simulation, not a secret
    held: list[tuple[int, int, Kind, Event]] = []
    order = 0
    clock_us = -1

    def hold(due_us: int, kind: Kind, event: Event) -> None:
        nonlocal order
        heapq.heappush(held, (due_us, order, kind, event))
        order += 1

    def release() -> Arrival:
        nonlocal clock_us
        due_us, _, kind, event = heapq.heappop(held)
        if kind is Kind.LATE and clock_us - event.time_us < LATE_US:
            kind = Kind.EVENT
        if kind is not Kind.POISON:
            clock_us = max(clock_us, event.time_us)
        return Arrival(due_us, kind, event.key, event.value)

    for event in events:
        lot = draw.random()
        if lot < faults.late:
            hold(event.time_us + LATE_US + draw.randrange(LATE_SPREAD_US), Kind.LATE, event)
        else:
            delay_us = draw.randrange(DISORDER_US) if lot < faults.late + faults.disorder else 0
            hold(event.time_us + delay_us, Kind.EVENT, event)
            if draw.random() < faults.duplicates:
                hold(event.time_us + draw.randrange(delay_us, DISORDER_US), Kind.DUPLICATE, event)
        if draw.random() < faults.poison:
            hold(event.time_us, Kind.POISON, event._replace(value=_poison(event, draw)))
        while held and held[0][0] <= event.time_us:
            yield release()
    while held:
        yield release()


def _poison(event: Event, draw: random.Random) -> bytes:
    """A value that no worker may accept: not JSON, a field missing or of the wrong type, or from the future."""
    match draw.randrange(5):
        case 0:
            return event.value[: len(event.value) // 2]
        case 1:
            return b"edited by " + event.key
    fields = orjson.loads(event.value)
    match draw.randrange(3):
        case 0:
            del fields["user"]
        case 1:
            fields["added"] = "plenty"
        case _:
            fields["time"] = "2999-01-01T00:00:00.000Z"
    return orjson.dumps(fields)


def paced(
    arrivals: Iterable[Arrival],
    *,
    rate: float | None = None,
    speed_up: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Arrival]:
    """Hold arrivals back to `rate` messages a second, or to event time sped up `speed_up` times; without both, never.

    Falling behind is caught up: the n-th arrival is due at a time fixed by the first one. `clock` and `sleep` are in
    seconds.
    """
    for name, value in (("rate", rate), ("speed-up", speed_up)):
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value}: give a number above 0.")
    if rate is not None and speed_up is not None:
        raise ValueError("--rate and --speed-up exclude each other: give one of them.")
    start_s: float | None = None
    first_us = 0
    for index, arrival in enumerate(arrivals):
        if start_s is None:
            start_s, first_us = clock(), arrival.due_us
        if rate is not None:
            due_s = start_s + index / rate
        elif speed_up is not None:
            due_s = start_s + (arrival.due_us - first_us) / SECOND_US / speed_up
        else:
            due_s = start_s
        wait_s = due_s - clock()
        if wait_s > 0:
            sleep(wait_s)
        yield arrival

"""From events in the order they happened to events in the order they arrive: a pure pipeline over chunks of columns.

`disturb` injects faults from a seed: events out of order, duplicates, late events, poison. Every event leaves it
exactly once as itself; duplicates and poison come on top, and both carry the key of the event they are made from, so
that they meet it in its partition. `paced` holds arrivals back until they are due.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import orjson

from streaming.events import EDITS, Topic
from streaming.producing.columns import Event, Events, from_rows, joined, rows
from streaming.records import Bools, Floats, Ints

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US

DISORDER_US = 4 * MINUTE_US
"""The longest that an out-of-order event is held back: less than the five minutes the feature views wait."""
LATE_US = 3 * HOUR_US
"""The shortest that a late event is held back: every window of an hour it belongs to is closed by then."""
LATE_SPREAD_US = HOUR_US
TICK_S = 0.005
"""The least time between two releases of `paced`; what is due within it goes together."""

_NEVER_US = -(2**62)
_DRAWS = 6
_FLAVOURS = 5


class Kind(StrEnum):
    """What an arrival is, for the count at the end."""

    EVENT = "events"
    DUPLICATE = "duplicates"
    LATE = "late"
    POISON = "poison"


KINDS = tuple(Kind)
_EVENT, _DUPLICATE, _LATE, _POISON = range(4)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """N messages in the order they arrive.

    Attributes:
        due_us: [N] event times at which they arrive, never decreasing along the pipeline.
        kinds: [N] int8 indices into `KINDS`.
        events: What arrives.
    """

    due_us: Ints
    kinds: npt.NDArray[np.int8]
    events: Events

    def __len__(self) -> int:
        return len(self.due_us)

    def take(self, rows: Ints | slice) -> "Arrivals":
        """Some of the arrivals, over the same bytes."""
        return Arrivals(self.due_us[rows], self.kinds[rows], self.events.take(rows))

    def rows(self) -> Iterator[tuple[int, Kind, Event]]:
        """When each is due, what it is, and the event, for those who want few."""
        return zip(self.due_us.tolist(), [KINDS[kind] for kind in self.kinds], rows([self.events]), strict=True)


@dataclass(frozen=True)
class Faults:
    """The share of events that each fault strikes, in [0, 1], how far it moves them, and the seed of the draws."""

    disorder: float = 0.0
    duplicates: float = 0.0
    late: float = 0.0
    poison: float = 0.0
    seed: int = 0
    disorder_us: int = DISORDER_US
    late_us: int = LATE_US
    late_spread_us: int = LATE_SPREAD_US

    def __post_init__(self) -> None:
        """Refuse a share outside of [0, 1], and late and disordered shares that together exceed 1."""
        for name in ("disorder", "duplicates", "late", "poison"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"--{name} is {share}: give a fraction between 0 and 1.")
        if self.disorder + self.late > 1.0:
            raise ValueError(f"--disorder {self.disorder} and --late {self.late} exceed 1 together: lower one of them.")

    @property
    def none(self) -> bool:
        """Whether nothing is struck."""
        return not (self.disorder or self.duplicates or self.late or self.poison)


class Held:
    """Messages that wait until they are due; those due at once leave in the order they came."""

    def __init__(self) -> None:
        self._waiting: Arrivals | None = None

    def add(self, due_us: Ints, kinds: npt.NDArray[np.int8], events: Events) -> None:
        """Hold messages, in any order of their due times."""
        if self._waiting is not None:
            due_us = np.concatenate([self._waiting.due_us, due_us])
            kinds = np.concatenate([self._waiting.kinds, kinds])
            events = joined([self._waiting.events, events])
        self._waiting = Arrivals(due_us, kinds, events).take(np.argsort(due_us, kind="stable"))

    def release(self, until_us: int | None) -> Arrivals | None:
        """What is due up to `until_us`, or everything for None; None where that is nothing."""
        waiting = self._waiting
        if waiting is None:
            return None
        stop = len(waiting) if until_us is None else int(np.searchsorted(waiting.due_us, until_us, side="right"))
        rest = waiting.take(slice(stop, None))
        self._waiting = Arrivals(rest.due_us, rest.kinds, rest.events.compact()) if len(rest) else None
        return waiting.take(slice(stop)) if stop else None


def disturb(chunks: Iterable[Events], faults: Faults, topics: Sequence[Topic] = (EDITS,)) -> Iterator[Arrivals]:
    """Turn events, in time order, into arrivals; equal seeds give equal arrivals, however the events are cut.

    A struck event that is out of order arrives within `disorder_us`, a late one after `late_us`. What is still held
    back when the events end arrives at the end, in order; a late event that then overtakes its time counts as an
    event, because nobody downstream would find it late. An event older than one before it arrives with that one.

    Args:
        chunks: what happened.
        faults: what goes wrong.
        topics: the type of each route, which decides what is poison to its readers.
    """
    draw = np.random.default_rng(faults.seed)
    held = Held()
    clock_us = passed_us = _NEVER_US
    for events in chunks:
        if not len(events):
            continue
        now_us = np.maximum(np.maximum.accumulate(events.times_us), clock_us)
        clock_us = int(now_us[-1])
        if faults.none:
            yield Arrivals(now_us, np.zeros(len(events), dtype=np.int8), events)
            continue
        held.add(*_struck(events, now_us, faults, draw.random((len(events), _DRAWS)), topics))
        if (arrivals := held.release(clock_us)) is not None:
            arrivals, passed_us = _judged(arrivals, faults.late_us, passed_us)
            yield arrivals
    if (arrivals := held.release(None)) is not None:
        yield _judged(arrivals, faults.late_us, passed_us)[0]


def _struck(
    events: Events, now_us: Ints, faults: Faults, lots: Floats, topics: Sequence[Topic]
) -> tuple[Ints, npt.NDArray[np.int8], Events]:
    """When each event is due, and what comes on top of it: a duplicate, then poison, each right after its event."""
    late: Bools = lots[:, 0] < faults.late
    disordered = ~late & (lots[:, 0] < faults.late + faults.disorder)
    spread_us = np.where(late, faults.late_spread_us, np.where(disordered, faults.disorder_us, 0))
    delay_us = np.where(late, faults.late_us, 0) + (lots[:, 1] * spread_us).astype(np.int64)
    twice = np.flatnonzero(~late & (lots[:, 2] < faults.duplicates))
    twice_us = delay_us[twice] + (lots[twice, 3] * (faults.disorder_us - delay_us[twice])).astype(np.int64)
    poisoned = np.flatnonzero(lots[:, 4] < faults.poison)
    source = np.concatenate([np.arange(len(events)), twice, poisoned])
    order = np.argsort(source, kind="stable")
    due_us = np.concatenate([now_us + delay_us, now_us[twice] + twice_us, now_us[poisoned]])
    kinds = np.concatenate(
        [
            np.where(late, _LATE, _EVENT).astype(np.int8),
            np.full(len(twice), _DUPLICATE, dtype=np.int8),
            np.full(len(poisoned), _POISON, dtype=np.int8),
        ]
    )
    everything = events.take(source)
    if len(poisoned):
        everything = joined([events.take(source[: -len(poisoned)]), _poison(events, poisoned, lots[:, 5], topics)])
    return due_us[order], kinds[order], everything.take(order)


def _judged(arrivals: Arrivals, late_us: int, passed_us: int) -> tuple[Arrivals, int]:
    """Late only where the clock of those before it is that far ahead; the clock after all of them comes along."""
    times_us = np.where(arrivals.kinds == _POISON, _NEVER_US, arrivals.events.times_us)
    clocks_us = np.maximum(np.maximum.accumulate(times_us), passed_us)
    before_us = np.concatenate([[passed_us], clocks_us[:-1]])
    in_time = (arrivals.kinds == _LATE) & (before_us < late_us + times_us)
    kinds = np.where(in_time, np.int8(_EVENT), arrivals.kinds)
    return Arrivals(arrivals.due_us, kinds, arrivals.events), int(clocks_us[-1])


def _poison(events: Events, chosen: Ints, lots: Floats, topics: Sequence[Topic]) -> Events:
    """A value that no reader may accept in place of each chosen one, with its key and time."""
    flavours = (lots[chosen] * _FLAVOURS).astype(np.int64).tolist()
    values = [
        _spoilt(events.key(row), events.value(row), flavour, topics[events.routes[row]])
        for row, flavour in zip(chosen.tolist(), flavours, strict=True)
    ]
    made = from_rows(events.times_us[chosen].tolist(), [events.key(row) for row in chosen.tolist()], values)
    return Events(made.times_us, made.buffer, made.keys, made.values, events.routes[chosen])


def _spoilt(key: bytes, value: bytes, flavour: int, topic: Topic) -> bytes:
    """Not JSON, a field missing or of the wrong type, or from the future."""
    match flavour:
        case 0:
            return value[: len(value) // 2]
        case 1:
            return b"sent by " + key
    fields = orjson.loads(value)
    match flavour:
        case 2:
            fields.pop(topic.key, None)
            fields.pop(topic.timestamp, None)
        case 3:
            numbers = [name for name, kind in topic.fields.items() if kind in ("bigint", "double")]
            fields |= dict.fromkeys(numbers or [topic.timestamp], "plenty")
        case _:
            fields[topic.timestamp] = "2999-01-01T00:00:00.000Z"
    return orjson.dumps(fields)


def paced(
    chunks: Iterable[Arrivals],
    *,
    rate: float | None = None,
    speed_up: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Arrivals]:
    """Hold arrivals back to `rate` messages a second, or to event time sped up `speed_up` times; without both, never.

    Falling behind is caught up: the n-th arrival is due at a time fixed by the first one. None is early, and none
    waits more than `TICK_S` for others. `clock` and `sleep` are in seconds.
    """
    for name, value in (("rate", rate), ("speed-up", speed_up)):
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value}: give a number above 0.")
    if rate is not None and speed_up is not None:
        raise ValueError("--rate and --speed-up exclude each other: give one of them.")
    if rate is None and speed_up is None:
        yield from chunks
        return
    start_s: float | None = None
    first_us = sent = 0
    last_s = float("-inf")
    for arrivals in chunks:
        if start_s is None:
            start_s, first_us = clock(), int(arrivals.due_us[0])
        if rate is not None:
            due_s = start_s + (sent + np.arange(len(arrivals))) / rate
        else:
            due_s = start_s + (arrivals.due_us - first_us) / (SECOND_US * (speed_up or 1.0))
        sent += len(arrivals)
        at = 0
        while at < len(arrivals):
            wait_s = max(float(due_s[at]), last_s + TICK_S) - clock()
            if wait_s > 0:
                sleep(wait_s)
            last_s = clock()
            stop = max(at + 1, int(np.searchsorted(due_s, last_s, side="right")))
            yield arrivals.take(slice(at, stop))
            at = stop

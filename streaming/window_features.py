"""Windowed features in process, with the kernel of the stream and none of its surroundings: no Kafka, Feast or Ray.

    features = WindowFeatures()
    features.register_window("amount", "amount", ["mean", "count"], timedelta(hours=1), slide=timedelta(minutes=5))
    features.process_event("card 7", {"amount": 12.5}, datetime(2024, 5, 1, 12, 0, tzinfo=UTC))
    features.get_features("card 7", ["amount_mean", "amount_count"])  # [12.5, 1]

The values are bit for bit those of the same aggregates over a topic of these events: event time, one clock for all
entities, and a value that falls as its window slides past old events: by the events of other entities, and without any
event by `get_features(..., at=datetime.now(UTC))`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

from streaming.decode import RecordError, read_record
from streaming.partition import Counters, Partition
from streaming.plan import FUNCTIONS, Aggregate, Column, ColumnType, Plan, Role, role
from streaming.records import RecordBatch, Reject
from streaming.windows import NEVER_US

EVENTS_A_BATCH = 4_096
ENTITY, TIME = "entity", "event_time"
REMEDIES = {"dead": "correct it", "late": "give WindowFeatures a longer delay"}

Value = int | float | str | list[str] | None


class WindowError(ValueError):
    """A window or a question that makes no sense, or an event that is refused, in one sentence."""


def _refuse(reject: Reject) -> None:
    entity = json.loads(reject.value or b"{}").get(ENTITY)
    raise WindowError(
        f"An event of {entity!r} is refused: {reject.reason}; {REMEDIES[reject.kind]}, or take what is refused with"
        " on_reject."
    )


class WindowFeatures:
    """Windows over the events of many entities; not safe for use by two threads.

    Args:
        delay: How far the watermark stays behind the newest event: what comes later than that is late once its windows
            have closed, and changes nothing.
        on_reject: Told each event that changed nothing, with its reason, before `process_event` returns; by default
            that raises a WindowError. They are counted in `counters` in any case.
        now: The wall clock, against which an event is from the future; by default an event may have any time.
    """

    def __init__(
        self,
        delay: timedelta = timedelta(),
        on_reject: Callable[[Reject], None] = _refuse,
        now: Callable[[], datetime] = lambda: datetime.max.replace(tzinfo=UTC),
    ) -> None:
        self._delay, self._on_reject, self._now = delay, on_reject, now
        self._types: dict[str, ColumnType] = {}
        self._columns: dict[tuple[str, Role], Column] = {}
        self._aggregates: dict[str, Aggregate] = {}
        self._index: dict[str, int] = {}
        self._nothing: tuple[Value, ...] = ()
        self._partition: Partition | None = None
        self._clock_us = -NEVER_US
        self._events: list[bytes] = []
        self._values: dict[str, tuple[Value, ...]] = {}  # of entities whose windows are not empty

    @property
    def counters(self) -> Counters:
        """What has been done with the events so far."""
        if self._partition is None:
            return Counters(0, 0, 0, 0)
        self._flush(self._partition)
        return self._partition.counters

    def register_window(
        self,
        name: str,
        field: str,
        functions: Sequence[str],
        length: timedelta | None = None,
        *,
        slide: timedelta | None = None,
        gap: timedelta | None = None,
        last: int | None = None,
        type: ColumnType = "double",  # noqa: A002
    ) -> list[str]:
        """Declares a window over a field of the events; returns the names of its features, `NAME_FUNCTION`.

        Give one of `length` (tumbling, or sliding by `slide`), `gap` (a session that ends when an entity is silent for
        so long) and `last` (the newest N events of the entity), or none of them for a lifetime.

        Args:
            name: The beginning of the features' names.
            field: Of the events; one that is missing or None is not counted.
            functions: Of `streaming.plan.FUNCTIONS`; strings have count, count_distinct, first, last and top_k.
            length: Of the window.
            slide: Divides the length; by default the length itself.
            gap: Of a session.
            last: How many events.
            type: Of the field's values; events with another type are refused.

        Raises:
            WindowError: The window cannot be computed, or events have been processed already.
        """
        if self._partition is not None:
            raise WindowError(f"Window '{name}' comes too late: register all windows before the first event.")
        if sum(each is not None for each in (length, gap, last)) > 1:
            raise WindowError(f"Window '{name}': give one of length, gap and last.")
        if field in (ENTITY, TIME):
            raise WindowError(f"Window '{name}': '{field}' is kept for the event's own; call the field otherwise.")
        if self._types.setdefault(field, type) != type:
            raise WindowError(f"Window '{name}': the field '{field}' is {self._types[field]} in another window.")
        shape = _shape(name, length, slide, gap, last)
        names = [f"{name}_{function}" for function in functions]
        for feature, function in zip(names, functions, strict=True):
            aggregate = Aggregate(feature, field, function, **shape)
            if not aggregate.known or function == "decayed_mean":
                choice = ", ".join(each for each in FUNCTIONS if each != "decayed_mean")
                raise WindowError(f"Window '{name}': there is no function '{function}'; take one of {choice}.")
            if not aggregate.fits(type):
                raise WindowError(f"Window '{name}': {function} is not defined for the {type} field '{field}'.")
            if feature in self._aggregates:
                raise WindowError(f"Window '{name}': there is a feature '{feature}' already: choose another name.")
            self._aggregates[feature] = aggregate
            self._index[feature] = len(self._index)
            self._nothing += (_empty(aggregate),)
            needed = role(function, type)
            self._columns[field, needed] = Column(field, type, nullable=True, role=needed)
        return names

    def process_event(self, entity: str, event: Mapping[str, Any], time: datetime) -> None:
        """Takes an event, in the order in which it comes.

        Args:
            entity: Who it belongs to.
            event: Field to value: None, a string, a boolean, or a number of Python, numpy or `decimal`; fields of no
                window are not read.
            time: Event time, aware; one that is a little out of order is put where it belongs.

        Raises:
            WindowError: The event makes no sense, or it is refused and there is no `on_reject`. It changes no value.
        """
        if not self._aggregates:
            raise WindowError("There is no window: call register_window first.")
        _check_entity(entity)
        time_us = _time_us(time, "of an event")
        fields = {name: _plain(name, event[name]) for name in self._types if name in event}
        value = json.dumps({**fields, ENTITY: entity, TIME: time.isoformat()}).encode()
        partition = self._partition = self._partition or Partition(self._plan(), 0)
        self._events.append(value)
        if self._doubtful(partition, value, time_us):
            self._flush(partition)
            return
        self._clock_us = max(self._clock_us, time_us)
        if len(self._events) == EVENTS_A_BATCH:
            self._flush(partition)

    def get_features(self, entity: str, names: Sequence[str], at: datetime | None = None) -> list[Value]:
        """The values of features at the clock, which is the newest event time of all entities.

        An entity without an event has counts of 0, sums of 0.0 and None otherwise, as one whose windows are empty.

        Args:
            entity: Whose.
            names: Of the features.
            at: An aware time to which the clock goes on first, as it would by an event; an earlier one changes nothing.

        Raises:
            WindowError: There is no feature of this name, or the entity or the time makes no sense.
        """
        _check_entity(entity)
        for name in names:
            if name not in self._index:
                raise WindowError(f"There is no feature '{name}': there are {', '.join(self._index) or 'none'}.")
        at_us = -NEVER_US if at is None else _time_us(at, "to read at")
        if self._partition is not None:
            self._flush(self._partition, at_us)
        values = self._values.get(entity, self._nothing)
        return [values[self._index[name]] for name in names]

    def _doubtful(self, partition: Partition, value: bytes, time_us: int) -> bool:
        """Whether the kernel will refuse an event, which is not put by then, so that it is told at once."""
        if time_us > _us(self._now()) + partition.plan.future_us:
            return True
        mark_us = self._clock_us - partition.plan.delay_us
        if time_us < mark_us and partition.closed(np.array([time_us]), np.array([mark_us]))[0]:
            return True
        try:
            read_record(partition.plan, value)
        except RecordError:
            return True
        return False

    def _flush(self, partition: Partition, at_us: int = -NEVER_US) -> None:
        """Computes what has been put by, and moves the clock on: results do not depend on when."""
        if not self._events and at_us <= partition.clock_us:
            return
        rejects = []
        if self._events:
            batch = RecordBatch.of_values(self._events, partition.next_offset)
            self._events = []
            rejects = partition.process(batch, _us(self._now()))
        partition.clock_us = self._clock_us = max(partition.clock_us, at_us)
        emission = partition.emit()
        rows = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
        for entity, row in zip(emission.entities.to_pylist(), rows, strict=True):
            if row == self._nothing:
                self._values.pop(entity, None)
            else:
                self._values[entity] = row
        partition.shrink()
        for reject in rejects:
            self._on_reject(reject)

    def _plan(self) -> Plan:
        columns, aggregates = tuple(self._columns.values()), tuple(self._aggregates.values())
        delay_us = self._delay // timedelta(microseconds=1)
        return Plan("window_features", "", "", ENTITY, "string", TIME, columns, aggregates, delay_us)


def _shape(
    name: str, length: timedelta | None, slide: timedelta | None, gap: timedelta | None, last: int | None
) -> dict[str, Any]:
    """What an `Aggregate` says of its window."""
    microsecond = timedelta(microseconds=1)
    if last is not None:
        if last < 1:
            raise WindowError(f"Window '{name}': last is {last}, it must be at least 1.")
        return {"window_us": 0, "slide_us": 0, "kind": "last", "size": last}
    if gap is not None:
        if gap <= timedelta():
            raise WindowError(f"Window '{name}': the gap is {gap}, it must be longer than nothing.")
        return {"window_us": gap // microsecond, "slide_us": gap // microsecond, "kind": "session"}
    if length is None:
        return {"window_us": 0, "slide_us": 0, "kind": "lifetime"}
    slide = length if slide is None else slide
    if slide <= timedelta() or length % slide or length <= timedelta():
        raise WindowError(f"Window '{name}': the slide of {slide} must divide the length of {length}.")
    return {"window_us": length // microsecond, "slide_us": slide // microsecond}


def _empty(aggregate: Aggregate) -> Value:
    if aggregate.top is not None:
        return []
    return {"count": 0, "count_distinct": 0, "sum": 0.0}.get(aggregate.function)


def _check_entity(entity: object) -> None:
    if not isinstance(entity, str):
        raise WindowError(f"The entity {entity!r} is of type {type(entity).__name__}: give a string, as str(entity).")


def _plain(field: str, value: object) -> bool | int | float | str | None:
    """A value of an event as JSON has it."""
    if isinstance(value, np.bool_ | np.integer | np.floating) and not isinstance(value, np.timedelta64):
        value = value.item()
    if isinstance(value, Decimal):
        return float(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise WindowError(
        f"The field '{field}' of an event is of type {type(value).__name__}: give a number, boolean, string or None."
    )


def _time_us(time: object, which: str) -> int:
    if not isinstance(time, datetime) or time.utcoffset() is None:
        kind = type(time).__name__
        raise WindowError(f"The time {time} {which}, of type {kind}, has no zone: give an aware datetime.")
    return _us(time)


def _us(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)

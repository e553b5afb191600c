"""Skew: whether the features that predictions were made with are those that training sees.

A prediction event holds the features that were used and, for each, the event time of the row that it was read from.
Feast keeps that time in whole seconds, so a served value is right when a row of the entity in that second (or at that
very moment, where the time has a fraction) holds the same bits. The features of one view are compared as one row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from streaming.partition import Partition
from streaming.plan import Plan
from streaming.records import Emission, RecordBatch
from streaming.transformations import Reader

SECOND_US = 1_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Entity = str | int
Row = tuple[Any, ...]
Moment = tuple[Entity, int]
#: (entity, second) to the rows that may have been served then: event time (None: any in it) and features.
History = dict[Moment, list[tuple[int | None, Row]]]


class Served(NamedTuple):
    """What one prediction used of one view.

    Attributes:
        id: Of the prediction.
        entity: As the view has it.
        time_us: Event time of the row that was read.
        exact: Whether `time_us` is finer than a second.
        values: Feature to value.
    """

    id: str
    entity: Entity
    time_us: int
    exact: bool
    values: Mapping[str, float]


@dataclass
class Verdict:
    """What was found, by feature: values that agree, that do not, and that were not there and became a default.

    Attributes:
        unknown: Served values of rows that history does not hold (a row newer than its end, or lost by a crash before
            it was logged); they are no mismatch, and none of them was checked.
        examples: The first mismatches, in words.
    """

    matched: Counter[str] = field(default_factory=Counter)
    mismatched: Counter[str] = field(default_factory=Counter)
    defaulted: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def checked(self) -> int:
        """How many values were compared."""
        return self.matched.total() + self.mismatched.total()

    def failure(self, predictions: int, history: str) -> str:
        """What must not be, in a clause; empty where all is well or where no prediction used the view.

        Args:
            predictions: How many used the view.
            history: With what their values were compared, in words.
        """
        if self.mismatched:
            return f"{self.mismatched.total():,} of {self.checked:,} served values differ from {history}"
        if predictions and not self.checked:
            return f"none of the {predictions:,} predictions could be checked, since {history} has none of their rows"
        return ""

    def table(self) -> list[str]:
        """A line a feature, under a heading."""
        names = sorted({*self.matched, *self.mismatched, *self.defaulted, *self.unknown})
        width = max([7, *map(len, names)])
        lines = [f"{'feature':<{width}} {'matched':>10} {'mismatched':>10} {'defaulted':>10} {'unknown':>10}"]
        for name in names:
            counts = (self.matched[name], self.mismatched[name], self.defaulted[name], self.unknown[name])
            lines.append(f"{name:<{width}} " + " ".join(f"{count:>10,}" for count in counts))
        return lines


def read(
    event: Mapping[str, Any], view: str, features: Sequence[str], integer_key: bool, verdict: Verdict
) -> Served | None:
    """What a prediction event used of a view; counts the features that were defaults.

    Args:
        event: Fields of `streaming.events.PREDICTIONS`.
        view: Its name, which stands before its features as `view__` where a model reads several views.
        features: The names of the view's features.
        integer_key: Whether the view's entity is an integer.
        verdict: What is counted.
    """
    values, times = event.get("features") or {}, event.get("features_at") or {}
    used: dict[str, float] = {}
    moments = set()
    for name in features:
        key = name if name in values else f"{view}__{name}"
        if key not in values:
            continue
        if values[key] is None and times.get(key) is None:
            verdict.defaulted[name] += 1
            continue
        if times.get(key) is None:
            verdict.unknown[name] += 1  # given by the request, not read from the store
            continue
        used[name] = float("nan") if values[key] is None else float(values[key])
        moments.add(times[key])
    entity = event.get("entity")
    if not used or entity is None:
        return None
    time_us = (datetime.fromisoformat(min(moments)) - EPOCH) // (datetime.resolution)
    key_value: Entity = int(entity) if integer_key else str(entity)
    return Served(str(event["id"]), key_value, time_us, time_us % SECOND_US != 0, used)


def judge(served: Iterable[Served], history: History, names: Sequence[str], verdict: Verdict) -> None:
    """Compares served values with the rows of history.

    Args:
        served: Of one view.
        history: Of `logged` or `recomputed`.
        names: The columns of its rows.
        verdict: What is added to.
    """
    at = {name: index for index, name in enumerate(names)}
    for each in served:
        candidates = [
            row
            for time_us, row in history.get((each.entity, each.time_us // SECOND_US), [])
            if not each.exact or time_us in (None, each.time_us)
        ]
        if not candidates:
            verdict.unknown.update(each.values.keys())
            continue
        wrong = min(
            ([name for name, value in each.values.items() if not _same(row[at[name]], value)] for row in candidates),
            key=len,
        )
        verdict.mismatched.update(wrong)
        verdict.matched.update(name for name in each.values if name not in wrong)
        if wrong and len(verdict.examples) < 10:
            nearest = [row[at[wrong[0]]] for row in candidates]
            verdict.examples.append(
                f"prediction {each.id} of {each.entity!r}: {wrong[0]} was {each.values[wrong[0]]!r}, history says"
                f" {' or '.join(map(repr, nearest[:3]))}"
            )


def logged(log: pa.Table, join_key: str, event_timestamp: str, names: Sequence[str]) -> History:
    """The rows of an offline log by entity and second, for `judge`."""
    times = log.column(event_timestamp).cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist()
    rows = zip(*(log.column(name).to_pylist() for name in names), strict=True)
    found: History = {}
    for entity, time_us, row in zip(log.column(join_key).to_pylist(), times, rows, strict=True):
        found.setdefault((entity, time_us // SECOND_US), []).append((time_us, row))
    return found


def recomputed(plan: Plan, batches: Iterable[RecordBatch], wanted: Iterable[Moment], now_us: int) -> History:
    """The rows that the kernel gives for the wanted (entity, second), from the records of a topic.

    Whatever the batches of the live worker were, its row of an entity in some second stood after a record at which the
    clock was in that second: these are the state before the entity's own records of that second and after each of
    them. A second that only the wall clock reached is the state after the last record before it.

    Args:
        plan: Of fresh emission.
        batches: The records of each partition in offset order, from the first one that the windows reach.
        wanted: What predictions used.
        now_us: The wall clock.
    """
    seconds: dict[Entity, set[int]] = {}
    for entity, second in wanted:
        seconds.setdefault(entity, set()).add(second)
    replays: dict[int, _Replay] = {}
    for batch in batches:
        replays.setdefault(batch.partition, _Replay(plan, batch.partition, seconds, now_us)).add(batch)
    found: History = {}
    for replay in replays.values():
        replay.finish()
        for moment, rows in replay.found.items():
            found.setdefault(moment, []).extend(rows)
    return found


class _Replay:
    """One partition, stopped wherever a wanted row may have been emitted."""

    def __init__(self, plan: Plan, number: int, seconds: Mapping[Entity, set[int]], now_us: int) -> None:
        self.found: History = {}
        self._now_us = now_us
        self._partition = Partition(plan, number)
        self._reader = Reader(plan)
        self._integer = plan.entity_type == "int64"
        self._seconds = seconds
        self._stops = np.array(sorted({second for each in seconds.values() for second in each}), dtype=np.int64)
        self._owners: dict[int, set[Entity]] = {}
        for entity, each in seconds.items():
            for second in each:
                self._owners.setdefault(second, set()).add(entity)
        self._latest: dict[Entity, Row] = {}
        self._next = 0

    def add(self, batch: RecordBatch) -> None:
        """The next records."""
        columns, _ = self._reader.decode(batch)
        seen = columns.readable & (columns.times <= self._now_us + self._partition.plan.future_us)
        clocks = np.maximum.accumulate(np.where(seen, columns.times, self._partition.clock_us))
        clocks = np.maximum(clocks, self._partition.clock_us) // SECOND_US
        start = 0
        for row in np.flatnonzero(np.isin(clocks, self._stops)).tolist():
            second = int(clocks[row])
            entity = self._entity(columns.text[slice(*columns.entities[row])].tobytes()) if seen[row] else None
            first = row == 0 or clocks[row - 1] != second
            if not (first or entity in self._owners.get(second, ())):
                continue
            self._advance(batch, start, row)
            self._idle_until(second)
            self._advance(batch, row, row + 1)
            start = row + 1
            self._keep(second)
        self._advance(batch, start, len(batch.offsets))

    def finish(self) -> None:
        """The seconds after the last record."""
        self._idle_until(1 << 62)

    def _advance(self, batch: RecordBatch, start: int, end: int) -> None:
        if start < end:
            self._partition.process(batch.rows(slice(start, end)), self._now_us)
            self._remember(self._partition.emit())

    def _idle_until(self, second: int) -> None:
        """Wanted seconds that lie between two records: an idle worker's clock went through them."""
        while self._next < len(self._stops) and self._stops[self._next] < second:
            stop = int(self._stops[self._next])
            self._next += 1
            if stop > self._partition.clock_us // SECOND_US and self._latest:
                probe = Partition.restore(self._partition.plan, self._partition.partition, self._partition.snapshot())
                probe.tick(self._now_us + stop * SECOND_US - probe.clock_us)
                aged = _rows(probe.emit())
                for entity in self._owners[stop] & self._latest.keys():
                    self._add(entity, stop, aged.get(entity, self._latest[entity]))

    def _keep(self, second: int) -> None:
        for entity in self._owners[second] & self._latest.keys():
            self._add(entity, second, self._latest[entity])

    def _add(self, entity: Entity, second: int, row: Row) -> None:
        rows = self.found.setdefault((entity, second), [])
        if not rows or rows[-1][1] != row:
            rows.append((None, row))

    def _remember(self, emission: Emission) -> None:
        self._latest.update((entity, row) for entity, row in _rows(emission).items() if entity in self._seconds)

    def _entity(self, key: bytes) -> Entity:
        return int.from_bytes(key, "little", signed=True) if self._integer else key.decode()


def _rows(emission: Emission) -> Mapping[Entity, Row]:
    """Entity to its newest row."""
    rows: Iterator[Row] = zip(*(column.to_pylist() for column in emission.features.columns), strict=True)
    return dict(zip(emission.entities.to_pylist(), rows, strict=True))


def _same(logged_value: Any, served: float) -> bool:
    """Equal bits; a null of the log is served as NaN, and 0.0 is not -0.0."""
    if logged_value is None:
        return bool(np.isnan(served))
    return np.float64(logged_value).tobytes() == np.float64(served).tobytes()

"""What windows hold by numpy and pandas, and histories of events to ask it about."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import Emission, RecordBatch, Reject

START_MS = 1_000_000
COLUMNS = (
    Column("x", "double", nullable=True),
    Column("word", "string", nullable=True),
    Column("word", "string", nullable=True, role="hash"),
    Column("word", "string", nullable=True, role="text"),
)
NUMERIC = ("count", "sum", "mean", "min", "max", "std", "var", "first", "last", "count_distinct", "p50", "p95")
TEXTUAL = ("count", "count_distinct", "first", "last", "top_2")
DELAY_MS = 15


class Happened(NamedTuple):
    """An event as the oracle keeps it."""

    user: str
    time: int
    x: float | None
    word: str | None


def plan(shape: dict[str, Any], **settings: Any) -> Plan:
    aggregates = [Aggregate(f"{name}_x", "x", name, **shape) for name in NUMERIC]
    aggregates += [Aggregate(f"{name}_word", "word", name, **shape) for name in TEXTUAL]
    named = {"delay_us": DELAY_MS * 1000} | settings
    return Plan("view", "topic", "", "user", "string", "time", COLUMNS, tuple(aggregates), **named)


def batch(events: Sequence[Happened], first: int) -> RecordBatch:
    values = [json.dumps(event._asdict()).encode() for event in events]
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    return RecordBatch(
        0,
        np.frombuffer(b"".join(values), dtype=np.uint8),
        np.arange(first, first + len(values), dtype=np.int64),
        np.full((len(values), 2), -1, dtype=np.int64),
        np.stack([ends[:-1], ends[1:]], axis=1),
        np.zeros(len(values), dtype=np.int64),
    )


def expected(held: Iterable[Happened]) -> dict[str, Any]:
    """The features of a window that holds these events, given in offset order."""
    held = list(held)
    x = [event.x for event in held if event.x is not None]
    words = [event.word for event in held if event.word is not None]
    in_time = sorted((event for event in held if event.x is not None), key=lambda event: event.time)
    words_in_time = [e.word for e in sorted(held, key=lambda event: event.time) if e.word is not None]
    series = pd.Series(x, dtype=float)
    values: dict[str, Any] = {"count": len(x), "sum": math.fsum(x), "count_distinct": len(set(x))}
    values |= {name: getattr(series, name)() if x else None for name in ("mean", "min", "max")}
    values |= {name: getattr(series, name)() if len(x) > 1 else None for name in ("std", "var")}
    values |= {"first": in_time[0].x if x else None, "last": in_time[-1].x if x else None}
    values |= {"p50": float(np.quantile(x, 0.5)) if x else None, "p95": float(np.quantile(x, 0.95)) if x else None}
    texts = {
        "count": len(words),
        "count_distinct": len(set(words)),
        "first": words_in_time[0] if words else None,
        "last": words_in_time[-1] if words else None,
        "top_2": Counter(words),
    }
    return {f"{name}_x": value for name, value in values.items()} | {f"{n}_word": value for n, value in texts.items()}


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if isinstance(value, Counter):
            counts = [value[word] for word in found[name]]
            assert counts == sorted(value.values(), reverse=True)[:2], (name, found[name], value)
        elif isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
        else:
            assert found[name] == value, name


def rows(emission: Emission) -> list[tuple[str, int, dict[str, Any]]]:
    """(entity, event time in milliseconds, features) in the order of the emission."""
    times = (emission.event_time_us // 1000).tolist()
    return list(zip(emission.entities.to_pylist(), times, emission.features.to_pylist(), strict=True))


@st.composite
def histories(draw: Callable[..., Any], late: bool = True) -> list[list[Happened]]:
    """Batches of events that mostly move on; some come out of order, some too late."""
    time = START_MS
    batches = []
    back = [0, 0, 0, -3, -9, -14] + ([-40] if late else [])
    for _ in range(draw(st.integers(1, 6))):
        events = []
        for _ in range(draw(st.integers(1, 6))):
            time += draw(st.sampled_from([0, 1, 2, 8, 30, 200]))
            events.append(
                Happened(
                    draw(st.sampled_from("ab")),
                    time + draw(st.sampled_from(back)),
                    draw(st.none() | st.sampled_from([0.5, 1.0, -2.25, 3.0, 7.5, -0.0])),
                    draw(st.none() | st.sampled_from(["oak", "elm", "fir"])),
                )
            )
        batches.append(events)
    return batches


class Log:
    """Which events were taken, from the offsets of the rejects; and the clock."""

    def __init__(self) -> None:
        self.taken: list[Happened] = []
        self.clock = -1
        self.offset = 0

    def add(self, events: Sequence[Happened], rejects: Sequence[Reject]) -> None:
        refused = {reject.offset for reject in rejects}
        self.taken += [event for at, event in enumerate(events, self.offset) if at not in refused]
        self.clock = max(self.clock, *(event.time for event in events))
        self.offset += len(events)

    def of(self, user: str, start: int, end: int) -> list[Happened]:
        return [event for event in self.taken if event.user == user and start <= event.time < end]


def feed(partition: Partition, log: Log, events: Sequence[Happened], collected: list[Any]) -> None:
    first, rejects = log.offset, []
    for refused in partition.pieces(batch(events, first), now_us=10**15):
        rejects += refused
        collected += rows(partition.emit())
    log.add(events, rejects)

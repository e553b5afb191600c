"""Events as columns: thousands of them in a few arrays, whose keys and values are spans into one buffer of bytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from streaming.compile_kernels import kernel
from streaming.records import Bytes, Ints

CHUNK = 32_768
"""Events that a source yields at once: enough to hide what a call costs, little enough to stay in the cache."""


class Event(NamedTuple):
    """One event as it happened."""

    time_us: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Events:
    """N events in the order of their source.

    Attributes:
        times_us: [N] event times.
        buffer: Holds all keys and values; a key may lie within its value.
        keys: [N, 2] start and end in `buffer`.
        values: [N, 2] start and end in `buffer`.
        routes: [N] which of the source's topics each goes to.
    """

    times_us: Ints
    buffer: Bytes
    keys: Ints
    values: Ints
    routes: Bytes

    def __len__(self) -> int:
        return len(self.times_us)

    def take(self, rows: Ints | slice) -> "Events":
        """Some of the events, over the same buffer."""
        return Events(self.times_us[rows], self.buffer, self.keys[rows], self.values[rows], self.routes[rows])

    def key(self, row: int) -> bytes:
        """The key of one event."""
        return self.buffer[self.keys[row, 0] : self.keys[row, 1]].tobytes()

    def value(self, row: int) -> bytes:
        """The value of one event."""
        return self.buffer[self.values[row, 0] : self.values[row, 1]].tobytes()

    def compact(self) -> "Events":
        """The same events over a buffer that holds nothing else."""
        sizes = (self.values[:, 1] - self.values[:, 0]).sum() + (self.keys[:, 1] - self.keys[:, 0]).sum()
        buffer = np.empty(int(sizes), dtype=np.uint8)
        keys, values = np.empty_like(self.keys), np.empty_like(self.values)
        used = _copy_spans(self.buffer, self.keys, self.values, buffer, keys, values)
        return Events(self.times_us, buffer[:used], keys, values, self.routes)


def from_rows(times_us: Sequence[int], keys: Sequence[bytes], values: Sequence[bytes], route: int = 0) -> Events:
    """Columns from one object a row."""
    count = len(times_us)
    ends = np.cumsum([len(part) for pair in zip(keys, values, strict=True) for part in pair], dtype=np.int64)
    starts = np.concatenate([np.zeros(min(count, 1), dtype=np.int64), ends[:-1]])
    spans = np.stack([starts, ends], axis=1).reshape(count, 2, 2)
    buffer = bytearray().join(part for pair in zip(keys, values, strict=True) for part in pair)
    # Contiguous and writable like the arrays of other makers: for others the kernels would be compiled once more.
    return Events(
        np.array(times_us, dtype=np.int64),
        np.frombuffer(buffer, dtype=np.uint8),
        np.ascontiguousarray(spans[:, 0]),
        np.ascontiguousarray(spans[:, 1]),
        np.full(count, route, dtype=np.uint8),
    )


def rows(chunks: Iterable[Events]) -> Iterator[Event]:
    """One object an event, for those who want few."""
    for events in chunks:
        for row, time_us in enumerate(events.times_us.tolist()):
            yield Event(time_us, events.key(row), events.value(row))


def joined(parts: Sequence[Events]) -> Events:
    """Events one after the other, over a new buffer."""
    starts = np.cumsum([0, *(len(part.buffer) for part in parts[:-1])])
    return Events(
        np.concatenate([part.times_us for part in parts]),
        np.concatenate([part.buffer for part in parts]),
        np.concatenate([part.keys + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.values + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.routes for part in parts]),
    )


def limited(chunks: Iterable[Events], limit: int | None) -> Iterator[Events]:
    """The first `limit` events; all of them where it is None."""
    left = limit
    for events in chunks:
        if left is not None and len(events) >= left:
            yield events.take(slice(left))
            return
        left = None if left is None else left - len(events)
        yield events


def sorted_within(chunks: Iterable[Events], window: int) -> Iterator[Events]:
    """Events in time order, as long as none lies more than `window` rows from its place; equal times keep theirs.

    What lies further away comes when it is read, out of order as it was.
    """
    waiting: list[Events] = []
    count = 0
    for events in chunks:
        waiting.append(events)
        count += len(events)
        if count >= 2 * window:
            together = _in_order(waiting)
            yield from _pieces(together.take(slice(count - window)))
            waiting, count = [together.take(slice(count - window, None)).compact()], window
    if count:
        yield from _pieces(_in_order(waiting))


def _in_order(parts: Sequence[Events]) -> Events:
    together = joined(parts)
    if (np.diff(together.times_us) >= 0).all():
        return together
    return together.take(np.argsort(together.times_us, kind="stable"))


def _pieces(events: Events) -> Iterator[Events]:
    for start in range(0, len(events), CHUNK):
        yield events.take(slice(start, start + CHUNK))


@kernel
def _copy_spans(source: Bytes, keys: Ints, values: Ints, out: Bytes, new_keys: Ints, new_values: Ints) -> int:
    """Copy each value, and each key that does not lie within it; returns the bytes used."""
    at = 0
    for row in range(len(keys)):
        start, end = values[row, 0], values[row, 1]
        for index in range(end - start):
            out[at + index] = source[start + index]
        new_values[row, 0], new_values[row, 1] = at, at + end - start
        key_start, key_end = keys[row, 0], keys[row, 1]
        if start <= key_start and key_end <= end:
            new_keys[row, 0], new_keys[row, 1] = at + key_start - start, at + key_end - start
            at += end - start
            continue
        at += end - start
        for index in range(key_end - key_start):
            out[at + index] = source[key_start + index]
        new_keys[row, 0], new_keys[row, 1] = at, at + key_end - key_start
        at += key_end - key_start
    return at

"""What travels between the stages of the stream: records in, refused records and feature rows out."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
RejectKind = Literal["dead", "late"]


class RecordBatch(NamedTuple):
    """N records of one partition in offset order; keys and values are spans into one buffer.

    Attributes:
        partition: Kafka partition.
        buffer: uint8 bytes that hold all keys and values, in any order, with anything between them.
        offsets: int64 [N], rising; gaps are allowed (compaction, transactions).
        keys: int64 [N, 2] start and end in `buffer`; start -1 is a null key.
        values: int64 [N, 2] start and end in `buffer`; start -1 is a null value (tombstone).
        timestamps_ms: int64 [N], the broker's (not used as event time).
    """

    partition: int
    buffer: Bytes
    offsets: Ints
    keys: Ints
    values: Ints
    timestamps_ms: Ints

    @classmethod
    def of_values(cls, values: Sequence[bytes], first_offset: int) -> "RecordBatch":
        """Records of partition 0 without keys, whose offsets rise by one."""
        ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
        count = len(values)
        return cls(
            partition=0,
            buffer=np.frombuffer(b"".join(values), dtype=np.uint8),
            offsets=np.arange(first_offset, first_offset + count, dtype=np.int64),
            keys=np.full((count, 2), -1, dtype=np.int64),
            values=np.stack([ends[:-1], ends[1:]], axis=1),
            timestamps_ms=np.zeros(count, dtype=np.int64),
        )

    def rows(self, rows: slice) -> "RecordBatch":
        """Some of the records, over the same buffer."""
        return self._replace(
            offsets=self.offsets[rows],
            keys=self.keys[rows],
            values=self.values[rows],
            timestamps_ms=self.timestamps_ms[rows],
        )

    def key(self, row: int) -> bytes | None:
        """The key bytes of a row, or None where it has none."""
        return _bytes(self.buffer, self.keys[row])

    def value(self, row: int) -> bytes | None:
        """The value bytes of a row, or None where it has none."""
        return _bytes(self.buffer, self.values[row])


class Reject(NamedTuple):
    """A record that changed no feature: `dead` cannot be read or is from the future, `late` came after its windows."""

    kind: RejectKind
    partition: int
    offset: int
    reason: str
    key: bytes | None
    value: bytes | None


class Drift(NamedTuple):
    """A model has found that its input is not what it was.

    Attributes:
        column: That the model adds to the events.
        partition: Kafka partition.
        offset: Of the event at which it was found.
        time_us: Event time of that event.
        reason: In words.
    """

    column: str
    partition: int
    offset: int
    time_us: int
    reason: str


class Emission(NamedTuple):
    """Features of entities at moments of event time.

    Fresh ones stand at the clock, final ones at the ends of windows. An entity can be there several times, in rising
    order of time.

    Attributes:
        entities: string or int64 [N].
        event_time_us: int64 [N], the moment at which the values hold.
        features: N rows in one chunk, one column an aggregate in the order of `Plan.aggregates`:
            count and count_distinct int64 (0 when the window is empty), sum float64 (0.0), first and last of a string
            column string, top_k list of strings (empty), all others float64; null where the window is empty.
    """

    entities: pa.Array
    event_time_us: Ints
    features: pa.Table


def iso(time_us: int) -> str:
    """ISO 8601 in UTC, also just outside the years that datetime knows (a time of year 1 or 9999 with an offset)."""
    return f"{np.datetime64(time_us, 'us')}Z"


def _bytes(buffer: Bytes, span: Ints) -> bytes | None:
    start, end = int(span[0]), int(span[1])
    return None if start < 0 else buffer[start:end].tobytes()

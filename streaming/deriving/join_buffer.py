"""Events that wait for others: rows and bytes of both sides of a join, in arrays that grow and are compacted.

What is no longer needed stays until `compact` drops it, which costs as much as there is and is due when that has
doubled: so an event costs the same however much is held. Between two of these, the rows that were added and those that
were given out say what has changed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streaming.cells import grown
from streaming.deriving.join_input import Events
from streaming.deriving.join_rows import (
    COUNT,
    END,
    KEY,
    MATCHED,
    MIDDLE,
    NO_ROW,
    OLDER,
    START,
    TIME,
    USED,
    WAITING,
    WIDTH,
    Arrived,
    Held,
    copy_kept,
    first_seen,
    link_all,
)
from streaming.deriving.raw_json import NO_SPAN, NO_TEXT, joined
from streaming.keys import KeyIndex
from streaming.records import Bools, Bytes, Ints
from streaming.windows import NEVER_US

_FEW_ROWS = 8_192
_FEW_BYTES = 4 << 20
_SPARE_ROWS = 256
_SPARE_BYTES = 16 << 10
_NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


class Side:
    """What is held of one side of a join.

    Args:
        waits: Whether its rows wait in the heap.
        chained: Whether they are found by their key.
    """

    def __init__(self, waits: bool, chained: bool) -> None:
        self._waits, self._chained = waits, chained
        self._rows_told = self._bytes_told = 0
        nothing = np.zeros(0, dtype=np.int64)
        self.held = self._filled(np.zeros((0, WIDTH), dtype=np.int64), np.zeros(0, dtype=np.uint8), nothing, 0, 0)

    @property
    def rows(self) -> Ints:
        """The rows in use."""
        used: Ints = self.held.rows[: self.held.fill[COUNT]]
        return used

    @property
    def waiting(self) -> int:
        """How many rows wait in the heap."""
        return int(self.held.fill[WAITING])

    @property
    def used_bytes(self) -> int:
        """How many bytes of text are in use, needed or not."""
        return int(self.held.fill[USED])

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        return sum(array.nbytes for array in self.held)

    def reserve(self, arrived: Arrived, keys: int) -> None:
        """Makes room for records and for so many keys."""
        read = arrived.ids >= 0
        spans = (arrived.keys[read], arrived.bodies[read])
        self._reserve(len(arrived.ids), sum(int((each[:, 1] - each[:, 0]).sum()) for each in spans), keys)

    def _reserve(self, more: int, more_bytes: int, keys: int) -> None:
        rows, text, newest, heap, fill = self.held
        needed = int(fill[COUNT]) + more
        if needed > len(rows):
            rows = grown(rows, max(needed, 2 * len(rows)), 0)
            heap = grown(heap, len(rows), 0) if self._waits else heap
        needed = int(fill[USED]) + more_bytes
        if needed > len(text):
            text = grown(text, max(needed, 2 * len(text)), 0)
        self.held = Held(rows, text, self._chains(newest, keys), heap, fill)

    def reserve_keys(self, keys: int) -> None:
        """Makes room for so many keys."""
        self.held = self.held._replace(newest=self._chains(self.held.newest, keys))

    def _chains(self, newest: Ints, keys: int) -> Ints:
        return newest if keys <= len(newest) else grown(newest, max(keys, 2 * len(newest)), NO_ROW)

    def keep(self, kept: Bools, numbers: Ints, order: Ints) -> None:
        """Forgets rows but those of `kept` [rows], and numbers keys anew: `order` the old ids, `numbers` the new."""
        old = self.held
        count = int(kept.sum())
        used = int((self.rows[kept, END] - self.rows[kept, START]).sum())
        rows = np.empty((count + count // 2 + _SPARE_ROWS, WIDTH), dtype=np.int64)
        text = np.empty(used + used // 2 + _SPARE_BYTES, dtype=np.uint8)
        copy_kept(old.rows, old.text, kept, numbers, rows, text)
        moved = np.append(np.where(kept, np.cumsum(kept) - 1, NO_ROW), NO_ROW)
        rows[:count, OLDER] = moved[rows[:count, OLDER]]
        newest = np.full(len(order), NO_ROW, dtype=np.int64)
        known = order < len(old.newest)
        newest[known] = moved[old.newest[order[known]]]
        self.held = self._filled(rows, text, newest, count, used)

    def state(self) -> list[npt.NDArray[Any]]:
        """The arrays of a side that has just been compacted, for `restore`."""
        self._tell()
        return [self.rows, self.held.text[: self.used_bytes], self.held.newest]

    def added(self) -> list[npt.NDArray[Any]]:
        """The rows and bytes since the last `state` or `added`, for `extend`; not after a `keep`."""
        arrays: list[npt.NDArray[Any]] = [
            self.rows[self._rows_told :],
            self.held.text[self._bytes_told : self.used_bytes],
        ]
        self._tell()
        return arrays

    def extend(self, rows: Ints, text: Bytes, keys: int) -> None:
        """Takes the arrays of `added`, but lets none of the rows wait; there are so many keys by then."""
        self._reserve(len(rows), len(text), keys)
        held, first = self.held, int(self.held.fill[COUNT])
        held.rows[first : first + len(rows)] = rows
        held.text[self.used_bytes : self.used_bytes + len(text)] = text
        held.fill[:WAITING] += len(rows), len(text)
        if self._chained:
            link_all(held, first)

    def _tell(self) -> None:
        self._rows_told, self._bytes_told = len(self.rows), self.used_bytes

    def restore(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state`."""
        rows, text, newest = (array.copy() for array in arrays)
        self.held = self._filled(rows, text, newest, len(rows), len(text))

    def _filled(self, rows: Ints, text: Bytes, newest: Ints, count: int, used: int) -> Held:
        """The arrays of so many rows and bytes, all of which wait if any does."""
        heap, waiting = np.empty((len(rows) if self._waits else 0, 2), dtype=np.int64), 0
        if self._waits:
            order = np.argsort(rows[:count, TIME], kind="stable")
            heap[:count, 0], heap[:count, 1], waiting = rows[order, TIME], order, count
        return Held(rows, text, newest, heap, np.array([count, used, waiting], dtype=np.int64))


class Buffers:
    """Both sides of a join and the ids of their keys.

    Args:
        waits: Which sides wait in a heap.
        chained: Of which sides rows are found by their key.

    Attributes:
        rows_then: How many rows there were when they were last compacted.
        newest_then_us: And the greatest time of them.
    """

    def __init__(self, waits: tuple[bool, bool], chained: tuple[bool, bool]) -> None:
        self.index = KeyIndex()
        self.sides = (Side(waits[0], chained[0]), Side(waits[1], chained[1]))
        self._keys_told: int | None = None  # None: rows were forgotten since
        self._given: list[Ints] = []
        self.rows_then = self._bytes_then = self._keys_then = 0
        self.newest_then_us = -NEVER_US

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return self.index.nbytes + sum(side.nbytes for side in self.sides)

    def bytes_after(self, time_us: int) -> int:
        """Memory that rows of later times take."""
        later = [side.rows[side.rows[:, TIME] > time_us] for side in self.sides]
        return sum(rows.nbytes + int((rows[:, END] - rows[:, START]).sum()) for rows in later)

    def arrive(self, side: int, events: Events, now_us: int) -> Arrived:
        """Records of a side, for which there is room then on both."""
        ids = self.index.ids(events.text, events.entities, events.readable)
        arrived = Arrived(ids, events.times, now_us, events.keys_text, events.keys, events.body, events.bodies)
        self.sides[side].reserve(arrived, len(self.index))
        self.sides[1 - side].reserve_keys(len(self.index))
        return arrived

    def crowded(self, needless: int) -> bool:
        """Whether to compact, when so many rows at least are no longer needed."""
        rows = sum(len(side.rows) for side in self.sides)
        used_bytes = sum(side.used_bytes for side in self.sides)
        if used_bytes > 2 * self._bytes_then + _FEW_BYTES or len(self.index) > 2 * self._keys_then + _FEW_ROWS:
            return True
        return rows > 2 * self.rows_then + _FEW_ROWS or (rows > _FEW_ROWS and 2 * needless > rows)

    def compact(self, kept: tuple[Bools, Bools]) -> None:
        """Forgets rows but the kept ones of each side, and keys without any; equal contents give equal arrays."""
        keys = [side.rows[keep, KEY] for side, keep in zip(self.sides, kept, strict=True)]
        numbers, order = first_seen(np.concatenate(keys), len(self.index))
        for side, keep in zip(self.sides, kept, strict=True):
            side.keep(keep, numbers, order)
        self.index = self.index.kept(order)
        self._keys_told = None
        self._remember()

    def state(self) -> list[npt.NDArray[Any]]:
        """The arrays of buffers that have just been compacted, for `restore`."""
        self._tell()
        return [*self.index.state(), *self.sides[0].state(), *self.sides[1].state()]

    def added(self) -> list[npt.NDArray[Any]] | None:
        """What is new since the last `state` or `added`, for `extend`; None where rows were forgotten since."""
        if self._keys_told is None:
            return None
        given = np.concatenate([_NO_ROWS, *self._given])
        arrays: list[npt.NDArray[Any]] = [*self.index.state(self._keys_told), given]
        arrays += [*self.sides[0].added(), *self.sides[1].added()]
        self._tell()
        return arrays

    def extend(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `added`; the last time followed by a `compact`, which lets rows wait."""
        self.index.extend(arrays[0], arrays[1])
        for side, rows, text in zip(self.sides, arrays[3::2], arrays[4::2], strict=True):
            side.extend(rows, text, len(self.index))
        self.sides[0].rows[arrays[2], MATCHED] = 1

    def _tell(self) -> None:
        self._keys_told = len(self.index)
        self._given = []

    def restore(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Takes the arrays of `state`."""
        self.index.extend(arrays[0], arrays[1])
        self.sides[0].restore(arrays[2:5])
        self.sides[1].restore(arrays[5:8])
        self._remember()

    def _remember(self) -> None:
        self.rows_then = sum(len(side.rows) for side in self.sides)
        self.newest_then_us = max(int(side.rows[:, TIME].max(initial=-NEVER_US)) for side in self.sides)
        self._bytes_then = sum(side.used_bytes for side in self.sides)
        self._keys_then = len(self.index)

    def write(self, pairs: Ints, nulls: Bytes) -> tuple[list[bytes], list[bytes]]:
        """Gives out pairs [M, 2] of rows, of which the right one may be missing: their keys and values."""
        if self._keys_told is not None and len(pairs):
            self._given.append(pairs[:, 0].copy())
        left, right = (side.held for side in self.sides)
        lefts = left.rows[pairs[:, 0]]
        rights = np.full((len(pairs), 2), NO_SPAN, dtype=np.int64)
        found = pairs[:, 1] != NO_ROW
        rights[found] = right.rows[pairs[found, 1], MIDDLE : END + 1]
        nothing = np.full((len(pairs), 2), NO_SPAN, dtype=np.int64)
        keys = joined(left.text, np.ascontiguousarray(lefts[:, START : MIDDLE + 1]), left.text, nothing, NO_TEXT)
        spans = np.ascontiguousarray(lefts[:, MIDDLE : END + 1])
        return keys, joined(left.text, spans, right.text, rights, nulls)

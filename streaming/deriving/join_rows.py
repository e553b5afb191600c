"""The rows of one side of a join, in arrays, and the kernels that add, chain and order them.

Rows are appended in the order of arrival. Those of one key form a chain from the newest event time to the oldest, and
of equal times from the last arrival to the first. Those that wait for the watermark are in a heap.
"""

from typing import NamedTuple

import numpy as np

from streaming.compile_kernels import inlined, kernel
from streaming.memory import address, copy, prefetch
from streaming.records import Bools, Bytes, Ints

WIDTH = 7
KEY, TIME, START, MIDDLE, END, OLDER, MATCHED = range(WIDTH)
COUNT, USED, WAITING = range(3)
NO_ROW = -1
AHEAD = 8


class Arrived(NamedTuple):
    """N records of one side as the kernels take them.

    Attributes:
        ids: [N] of the join key, -1 where the record cannot be read.
        times: [N] microseconds.
        now_us: The wall clock.
        text: Holds the keys that the derived records get, which only the left side has.
        keys: [N, 2] spans into `text`.
        body: Holds what is kept of the values.
        bodies: [N, 2] spans into `body`.
    """

    ids: Ints
    times: Ints
    now_us: int
    text: Bytes
    keys: Ints
    body: Bytes
    bodies: Ints


class Held(NamedTuple):
    """The arrays of a side.

    Attributes:
        rows: [C, 7] of each row the key, the time, where in `text` its bytes begin, those of its value begin, and they
            end, the next older row of its key, and whether it has been given out.
        text: The bytes.
        newest: [K] the newest row of each key.
        heap: [C, 2] time and row of those that wait for the watermark, the earliest first.
        fill: [3] rows, bytes, and rows in the heap.
    """

    rows: Ints
    text: Bytes
    newest: Ints
    heap: Ints
    fill: Ints


@kernel
def insert(held: Held, arrived: Arrived, record: int) -> int:
    """Appends a record and puts it into the chain of its key; returns its row."""
    row = append(held, arrived, record)
    _link(held, row)
    return row


@inlined
def _link(held: Held, row: int) -> None:
    rows = held.rows
    key, time = rows[row, KEY], rows[row, TIME]
    newer, older = NO_ROW, held.newest[key]
    while older != NO_ROW and rows[older, TIME] > time:
        newer, older = older, rows[older, OLDER]
    rows[row, OLDER] = older
    if newer == NO_ROW:
        held.newest[key] = row
    else:
        rows[newer, OLDER] = row


@kernel
def link_all(held: Held, first: int) -> None:
    """Puts the rows from `first` on into the chains of their keys."""
    for row in range(first, held.fill[COUNT]):
        _link(held, row)


@kernel
def append(held: Held, arrived: Arrived, record: int) -> int:
    """Appends a record, for which there is room, and returns its row."""
    row, used = held.fill[COUNT], held.fill[USED]
    rows, to = held.rows, address(held.text)
    rows[row, KEY], rows[row, TIME], rows[row, START] = arrived.ids[record], arrived.times[record], used
    start, end = arrived.keys[record, 0], arrived.keys[record, 1]
    copy(to + used, address(arrived.text) + start, end - start)
    used += end - start
    rows[row, MIDDLE] = used
    start, end = arrived.bodies[record, 0], arrived.bodies[record, 1]
    copy(to + used, address(arrived.body) + start, end - start)
    used += end - start
    rows[row, END], rows[row, OLDER], rows[row, MATCHED] = used, NO_ROW, 0
    held.fill[COUNT], held.fill[USED] = row + 1, used
    return int(row)


@kernel
def push(held: Held, row: int) -> None:
    """Lets a row wait."""
    heap, time, at = held.heap, held.rows[row, TIME], held.fill[WAITING]
    held.fill[WAITING] += 1
    while at > 0:
        parent = (at - 1) >> 1
        if not _before(time, row, heap[parent, 0], heap[parent, 1]):
            break
        heap[at, 0], heap[at, 1] = heap[parent, 0], heap[parent, 1]
        at = parent
    heap[at, 0], heap[at, 1] = time, row


@kernel
def pop(held: Held) -> int:
    """Takes out the row of the least time that waits, of equal times the first that came; there must be one."""
    heap = held.heap
    held.fill[WAITING] -= 1
    count = held.fill[WAITING]
    first, time, row, at = heap[0, 1], heap[count, 0], heap[count, 1], 0
    while 2 * at + 1 < count:
        child = 2 * at + 1
        if child + 1 < count and _before(heap[child + 1, 0], heap[child + 1, 1], heap[child, 0], heap[child, 1]):
            child += 1
        if not _before(heap[child, 0], heap[child, 1], time, row):
            break
        heap[at, 0], heap[at, 1] = heap[child, 0], heap[child, 1]
        at = child
    heap[at, 0], heap[at, 1] = time, row
    return int(first)


@kernel
def ask_for(own: Held, other: Held, arrived: Arrived, record: int) -> None:
    """Begins to fetch the newest rows of the key of a record that is taken soon."""
    if record < len(arrived.ids) and arrived.ids[record] >= 0:
        key, size = arrived.ids[record], 8 * own.rows.shape[1]
        prefetch(address(own.rows) + size * own.newest[key])
        prefetch(address(other.rows) + size * other.newest[key])


@kernel
def with_room(pairs: Ints, count: int) -> Ints:
    """The pairs, with room for one more."""
    if count < len(pairs):
        return pairs
    larger = np.empty((2 * len(pairs), 2), dtype=np.int64)
    larger[:count] = pairs
    return larger


@kernel
def _before(time: int, row: int, other_time: int, other_row: int) -> bool:
    return time < other_time or (time == other_time and row < other_row)


@kernel
def copy_kept(rows: Ints, text: Bytes, kept: Bools, numbers: Ints, to_rows: Ints, to_text: Bytes) -> None:
    """Copies the kept rows with their keys' new numbers, `OLDER` still as before, and their bytes."""
    count, used = 0, 0
    for row in range(len(kept)):
        if not kept[row]:
            continue
        start, length = rows[row, START], rows[row, END] - rows[row, START]
        to_rows[count] = rows[row]
        to_rows[count, KEY] = numbers[rows[row, KEY]]
        to_rows[count, START], to_rows[count, MIDDLE] = used, used + rows[row, MIDDLE] - start
        copy(address(to_text) + used, address(text) + start, length)
        used += length
        to_rows[count, END] = used
        count += 1


@kernel
def first_seen(keys: Ints, known: int) -> tuple[Ints, Ints]:
    """New numbers [known] of keys in the order of their first sight, -1 for others, and the keys in that order."""
    numbers = np.full(known, NO_ROW, dtype=np.int64)
    order = np.empty(known, dtype=np.int64)
    count = 0
    for key in keys:
        if numbers[key] == NO_ROW:
            numbers[key] = count
            order[count] = key
            count += 1
    return numbers, order[:count].copy()

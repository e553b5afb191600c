"""Events with the row of a table that was valid at their time, such as edits with what the account was then.

The table is Parquet with a column that says from when on a row holds; a row holds until the next one of its key, and of
rows that begin together the last in the file counts. It is held in memory, its fields as the JSON that they become.
"""

import fnmatch
import logging
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs as pafs

from streaming.checkpoint import filesystem
from streaming.compile_kernels import kernel
from streaming.ddl import read_schema
from streaming.deriving.derivation import Derivation, Table
from streaming.deriving.join_input import Events, key_type
from streaming.deriving.lookup import Lookup
from streaming.deriving.raw_json import read_only
from streaming.keys import KeyIndex
from streaming.plan import PlanError
from streaming.records import Bytes, Ints

LOOK_US = 10_000_000

log = logging.getLogger(__name__)

Files = tuple[tuple[str, int, int], ...]


class TableLookup(Lookup):
    """Looks events up in a table, and looks at its files again after ten seconds.

    A table that cannot be read is away at first; later the one that was read before stays, with a warning.

    Args:
        derivation: Its table and the events.
        repo: Folder of the feature repository, from which a relative path counts.

    Raises:
        PlanError: The key of the events is not that of the table.
    """

    def __init__(self, derivation: Derivation, repo: str = ".") -> None:
        super().__init__(derivation)
        table = derivation.table
        if table is None:
            raise PlanError(f"Derived topic '{derivation.name}' looks up a table and names none.")
        of_events, of_table = (key_type(each, derivation.on) for each in (derivation.inputs[0], table))
        if of_events != of_table:
            raise PlanError(
                f"Derived topic '{derivation.name}': '{derivation.on}' is {of_events} in the events and {of_table} in"
                f" table '{table.name}': write it in the same way."
            )
        self._table, self._on, self._repo = table, derivation.on, repo
        self._history: History | None = None
        self._files: Files = ()
        self._looked_us = 0

    def _find(self, events: Events, now_us: int) -> tuple[Bytes, Ints, Bytes]:
        history = self._newest(now_us)
        rows = history.valid_rows(events)
        spans = np.full((len(rows), 2), -1, dtype=np.int64)
        spans[rows >= 0] = history.spans[rows[rows >= 0]]
        return history.text, spans, history.nulls

    def _newest(self, now_us: int) -> "History":
        if self._history is not None and abs(now_us - self._looked_us) < LOOK_US:
            return self._history
        try:
            files = _files(self._table, self._repo)
            if self._history is None or files != self._files:
                self._history, self._files = _read(self._table, self._on, self._repo, files), files
        except (OSError, pa.ArrowException) as error:
            if self._history is None:
                raise OSError(f"Table '{self._table.name}' cannot be read at {self._table.path!r}: {error}") from error
            log.warning("table %s cannot be read, the one read before stays: %s", self._table.name, error)
        self._looked_us = now_us
        return self._history


class History:
    """A table in memory.

    Args:
        keys: [R] string or int64.
        valid_from: [R] microseconds.
        tails: [R] what follows on an event that a row is found for.
        nulls: The same where there is none.

    Attributes:
        text: Of all tails.
        spans: [R, 2] of the tail of each row in `text`, by key and time.
        nulls: As given.
    """

    def __init__(self, keys: pa.Array, valid_from: Ints, tails: list[bytes], nulls: bytes) -> None:
        self._index = KeyIndex()
        ids = self._index.ids(*_key_texts(keys), np.ones(len(keys), dtype=np.bool_))
        order = np.lexsort((valid_from, ids))
        ends = np.cumsum([0, *map(len, tails)], dtype=np.int64)
        self._firsts = np.searchsorted(ids[order], np.arange(len(self._index) + 1))
        self._valid_from = valid_from[order]
        self.text, self.spans = _bytes(b"".join(tails)), np.stack([ends[:-1], ends[1:]], axis=1)[order]
        self.nulls = _bytes(nulls)

    def valid_rows(self, events: Events) -> Ints:
        """For each of N events the row of its key that was valid at its time, -1 where there is none."""
        ids = self._index.find(events.text, events.entities, events.readable)
        return _valid_rows(ids, events.times, self._firsts, self._valid_from)


def _bytes(text: bytes) -> Bytes:
    return read_only(np.frombuffer(text, dtype=np.uint8))


def _key_texts(keys: pa.Array) -> tuple[Bytes, Ints]:
    if pa.types.is_int64(keys.type):
        starts = np.arange(0, 8 * len(keys), 8)
        return keys.to_numpy().astype("<i8").view(np.uint8), np.stack([starts, starts + 8], axis=1)
    lengths = pc.binary_length(keys).to_numpy()
    ends = np.cumsum(lengths, dtype=np.int64)
    text = _bytes(b"".join(keys.cast(pa.large_binary()).to_pylist())).copy()
    return text, np.stack([ends - lengths, ends], axis=1)


def _files(table: Table, repo: str) -> Files:
    """Path, size and time of change of the files of a table, by name."""
    uri = table.path if "://" in table.path or table.path.startswith("/") else f"{repo}/{table.path}"
    filesystem_, path = filesystem(uri)
    info = filesystem_.get_file_info(path)
    if info.type == pafs.FileType.File:
        found = [info]
    else:
        folder, pattern = path.rsplit("/", 1) if "*" in path else (path, "*.parquet")
        listed = filesystem_.get_file_info(pafs.FileSelector(folder))
        found = [each for each in listed if fnmatch.fnmatch(each.base_name, pattern)]
    if not found:
        raise FileNotFoundError("there is no file")
    return tuple(sorted((each.path, each.size, each.mtime_ns) for each in found))


def _read(table: Table, on: str, repo: str, files: Files) -> History:
    """The rows that have a key and a time; columns are what the schema says."""
    names = list(read_schema(f"Table '{table.name}'", table.schema))
    filesystem_, _ = filesystem(table.path if "://" in table.path else repo)
    dataset = ds.dataset([path for path, _, _ in files], format="parquet", filesystem=filesystem_)
    rows = dataset.to_table(columns=names)
    rows = rows.filter(pc.and_(rows[on].is_valid(), rows[table.timestamp].is_valid()))
    for at, field in enumerate(rows.schema):
        if pa.types.is_timestamp(field.type):
            rows = rows.set_column(at, field.name, rows[at].cast(pa.timestamp("us", "UTC"), safe=False))
    keys = rows[on].cast(pa.int64() if pa.types.is_integer(rows[on].type) else pa.string()).combine_chunks()
    labels = [f"{table.name}_{name}" for name in names]
    columns = [column.to_pylist() for column in rows.columns]
    tails = [_tail(labels, values) for values in zip(*columns, strict=True)]
    valid_from = rows[table.timestamp].cast(pa.int64()).to_numpy()
    return History(keys, valid_from, tails, _tail(labels, (None,) * len(labels)))


def _tail(labels: list[str], values: tuple[Any, ...]) -> bytes:
    return b"," + orjson.dumps(dict(zip(labels, values, strict=True)), option=orjson.OPT_UTC_Z)[1:]


@kernel
def _valid_rows(ids: Ints, times: Ints, firsts: Ints, valid_from: Ints) -> Ints:
    """For each of N events the last row of its key that begins at its time or before, -1 where there is none."""
    rows = np.full(len(ids), -1, dtype=np.int64)
    for event in range(len(ids)):
        if ids[event] < 0:
            continue
        low, high = firsts[ids[event]], firsts[ids[event] + 1]
        first = low
        while low < high:
            middle = (low + high) >> 1
            if valid_from[middle] <= times[event]:
                low = middle + 1
            else:
                high = middle
        if low > first:
            rows[event] = low - 1
    return rows

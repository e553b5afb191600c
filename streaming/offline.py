"""The offline log: every emitted feature row as Parquet parts that Feast's duckdb store reads by a glob.

A part is named by its topic, partition and the offsets that it covers (`edits-00000-500-1500.parquet`: records 500 to
1499), so writing a range again after a crash replaces it. Rows made by the clock alone, with no new record, cover an
empty range and carry the clock in the name as well. Rows are unique by (entity, event timestamp, created timestamp): a
reader that wants one row an (entity, event timestamp) keeps the one with the newest created timestamp, as Feast's
point-in-time join does, and neither a revision nor a row that lies in two parts for a while changes what it gets.

Parts of a second each are merged by `compact` into a few big ones (`edits-00000-0-90500-merged.parquet`), which name
the parts that they replace in their footers. Those stay until the next call, so that no reader that has listed them
misses one; a merged part and what it replaces hold the same rows.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaming.checkpoint import filesystem, write_atomic
from streaming.records import Emission

log = logging.getLogger(__name__)

NAME = re.compile(
    r"(?P<topic>.+)-(?P<partition>\d{5})-(?P<first>\d+)-(?P<next>\d+)(?:-(?P<clock>-?\d+))?(?P<merged>-merged)?\.parquet"
)
TEMPORARY = re.compile(r"(?P<name>.+\.parquet)\.[0-9a-f]{32}\.tmp")
TIMESTAMP = pa.timestamp("us", tz="UTC")
REPLACES = b"millrace.replaces"
FEWEST_PARTS = 8
SMALL_BYTES = 4 << 20
MERGED_BYTES = 128 << 20
NO_CLOCK = -(1 << 63)


class _Part(NamedTuple):
    path: str
    name: str
    bytes: int
    first: int
    next_offset: int
    clock_us: int
    merged: bool


class OfflineLog:
    """Parts of one view in one folder.

    Args:
        uri: folder, local or any URI of Arrow's file systems.
        topic: first part of the file names.
        join_key: name of the entity column.
        event_timestamp: name of the column with the clock at which a row holds.
        created_timestamp: name of the column with the wall clock at which a row was made.
    """

    def __init__(
        self,
        uri: str,
        topic: str,
        join_key: str,
        event_timestamp: str = "event_timestamp",
        created_timestamp: str = "created_timestamp",
    ) -> None:
        self._fs, self._folder = filesystem(uri)
        self._topic = topic
        self._names = (join_key, event_timestamp, created_timestamp)
        self._aligned: dict[int, pa.Schema] = {}

    def write(
        self, partition: int, first: int, next_offset: int, clock_us: int, rows: Sequence[tuple[Emission, int]]
    ) -> None:
        """Write one part atomically; nothing when there are no rows. The first one aligns the parts before it.

        Args:
            partition: the Kafka partition.
            first: offset of the first record that the rows reflect and the part before did not.
            next_offset: offset after the last one.
            clock_us: the partition clock, UTC microseconds.
            rows: emissions in order, each with the wall clock (microseconds) at which it was made.
        """
        tables = [self._table(emission, created_us) for emission, created_us in rows if len(emission.entities)]
        if not tables:
            return
        table = pa.concat_tables(tables)
        self._fs.create_dir(self._folder, recursive=True)
        if self._aligned.get(partition) != table.schema:
            self.align(partition, table.schema)
        clock = "" if next_offset > first else f"-{clock_us}"
        self._put(f"{self._topic}-{partition:05d}-{first}-{next_offset}{clock}.parquet", table, "lz4")

    def truncate(self, partition: int, offset: int, clock_us: int, aside: str = "") -> int:
        """Remove the parts of a partition that go beyond a checkpoint, and what a crash left; returns how many parts.

        A merged part that begins before the checkpoint and ends behind it (the checkpoint was lost and the topic no
        longer has the records) is renamed to `kept-...`: it is read as before and touched no more.

        Args:
            partition: the Kafka partition.
            offset: next offset of the checkpoint (of the first record to be read, when there is none).
            clock_us: clock of the checkpoint, for the parts that cover no record.
            aside: folder in the log's, which a glob does not read, to which they are moved instead.
        """
        for info in self._files():
            temporary = TEMPORARY.fullmatch(info.base_name)
            if temporary and self._part(info, temporary["name"], partition):
                self._fs.delete_file(info.path)
        self._remove_replaced(partition)
        removed = 0
        for part in self._parts(partition):
            # A part of records ends where the records end, whatever the clock is.
            if (part.next_offset, part.clock_us) <= (offset, clock_us):
                continue
            if part.merged and part.first < offset:
                log.warning("merged part goes beyond the checkpoint", extra={"path": part.path, "offset": offset})
                self._fs.move(part.path, f"{self._folder}/kept-{part.name}")
                continue
            if aside:
                self._fs.create_dir(f"{self._folder}/{aside}", recursive=True)
                self._fs.move(part.path, f"{self._folder}/{aside}/{part.name}")
            else:
                self._fs.delete_file(part.path)
            removed += 1
        return removed

    def compact(self, partition: int, offset: int, clock_us: int) -> int:
        """Remove the parts that earlier calls merged, then merge neighbours up to a checkpoint; returns how many.

        To be called by the owner of the partition, after a checkpoint, about once a minute: the pause is the time that
        readers have to finish with the parts that were merged. Sizes grow like the digits of a counter, so a row is
        rewritten a logarithmic number of times. A crash between any two steps leaves rows that lie in two parts; the
        next call, or `truncate`, removes the smaller ones.

        Args:
            partition: the Kafka partition.
            offset: next offset of the oldest checkpoint that a restart may still choose (of the two that are kept the
                older one): a part is never merged across it.
            clock_us: clock of that checkpoint.
        """
        self._remove_replaced(partition)
        parts = [part for part in self._parts(partition) if (part.next_offset, part.clock_us) <= (offset, clock_us)]
        merged = 0
        for group in _groups(parts):
            if len(group) < FEWEST_PARTS:
                continue
            tables: list[pa.Table] = []
            for part in group:
                table = self._read(part)
                if tables and table.schema != tables[0].schema:
                    break
                tables.append(table)
            group = group[: len(tables)]
            if len(group) >= FEWEST_PARTS:
                self._merge(partition, group, tables)
                merged += len(group)
        return merged

    def align(self, partition: int, schema: pa.Schema) -> int:
        """Give the parts of a partition the columns and types of a schema; returns how many parts were rewritten.

        duckdb takes the columns of a glob from its first file and fails where another lacks one, so that a view that
        gains a feature could not be read. Columns that the schema does not have stay; a part whose column cannot be
        cast is logged and left. Each part is replaced atomically.

        Args:
            partition: the Kafka partition.
            schema: of the parts that are going to be written.
        """
        rewritten = 0
        for part in self._parts(partition):
            with self._fs.open_input_file(part.path) as file:
                found = pq.read_schema(file)
            if all(name in found.names and found.field(name).type == schema.field(name).type for name in schema.names):
                continue
            try:
                table = _aligned(self._read(part), schema)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                log.error("part does not fit the view", extra={"path": part.path, "error": str(error)})
                continue
            self._put(part.name, table.replace_schema_metadata(found.metadata), "zstd")
            rewritten += 1
        if rewritten:
            log.info("parts given the view's columns", extra={"folder": self._folder, "parts": rewritten})
        self._aligned[partition] = schema
        return rewritten

    def _merge(self, partition: int, group: Sequence[_Part], tables: Sequence[pa.Table]) -> None:
        first, last = group[0], group[-1]
        clock = "" if last.clock_us == NO_CLOCK else f"-{last.clock_us}"
        name = f"{self._topic}-{partition:05d}-{first.first}-{last.next_offset}{clock}-merged.parquet"
        replaced = json.dumps([part.name for part in group if part.name != name]).encode()
        self._put(name, pa.concat_tables(tables).replace_schema_metadata({REPLACES: replaced}), "zstd")

    def _remove_replaced(self, partition: int) -> None:
        parts = self._parts(partition)
        present = {part.name: part for part in parts}
        for part in parts:
            if not part.merged or len(present) == 1:
                continue
            with self._fs.open_input_file(part.path) as file:
                metadata = pq.read_schema(file).metadata or {}
            for name in json.loads(metadata.get(REPLACES, b"[]")):
                if name in present:
                    self._fs.delete_file(present[name].path)

    def _parts(self, partition: int) -> list[_Part]:
        """The parts of a partition in the order of their rows."""
        found = [self._part(info, info.base_name, partition) for info in self._files()]
        return sorted((part for part in found if part), key=lambda part: (part.next_offset, part.clock_us))

    def _part(self, info: pafs.FileInfo, name: str, partition: int) -> _Part | None:
        part = NAME.fullmatch(name)
        if part is None or part["topic"] != self._topic or int(part["partition"]) != partition:
            return None
        clock_us = NO_CLOCK if part["clock"] is None else int(part["clock"])
        merged = part["merged"] is not None
        return _Part(info.path, name, info.size, int(part["first"]), int(part["next"]), clock_us, merged)

    def _files(self) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self._fs.get_file_info(pafs.FileSelector(self._folder, allow_not_found=True))
        return found

    def _read(self, part: _Part) -> pa.Table:
        with self._fs.open_input_file(part.path) as file:
            return pq.read_table(file).replace_schema_metadata()

    def _put(self, name: str, table: pa.Table, compression: str) -> None:
        times = list(self._names[1:])
        sink = pa.BufferOutputStream()
        # Dictionaries cost most of the time and serve only what repeats.
        pq.write_table(table, sink, compression=compression, use_dictionary=list(self._names), write_statistics=times)
        write_atomic(self._fs, f"{self._folder}/{name}", memoryview(sink.getvalue()))

    def _table(self, emission: Emission, created_us: int) -> pa.Table:
        join_key, event_timestamp, created_timestamp = self._names
        created = np.full(len(emission.entities), created_us, dtype=np.int64)
        return pa.table(
            {
                join_key: emission.entities,
                **dict(zip(emission.features.column_names, emission.features.columns, strict=True)),
                event_timestamp: pa.array(emission.event_time_us, TIMESTAMP),
                created_timestamp: pa.array(created, TIMESTAMP),
            }
        )


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Neighbours to be merged: newest first, an older part joins if it is small or no bigger than those behind it."""
    group: list[_Part] = []
    size = 0
    for part in reversed(parts):
        if group and (part.bytes > max(size, SMALL_BYTES) or size + part.bytes > MERGED_BYTES):
            yield group[::-1]
            group, size = [], 0
        group.append(part)
        size += part.bytes
    yield group[::-1]


def _aligned(table: pa.Table, schema: pa.Schema) -> pa.Table:
    names = [*schema.names, *(name for name in table.column_names if name not in schema.names)]
    columns = {}
    for name in names:
        if name not in table.column_names:
            columns[name] = pa.nulls(len(table), schema.field(name).type)
        elif name in schema.names:
            columns[name] = table.column(name).cast(schema.field(name).type)
        else:
            columns[name] = table.column(name)
    return pa.table(columns)

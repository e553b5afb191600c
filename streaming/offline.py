"""The offline log: every emitted feature row as Parquet parts that Feast's duckdb store reads by a glob.

A part is named by its topic, partition and the offsets that it covers (`edits-00000-500-1500.parquet`: records 500 to
1499), so writing a range again after a crash replaces it. Rows made by the clock alone, with no new record, cover an
empty range and carry the clock in the name as well. A reader that wants one row an (entity, event timestamp) keeps the
one with the newest created timestamp, as Feast's point-in-time join does.
"""

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaming.checkpoint import filesystem, write_atomic
from streaming.records import Emission

NAME = re.compile(r"(?P<topic>.+)-(?P<partition>\d{5})-(?P<first>\d+)-(?P<next>\d+)(?:-(?P<clock>-?\d+))?\.parquet")
TIMESTAMP = pa.timestamp("us", tz="UTC")


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

    def write(
        self, partition: int, first: int, next_offset: int, clock_us: int, rows: Sequence[tuple[Emission, int]]
    ) -> None:
        """Write one part atomically; nothing when there are no rows.

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
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(tables), sink)
        self._fs.create_dir(self._folder, recursive=True)
        clock = "" if next_offset > first else f"-{clock_us}"
        name = f"{self._topic}-{partition:05d}-{first}-{next_offset}{clock}.parquet"
        write_atomic(self._fs, f"{self._folder}/{name}", memoryview(sink.getvalue()))

    def truncate(self, partition: int, offset: int, clock_us: int) -> int:
        """Remove the parts of a partition that go beyond a checkpoint; returns how many.

        Args:
            partition: the Kafka partition.
            offset: next offset of the checkpoint (of the first record to be read, when there is none).
            clock_us: clock of the checkpoint, for the parts that cover no record.
        """
        removed = 0
        for info in self._fs.get_file_info(pafs.FileSelector(self._folder, allow_not_found=True)):
            part = NAME.fullmatch(info.base_name)
            if part is None or part["topic"] != self._topic or int(part["partition"]) != partition:
                continue
            beyond = int(part["next"]) > offset
            if part["clock"] is not None:
                beyond |= int(part["next"]) == offset and int(part["clock"]) > clock_us
            if beyond:
                self._fs.delete_file(info.path)
                removed += 1
        return removed

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

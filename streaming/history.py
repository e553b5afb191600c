"""Recorded events as decoded columns: Parquet, JSON lines (also gzipped), or a topic from its beginning to its end now.

An input is cut into pieces, in the order in which they are to be computed; a piece can be decoded by any process. What
an offset counts: rows of Parquet, bytes of (decompressed) JSON lines, over all files of a folder in the order of their
names; Kafka's own offsets of a topic. Files are one partition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaming import arrow_columns
from streaming.checkpoint import filesystem
from streaming.consumer import Consumer
from streaming.decode import Columns
from streaming.plan import Plan
from streaming.records import Bytes, Ints, RecordBatch, Reject
from streaming.transformations import Reader

ROWS_A_CHUNK = 131_072
BYTES_A_CHUNK = 16 << 20
LINE_BYTES = 64 << 20
FETCH_S = 1.0
SILENT_S = 60.0
NEWLINE = 10


class HistoryError(ValueError):
    """An input that cannot be read, in one sentence."""


class Decoded(NamedTuple):
    """N records of one partition: their columns, their offsets [N], and those that cannot be read."""

    partition: int
    columns: Columns
    offsets: Ints
    rejects: list[Reject]


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file; `first` is the offset of its first row."""

    uri: str
    group: int
    first: int


@dataclass(frozen=True)
class ByteRange:
    """The lines of a file that begin in [start, end); `first` is the offset of the file's first byte."""

    uri: str
    start: int
    end: int
    first: int


@dataclass(frozen=True)
class Lines:
    """Whole lines that were read already; `first` is the offset of the first byte."""

    data: bytes
    first: int


Piece = RowGroup | ByteRange | Lines | RecordBatch


def pieces(plan: Plan, source: str) -> Iterator[Piece]:
    """The pieces of `kafka:TOPIC`, of a .parquet, .jsonl or .jsonl.gz file, or of a folder of one such kind.

    Raises:
        HistoryError: There is nothing of that name, or it is of no or of several kinds.
        TableError: A Parquet file lacks what the plan reads.
    """
    if source.startswith("kafka:"):
        topic, reader = source.removeprefix("kafka:"), f"millrace-backfill-{plan.view}"
        yield from records(plan.bootstrap_servers, topic, reader)
        return
    first = 0
    for uri, kind, size in _files(source):
        if kind == ".parquet":
            file = _open_parquet(uri)
            arrow_columns.check_schema(Reader(plan).source, file.schema_arrow, uri)
            for group in range(file.num_row_groups):
                yield RowGroup(uri, group, first)
                first += file.metadata.row_group(group).num_rows
        elif kind == ".gz":
            for lines in _unzipped(uri, first):
                yield lines
                first = lines.first + len(lines.data)
        else:
            for start in range(0, size, BYTES_A_CHUNK):
                yield ByteRange(uri, start, min(start + BYTES_A_CHUNK, size), first)
            first += size


def decoded(plan: Plan, piece: Piece) -> Iterator[Decoded]:
    """The records of a piece, in chunks that bound memory.

    Raises:
        HistoryError: A file is damaged or a line is longer than 64 MiB.
    """
    match piece:
        case RowGroup():
            yield from _rows(plan, piece)
        case ByteRange():
            filesystem_, path = filesystem(piece.uri)
            with filesystem_.open_input_file(path) as file:
                data, start = _range(file, piece)
            yield _from_lines(plan, data, piece.first + start)
        case Lines():
            yield _from_lines(plan, piece.data, piece.first)
        case RecordBatch():
            columns, rejects = Reader(plan).decode(piece)
            yield Decoded(piece.partition, columns, piece.offsets, rejects)


def records(bootstrap_servers: str, topic: str, group: str) -> Iterator[RecordBatch]:
    """All records that the partitions of a topic hold now, each partition in the order of its offsets.

    Raises:
        HistoryError: There is no such topic, or the broker falls silent.
    """
    from kafka import KafkaAdminClient

    admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers.split(","))
    try:
        if topic not in admin.list_topics():
            raise HistoryError(f"There is no topic {topic!r} at {bootstrap_servers}.")
        numbers = [each["partition_index"] for each in admin.describe_topics([topic])[0]["partitions"]]
    finally:
        admin.close()
    consumer = Consumer(bootstrap_servers, topic, group)
    try:
        consumer.assign(numbers)
        for number in numbers:
            consumer.seek(number, None)
        ends = consumer.end_offsets()
        silent_s = 0.0
        while any(consumer.position(number) < ends[number] for number in numbers):
            batches = consumer.poll(FETCH_S, ROWS_A_CHUNK)
            silent_s = 0.0 if batches else silent_s + FETCH_S
            if silent_s >= SILENT_S:
                raise HistoryError(f"Kafka at {bootstrap_servers} gave nothing of {topic!r} for {SILENT_S:.0f} s.")
            yield from (piece for batch in batches if len((piece := _until(batch, ends[batch.partition])).offsets))
    finally:
        consumer.close()


def _files(source: str) -> Sequence[tuple[str, str, int]]:
    """Path, kind and size of the files of an input, by name."""
    filesystem_, path = filesystem(source)
    info = filesystem_.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise HistoryError(f"There is no input {source}: give a file, a folder, or kafka:TOPIC.")
    if info.type == pafs.FileType.File:
        found = [info]
    else:
        listed = filesystem_.get_file_info(pafs.FileSelector(path, recursive=True))
        found = [each for each in listed if each.type == pafs.FileType.File and each.base_name[0] not in "._"]
    prefix = source[: len(source) - len(path)] if source.endswith(path) else ""
    files = [(prefix + each.path, _kind(each.base_name), each.size) for each in sorted(found, key=lambda f: f.path)]
    kinds = {".jsonl" if kind == ".gz" else kind for _, kind, _ in files}
    if len(kinds) != 1 or "?" in kinds:
        raise HistoryError(
            f"The input {source} must be .parquet, or .jsonl or .jsonl.gz files:"
            f" it is {', '.join(sorted({each.base_name for each in found})[:5]) or 'an empty folder'}."
        )
    return files


def _kind(name: str) -> str:
    for kind in (".parquet", ".jsonl", ".ndjson", ".json"):
        if name.endswith(kind):
            return ".parquet" if kind == ".parquet" else ".jsonl"
        if kind != ".parquet" and name.endswith(kind + ".gz"):
            return ".gz"
    return "?"


def _open_parquet(uri: str) -> pq.ParquetFile:
    filesystem_, path = filesystem(uri)
    try:
        return pq.ParquetFile(filesystem_.open_input_file(path), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise HistoryError(f"{uri} is no Parquet file: {error}") from None


def _rows(plan: Plan, piece: RowGroup) -> Iterator[Decoded]:
    file = _open_parquet(piece.uri)
    reader = Reader(plan)
    known = [name for name in arrow_columns.names(reader.source) if name in file.schema_arrow.names]
    first = piece.first
    try:
        for batch in file.iter_batches(ROWS_A_CHUNK, [piece.group], known):
            offsets = np.arange(first, first + batch.num_rows)
            columns, rejects = reader.convert(batch, 0, offsets)
            yield Decoded(0, columns, offsets, rejects)
            first += batch.num_rows
    except OSError as error:
        raise HistoryError(f"Row group {piece.group} of {piece.uri} is damaged: {error}") from None


def _range(file: pa.NativeFile, piece: ByteRange) -> tuple[bytes, int]:
    """The lines that begin in a range, and where the first of them begins."""
    start = piece.start
    if start:
        file.seek(start - 1)
        start += len(_rest_of_line(file, piece.uri)) - 1
    if start >= piece.end:
        return b"", start
    file.seek(start)
    data = file.read(piece.end - start)
    return data if data.endswith(b"\n") else data + _rest_of_line(file, piece.uri), start


def _rest_of_line(file: pa.NativeFile, uri: str) -> bytes:
    """The bytes up to and with the next newline, or to the end of the file."""
    parts: list[bytes] = []
    size = 0
    while more := file.read(1 << 16):
        end = more.find(b"\n")
        if end >= 0:
            return b"".join([*parts, more[: end + 1]])
        parts.append(more)
        size += len(more)
        if size > LINE_BYTES:
            raise HistoryError(f"{uri} holds a line of more than {LINE_BYTES >> 20} MiB: it is no file of JSON lines.")
    return b"".join(parts)


def _unzipped(uri: str, first: int) -> Iterator[Lines]:
    """Chunks of whole lines of a gzipped file."""
    filesystem_, path = filesystem(uri)
    rest = b""
    with filesystem_.open_input_stream(path, compression="gzip") as file:
        while True:
            try:
                more = file.read(BYTES_A_CHUNK)
            except OSError as error:
                raise HistoryError(f"{uri} is no whole gzip file: {error}") from None
            data = rest + more
            end = len(data) if not more else data.rfind(b"\n") + 1
            if end:
                yield Lines(data[:end], first)
                first += end
            rest = data[end:]
            if len(rest) > LINE_BYTES:
                raise HistoryError(f"{uri} holds a line of more than {LINE_BYTES >> 20} MiB: it is no JSON lines.")
            if not more:
                return


def _from_lines(plan: Plan, data: bytes, first: int) -> Decoded:
    """Each line is a record, but for empty ones; a line may end with a carriage return too."""
    buffer: Bytes = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(buffer == NEWLINE)
    if len(buffer) and buffer[-1] != NEWLINE:
        ends = np.append(ends, len(buffer))
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if len(ends) else ends
    ends = ends - ((ends > starts) & (buffer[np.maximum(ends - 1, 0)] == 13)) if len(ends) else ends
    spans = np.stack([starts, ends], axis=1).astype(np.int64)[ends > starts]
    count = len(spans)
    offsets = spans[:, 0] + first
    batch = RecordBatch(0, buffer, offsets, np.full((count, 2), -1, np.int64), spans, np.zeros(count, np.int64))
    columns, rejects = Reader(plan).decode(batch)
    return Decoded(0, columns, offsets, rejects)


def _until(batch: RecordBatch, end: int) -> RecordBatch:
    return batch.rows(slice(int(np.searchsorted(batch.offsets, end))))

"""Real events from files: JSON lines as they are, CSV and Parquet as one JSON object a row.

A file is read in pieces. Rows come in the order of their time as long as none lies more than `SORT_ROWS` from its
place, which holds for a file in any order that is no longer than that.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from streaming.events import Topic
from streaming.producing.columns import CHUNK, Events, from_rows, sorted_within
from streaming.records import Ints

SORT_ROWS = 100_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
Format = Literal["jsonl", "csv", "parquet"]

_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
_SUFFIXES |= {".parquet": "parquet", ".pq": "parquet"}
_BLOCKS = pyarrow.csv.ReadOptions(block_size=16 * 2**20)  # the types of columns are those of the first one
_JSON = orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z | orjson.OPT_SERIALIZE_NUMPY


def replay(path: Path, time: str, key: str) -> Iterator[Events]:
    """A file's events: `.jsonl` (also `.ndjson`, `.json`), `.csv`, both also with `.gz`, or `.parquet`.

    Args:
        path: the file.
        time: the field with the event time: ISO 8601, integer epoch milliseconds, or a Parquet timestamp; without a
            zone it is UTC.
        key: the field whose text becomes the message key.

    Raises:
        ValueError: the file or a field is not there, or a row can't be read; the sentence names the row.
    """
    kind = file_format(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; correct --file.")
    read = {"jsonl": json_lines, "csv": _csv, "parquet": _parquet}[kind]
    return sorted_within(read(path, time, key), SORT_ROWS)


def file_format(path: Path) -> Format:
    """The format that a file's name says.

    Raises:
        ValueError: it says none that is known.
    """
    name = path.with_suffix("") if path.suffix == ".gz" else path
    kind = _SUFFIXES.get(name.suffix)
    if kind is None or (kind == "parquet" and path.suffix == ".gz"):
        raise ValueError(f"{path}: name a .jsonl or .csv file (each also with .gz), or a .parquet file.")
    return kind


def topic_of(name: str, time: str, key: str, numbers: Sequence[str] = ()) -> Topic:
    """The type of a replayed file's topic, as far as faults need it."""
    return Topic(name, version=1, key=key, timestamp=time, fields=dict.fromkeys(numbers, "double"), partitions=2)


def json_lines(path: Path, time: str, key: str, what: str = "an object") -> Iterator[Events]:
    """One event a line, in the order of the file; the value is the line itself, blank lines are skipped.

    Raises:
        ValueError: a line is not `what` with a key and a time; the sentence names the line.
    """

    def event(number: int, line: bytes) -> tuple[int, bytes, bytes]:
        try:
            fields = orjson.loads(line)
            return _time_us(fields[time]), _text(fields[key]), line.rstrip(b"\r\n")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number}: is not {what} with a {key} and a {time} with its zone ({error!r})."
            ) from None

    try:
        with _opened(path) as lines:
            some: list[tuple[int, bytes, bytes]] = []
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    some.append(event(number, line))
                if len(some) == CHUNK:
                    yield _columns(some)
                    some = []
            if some:
                yield _columns(some)
    except (OSError, EOFError) as error:
        how = "as gzip" if path.suffix == ".gz" else "at all"
        raise ValueError(f"{path}: can't be read {how} ({error}); fetch the file again.") from None


def from_table(batch: pa.RecordBatch, time: str, key: str, path: Path) -> Events:
    """The rows of a table as events, each value one JSON object of all columns.

    Raises:
        ValueError: a column is missing, has a type without a meaning, or holds a null.
    """
    for option, column in (("--time", time), ("--key", key)):
        if column not in batch.schema.names:
            names = ", ".join(batch.schema.names)
            raise ValueError(f"{path}: has no column {column!r} for {option}; it has {names}.")
        if batch.column(column).null_count:
            raise ValueError(f"{path}: the column {column!r} for {option} holds a null; replay rows that have it.")
    times = _timestamps(batch.column(time), time, path)
    if not pa.types.is_integer(batch.schema.field(time).type):
        batch = batch.set_column(batch.schema.get_field_index(time), time, _iso(times))
    keys = [_text(value) for value in batch.column(key).to_pylist()]
    try:
        values = [orjson.dumps(row, default=str, option=_JSON) for row in batch.to_pylist()]
    except TypeError as error:
        raise ValueError(f"{path}: holds a value that JSON can't ({error}).") from None
    return from_rows(times.cast(pa.int64()).to_pylist(), keys, values)


def numeric_columns(path: Path) -> list[str]:
    """The columns of numbers of a CSV or Parquet file, or the fields of numbers of the first line of JSON."""
    kind = file_format(path)
    if kind == "jsonl":
        with _opened(path) as lines:
            first = next((line for line in lines if not line.isspace()), b"{}")
        try:
            fields = orjson.loads(first)
        except ValueError:
            return []
        items = fields.items() if isinstance(fields, dict) else ()
        return [name for name, value in items if isinstance(value, int | float) and not isinstance(value, bool)]
    schema = pq.read_schema(path) if kind == "parquet" else next(_csv_batches(path)).schema
    return [field.name for field in schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)]


def _columns(events: Sequence[tuple[int, bytes, bytes]]) -> Events:
    times_us, keys, values = zip(*events, strict=True)
    return from_rows(times_us, keys, values)


def _csv(path: Path, time: str, key: str) -> Iterator[Events]:
    for batch in _csv_batches(path):
        yield from_table(batch, time, key, path)


def _csv_batches(path: Path) -> Iterator[pa.RecordBatch]:
    return _read(path, lambda: iter(pyarrow.csv.open_csv(path, read_options=_BLOCKS)))


def _parquet(path: Path, time: str, key: str) -> Iterator[Events]:
    for batch in _read(path, lambda: pq.ParquetFile(path).iter_batches(batch_size=CHUNK)):
        yield from_table(batch, time, key, path)


def _read(path: Path, open_batches: Callable[[], Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    try:
        yield from (batch for batch in open_batches() if batch.num_rows)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: can't be read as {file_format(path)} ({reason}).") from None


def _timestamps(column: pa.Array, time: str, path: Path) -> pa.Array:
    """Event times as timestamp[us, UTC]."""
    kind = column.type
    try:
        if pa.types.is_integer(kind):
            return pc.multiply(column.cast(pa.int64()), 1000).cast(pa.timestamp("us", "UTC"))
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return pa.array([_time_us(text, UTC) for text in column.to_pylist()]).cast(pa.timestamp("us", "UTC"))
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return column.cast(pa.timestamp("us", kind.tz if pa.types.is_timestamp(kind) else None), safe=False).cast(
                pa.timestamp("us", "UTC")
            )
    except ValueError as error:
        raise ValueError(f"{path}: the column {time!r} for --time holds what is no time ({error}).") from None
    raise ValueError(f"{path}: the column {time!r} for --time is of type {kind}, which is no time.")


def _iso(times: pa.Array) -> pa.Array:
    """ISO 8601 texts with a Z, in milliseconds, or in microseconds where one of the times has them."""
    micros = times.cast(pa.int64())
    unit = "us" if len(micros) and pc.any(pc.not_equal(_remainder(micros), 0)).as_py() else "ms"
    return pc.strftime(times.cast(pa.timestamp(unit, "UTC")), format="%Y-%m-%dT%H:%M:%SZ")


def _remainder(micros: pa.Array) -> pa.Array:
    numbers: Ints = micros.to_numpy()
    return pa.array(np.remainder(numbers, 1000))


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _time_us(value: Any, zone: Any = None) -> int:
    """Microseconds since 1970 of ISO 8601 (in `zone` where it names none) or of integer epoch milliseconds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value * 1000
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None and zone is not None:
        moment = moment.replace(tzinfo=zone)
    return (moment - EPOCH) // MICROSECOND


def _text(value: Any) -> bytes:
    """A key's bytes: the text of a string, JSON of anything else."""
    if value is None:
        raise ValueError("the key is null")
    return value.encode() if isinstance(value, str) else json.dumps(value, default=str).encode()

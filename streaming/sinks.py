"""The online side: emissions become rows of a Feast online store, and never an older value over a newer one.

`GuardedSqliteOnlineStore` is Feast's sqlite store with its own table layout (one row an entity and feature, so that
`get_online_features` works unchanged) plus one column, `event_us`: Feast keeps whole seconds only, and the guard
compares microseconds. Value protos are written as bytes made straight from the columns; writers in several processes
take turns by a file lock, because sqlite has one writer.
"""

import fcntl
import logging
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from feast import Entity, FeatureStore, FeatureView, RepoConfig
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.infra.online_stores.sqlite import (
    SqliteOnlineStore,
    SqliteOnlineStoreConfig,
    _alter_table_add_column_if_missing,
    _quote_id,
    _table_id,
    adapt_datetime_epoch,
)
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value, ValueType
from feast.types import Float32, Float64, Int32, Int64

from streaming.records import Emission, Ints

log = logging.getLogger(__name__)

Row = tuple[bytes, str, bytes, str | None, int, int | None, int]
TAGS: dict[Any, int] = {Int64: 0x20, Int32: 0x18, Float64: 0x29, Float32: 0x35}
DTYPES: dict[int, type[np.generic]] = {0x20: np.int64, 0x18: np.int64, 0x29: np.float64, 0x35: np.float32}
BUSY_S = 30.0
CACHE_KIB = 64_000


class OnlineSinkError(ValueError):
    """A feature view whose values this sink cannot write."""


class GuardedSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Settings in feature_store.yaml: `type: streaming.sinks.GuardedSqliteOnlineStore` and `path`."""

    type: Literal["streaming.sinks.GuardedSqliteOnlineStore"] = "streaming.sinks.GuardedSqliteOnlineStore"  # type: ignore[assignment]


class GuardedSqliteOnlineStore(SqliteOnlineStore):
    """Feast's sqlite store in WAL mode, whose upsert keeps the newer event time; many readers, writers in turn."""

    _conn: sqlite3.Connection | None = None

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        if self._conn is None:
            if config.online_store.vector_enabled or config.online_store.enable_openai_compatible_store:
                raise OnlineSinkError("GuardedSqliteOnlineStore has no vector search: use Feast's own sqlite store.")
            path = Path(self._get_db_path(config))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._conn = sqlite3.connect(
                path,
                timeout=BUSY_S,
                detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES,
                check_same_thread=False,
            )
            self._conn.execute("PRAGMA journal_mode=WAL")
            self._conn.execute("PRAGMA synchronous=NORMAL")
            self._conn.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        return self._conn

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """What `feast apply` calls: make and drop tables."""
        with exclusive(self._get_db_path(config)):
            super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
            for table in tables_to_keep:
                name = _table_id(config.project, table, config.registry.enable_online_feature_view_versioning)
                _alter_table_add_column_if_missing(self._get_conn(config), name, "event_us", "INTEGER")

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's own way in (`write_to_online_store`, `push`, `materialize`), guarded like ours."""
        rows: list[Row] = []
        for entity_key, values, timestamp, created in data:
            key = serialize_entity_key(entity_key, config.entity_key_serialization_version)
            event = timestamp.replace(tzinfo=UTC) if timestamp.tzinfo is None else timestamp
            created_s = None if created is None else _feast_seconds(_microseconds(created) // 1_000_000)
            event_us = _microseconds(event)
            event_s = _feast_seconds(event_us // 1_000_000)
            for name, value in values.items():
                text = extract_text_and_num(value, False)[0]
                rows.append((key, name, value.SerializeToString(), text, event_s, created_s, event_us))
        self.write_rows(config, table, rows)
        if progress:
            progress(len(data))

    def write_rows(self, config: RepoConfig, table: FeatureView, rows: Sequence[Row] | Iterator[Row]) -> None:
        """Upsert rows of (entity key, feature, value proto, text, event s, created s, event us) in one transaction."""
        name = _table_id(config.project, table, config.registry.enable_online_feature_view_versioning)
        upsert = (
            f"INSERT INTO {_quote_id(name)} "  # noqa: S608  # quoted; names come from the registry
            "(entity_key, feature_name, value, value_text, event_ts, created_ts, event_us) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value,"
            " value_text = excluded.value_text, event_ts = excluded.event_ts, created_ts = excluded.created_ts,"
            " event_us = excluded.event_us WHERE excluded.event_us >= COALESCE(event_us, event_ts * 1000000)"
        )
        connection = self._get_conn(config)
        try:
            with exclusive(self._get_db_path(config)), connection:
                connection.executemany(upsert, rows)
        except sqlite3.OperationalError as error:
            if "no such" not in str(error):
                raise
            raise OnlineSinkError(
                f"The online store {self._get_db_path(config)} has no table of view {table.name!r} as it is declared:"
                " run `feast apply`."
            ) from error

    def sync(self, config: RepoConfig) -> None:
        """Make everything that was committed survive a loss of power (WAL commits alone survive a crash only)."""
        path = f"{self._get_db_path(config)}-wal"
        if not os.path.exists(path):
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class OnlineSink:
    """Writes emissions of one stream feature view to the online store of its repository.

    The guarded sqlite store gets prepared rows; any other store is written through Feast's `online_write_batch`, and
    whether it refuses older values is up to that store.

    Args:
        store: the Feast store.
        view: name of a stream feature view of it.

    Raises:
        OnlineSinkError: a feature has a type that no aggregate has.
    """

    def __init__(self, store: FeatureStore, view: str) -> None:
        self._config = store.config
        self._view = store.get_stream_feature_view(view)
        self._online = store._get_provider().online_store
        self._join_key = self._view.entity_columns[0].name
        self._tags: dict[str, int] = {}
        for field in self._view.features:
            if field.name == self._join_key:
                continue  # a StreamFeatureView lists its entity among its features
            if field.dtype not in TAGS:
                raise OnlineSinkError(
                    f"Feature {field.name!r} of view {view!r} is a {field.dtype}: declare Int64, Int32, Float64 or"
                    " Float32."
                )
            self._tags[field.name] = TAGS[field.dtype]
        self.guarded = isinstance(self._online, GuardedSqliteOnlineStore)
        if not self.guarded:
            log.warning(
                "the online store is not guarded: an older value can overwrite a newer one",
                extra={"view": view, "store": type(self._online).__name__},
            )

    def write(self, emissions: Sequence[Emission]) -> int:
        """Write the newest row of each entity in one transaction; returns the number of entities.

        Args:
            emissions: in the order in which they were made.
        """
        newest = latest(emissions)
        if newest is None:
            return 0
        features = [name for name in newest.features.column_names if name in self._tags]
        columns = [encode(newest.features.column(name), self._tags[name]) for name in features]
        created_s = _feast_seconds(int(datetime.now(UTC).timestamp()))
        if isinstance(self._online, GuardedSqliteOnlineStore):
            keys = entity_keys(self._join_key, newest.entities)
            event_s = _feast_column(newest.event_time_us)
            event_us = newest.event_time_us.tolist()
            cells = (
                zip(keys, repeat(name), values, texts, event_s, repeat(created_s), event_us)
                for name, (values, texts) in zip(features, columns, strict=True)
            )
            rows = zip(*cells, strict=True)  # entity by entity: its rows lie on the same page
            self._online.write_rows(self._config, self._view, chain.from_iterable(rows))
        else:
            self._write_protos(newest, features, [values for values, _ in columns])
        return len(newest.entities)

    def sync(self) -> None:
        """Make the writes durable, where the store can be told to."""
        if isinstance(self._online, GuardedSqliteOnlineStore):
            self._online.sync(self._config)

    def _write_protos(self, newest: Emission, features: Sequence[str], columns: Sequence[list[bytes]]) -> None:
        text = pa.types.is_string(newest.entities.type)
        created = datetime.now(UTC)
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]] = []
        for row, (entity, event_us) in enumerate(zip(newest.entities.to_pylist(), newest.event_time_us, strict=True)):
            value = Value(string_val=entity) if text else Value(int64_val=entity)
            key = EntityKey(join_keys=[self._join_key], entity_values=[value])
            values = {name: Value.FromString(column[row]) for name, column in zip(features, columns, strict=True)}
            data.append((key, values, datetime.fromtimestamp(int(event_us) / 1_000_000, UTC), created))
        if isinstance(self._online, SqliteOnlineStore):
            with exclusive(self._online._get_db_path(self._config)):
                self._online.online_write_batch(self._config, self._view, data, None)
        else:
            self._online.online_write_batch(self._config, self._view, data, None)


@contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Hold the lock file `<path>.lock`, which all writers of a sqlite file take, threads and processes alike."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def latest(emissions: Sequence[Emission]) -> Emission | None:
    """One emission with the last row of each entity; None when there are no rows."""
    filled = [emission for emission in emissions if len(emission.entities)]
    if len(filled) < 2:
        return filled[0] if filled else None
    entities = pa.concat_arrays([emission.entities for emission in filled])
    codes = entities.dictionary_encode().indices.to_numpy()
    last = np.zeros(int(codes.max()) + 1, dtype=np.int64)
    last[codes] = np.arange(len(codes))
    last.sort()
    return Emission(
        entities.take(pa.array(last)),
        np.concatenate([emission.event_time_us for emission in filled])[last],
        pa.concat_tables([emission.features for emission in filled]).take(pa.array(last)).combine_chunks(),
    )


def encode(column: pa.ChunkedArray, tag: int) -> tuple[list[bytes], list[str | None]]:
    """A column as serialised `feast.types.Value` protos and as the texts that Feast stores beside them.

    Args:
        column: numbers, N of them, nulls allowed; a null is the empty message, as Feast writes it.
        tag: field number and wire type of the proto's member (int64 0x20, int32 0x18, double 0x29, float 0x35).
    """
    nulls = np.flatnonzero(column.is_null().to_numpy())
    filled = column.fill_null(0) if len(nulls) else column
    values = filled.to_numpy().astype(DTYPES[tag])
    protos = _varints(values, tag) if values.dtype == np.int64 else _fixed(values, tag)
    texts: list[str | None] = list(map(str, values.tolist()))
    for row in nulls.tolist():
        protos[row], texts[row] = b"", None
    return protos, texts


def entity_keys(join_key: str, entities: pa.Array) -> list[bytes]:
    """Feast's serialised entity keys (version 3) of one join key; `entities` is a string or int64 array."""
    name = join_key.encode()
    prefix = struct.pack("<III", 1, ValueType.STRING, len(name)) + name
    if pa.types.is_string(entities.type):
        string = prefix + struct.pack("<I", ValueType.STRING)
        size = struct.Struct("<I").pack
        return [string + size(len(data)) + data for data in entities.cast(pa.binary()).to_pylist()]
    integer = prefix + struct.pack("<II", ValueType.INT64, 8)
    pack = struct.Struct("<q").pack
    return [integer + pack(entity) for entity in entities.to_pylist()]


def _fixed(values: npt.NDArray[Any], tag: int) -> list[bytes]:
    size = 1 + values.itemsize
    data = np.empty((len(values), size), dtype=np.uint8)
    data[:, 0] = tag
    data[:, 1:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize)
    raw = data.tobytes()
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def _varints(values: Ints, tag: int) -> list[bytes]:
    unsigned = values.astype(np.uint64)
    groups = np.arange(0, 70, 7, dtype=np.uint64)
    data = np.empty((len(values), 11), dtype=np.uint8)
    data[:, 0] = tag
    data[:, 1:] = ((unsigned[:, None] >> groups) & np.uint64(0x7F)) | np.uint64(0x80)
    sizes = 1 + (unsigned[:, None] >> groups[1:] != 0).sum(axis=1)
    data[np.arange(len(values)), sizes] &= 0x7F
    raw = data.tobytes()
    return [raw[at : at + size + 1] for at, size in zip(range(0, len(raw), 11), sizes.tolist(), strict=True)]


def _microseconds(moment: datetime) -> int:
    """Microseconds since the epoch; exact, unlike `timestamp()`; naive means UTC, as in Feast."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    delta = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _feast_seconds(second: int) -> int:
    """The number under which Feast's sqlite store keeps a UTC second: it reads naive UTC times as local ones."""
    return int(adapt_datetime_epoch(datetime.fromtimestamp(second, UTC).replace(tzinfo=None)))


def _feast_column(event_time_us: Ints) -> list[int]:
    seconds, rows = np.unique(event_time_us // 1_000_000, return_inverse=True)
    stored = [_feast_seconds(second) for second in seconds.tolist()]
    return [stored[row] for row in rows.tolist()]

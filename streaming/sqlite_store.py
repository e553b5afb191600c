"""Feast's sqlite online store with one row an entity, and never an older row over a newer one.

Feast's own layout has a row an entity and feature, kept in whole seconds. Here a view's table is (entity key, event
time, created time, layout, blob), both times in microseconds: thirty features cost one upsert instead of thirty. The
blobs are those of `row_layout`, their layouts lie in the table `_layouts`. Writers in several processes take turns by a
file lock, because sqlite has one writer; readers never wait (WAL).
"""

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast import Entity, FeatureView, RepoConfig
from feast.infra.infra_object import InfraObject
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig, _quote_id, _table_id
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from streaming.feast_bytes import as_bytes, entity_keys
from streaming.records import Ints
from streaming.row_layout import RowLayout, declared, encode_values, from_arrow

log = logging.getLogger(__name__)

BUSY_S = 30.0
CACHE_KIB = 64_000
PAGE_BYTES = 8_192  # a row of 200 features fits without an overflow page
WAL_PAGES = 4_000
ROWS_A_STATEMENT = 50
ROWS_A_CHUNK = 20_000
KEYS_A_READ = 10_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Data = Sequence[tuple[EntityKey, dict[str, Value], datetime, datetime | None]]
Row = tuple[bytes, dict[str, Value], int, int | None]
Found = tuple[datetime | None, dict[str, Value] | None]


class OnlineStoreError(ValueError):
    """Something that this online store cannot do, or a table that it does not have."""


class GuardedSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Settings in feature_store.yaml: `type: streaming.sinks.GuardedSqliteOnlineStore` and `path`."""

    type: Literal["streaming.sinks.GuardedSqliteOnlineStore"] = "streaming.sinks.GuardedSqliteOnlineStore"  # type: ignore[assignment]


class GuardedSqliteOnlineStore(SqliteOnlineStore):
    """One row an entity; an upsert keeps the newer event time, and of equal ones the later write."""

    _conn: sqlite3.Connection | None = None

    def __init__(self) -> None:
        self._layouts: dict[int, RowLayout] = {}
        self._ids: dict[str, int] = {}

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        if self._conn is None:
            if config.online_store.vector_enabled or config.online_store.enable_openai_compatible_store:
                self._refuse_search()
            path = Path(self._get_db_path(config))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._conn = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            for setting in (
                f"page_size={PAGE_BYTES}",
                "journal_mode=WAL",
                "synchronous=NORMAL",
                f"cache_size=-{CACHE_KIB}",
                f"wal_autocheckpoint={WAL_PAGES}",
            ):
                self._conn.execute(f"PRAGMA {setting}")
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
        """What `feast apply` calls: make and drop tables, and turn tables of Feast's own layout into ours."""
        with self._transaction(config) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS _layouts (id INTEGER PRIMARY KEY, features TEXT UNIQUE)")
            for view in tables_to_keep:
                columns = connection.execute("SELECT name FROM pragma_table_info(?)", [_table(config, view)]).fetchall()
                if ("feature_name",) in columns:
                    self._convert(config, view, connection, guarded=("event_us",) in columns)
                elif not columns:
                    _create(connection, _table(config, view))
            for view in tables_to_delete:
                connection.execute(f"DROP TABLE IF EXISTS {_quoted(config, view)}")

    def plan(self, config: RepoConfig, desired_registry_proto: Registry) -> list[InfraObject]:
        """Nothing: `feast apply` goes through `update`, and Feast's own plan would make tables of its own layout."""
        return []

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Remove the database's files."""
        super().teardown(config, tables, entities)
        for suffix in ("-wal", "-shm"):
            Path(self._get_db_path(config) + suffix).unlink(missing_ok=True)
        self._layouts, self._ids = {}, {}

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: Data, progress: Callable[[int], Any] | None
    ) -> None:
        """Feast's own way in (`write_to_online_store`, `push`, `materialize`), guarded like ours.

        Features that a row does not name keep what the store has, as in Feast's own layout.
        """
        with self._transaction(config, table) as connection:
            rows = self._complete(config, table, data, connection)
            self._upsert_values(connection, _table(config, table), table, rows)
        if progress:
            progress(len(data))

    def write_columns(
        self, config: RepoConfig, view: FeatureView, entities: pa.Array, event_time_us: Ints, features: pa.Table
    ) -> None:
        """Upsert N rows in one transaction.

        Args:
            config: the repository's.
            view: with one join key.
            entities: string or int64 [N].
            event_time_us: int64 [N].
            features: N rows, some or all features of the view, of types in `feast_bytes.ARROW_TYPES`.

        Raises:
            OnlineStoreError: the view is not applied.
            sqlite3.OperationalError: locked, full or broken; nothing was written.
        """
        dtypes = {field.name: field.dtype for field in view.features}
        layout = RowLayout([each for each in declared(view) if each[0] in features.column_names])
        created_us = time.time_ns() // 1_000
        with self._transaction(config, view) as connection:
            for start in range(0, len(entities), ROWS_A_CHUNK):
                part = slice(start, start + ROWS_A_CHUNK)
                cells = features.slice(start, ROWS_A_CHUNK)
                columns = [from_arrow(cells.column(name), dtypes[name]) for name, _ in layout.features]
                rows = layout.rows(columns, len(event_time_us[part]))
                keys = entity_keys(view.entity_columns[0].name, entities[part])
                created = pa.array(np.full(len(keys), created_us))
                self._upsert(
                    connection, _table(config, view), layout, keys, pa.array(event_time_us[part]), created, rows
                )

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Found]:
        """Event time and features of each entity; features that a row was written without are not in its dict."""
        wanted = frozenset(requested_features or [field.name for field in table.features])
        keys = [serialize_entity_key(key, config.entity_key_serialization_version) for key in entity_keys]
        with self._clear_errors(config, table):
            connection = self._get_conn(config)
            found = self._read(connection, _table(config, table), keys, wanted)
        return [found.get(key, (None, None)) for key in keys]

    def newest_event_us(self, config: RepoConfig, table: FeatureView) -> int | None:
        """The newest event time of a view's rows; None when it has none. Reads the whole table."""
        with self._clear_errors(config, table):
            query = f"SELECT max(event_us) FROM {_quoted(config, table)}"  # noqa: S608  # quoted
            newest: int | None = self._get_conn(config).execute(query).fetchone()[0]
        return newest

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

    def retrieve_online_documents(self, *args: Any, **options: Any) -> NoReturn:
        """Refused."""
        self._refuse_search()

    def retrieve_online_documents_v2(self, *args: Any, **options: Any) -> NoReturn:
        """Refused."""
        self._refuse_search()

    def _refuse_search(self) -> NoReturn:
        raise OnlineStoreError("GuardedSqliteOnlineStore has no vector or text search: use Feast's own sqlite store.")

    def _complete(
        self, config: RepoConfig, view: FeatureView, data: Data, connection: sqlite3.Connection
    ) -> Iterator[Row]:
        """The rows with the features that they do not name filled in from the store."""
        keys = [serialize_entity_key(key, config.entity_key_serialization_version) for key, *_ in data]
        names = dict(declared(view)).keys()
        lacking = {key for key, row in zip(keys, data, strict=True) if not names <= row[1].keys()}
        kept = self._read(connection, _table(config, view), sorted(lacking), names) if lacking else {}
        for key, (_, values, event, created) in zip(keys, data, strict=True):
            event_us = _microseconds(event)
            if key in lacking:
                newest, old = kept.get(key, (None, None))
                values = (old or {}) | values
                if newest is None or event_us >= _microseconds(newest):
                    kept[key] = event, values
            yield key, values, event_us, None if created is None else _microseconds(created)

    def _upsert_values(
        self, connection: sqlite3.Connection, table: str, view: FeatureView, rows: Iterable[Row]
    ) -> None:
        """Write rows of protos in their order; neighbours that name the same features go together."""
        kinds = dict(declared(view))
        for _, group in groupby(rows, key=lambda row: sorted(row[1])):
            keys, values, event_us, created_us = zip(*group, strict=True)
            layout, blobs = encode_values(values, kinds)
            times = pa.array(event_us, pa.int64()), pa.array(created_us, pa.int64())
            self._upsert(connection, table, layout, pa.array(keys, pa.binary()), *times, blobs)

    def _upsert(
        self,
        connection: sqlite3.Connection,
        table: str,
        layout: RowLayout,
        keys: pa.Array,
        event_us: pa.Array,
        created_us: pa.Array,
        rows: pa.Array,
    ) -> None:
        """Write in the order of the keys, so that neighbours share a page, many rows a statement."""
        order = pc.sort_indices(keys)
        number = self._layout_id(connection, layout)
        cells: list[Any] = [None] * (4 * len(keys))
        cells[0::4] = as_bytes(keys.take(order))
        cells[1::4] = event_us.take(order).to_pylist()
        cells[2::4] = created_us.take(order).to_pylist()
        cells[3::4] = as_bytes(rows.take(order))
        whole = len(keys) // ROWS_A_STATEMENT * ROWS_A_STATEMENT * 4
        width = ROWS_A_STATEMENT * 4
        connection.executemany(
            _statement(table, ROWS_A_STATEMENT), ([number, *cells[at : at + width]] for at in range(0, whole, width))
        )
        connection.executemany(
            _statement(table, 1), ([number, *cells[at : at + 4]] for at in range(whole, len(cells), 4))
        )

    def _read(
        self, connection: sqlite3.Connection, table: str, keys: Sequence[bytes], wanted: Collection[str]
    ) -> dict[bytes, Found]:
        found: dict[bytes, Found] = {}
        for start in range(0, len(keys), KEYS_A_READ):
            part = keys[start : start + KEYS_A_READ]
            query = (
                f"SELECT entity_key, event_us, layout, row FROM {_quote_id(table)}"  # noqa: S608  # quoted
                f" WHERE entity_key IN ({','.join('?' * len(part))})"
            )
            for key, event_us, number, row in connection.execute(query, part):
                event = EPOCH + timedelta(microseconds=event_us)
                found[key] = (event, self._layout(connection, number).read(row, wanted))
        return found

    def _layout(self, connection: sqlite3.Connection, number: int) -> RowLayout:
        if number not in self._layouts:
            (text,) = connection.execute("SELECT features FROM _layouts WHERE id = ?", [number]).fetchone()
            self._layouts[number] = RowLayout.parse(text)
        return self._layouts[number]

    def _layout_id(self, connection: sqlite3.Connection, layout: RowLayout) -> int:
        text = str(layout)
        if text not in self._ids:
            row = connection.execute("SELECT id FROM _layouts WHERE features = ?", [text]).fetchone()
            if row is None:  # not remembered until it is read back: this transaction may still fail
                made = connection.execute("INSERT INTO _layouts (features) VALUES (?)", [text]).lastrowid
                assert made is not None  # noqa: S101
                return made
            self._ids[text] = row[0]
        return self._ids[text]

    def _convert(self, config: RepoConfig, view: FeatureView, connection: sqlite3.Connection, guarded: bool) -> None:
        """Turn a table of Feast's layout, with or without our earlier `event_us` column, into ours."""
        table, old = _table(config, view), f"_old_{_table(config, view)}"
        connection.execute(f"DROP INDEX IF EXISTS {_quote_id(table + '_ek')}")
        connection.execute(f"ALTER TABLE {_quote_id(table)} RENAME TO {_quote_id(old)}")
        _create(connection, table)
        query = (
            "SELECT entity_key, feature_name, value, event_ts, created_ts,"  # noqa: S608  # quoted
            f" {'event_us' if guarded else 'NULL'} FROM {_quote_id(old)} ORDER BY entity_key"
        )
        converted = 0
        with closing(connection.execute(query)) as cursor:
            entities = (_old_row(list(cells)) for _, cells in groupby(cursor, key=lambda cell: cell[0]))
            while rows := list(islice(entities, ROWS_A_CHUNK)):
                self._upsert_values(connection, table, view, rows)
                converted += len(rows)
        connection.execute(f"DROP TABLE {_quote_id(old)}")
        log.info("online table converted to one row an entity", extra={"view": view.name, "entities": converted})

    @contextmanager
    def _transaction(self, config: RepoConfig, view: FeatureView | None = None) -> Iterator[sqlite3.Connection]:
        with self._clear_errors(config, view), exclusive(self._get_db_path(config)):
            connection = self._get_conn(config)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _clear_errors(self, config: RepoConfig, view: FeatureView | None) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if view is None or not str(error).startswith(("no such", "table ")):
                raise
            raise OnlineStoreError(
                f"The online store {self._get_db_path(config)} has no table of view {view.name!r} as this version"
                " keeps it: run `feast apply`, which makes or converts it."
            ) from error


@contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Hold the lock file `<path>.lock`, which all writers of a sqlite file take, threads and processes alike."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _table(config: RepoConfig, view: FeatureView) -> str:
    return str(_table_id(config.project, view, config.registry.enable_online_feature_view_versioning))


def _quoted(config: RepoConfig, view: FeatureView) -> str:
    return str(_quote_id(_table(config, view)))


def _create(connection: sqlite3.Connection, table: str) -> None:
    connection.execute(
        f"CREATE TABLE {_quote_id(table)} (entity_key BLOB PRIMARY KEY, event_us INTEGER, created_us INTEGER,"
        " layout INTEGER, row BLOB) WITHOUT ROWID"
    )


def _statement(table: str, rows: int) -> str:
    values = ", ".join(f"(?{at}, ?{at + 1}, ?{at + 2}, ?1, ?{at + 3})" for at in range(2, 2 + 4 * rows, 4))
    return (
        f"INSERT INTO {_quote_id(table)} (entity_key, event_us, created_us, layout, row) VALUES {values}"  # noqa: S608
        " ON CONFLICT (entity_key) DO UPDATE SET event_us = excluded.event_us, created_us = excluded.created_us,"
        " layout = excluded.layout, row = excluded.row WHERE excluded.event_us >= event_us"
    )


def _microseconds(moment: datetime) -> int:
    """Microseconds since the epoch; exact, unlike `timestamp()`; naive means UTC, as in Feast."""
    delta = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _old_row(cells: Sequence[Any]) -> Row:
    """One entity of Feast's layout: cells of (key, feature, proto, event s, created s, event us or NULL)."""
    events_us = [_old_us(event_s) if event_us is None else event_us for *_, event_s, _, event_us in cells]
    created = [_old_us(cell[4]) for cell in cells if cell[4] is not None]
    values = {cell[1]: Value.FromString(cell[2]) for cell in cells}
    return cells[0][0], values, max(events_us), max(created, default=None)


def _old_us(stored: int) -> int:
    """Microseconds of a number that Feast's sqlite store wrote: it keeps naive UTC times as if they were local."""
    return _microseconds(datetime.fromtimestamp(stored).replace(tzinfo=UTC))  # noqa: DTZ006

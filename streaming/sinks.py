"""The online side: emissions become rows of a Feast online store, and never an older value over a newer one.

Our own stores (`GuardedSqliteOnlineStore`, `redis_store.GuardedRedisOnlineStore`) take whole columns and guard by
microseconds. Any other store is written through Feast's `online_write_batch`, and guards or not as it likes.
"""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from feast import FeatureStore, FeatureView, RepoConfig
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from streaming.feast_bytes import ARROW_TYPES, as_bytes, value_protos
from streaming.records import Emission, Ints
from streaming.sqlite_store import EPOCH, GuardedSqliteOnlineStore, GuardedSqliteOnlineStoreConfig, exclusive

log = logging.getLogger(__name__)

# The two stand here too because feature_store.yaml names the store `streaming.sinks.GuardedSqliteOnlineStore`.
__all__ = ["GuardedSqliteOnlineStore", "GuardedSqliteOnlineStoreConfig", "OnlineSink", "OnlineSinkError", "latest"]


class OnlineSinkError(ValueError):
    """A feature view whose values this sink cannot write."""


@runtime_checkable
class ColumnStore(Protocol):
    """An online store that takes columns and refuses rows older than its own."""

    def write_columns(  # noqa: D102
        self, config: RepoConfig, view: FeatureView, entities: pa.Array, event_time_us: Ints, features: pa.Table
    ) -> None: ...
    def sync(self, config: RepoConfig) -> None: ...  # noqa: D102


class OnlineSink:
    """Writes emissions of one stream feature view to the online store of its repository.

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
        # A StreamFeatureView lists its entity among its features.
        self._dtypes = {field.name: field.dtype for field in self._view.features if field.name != self._join_key}
        for name, dtype in self._dtypes.items():
            if dtype not in ARROW_TYPES:
                raise OnlineSinkError(
                    f"Feature {name!r} of view {view!r} is a {dtype}: declare Int64, Int32, Float64, Float32, String or"
                    " Array(String)."
                )
        if not isinstance(self._online, ColumnStore):
            log.warning(
                "the online store is not guarded: an older value can overwrite a newer one",
                extra={"view": view, "store": type(self._online).__name__},
            )

    def write(self, emissions: Sequence[Emission]) -> int:
        """Write the newest row of each entity in one transaction; returns the number of entities.

        Args:
            emissions: in the order in which they were made.

        Raises:
            OnlineSinkError: a column does not have the type that the view declares.
            sqlite3.OperationalError, OSError: the store is away; write the same emissions again.
        """
        newest = latest(emissions)
        if newest is None:
            return 0
        features = newest.features.select([name for name in newest.features.column_names if name in self._dtypes])
        try:
            if isinstance(self._online, ColumnStore):
                self._online.write_columns(self._config, self._view, newest.entities, newest.event_time_us, features)
            else:
                self._write_protos(newest, features)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise OnlineSinkError(
                f"View {self._view.name!r} declares another type than its aggregates have: {error}"
            ) from error
        return len(newest.entities)

    def sync(self) -> None:
        """Make the writes durable, where the store can be told to."""
        if isinstance(self._online, ColumnStore):
            self._online.sync(self._config)

    def _write_protos(self, newest: Emission, features: pa.Table) -> None:
        columns = [as_bytes(value_protos(features.column(name), self._dtypes[name])) for name in features.column_names]
        text = pa.types.is_string(newest.entities.type)
        created = datetime.now(UTC)
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]] = []
        for row, (entity, event_us) in enumerate(
            zip(newest.entities.to_pylist(), newest.event_time_us.tolist(), strict=True)
        ):
            value = Value(string_val=entity) if text else Value(int64_val=entity)
            key = EntityKey(join_keys=[self._join_key], entity_values=[value])
            values = {
                name: Value.FromString(column[row]) for name, column in zip(features.column_names, columns, strict=True)
            }
            data.append((key, values, EPOCH + timedelta(microseconds=event_us), created))
        if isinstance(self._online, SqliteOnlineStore):
            with exclusive(self._online._get_db_path(self._config)):
                self._online.online_write_batch(self._config, self._view, data, None)
        else:
            self._online.online_write_batch(self._config, self._view, data, None)


def latest(emissions: Sequence[Emission]) -> Emission | None:
    """One emission with the newest row of each entity, of equal event times the last; None when there are no rows."""
    filled = [emission for emission in emissions if len(emission.entities)]
    if not filled:
        return None
    entities = pa.concat_arrays([emission.entities for emission in filled])
    event_time_us = np.concatenate([emission.event_time_us for emission in filled])
    codes = entities.dictionary_encode().indices.to_numpy()
    order = np.argsort(event_time_us, kind="stable")
    last = np.zeros(int(codes.max()) + 1, dtype=np.int64)
    last[codes[order]] = order
    last.sort()
    if len(last) == len(entities) and len(filled) == 1:
        return filled[0]
    features = pa.concat_tables([emission.features for emission in filled]).take(pa.array(last))
    return Emission(entities.take(pa.array(last)), event_time_us[last], features.combine_chunks())

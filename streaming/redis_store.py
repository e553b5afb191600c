"""Feast's Redis online store with a guard that two writers cannot race through.

Feast's own store reads the event times of a batch, compares, and then writes: between the two another writer's newer
row can be overwritten. Here one Lua script compares and writes, so each entity is atomic. What is kept is exactly
Feast's (a hash an entity, fields by murmur hash, `_ts:<view>` as a Timestamp proto), so that any reader or writer of
Feast's works beside it. In feature_store.yaml: `type: streaming.redis_store.GuardedRedisOnlineStore`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from feast import FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType, _versioned_fv_name
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from redis import exceptions

from streaming.feast_bytes import as_bytes, entity_keys, value_protos
from streaming.records import Ints

ENTITIES_A_CALL = 200  # a call of 200 keeps the server busy for about 2 ms
ENTITIES_A_PIPELINE = 20_000
AWAY = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.ClusterError,
)

# KEYS: entities. ARGV: the stamp's field, a ttl in seconds or 0, the number of features, their fields, and then for
# each entity its seconds, nanoseconds, stamp and values. A Timestamp is two varints; a negative one has ten bytes.
SCRIPT = """
local function parsed(stamp)
  local found, at = {[8] = 0, [16] = 0}, 1
  while at <= #stamp do
    local tag, value, complement, scale, bytes = stamp:byte(at), 0, 0, 1, 0
    repeat
      at, bytes = at + 1, bytes + 1
      local digit = stamp:byte(at) % 128
      if bytes < 10 then
        value, complement, scale = value + digit * scale, complement + (127 - digit) * scale, scale * 128
      end
    until stamp:byte(at) < 128
    found[tag], at = bytes == 10 and -(complement + 1) or value, at + 1
  end
  return found[8], found[16]
end
local size, at, cells, written = tonumber(ARGV[3]), tonumber(ARGV[3]) + 4, {}, 0
for feature = 1, size do cells[2 * feature] = ARGV[3 + feature] end
cells[2 * size + 2] = ARGV[1]
for number = 1, #KEYS do
  local seconds, nanos, newer = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), true
  local old = redis.call('HGET', KEYS[number], ARGV[1])
  if old then
    local old_seconds, old_nanos = parsed(old)
    newer = seconds > old_seconds or (seconds == old_seconds and nanos >= old_nanos)
  end
  if newer then
    cells[1], cells[2 * size + 3] = KEYS[number], ARGV[at + 2]
    for feature = 1, size do cells[2 * feature + 1] = ARGV[at + 2 + feature] end
    redis.call('HSET', unpack(cells))
    if ARGV[2] ~= '0' then redis.call('EXPIRE', KEYS[number], ARGV[2]) end
    written = written + 1
  end
  at = at + 3 + size
end
return written
"""

Data = list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]]
Command = list[Any]


class GuardedRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """Feast's settings of Redis; `skip_dedup`, which would switch the guard off, must stay false."""

    type: Literal["streaming.redis_store.GuardedRedisOnlineStore"] = "streaming.redis_store.GuardedRedisOnlineStore"  # type: ignore[assignment]
    skip_dedup: Literal[False] = False


class GuardedRedisOnlineStore(RedisOnlineStore):
    """A write keeps the newer event time of each entity, and of equal ones the later write, whoever else writes."""

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: Data, progress: Callable[[int], Any] | None
    ) -> None:
        """Feast's own way in (`write_to_online_store`, `push`, `materialize`), guarded like ours."""
        self._execute(config, self._rows(config, table, data))
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self, config: RepoConfig, table: FeatureView, data: Data, progress: Callable[[int], Any] | None
    ) -> None:
        """The same for asynchronous callers."""
        client = await self._get_client_async(config.online_store)
        with _reachable(config):
            for command in self._rows(config, table, data):
                await client.execute_command(*command)
        if progress:
            progress(len(data))

    def write_columns(
        self, config: RepoConfig, view: FeatureView, entities: pa.Array, event_time_us: Ints, features: pa.Table
    ) -> None:
        """Write N rows, many in one round trip; each entity is written whole or not at all.

        Args:
            config: the repository's.
            view: with one join key.
            entities: string or int64 [N].
            event_time_us: int64 [N].
            features: N rows, some or all features of the view, of types in `feast_bytes.ARROW_TYPES`.

        Raises:
            ConnectionError: Redis is away, full or a replica; write the same rows again.
        """
        dtypes = {field.name: field.dtype for field in view.features}
        names = features.column_names
        project = config.project.encode()
        for start in range(0, len(entities), ENTITIES_A_PIPELINE):
            part = slice(start, start + ENTITIES_A_PIPELINE)
            cells = features.slice(start, ENTITIES_A_PIPELINE)
            keys = [key + project for key in as_bytes(entity_keys(view.entity_columns[0].name, entities[part]))]
            columns = [as_bytes(value_protos(cells.column(name), dtypes[name])) for name in names]
            stamps = _stamps(event_time_us[part])
            self._execute(config, _commands(config, view, names, keys, [*stamps, *columns]))

    def sync(self, config: RepoConfig) -> None:
        """Nothing: what survives a crash of the server is its own setting (`appendfsync`)."""

    def _rows(self, config: RepoConfig, view: FeatureView, data: Data) -> Iterator[Command]:
        version = config.entity_key_serialization_version
        for names, group in groupby(data, key=lambda row: sorted(row[1])):
            rows = list(group)
            keys = [_redis_key(config.project, row[0], entity_key_serialization_version=version) for row in rows]
            moments = np.array([_microseconds(row[2]) for row in rows], dtype=np.int64)
            columns = [[row[1][name].SerializeToString() for row in rows] for name in names]
            yield from _commands(config, view, names, keys, [*_stamps(moments), *columns])

    def _execute(self, config: RepoConfig, commands: Iterator[Command]) -> None:
        with _reachable(config), self._get_client(config.online_store).pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            pipeline.execute()


def _commands(
    config: RepoConfig, view: FeatureView, names: Sequence[str], keys: list[bytes], columns: list[list[Any]]
) -> Iterator[Command]:
    """Calls of the script; a cluster takes one entity a call, because entities lie in different slots."""
    name = _versioned_fv_name(view, config)
    fields = [_mmh3(f"{name}:{feature}") for feature in names]
    head = [f"_ts:{name}", config.online_store.key_ttl_seconds or 0, len(fields), *fields]
    width = len(columns)
    cells: list[Any] = [None] * (width * len(keys))
    for at, column in enumerate(columns):
        cells[at::width] = column
    size = 1 if config.online_store.redis_type == RedisType.redis_cluster else ENTITIES_A_CALL
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        yield ["EVAL", SCRIPT, len(part), *part, *head, *cells[width * start : width * (start + size)]]


def _stamps(event_time_us: Ints) -> tuple[list[int], list[int], list[bytes]]:
    """Seconds, nanoseconds and Timestamp protos."""
    unique, rows = np.unique(event_time_us, return_inverse=True)
    seconds, nanos = unique // 1_000_000, unique % 1_000_000 * 1_000
    protos = np.array(
        [
            Timestamp(seconds=second, nanos=nano).SerializeToString()
            for second, nano in zip(seconds.tolist(), nanos.tolist(), strict=True)
        ],
        dtype=object,
    )
    return seconds[rows].tolist(), nanos[rows].tolist(), protos[rows].tolist()


def _microseconds(moment: datetime) -> int:
    stamp = Timestamp()
    stamp.FromDatetime(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return int(stamp.ToMicroseconds())


@contextmanager
def _reachable(config: RepoConfig) -> Iterator[None]:
    try:
        yield
    except AWAY as error:
        address = ",".join(each for each in config.online_store.connection_string.split(",") if "=" not in each)
        raise ConnectionError(f"Redis at {address} does not take writes: {error}") from error

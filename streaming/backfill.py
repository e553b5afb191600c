"""Backfill: the plan of a view over recorded events, in parallel by entity, bit for bit what the stream computes.

The entities are shared out by a hash of their bytes. Each shard has a `Partition` of its own for every Kafka partition;
all rows pass through all shards, because the clock of a partition is the largest event time of all its rows, but each
shard adds only its own. Rows are emitted where the clock enters another pane and at the end, and written as the offline
log writes them; how the input is cut into chunks and the entities into shards changes no row.

On Ray, tasks decode and an actor a shard computes. It is not a Ray Data pipeline, whose operators give a block to one
worker: here every shard must see every chunk, in the order of the offsets.
"""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from streaming.allowance import Allowance
from streaming.checkpoint import filesystem, write_atomic
from streaming.compile_kernels import kernel
from streaming.decode import Columns
from streaming.history import Decoded, Piece, decoded
from streaming.partition import Partition
from streaming.plan import Plan
from streaming.records import Bools, Bytes, Emission, Ints, Reject
from streaming.state import StateError

ROWS_A_PART = 1_000_000
CHUNKS_AHEAD = 3
TIMESTAMP = pa.timestamp("us", tz="UTC")

_PRIME = np.uint64(0x100000001B3)
_BASIS = np.uint64(0xCBF29CE484222325)
_HALF = np.uint64(32)


class BackfillError(ValueError):
    """A backfill that cannot be done as asked, in one sentence."""


class Backfilled(NamedTuple):
    """What a backfill did: feature rows written; events read; dead and late ones; entities known at the end."""

    rows: int
    events: int
    dead: int
    late: int
    keys: int


class Output(NamedTuple):
    """Where feature rows go and what they carry.

    Attributes:
        uri: Folder, local or a URI of Arrow's file systems.
        event_timestamp: Name of the column with the clock at which a row holds.
        created_timestamp: Name of the column with `created_us`; None for no such column.
        created_us: The wall clock, which is also what decides whether an event is from the future.
    """

    uri: str
    event_timestamp: str
    created_timestamp: str | None
    created_us: int


class Shard:
    """Computes the entities of one of `shards` shares and writes their rows.

    Args:
        plan: What is computed.
        number: Of the share, from 0.
        shards: How many there are.
        output: Where rows go.
        max_state_bytes: Memory that the state of the share may take, over all partitions.
    """

    def __init__(
        self, plan: Plan, number: int, shards: int, output: Output, max_state_bytes: int | None = None
    ) -> None:
        self._plan, self._number, self._shards, self._output = plan, number, shards, output
        self._allowance = None if max_state_bytes is None else Allowance(max_state_bytes)
        self._filesystem, self._folder = filesystem(output.uri)
        self._partitions: dict[int, Partition] = {}
        self._tables: list[pa.Table] = []
        self._waiting = self._rows = self._parts = 0

    def add(self, chunk: Decoded) -> list[Reject]:
        """Takes the next chunk of its partition; returns the records of this share that changed nothing.

        Raises:
            BackfillError: The state needs more memory than it may take.
        """
        if not len(chunk.offsets):
            return []
        if chunk.partition not in self._partitions:
            self._partitions[chunk.partition] = Partition(self._plan, chunk.partition, self._allowance)
        partition = self._partitions[chunk.partition]
        columns = _writable(chunk.columns)
        mine = None
        if self._shards > 1:
            mine = np.empty(len(chunk.offsets), dtype=np.bool_)
            _share(columns.text, columns.entities, columns.readable, self._shards, self._number, mine)
        rejects = list(chunk.rejects) if self._number == 0 else []
        try:
            for refused in partition.add(columns, chunk.offsets, self._output.created_us, mine):
                rejects += refused
                if partition.next_offset <= chunk.offsets[-1]:
                    partition.mark()
        except StateError as error:
            if self._allowance is None:
                raise
            raise BackfillError(self._too_large(self._allowance.limit_bytes)) from error
        self._take(partition.take())
        partition.shrink()
        if self._allowance is not None:
            self._allowance.shrink((self._plan.view, chunk.partition), partition.state_bytes)
        return rejects

    def finish(self) -> Backfilled:
        """Emits and writes the last rows."""
        for _, partition in sorted(self._partitions.items()):
            self._take(partition.drain())
        self._write()
        counters = [partition.counters for partition in self._partitions.values()]
        return Backfilled(
            self._rows,
            sum(each.processed for each in counters),
            sum(each.dead for each in counters),
            sum(each.late for each in counters),
            sum(each.keys for each in counters),
        )

    def _too_large(self, limit_bytes: int) -> str:
        partitions = self._partitions.values()
        keys, taken = sum(one.counters.keys for one in partitions), sum(one.state_bytes for one in partitions)
        return (
            f"The backfill of view '{self._plan.view}' holds {keys:,} entities in share {self._number + 1} of"
            f" {self._shards}: their state takes {taken / 2**20:,.0f} MiB, and more than the {limit_bytes / 2**20:,.0f}"
            " MiB that it may take are needed. Use a machine with more memory, shorten the windows, or give the view an"
            " idle_ttl."
        )

    def _take(self, emission: Emission) -> None:
        if not len(emission.entities):
            return
        self._tables.append(table(self._plan, emission, self._output))
        self._waiting += len(emission.entities)
        if self._waiting >= ROWS_A_PART:
            self._write()

    def _write(self) -> None:
        """One part: the rows since the part before it."""
        if not self._tables:
            return
        part = pa.concat_tables(self._tables)
        sink = pa.BufferOutputStream()
        pq.write_table(part, sink, use_dictionary=[self._plan.entity], write_statistics=[self._output.event_timestamp])
        name = f"{self._plan.view}-backfill-{self._number:03d}-{self._parts:05d}.parquet"
        write_atomic(self._filesystem, f"{self._folder}/{name}", memoryview(sink.getvalue()))
        self._rows += part.num_rows
        self._parts += 1
        self._tables, self._waiting = [], 0


def table(plan: Plan, emission: Emission, output: Output) -> pa.Table:
    """The rows of an emission with the columns of the offline log."""
    features = dict(zip(emission.features.column_names, emission.features.columns, strict=True))
    columns = {
        plan.entity: emission.entities,
        **features,
        output.event_timestamp: pa.array(emission.event_time_us, TIMESTAMP),
    }
    if output.created_timestamp is not None:
        created = np.full(len(emission.entities), output.created_us, dtype=np.int64)
        columns[output.created_timestamp] = pa.array(created, TIMESTAMP)
    return pa.table(columns)


def prepare(output: Output) -> None:
    """Makes the folder of an output.

    Raises:
        BackfillError: It holds Parquet files already, which the new ones would be mixed with.
    """
    from pyarrow import fs as pafs

    filesystem_, folder = filesystem(output.uri)
    found = filesystem_.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    if any(info.base_name.endswith(".parquet") for info in found):
        raise BackfillError(f"{output.uri} holds Parquet files already: give --output an empty folder.")
    filesystem_.create_dir(folder, recursive=True)


def run(
    plan: Plan, pieces: Iterable[Piece], output: Output, shards: int = 1, max_state_bytes: int | None = None
) -> Backfilled:
    """Computes all pieces in this process; `max_state_bytes` is the memory of a shard's state."""
    with _RejectFile(output) as rejects:
        local = [Shard(plan, number, shards, output, max_state_bytes) for number in range(shards)]
        for piece in pieces:
            for chunk in decoded(plan, piece):
                rejects.write(shard.add(chunk) for shard in local)
        return _total([shard.finish() for shard in local])


def run_on_ray(
    plan: Plan, pieces: Iterable[Piece], output: Output, shards: int, max_state_bytes: int | None = None
) -> tuple[Backfilled, float]:
    """Computes all pieces on Ray: tasks decode, an actor a shard computes; also returns the seconds that it took.

    In memory are at most a few chunks a shard, whatever the length of the input; the seconds are those from the moment
    at which the actors were there. `max_state_bytes` is the memory of a shard's state.

    Raises:
        BackfillError: The cluster is too small, or the memory.
    """
    import ray

    cluster: Any = ray
    remote = cluster.remote
    cpus = int(cluster.cluster_resources().get("CPU", 0))
    if cpus < shards + 1:
        raise BackfillError(f"{shards} workers need {shards + 1} CPUs and the Ray cluster has {cpus}: lower --workers.")
    decode = remote(num_cpus=1, num_returns="streaming", _generator_backpressure_num_objects=2)(decoded)
    actor = remote(num_cpus=1)(Shard)
    actors = [actor.remote(plan, number, shards, output, max_state_bytes) for number in range(shards)]
    ray.get([each.__ray_ready__.remote() for each in actors])
    started_s = time.perf_counter()
    under_way: deque[list[Any]] = deque()
    with _RejectFile(output) as rejects:
        for chunk in _in_order(decode, ray.put(plan), pieces, shards + 1):
            under_way.append([each.add.remote(chunk) for each in actors])
            if len(under_way) > CHUNKS_AHEAD:
                rejects.write(ray.get(under_way.popleft()))
        while under_way:
            rejects.write(ray.get(under_way.popleft()))
        total = _total(ray.get([each.finish.remote() for each in actors]))
    return total, time.perf_counter() - started_s


def _in_order(decode: Any, plan: Any, pieces: Iterable[Piece], ahead: int) -> Iterator[Any]:
    """References to the chunks of all pieces in order, while the pieces after are decoded too."""
    started: deque[Any] = deque()
    for piece in pieces:
        started.append(decode.remote(plan, piece))
        if len(started) > ahead:
            yield from started.popleft()
    while started:
        yield from started.popleft()


class _RejectFile:
    """`rejects.jsonl` in the output's folder, made with its first line."""

    def __init__(self, output: Output) -> None:
        self._filesystem, folder = filesystem(output.uri)
        self._path = f"{folder}/rejects.jsonl"
        self._file: Any = None

    def write(self, rejects: Iterable[list[Reject]]) -> None:
        """Those of one chunk, in offset order."""
        for reject in sorted((each for some in rejects for each in some), key=lambda each: each.offset):
            if self._file is None:
                self._file = self._filesystem.open_output_stream(self._path)
            line = reject._asdict() | {name: _text(getattr(reject, name)) for name in ("key", "value")}
            self._file.write(json.dumps(line).encode() + b"\n")

    def __enter__(self) -> "_RejectFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "backslashreplace")


def _total(each: list[Backfilled]) -> Backfilled:
    return Backfilled(*(sum(values) for values in zip(*each, strict=True)))


def _writable(columns: Columns) -> Columns:
    """Copies of arrays that Arrow or Ray's store share read-only, for which the kernels would be compiled again."""
    arrays: Iterator[Any] = (array if array.flags.writeable else array.copy() for array in columns)
    return Columns(*arrays)


@kernel
def _share(text: Bytes, spans: Ints, readable: Bools, shards: int, number: int, mine: Bools) -> None:
    """Which rows belong to a shard: FNV-1a of the entity's bytes; unreadable ones to the first, to be counted once."""
    for row in range(len(spans)):
        if not readable[row]:
            mine[row] = number == 0
            continue
        code = _BASIS
        for at in range(spans[row, 0], spans[row, 1]):
            code = (code ^ np.uint64(text[at])) * _PRIME
        mine[row] = int(((code ^ (code >> _HALF)) & np.uint64(0xFFFFFFFF)) % np.uint64(shards)) == number

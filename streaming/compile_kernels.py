"""How the numba kernels are compiled: lazily by `kernel`, or all at once by `python -m streaming.compile_kernels`.

The machine code is cached beside the sources, a folder for each version of them: a worker started after this command
loads it in about two seconds of CPU instead of compiling for thirty.
"""

import functools
import hashlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function on its first call and keeps the machine code on disk; floating point stays exact."""
    config: Any = numba.config
    elsewhere, config.CACHE_DIR = config.CACHE_DIR, _folder()
    try:
        return cast(Callable[P, R], numba.njit(cache=True, nogil=True)(function))
    finally:
        config.CACHE_DIR = elsewhere


@functools.cache
def _folder() -> str:
    """A folder named after all sources: numba renews a kernel when its own file changes, not one that it calls."""
    folder = Path(__file__).parent
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()
    return str(folder / "__pycache__" / f"kernels-{sources[:16]}")


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """A kernel that becomes part of those that call it: passing many arrays costs more than what it does."""
    return cast(Callable[P, R], numba.njit(inline="always")(function))


def compile_all() -> None:
    """Compiles every kernel for the types it is used with, by running a few records through windows of every kind."""
    from streaming.partition import Partition
    from streaming.plan import Aggregate, Column, EntityType, Plan
    from streaming.records import RecordBatch
    from streaming.simulators import bulk
    from streaming.simulators.arrival import Faults
    from streaming.wire import parse_records

    record = b'{"id": 1, "user": "one", "name": "one", "time": "1970-01-01T00:00:00Z", "amount": 1.5}'
    count = 200  # enough for the hash table to grow and for sketches to be merged, which have kernels of their own
    batch = RecordBatch(
        partition=0,
        buffer=np.frombuffer(record, dtype=np.uint8),
        offsets=np.arange(count, dtype=np.int64),
        keys=np.full((count, 2), -1, dtype=np.int64),
        values=np.tile(np.array([[0, len(record)]], dtype=np.int64), (count, 1)),
        timestamps_ms=np.zeros(count, dtype=np.int64),
    )
    columns = (
        Column("amount", "double", nullable=True),
        Column("name", "string", nullable=True, role="hash"),
        Column("name", "string", nullable=True, role="text"),
    )
    functions = (("amount", "sum"), ("amount", "p50"), ("name", "count_distinct"), ("name", "top_1"))
    shapes: tuple[dict[str, Any], ...] = (
        {"window_us": 2_000_000, "slide_us": 1_000_000},
        {"window_us": 1_000_000, "kind": "session"},
        {"size": 2, "kind": "last"},
        {"kind": "lifetime"},
    )
    keys: tuple[tuple[str, EntityType], ...] = (("id", "int64"), ("user", "string"))
    for shape, clocks in itertools.product(shapes, ("partition", "key")):
        for entity, entity_type in keys:
            aggregates = tuple(Aggregate(function, column, function, **shape) for column, function in functions)
            timing: dict[str, Any] = {"delay_us": 0, "clocks": clocks, "idle_ttl_us": 1}
            plan = Plan("warm_up", "", "", entity, entity_type, "time", columns, aggregates, **timing)
            partition = Partition(plan, 0)
            partition.process(batch, now_us=0)
            partition.emit()
            Partition.restore(plan, 0, partition.snapshot(), partition.delta())
    nothing, spans = np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int64)
    for buffer in (batch.buffer, batch.buffer.copy()):  # decompressed bytes are read-only, others are not
        parse_records(buffer, 0, 0, 0, nothing, nothing.copy(), spans, spans.copy())
    bulk.stages(1, faults=Faults(disorder=0.5, poison=0.5))
    _compile_joins()


def _compile_joins() -> None:
    """Joins a few records, looks them up and gives them another key."""
    import pyarrow as pa

    from streaming.deriving.as_of_join import AsOfJoin
    from streaming.deriving.derivation import Derivation, Input
    from streaming.deriving.interval_join import IntervalJoin
    from streaming.deriving.join_input import LeftInput
    from streaming.deriving.rekeying import Rekeying
    from streaming.deriving.table_lookup import History
    from streaming.records import RecordBatch

    source = Input("one", "one", "", "id string, number bigint, time bigint, more string", "time", 0)
    right = Input("two", "two", "", source.schema, "time", 0)
    values = [b'{"id": "%d", "number": %d, "time": 5, "more": null}' % (n, n) for n in range(200)]
    batch = RecordBatch.of_values(values, 0)
    for on in ("id", "number"):
        what = Derivation("join", "interval_join", (source, right), on, "", 0, on=on, unmatched=True)
        for join in (IntervalJoin(what), AsOfJoin(what)):
            snapshot = join.snapshot()
            for side in (0, 1):
                join.process(side, batch, now_us=0)
            type(join).restore(what, snapshot, join.delta() or b"")
            join.drain()
    Rekeying(Derivation("keyed", "rekeyed", (source,), "id", "", 0)).process(0, batch, now_us=0)
    table = History(pa.array(["0", "1"]), np.zeros(2, dtype=np.int64), [b"}", b"}"], b"}")
    table.valid_rows(LeftInput(source, "id", "id").read(batch)[0])


if __name__ == "__main__":
    started_s = time.perf_counter()
    compile_all()
    print(f"kernels compiled in {time.perf_counter() - started_s:.1f} s")

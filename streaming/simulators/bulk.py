"""Millions of small events in little time: what a throughput benchmark reads.

    report = fill("127.0.0.1:9092", "edits", count=20_000_000, keys=10_000, partitions=2)

The events are edits with the fields that `editor_activity` reads, of about 110 bytes with their key.
"""

import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TypeVar

import numpy as np
import pyarrow as pa

from streaming.producing.columns import CHUNK, Events
from streaming.producing.encode import BATCH_BYTES, Batch, Compression, encode, packed
from streaming.records import Ints
from streaming.simulators.arrival import Faults, disturb
from streaming.simulators.patterns import START, Shape, skewed
from streaming.simulators.produce import Report, ensure_topic, produce
from streaming.simulators.render import Moment, Name, Number, Template

T = TypeVar("T")
EVENTS_PER_S = 10_000.0
NO_FAULTS = Faults()
_TEMPLATE = Template(
    {
        "seq": Number(),
        "time": Moment(),
        "user": Name("u", 7),
        "added": Number(),
        "deleted": Number(),
        "score": Number(decimals=3),
    },
    key="user",
)


def events(
    count: int,
    keys: int,
    seed: int = 0,
    skew: float = 0.0,
    events_per_s: float = EVENTS_PER_S,
    start: datetime = START,
) -> Iterator[Events]:
    """Generate events in time order, `events_per_s` of them in a second of event time, in chunks.

    Equal arguments give equal bytes. A key is `u` and seven digits, or more where there are more keys.
    """
    for at_us, columns in _columns(count, keys, seed, skew, events_per_s, start):
        yield _TEMPLATE.render(at_us, columns)


def messages(
    count: int,
    keys: int,
    partitions: int,
    seed: int = 0,
    skew: float = 0.0,
    events_per_s: float = EVENTS_PER_S,
    start: datetime = START,
) -> Iterator[Batch]:
    """The same events packed: Arrow IPC messages of up to 1,000 events each, for `produce_batches`."""
    names = pa.array([f"u{user:07}" for user in range(keys)])
    for at_us, columns in _columns(count, keys, seed, skew, events_per_s, start):
        table = pa.record_batch(
            {
                "seq": pa.array(columns["seq"]),
                "time": pa.array(at_us, pa.timestamp("us", "UTC")),
                "user": names.take(pa.array(columns["user"])),
                "added": pa.array(columns["added"]),
                "deleted": pa.array(columns["deleted"]),
                "score": pa.array(columns["score"] / 1000),
            }
        )
        yield from packed(table, "user", at_us, partitions)


def fill(
    bootstrap_servers: str,
    topic: str,
    count: int,
    keys: int = 10_000,
    partitions: int = 2,
    seed: int = 0,
    skew: float = 0.0,
    events_per_s: float = EVENTS_PER_S,
    faults: Faults = NO_FAULTS,
    compression: Compression = "lz4",
    batch_bytes: int = BATCH_BYTES,
) -> Report:
    """Create the topic unless it is there, and send `count` events to it as fast as they can be made.

    Raises:
        ProduceError: the broker is not there, or did not acknowledge everything.
    """
    ensure_topic(bootstrap_servers, topic, partitions)
    arrivals = disturb(events(count, keys, seed, skew, events_per_s), faults)
    return produce(arrivals, bootstrap_servers, topic, compression=compression, batch_bytes=batch_bytes)


def stages(
    count: int, keys: int = 10_000, partitions: int = 2, faults: Faults = NO_FAULTS, compression: Compression = "lz4"
) -> dict[str, float]:
    """Seconds of CPU that each stage before Kafka takes for `count` events; the kernels are compiled before."""
    for arrivals in disturb(events(2 * CHUNK, keys), faults):
        list(encode(arrivals.events, [partitions], compression))
    spent = {"generate": 0.0, "disturb": 0.0, "encode": 0.0}
    made = _timed(events(count, keys), spent, "generate")
    for arrivals in _timed(disturb(made, faults), spent, "disturb"):
        start_s = time.process_time()
        for batch in encode(arrivals.events, [partitions], compression):
            batch.sign(0, 0, 0)
        spent["encode"] += time.process_time() - start_s
    return spent | {"disturb": spent["disturb"] - spent["generate"]}


def _columns(
    count: int, keys: int, seed: int, skew: float, events_per_s: float, start: datetime
) -> Iterator[tuple[Ints, dict[str, Ints]]]:
    what = np.random.default_rng([seed, 2])
    who = skewed(keys, skew)
    done = 0
    for at_us in Shape(start=start).times_us(count, events_per_s, seed):
        size = len(at_us)
        added = (what.standard_exponential(size) * 120).astype(np.int64)
        columns = {
            "seq": np.arange(done, done + size),
            "time": at_us,
            "user": who(size, what),
            "added": added,
            "deleted": np.where(added % 8 == 0, added // 2, 0),
            "score": (what.standard_normal(size) * 10_000).astype(np.int64),
        }
        done += size
        yield at_us, columns


def _timed(chunks: Iterable[T], spent: dict[str, float], name: str) -> Iterator[T]:
    source = iter(chunks)
    while True:
        start_s = time.process_time()
        part = next(source, None)
        spent[name] += time.process_time() - start_s
        if part is None:
            return
        yield part

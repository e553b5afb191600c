"""The streaming kernel in process: from the bytes of JSON records to emitted features, on one core.

Ten aggregates over three windows (1, 5 and 15 minutes, every minute), entities at random, 120 bytes of JSON.
"""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.record import Figure, machine, write
from streaming.partition import Partition
from streaming.plan import Aggregate, Column, Plan
from streaming.records import RecordBatch

BATCH = 20_000
BATCHES = 60
FUNCTIONS = (
    *(("amount", function) for function in ("count", "sum", "mean", "min", "max", "std", "last")),
    *(("quantity", function) for function in ("sum", "mean", "max")),
)
MINUTE_US = 60_000_000
START_MS = 1_700_000_000_000
EVENTS_PER_S, SPREAD_PER_S = 100_000, 2_500
EMIT_EVERY = 10
NOW_US = (START_MS + 86_400_000) * 1_000
RECORD = '{"user":"user-%07d","time":%d,"amount":%.2f,"quantity":%d,"country":"NL","device":"mobile","channel":"web"}'


def main() -> None:
    """Measures throughput, what more entities and more windows cost, and checkpoints of a million entities."""
    conditions = machine()
    three = plan((1, 5, 15))
    partition = Partition(three, 0)
    rate = _rate(partition, 10_000, emissions_count=True)
    spread = {"batches": 4 * BATCHES, "events_per_s": SPREAD_PER_S}
    small = _rate(Partition(three, 0), 1_000, **spread)
    large = Partition(three, 0)
    large_rate = _rate(large, 1_000_000, **spread)
    one_window = _rate(Partition(plan((20,)), 0), 10_000)
    twenty_windows = _rate(Partition(plan(tuple(range(1, 21))), 0), 10_000)
    keys = large.counters.keys
    Partition.restore(three, 0, partition.snapshot())  # loads the kernels
    started_s = time.perf_counter()
    snapshot = large.snapshot()
    taken_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    Partition.restore(three, 0, snapshot)
    restored_s = time.perf_counter() - started_s
    at = f"10 aggregates x 3 windows, 120-byte JSON; {conditions}"
    emitting = f"an emission every {EMIT_EVERY * BATCH:,} events; {at}"
    minutes = 4 * BATCHES * BATCH // SPREAD_PER_S // 60
    filled = f"{4 * BATCHES * BATCH:,} events over {minutes} minutes of event time, emissions not counted; {at}"
    million = f"{keys:,} entities, {len(snapshot) / 2**20:,.0f} MiB; {filled}"
    write(
        "kernel",
        [
            Figure("records to features, 10k entities", round(rate), "events/s", "higher", emitting, target=1_500_000),
            Figure(
                "cost of an event, 1M entities over 1k", round(small / large_rate, 2), "x", "lower", filled, target=1.2
            ),
            Figure(
                name="cost of an event, 20 windows sharing panes over 1",
                value=round(one_window / twenty_windows, 2),
                unit="x",
                better="lower",
                conditions=at,
                target=1.2,
            ),
            Figure("state of an entity and window", round(large.state_bytes / keys / 3), "bytes", "lower", million),
            Figure("snapshot of 1M entities in memory", round(taken_s, 2), "s", "lower", million, target=2.0),
            Figure("restore of 1M entities", round(restored_s, 2), "s", "lower", million, target=3.0),
        ],
    )


def plan(minutes: Sequence[int]) -> Plan:
    """The aggregates over windows of so many minutes, each sliding by one."""
    columns = (Column("amount", "double", nullable=True), Column("quantity", "bigint", nullable=True))
    aggregates = tuple(
        Aggregate(f"{function}_{column}_{length}m", column, function, length * MINUTE_US, MINUTE_US)
        for length in minutes
        for column, function in FUNCTIONS
    )
    return Plan("kernel", "", "", "user", "string", "time", columns, aggregates, delay_us=0)


def _rate(
    partition: Partition,
    entities: int,
    batches: int = BATCHES,
    events_per_s: int = EVENTS_PER_S,
    emissions_count: bool = False,
) -> float:
    """Events a second of CPU, over the last quarter of the batches; with or without what emissions take."""
    spent_s, events = 0.0, 0
    for number, batch in enumerate(_batches(entities, batches, events_per_s)):
        started_s = time.process_time()
        partition.process(batch, NOW_US)
        taken_s = time.process_time() - started_s
        if number % EMIT_EVERY == EMIT_EVERY - 1:
            partition.emit()
        if emissions_count:
            taken_s = time.process_time() - started_s
        if number >= 3 * batches // 4:
            spent_s += taken_s
            events += BATCH
    return events / spent_s


def _batches(entities: int, batches: int, events_per_s: int) -> Iterator[RecordBatch]:
    """Events of each entity in turn and then of any, so that none is new in the batches that are measured."""
    random = np.random.default_rng(0)
    for number in range(batches):
        amounts, quantities = random.lognormal(3, 1, BATCH).tolist(), random.integers(1, 10, BATCH).tolist()
        first = number * BATCH
        places = np.arange(first, first + BATCH)
        keys = np.where(places < entities, places, random.integers(0, entities, BATCH)).tolist()
        times = (START_MS + places * 1_000 // events_per_s).tolist()
        values = [(RECORD % row).encode() for row in zip(keys, times, amounts, quantities, strict=True)]
        yield RecordBatch.of_values(values, first)


if __name__ == "__main__":
    main()
